"""Speed and memory of one memory layer, beside its definition, a GRU and an LSTM.

    python -m experiments.bench.layer [--lengths 1024] [--batches 1] [--chunks 64]
        [--variants yaad,moneta,memora,titans,gated_delta_net | all]
        [--repeats 5] [--no memory,recurrent] [--json rows.json]

    python -m experiments.bench.layer --variants all --no recurrent,memory \\
        > experiments/results/bench/variants.txt

Prints one table, all of it measured in this one run, cases of one scope, batch and
length in turns with each other: 4 heads of 64 (width 256), float32, tokens per second
forward and forward+backward, the ratio of backward to forward time, memory, and the
share of the machine's own matrix-product rate; then a summary.

scope       "layer": the nnx mixer with its projections, without cache; a GRU or LSTM of
            width 256 with its input projection (one product over the whole sequence).
            "memory": `miras.run` alone, vmapped over heads and batch, at the rates that
            the untrained layer makes; of a GRU or LSTM the scan alone.
fwd+bwd     gradients with respect to all inputs, rates and parameters of a random
            linear function of the outputs, in one program with the forward pass.
definition  Yaad token by token. It is slow, and its backward pass stores weights of
            every token: it runs at few tokens and is compared per token.
products    the matrix products of Yaad's memory with nothing between them: what the
            compiler reaches in these shapes, a mark for all memories of them.
chunk       of rules with chunk_size 1 the engine's tile: it changes the speed alone.
layer       of rules without chunks that of their own paper (`miras_jax.nn.recipes`).
NAME_exact  a rule with the exact readout, where that is another function (but not of
            Muon, which would iterate for every token, 64 times as often).
MB          results and temporaries in XLA's own plan of the program, not its inputs. It
            agrees with the growth of the process while the program runs (57 against 69,
            571 against 556, 111 against 104 MB where compared); the peak of the whole
            process would count the compiler too.
share       useful matrix FLOPs / time / rate of a 1,024-cubed float32 product, timed in
            turns with it. Useful per token and head, with matrices [i, o]
            of a memory, P = sum of i o, P' without the first matrix, C tokens a chunk:
                write: forward 2P, errors pulled back to each product's output 2P'
                update 2P, read 2P
                own chunk's corrections, causal pairs only: (C + 1) sum(i + o)
                delta rule's triangular system, C the tile: (C - 1) sum(i + o)
            (Hebbian rules on a matrix neither predict nor pull back; of rules that
            solve, orthogonalise or look up, no share is given), and per token 2 i o of
            each projection of the layer. A backward pass counts as twice the forward
            one; recomputation is not useful. XLA's own count (`cost_analysis`) is no
            help: it takes the body of a scan once.
x family    in the summary: time of forward+backward over that of Gated DeltaNet (rules
            with chunk_size 1), of the same rule with the linear readout (NAME_exact),
            or of Yaad at the same chunk.

Nearly all of the time is compilation.
"""

import argparse
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import miras_jax as miras
from experiments.bench import products, recurrent, report
from experiments.bench.timing import compile_program, median_seconds
from miras_jax import algorithm, memory, variants
from miras_jax.core.bias import DotProduct
from miras_jax.core.engine import LINEAR_TILE
from miras_jax.errors import UserError
from miras_jax.nn import recipes
from miras_jax.nn.documents import locate
from miras_jax.nn.layers import Projection
from miras_jax.nn.miras import Miras, read_memories

# Softmax attention has a layer of its own.
RULES = {
    rule.__name__: rule()
    for rule in variants.ALL
    if not isinstance(rule().memory, memory.Cache)
}
RULES |= {
    f"{name}_exact": replace(rule, readout="exact")
    for name, rule in RULES.items()
    if rule.chunk_size > 1
    and replace(rule, readout="exact").reads_exactly
    and not rule.algorithm.settles
}
VARIANTS = ("yaad", "moneta", "memora", "titans", "gated_delta_net")
COUNTED = (algorithm.GradientDescent, algorithm.Momentum, algorithm.Implicit)
PARTS = ("layer", "memory", "definition", "products", "recurrent")
DEFINITION_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """What one row of the table measures."""

    scope: str  # "layer" or "memory"
    variant: str  # a name in RULES, "gru" or "lstm"
    form: str  # "chunked", "definition", "products" or "recurrent"
    chunk: int | None
    batch: int
    length: int
    width: int = 256
    heads: int = 4

    @property
    def family(self) -> str | None:
        """The variant that this one is compared with."""
        if self.form != "chunked":
            return None
        if self.variant.endswith("_exact"):
            return self.variant.removesuffix("_exact")
        return "gated_delta_net" if RULES[self.variant].chunk_size == 1 else "yaad"

    @property
    def mixer(self) -> Miras:
        """The variant's layer: its paper's own, where rates make the model."""
        rule = RULES[self.variant]
        if rule.chunk_size > 1:
            return Miras(replace(rule, chunk_size=self.chunk), self.heads)
        recipe = getattr(recipes, self.variant, None)
        if recipe is None:
            return Miras(rule, self.heads)
        sizes = {"num_heads": self.heads, "width": self.width, "expand": 1}
        sizes["key_dim"] = 16 if self.variant == "mamba" else self.width // self.heads
        known = inspect.signature(recipe).parameters
        return recipe(**{name: size for name, size in sizes.items() if name in known})


