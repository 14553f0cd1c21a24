"""Every named rule under inputs that break things: finite outputs and gradients?

    python -m experiments.studies.stability               # every rule
    python -m experiments.studies.stability moneta titans # some of them

One head of dimension 32, at rates between those that an untrained layer starts from:
bf16 activations, 65,536 tokens, and at 1,024 tokens all zeros, one token again and
again, values scaled by 1e4, and two keys in turn with ever new values. A cell gives the
largest output and the largest gradient (of a random projection of all outputs by
parameters, queries, keys, values and rates), or what is not finite. Every cell is kept
in runs/stability/rows.jsonl. A rule takes about a quarter of a minute to compile, and
the long row its own time.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import miras_jax as miras
from experiments.compare import command
from experiments.studies.rows import Rows, report
from experiments.untrained import rates
from miras_jax import variants

RESULTS = Path(__file__).parents[1] / "results" / "stability"
DIM, LENGTH, LONG = 32, 1024, 65_536
CASES = {
    "bf16": "bfloat16",
    "long": "65,536 tokens",
    "zeros": "zeros",
    "constant": "one token again and again",
    "large": "values × 1e4",
    "repeated": "two keys in turn",
}


def tokens(rule: miras.Rule, case: str, length: int) -> miras.Tokens:
    """What the case feeds to one head."""
    rng = np.random.default_rng(0)
    steps = rule.algorithm.steps
    pairs = (length,) if steps == 1 else (length, steps)

    def unit(*shape):
        x = rng.normal(size=(*shape, DIM))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    queries, keys, erase_keys = unit(length), unit(*pairs), unit(length)
    values = rng.normal(size=(*pairs, DIM)) / DIM**0.5
    match case:
        case "zeros":
            queries, keys, values = (0 * x for x in (queries, keys, values))
            erase_keys = 0 * erase_keys
        case "constant":
            queries, keys, values, erase_keys = (
                np.broadcast_to(x[:1], x.shape)
                for x in (queries, keys, values, erase_keys)
            )
        case "large":
            values = 1e4 * values
        case "repeated":
            queries, keys, erase_keys = (
                x[np.arange(length) % 2] for x in (queries, keys, erase_keys)
            )
    dtype = jnp.bfloat16 if case == "bf16" else jnp.float32
    queries, keys, values, erase_keys = (
        jnp.asarray(x, dtype) for x in (queries, keys, values, erase_keys)
    )
    read = miras.Tokens(queries, keys, values, rates(rule, length))
    return read._replace(erase_keys=erase_keys) if rule.algorithm.erases else read


def measure(rule: miras.Rule, case: str, length: int) -> dict:
    """Largest output and gradient, None where they are not finite."""
    params = rule.init(jax.random.key(0), DIM, DIM)

    @jax.jit
    def both(params, read):
        direction = jax.random.normal(jax.random.key(1), (length, DIM))

        def projected(params, read):
            outputs, _ = miras.run(rule, params, rule.start(params), read)
            return jnp.mean(outputs * direction), outputs

        gradient, outputs = jax.grad(projected, (0, 1), has_aux=True)(params, read)
        return outputs, gradient

    outputs, gradient = both(params, tokens(rule, case, length))

    def largest(tree):
        values = [np.abs(np.float64(x)) for x in jax.tree.leaves(tree) if x.size]
        return max((float(v.max()) for v in values), default=0.0)

    found = {"output": largest(outputs), "gradient": largest(gradient)}
    return {name: x if math.isfinite(x) else None for name, x in found.items()}


def cell(found: dict) -> str:
    bad = [f"{name} not finite" for name, x in found.items() if x is None]
    return ", ".join(bad) or f"{found['output']:.2g}, {found['gradient']:.2g}"


def main() -> None:
    names = {make.__name__: make for make in variants.ALL}
    parser = command(__doc__, names, folder="runs/stability", results=RESULTS)
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N")
    parser.add_argument("--long", type=int, default=LONG, metavar="N")
    arguments = parser.parse_args()
    kept = Rows(arguments.folder / "rows.jsonl")
    lines = []
    for name in arguments.names or names:
        rule, line = names[name](), {"rule": name}
        for case, about in CASES.items():
            length = arguments.long if case == "long" else arguments.length
            found = kept.measure(
                f"{name} {case}",
                f"{rule} at {length}",
                lambda rule=rule, case=case, length=length: measure(rule, case, length),
            )
            line[about] = cell(found)
            print(f"{name} {case}: {line[about]}", flush=True)
        lines.append(line)
        jax.clear_caches()
    print("\nlargest output, largest gradient")
    report(lines, arguments)


if __name__ == "__main__":
    main()
