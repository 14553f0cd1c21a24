"""Softmax attention as a memory: the tokens themselves, kept (Miras, section 4).

    y_t = sum_s softmax_s(q_t^T k_s / sqrt(K)) v_s

the Nadaraya-Watson solution of the L2 loss: the value that has the least error on all
pairs seen, weighted by how near their keys are to the query. Nothing is learned and
nothing decays; a window forgets what is older than its last tokens.

The state's dual are the keys `[S, K]` and values `[S, V]`, oldest first, and its `kept`
`[S, 1]` is 1 for rows that hold a token. A window has as many rows as it sees tokens;
without one there is a row for every token.
"""

import jax
import jax.numpy as jnp

from miras_jax.core.types import Params, State, Tokens, state_dtype
from pallas_kernels.attention import attention


def start(window: int | None, params: Params) -> State:
    """Before the first token: rows for `params.weights`, of which there are none yet.

    The rows of a window are there from the start, empty ones first.
    """
    dtype = state_dtype(*params.weights)
    rows = tuple(w.astype(dtype) for w in params.weights)
    state = State(rows, kept=(jnp.ones((len(rows[0]), 1), dtype),))
    return state if window is None else with_rows(state, window)


def with_rows(state: State, rows: int) -> State:
    """The state with so many rows: the last ones, or empty ones before its own."""
    missing = rows - len(state.dual[0])

    def fit(x):
        return jnp.pad(x, ((missing, 0), (0, 0))) if missing > 0 else x[-missing:]

    return jax.tree.map(fit, state._replace(position=()))._replace(
        position=state.position
    )


def step(window: int | None, state: State, token: Tokens):
    """One token, the definition: keep it, then read: `(output [V], state)`."""
    state = _append(window, state, jax.tree.map(lambda x: x[None], token[:3]))
    keys, values = state.dual
    scores = keys @ token.queries.astype(keys.dtype) / keys.shape[1] ** 0.5
    scores = jnp.where(state.kept[0][:, 0] > 0, scores, -jnp.inf)
    return jax.nn.softmax(scores) @ values, state


def run(window: int | None, state: State, tokens: Tokens, implementation: str | None):
    """Many tokens at once: `(outputs [L, V], state)`.

    implementation: of `pallas_kernels.attention`.
    """
    before = len(state.dual[0])  # of a window: its size
    everything = _append(None, state, tokens[:3])
    (filled,) = everything.kept
    outputs = attention(
        tokens.queries[None, :, None],
        *(x.astype(tokens.keys.dtype)[None, :, None] for x in everything.dual),
        segments=filled.T.astype(jnp.int32) if before else None,
        window=window,
        implementation=implementation,
    )
    state = everything if window is None else with_rows(everything, window)
    return outputs[0, :, 0], state


def _append(window, state, tokens):
    """The state with tokens (queries, keys, values) `[n, ...]` in rows of their own."""
    _, keys, values = tokens
    ones = jnp.ones((len(keys), 1))
    old = (*state.dual, *state.kept)
    pairs = zip(old, (keys, values, ones), strict=True)
    rows = [jnp.concatenate([x, y.astype(x.dtype)]) for x, y in pairs]
    state = state._replace(dual=tuple(rows[:2]), kept=(rows[2],))
    return state if window is None else with_rows(state, window)