class Computation(NamedTuple):
    function: Callable[[Any], jax.Array]
    inputs: Any  # all of them differentiable
    flops: float | None  # useful, of one forward pass; None: not counted


def list_cases(
    lengths: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[int],
    names: Sequence[str],
    without: Sequence[str] = (),
) -> list[Case]:
    """Every case that is asked for, scope by scope."""
    cases = []
    for scope in (s for s in ("layer", "memory") if s not in without):
        for batch in batches:
            for length in lengths:
                for name in names:
                    exact = RULES[name].chunk_size == 1
                    for chunk in (LINEAR_TILE,) if exact else chunks:
                        cases.append(Case(scope, name, "chunked", chunk, batch, length))
                for cell in () if "recurrent" in without else recurrent.GATES:
                    cases.append(Case(scope, cell, "recurrent", None, batch, length))
            if scope == "memory" and "yaad" in names and "definition" not in without:
                few = min(DEFINITION_TOKENS, *lengths)
                slow = Case(scope, "yaad", "definition", max(chunks), batch, few)
                cases.append(slow)
            if scope == "memory" and "yaad" in names and "products" not in without:
                cases += [
                    Case(scope, "yaad", "products", chunk, batch, length)
                    for length in lengths
                    for chunk in chunks
                    if length % chunk == 0
                ]
    return cases


def memory_flops(rule: miras.Rule, chunk: int | None, channels: int) -> int | None:
    """Useful matrix FLOPs per token and head, by the formula in the module docstring.

    chunk None: token by token, without corrections. None where the formula does not
    tell what the rule does.
    """
    if not isinstance(rule.algorithm, COUNTED):
        return None
    shapes = rule.memory.shapes(channels, channels)
    products = sum(i * o for i, o in shapes)
    pulled = sum(i * o for i, o in shapes[1:])
    hebbian = rule.memory.is_linear and rule.bias == DotProduct()
    flops = 2 * ((2 if hebbian else 3) * products + pulled)
    if chunk is not None:
        solves = rule.memory.is_linear and not hebbian
        pairs = 2 * chunk if solves else chunk + 1
        flops += pairs * sum(i + o for i, o in shapes)
    return flops * rule.algorithm.steps


