"""The matrix products of a deep memory with nothing between them.

No decay, activation, norm, bias or rate: what the compiler makes of the products alone,
in the shapes that a chunk gives them, is the mark for any rule with such a memory.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

SMALL = 1e-3
"""Step size: enough to make the updates matter, too little to make them grow."""


def read(
    weights: Sequence[jax.Array], queries: jax.Array, keys: jax.Array, chunk: int
) -> jax.Array:
    """One head in the dual form of `miras_jax.core.block`: `[L, K]` -> `[L, V]`.

    Written are the keys themselves, as values.
    """

    def advance(weights, tokens):
        queries, keys = tokens
        inputs = [keys]
        for w in weights:
            inputs.append(inputs[-1] @ w)
        errors = [inputs.pop() - keys]
        for w in reversed(weights[1:]):
            errors.append(errors[-1] @ w.T)
        steps = [*zip(inputs, errors[::-1], strict=True)]
        x = queries
        for w, (a, d) in zip(weights, steps, strict=True):
            x = x @ w - SMALL * ((x @ a.T) @ d)
        pairs = zip(weights, steps, strict=True)
        return [w - SMALL * (a.T @ d) for w, (a, d) in pairs], x

    def chunks(x):
        return x.reshape(-1, chunk, x.shape[-1])

    _, outputs = jax.lax.scan(advance, list(weights), (chunks(queries), chunks(keys)))
    return jnp.reshape(outputs, (len(queries), -1))
