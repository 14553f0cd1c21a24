"""GRU and LSTM, token by token: what a memory layer is compared with.

The input projection is one matrix product over the whole sequence; the scan only holds
what depends on the last token's output. Batch `[B, L, D]`, hidden size D.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Cell = Literal["gru", "lstm"]
GATES = {"gru": 3, "lstm": 4}


class RecurrentParams(NamedTuple):
    input: jax.Array  # [D, gates D]
    input_bias: jax.Array  # [gates D]
    hidden: jax.Array  # [D, gates D]
    hidden_bias: jax.Array  # [gates D]


def init(key: jax.Array, cell: Cell, width: int) -> RecurrentParams:
    """Normal matrices of variance 1 / width; biases of the same size, to be seen."""
    shapes = ((width, GATES[cell] * width), (GATES[cell] * width,)) * 2
    return RecurrentParams(
        *(
            jax.random.normal(k, shape) / width**0.5
            for k, shape in zip(jax.random.split(key, 4), shapes, strict=True)
        )
    )


def project(params: RecurrentParams, x: jax.Array) -> jax.Array:
    """The input's part of all gates: `[B, L, D]` -> `[B, L, gates D]`."""
    return x @ params.input + params.input_bias[None, None]


def scan_tokens(cell: Cell, params: RecurrentParams, projected: jax.Array) -> jax.Array:
    """Outputs `[B, L, D]` from zero state.

    GRU: h = (1 - z) n + z h, n = tanh(x_n + r (h U_n + b_n)), that is arXiv 1406.1078
    with the reset gate after the product, as in cuDNN. Order of the gates: r, z, n.
    LSTM: c = f c + i g, h = o tanh(c). Order of the gates: i, f, g, o.
    """
    batch, _, gates_width = projected.shape
    width = gates_width // GATES[cell]

    def gru(h, x):
        own = h @ params.hidden + params.hidden_bias[None]
        x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(own, 3, axis=-1)
        reset, update = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        h = (1 - update) * jnp.tanh(x_n + reset * h_n) + update * h
        return h, h

    def lstm(carry, x):
        h, c = carry
        gates = x + h @ params.hidden + params.hidden_bias[None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((batch, width), projected.dtype)
    body, start = (gru, zero) if cell == "gru" else (lstm, (zero, zero))
    _, outputs = jax.lax.scan(body, start, jnp.moveaxis(projected, 1, 0))
    return jnp.moveaxis(outputs, 0, 1)