def build(case: Case) -> Computation:
    """The function that a case measures, its inputs, and its useful FLOPs."""
    x_key, key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (case.batch, case.length, case.width))
    tokens = case.batch * case.length
    if case.form == "recurrent":
        return _build_recurrent(case, key, x, tokens)

    config = case.mixer
    rule = config.rule
    mixer = config.build(case.width, 1.0, nnx.Rngs(0))
    chunk = None if case.form == "definition" else case.chunk
    is_square = config.key_dim is None and config.value_dim is None
    flops = memory_flops(rule, chunk, case.width // case.heads) if is_square else None
    flops = flops and case.heads * flops
    if case.scope == "layer":
        graph, params = nnx.split(mixer)
        modules = (module for _, module in nnx.iter_modules(mixer))
        projections = [m for m in modules if isinstance(m, Projection)]
        flops = flops and flops + sum(2 * m.weight.size for m in projections)
        return Computation(
            lambda inputs: nnx.merge(graph, inputs[0])(inputs[1])[0],
            (params, x),
            flops and tokens * flops,
        )

    start = mixer.start(case.batch, case.length, x.dtype)
    places = locate(x.shape[:2], start.last, None)
    read_tokens, _ = mixer.tokens(x, start.convolution, places)

    def read(inputs):
        params, tokens = inputs
        if case.form == "chunked":
            return read_memories(rule, params, None, tokens, None)[0]

        def by_products(params, tokens):
            queries, keys = tokens.queries, tokens.keys
            return products.read(params.weights, queries, keys, chunk)

        def by_definition(params, tokens):
            state = rule.start(params)
            return miras.run(rule, params, state, tokens, implementation="definition")

        by_head = by_products if case.form == "products" else by_definition
        over_batch = jax.vmap(jax.vmap(by_head), (None, 0))
        return over_batch(params, tokens)[0]

    inputs = (mixer.memory_params, read_tokens)
    return Computation(read, inputs, flops and tokens * flops)


def _build_recurrent(case: Case, key, x, tokens) -> Computation:
    params = recurrent.init(key, case.variant, case.width)
    flops = 2 * params.hidden.size
    if case.scope == "memory":
        return Computation(
            lambda inputs: recurrent.scan_tokens(case.variant, *inputs),
            (params, recurrent.project(params, x)),
            tokens * flops,
        )

    def read(inputs):
        params, x = inputs
        projected = recurrent.project(params, x)
        return recurrent.scan_tokens(case.variant, params, projected)

    return Computation(read, (params, x), tokens * (flops + 2 * params.input.size))


def differentiated(function: Callable) -> Callable:
    """(inputs, weights) -> sum(weights * outputs) and its gradient in the inputs."""

    def functional(inputs, weights):
        return jnp.sum(weights * function(inputs))

    return jax.value_and_grad(functional)


def measure(cases: Sequence[Case], repeats: int) -> list[dict]:
    """One row per case, with the rate of the matrix product in FLOP/s.

    Cases of one scope, batch and length are timed in turns, and their programs let go
    of before the next: Linux allows a process 65,530 memory maps, of which a program
    takes hundreds.
    """
    rows = []

    def shape(case):
        return case.scope, case.batch, case.length

    for _, group in itertools.groupby(sorted(cases, key=shape, reverse=True), shape):
        rows += _measure_together([*group], repeats)
        print(f"measured {len(rows)} of {len(cases)}", file=sys.stderr)
        jax.clear_caches()
    order = {case: place for place, case in enumerate(cases)}
    fields = Case.__dataclass_fields__
    return sorted(rows, key=lambda row: order[Case(**{f: row[f] for f in fields})])


def _measure_together(cases: Sequence[Case], repeats: int) -> list[dict]:
    programs, flops = [], []
    for case in cases:
        print(f"compiling {case}", file=sys.stderr)
        function, inputs, useful = build(case)
        forward = compile_program(function, inputs)
        shape = jax.eval_shape(function, inputs).shape
        weights = jax.random.normal(jax.random.key(1), shape)
        programs += [
            forward,
            compile_program(differentiated(function), inputs, weights),
        ]
        flops.append(useful)
    times, rate = median_seconds(programs, repeats)
    rows = []
    for i, (case, useful) in enumerate(zip(cases, flops, strict=True)):
        forward, both = times[2 * i : 2 * i + 2]
        tokens = case.batch * case.length
        rows.append(
            asdict(case)
            | {
                "family": case.family,
                "forward_tokens_per_s": tokens / forward,
                "both_tokens_per_s": tokens / both,
                "backward_over_forward": (both - forward) / forward,
                "forward_mb": programs[2 * i].megabytes,
                "both_mb": programs[2 * i + 1].megabytes,
                "forward_share": useful and useful / forward / rate,
                "both_share": useful and 3 * useful / both / rate,
                "matmul_flops_per_s": rate,
            }
        )
    return rows


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{option} takes whole numbers >= 1 and commas; got {text!r}.")
    return numbers


def _names(text: str, option: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} is unknown; choose from {[*known]}.")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.layer")
    parser.add_argument("--lengths", default="1024")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--chunks", default="64")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="or all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no", default="", help=f"leave out any of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="also save the rows here")
    options = parser.parse_args(arguments)
    names = _names(options.variants, "--variants", [*RULES, "all"])
    names = [*RULES] if "all" in names else names
    cases = list_cases(
        _numbers(options.lengths, "--lengths"),
        _numbers(options.batches, "--batches"),
        _numbers(options.chunks, "--chunks"),
        names,
        _names(options.no, "--no", PARTS),
    )
    rows = measure(cases, options.repeats)
    rates = sorted(row["matmul_flops_per_s"] / 1e9 for row in rows)
    kind = jax.devices()[0].device_kind
    device = f"{kind}, {os.cpu_count()} cores, jax {jax.__version__}"
    flags = os.environ.get("XLA_FLAGS", "")  # they can change the times severalfold
    print(f"\n{device} {flags}")
    print(
        "1,024-cubed float32 product, timed with each scope, batch and length: "
        f"{rates[0]:.1f} to {rates[-1]:.1f} GFLOP/s\n"
    )
    print(report.table(rows))
    print("\n" + report.summary(rows))
    if options.json is not None:
        saved = {
            "device": device,
            "xla_flags": flags,
            "rows": rows,
        }
        options.json.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
