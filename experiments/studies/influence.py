"""How far back a memory's outputs depend on what was written, by what it forgets.

    python -m experiments.studies.influence

An untrained Yaad memory of 32 channels, at the middle of the rates that a layer starts
from but for what it forgets per token, reads 1,024 tokens whose keys, queries and
values are alike, as those of a text are (half of each is common to a sequence). The
last 64 outputs, randomly projected, are differentiated by the values of each stretch of
64 tokens: the table has the root mean square of the stretch where it is largest, over
16 sequences, and how many tokens that stretch lies back. Where it is much larger than
in a memory that forgets nothing, small differences grow while it reads. One minute on
two cores.
"""

import dataclasses

import jax
import jax.numpy as jnp

import miras_jax as miras
from experiments.compare import table
from experiments.untrained import rates
from miras_jax import variants

DIM, LENGTH, STRETCH, SEQUENCES = 32, 1024, 64, 16
FORGOTTEN, CHUNKS = (0.01, 0.003, 0.001, 0.0001, 0.0), (4, 16, 64)


def alike(key: jax.Array, length: int, sequences: int) -> jax.Array:
    """`[sequences, length, DIM]` rows of norm one, half of it common to a sequence."""
    own, common = jax.random.split(key)
    x = jax.random.normal(own, (sequences, length, DIM))
    x = x + jax.random.normal(common, (sequences, 1, DIM))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def influence(
    rule: miras.Rule, forgotten: float, length: int = LENGTH, sequences: int = SEQUENCES
) -> list[float]:
    """Of the values of each stretch on the last outputs, the nearest stretch first."""
    draws = jax.random.split(jax.random.key(0), 5)
    params = rule.init(draws[0], DIM, DIM)
    queries, keys, values = (alike(key, length, sequences) for key in draws[1:4])
    weights = jax.random.normal(draws[4], (sequences, STRETCH, DIM))
    given = rates(rule, length)._replace(keep=jnp.full(length, 1 - forgotten))

    def late(values, queries, keys, weights):
        tokens = miras.Tokens(queries, keys, values, given)
        outputs, _ = miras.run(rule, params, rule.start(params), tokens)
        return jnp.sum(outputs[-STRETCH:] * weights)

    gradient = jax.jit(jax.vmap(jax.grad(late)))(values, queries, keys, weights)
    stretches = gradient.reshape(sequences, -1, STRETCH * DIM)
    return jnp.sqrt(jnp.mean(stretches**2, axis=(0, 2)))[::-1].tolist()


def main() -> None:
    rows = []
    for forgotten in FORGOTTEN:
        row = {"forgotten per token": f"{forgotten:g}"}
        for chunk in CHUNKS:
            rule = dataclasses.replace(variants.yaad(), chunk_size=chunk)
            of = influence(rule, forgotten)
            largest = max(range(len(of)), key=of.__getitem__)
            row[f"chunks of {chunk}"] = f"{of[largest]:.2g}, {largest * STRETCH} back"
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
