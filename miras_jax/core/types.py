"""The axis key, and the data that flows through a rule.

One letter per axis, in names (`keys_LK`) and in docstrings:

    B batch   H heads   L length   C chunk   K key   V value   D model   F hidden

Everything in `miras_jax.core` is written for one head of one sequence; `jax.vmap` adds
heads and batch.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Side = Literal["in", "out", "both"]
"""The axes of a matrix `[in, out]` along which a channel-wise rate varies."""

Weights = tuple[jax.Array, ...]
"""Matrices `[in, out]` of a memory, in the order in which they are applied."""


class Rates(NamedTuple):
    """What the outer network decides for every token. None: the rule's own default (1).

    Each is `[L]` (one number per token) or `[L, channels]` (channel-wise). A
    channel-wise rate acts on the memory's own inputs and outputs: on the key axis
    (rows) of its first matrix and on the value axis (columns) of its last; matrices in
    between take the mean over the channels. When first and last are the same matrix,
    `learn` acts where the algorithm says and `keep` where the retention gate says.
    `momentum` is always one per token.
    """

    learn: jax.Array | None = None  # eta_t >= 0, step size
    keep: jax.Array | None = None  # alpha_t in (0, 1], fraction kept
    momentum: jax.Array | None = None  # in [0, 1], fraction of the last step kept
    threshold: jax.Array | None = None  # delta_t > 0, of Huber; per token or [L, V]
    keep_value: jax.Array | None = None  # of Decay("both"), beside keep: [L] or [L, V]
    erase: jax.Array | None = None  # of EraseWrite, fraction erased: [L] or [L, K]


class Tokens(NamedTuple):
    """What a memory reads: L tokens, or a single one when the L axis is left out."""

    queries: jax.Array  # [L, K]
    keys: jax.Array  # [L, K]
    values: jax.Array  # [L, V]
    rates: Rates = Rates()
    erase_keys: jax.Array | None = None  # [L, K], of EraseWrite


class Documents(NamedTuple):
    """Where documents start in a sequence that holds several, and what is padding.

    At a start the memory is what it was before its first token, learned weights and
    all. Padding leaves no trace in it, on whichever side it is, and its outputs are 0.
    """

    starts: jax.Array  # [L] bool, True at the first token of each document
    real: jax.Array  # [L] bool, False for padding


class Params(NamedTuple):
    """What the outer loop learns of a memory: how it starts, LayerNorm, Lambda."""

    weights: Weights  # initial weights W_0 (logits for KL retention)
    norm_scale: jax.Array | None = None  # [V]
    norm_bias: jax.Array | None = None  # [V]
    ridge: jax.Array | None = None  # [K], of Newton: Lambda before its softplus


class Past(NamedTuple):
    """The last pairs, whose gradients the next steps take again (window > 1)."""

    keys: jax.Array  # [window - 1, K]
    values: jax.Array  # [window - 1, V]
    learn: jax.Array  # [window - 1, V], what multiplies their gradients
    threshold: jax.Array  # [window - 1, V]


class State(NamedTuple):
    """Only what the next token needs. Empty tuples where a rule needs nothing.

    dual      A_s, the state on which the retention gate is a linear recurrence
    anchor    A_c, the dual at the start of the current chunk (chunk_size > 1)
    kept      product of keep since then, per matrix, broadcastable to it (only where
              weights and dual differ)
    momentum  m_s, the running inner step
    stride    step sizes of the chunk so far, decayed and summed, per matrix (only where
              learn multiplies the step at the chunk's end)
    curvature H_s and Lambda (only of Newton, whose dual is G_s)
    past      the last pairs (only where a step learns from a window of them)
    position  tokens of the current chunk already read; a Python int where it is known
              while tracing, which lets `run` split the sequence without padding
    """

    dual: Weights
    anchor: Weights = ()
    kept: Weights = ()
    momentum: Weights = ()
    position: int | jax.Array = 0
    stride: Weights = ()
    past: Past | tuple[()] = ()
    curvature: Weights = ()


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Dtype of states and accumulators: float32, or float64 if an operand is."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))


class Choice:
    """Base of the frozen dataclasses that describe a rule: prints functions by name."""

    def __repr__(self) -> str:
        parts = (f"{f.name}={_describe(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(parts)})"


def _describe(value: Any) -> str:
    is_function = isinstance(value, Callable) and not isinstance(value, Choice)
    return getattr(value, "__qualname__", repr(value)) if is_function else repr(value)
