"""GPU: cuDNN, and JAX's Triton kernel for what cuDNN does not take."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as triton

BLOCK = 128
"""Tokens of which the Triton kernel takes a multiple."""


def objection(queries, keys, values, segments, always, *, window) -> str | None:
    """What of a call the kernels cannot run, if anything."""
    if queries.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernels multiply in 16 bits, and queries are {queries.dtype}."
    if always is not None:
        return "its kernels have no keys that all tokens see, whatever the segment."
    if keys.shape[1] != queries.shape[1]:
        return "its kernels read tokens from the start on, without older keys."
    if keys.shape[3] != values.shape[3]:
        return "its kernels take values of as many channels as keys."
    refusal = _cudnn_objection(queries, keys, values, segments, window)
    if refusal is None:
        return None
    if window is not None:
        return f"{refusal} JAX's Triton kernel has no window."
    if queries.shape[3] > 128:
        return f"{refusal} JAX's Triton kernel is for 128 channels at most."
    return None


def attention(queries, keys, values, segments, *, window, interpret):
    """Queries `[B, G, R, L, K]`, keys and values `[B, G, L, K]` -> like queries.

    R heads of queries read the keys of one group; segments `[B, L]` or None.
    """
    batch, groups, copies, length, channels = queries.shape
    queries = queries.reshape(batch, -1, length, channels)
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    if _cudnn_objection(queries, keys, values, segments, window) is None:
        y = _cudnn(queries, keys, values, window)
    else:
        padding = -length % BLOCK
        if segments is not None:
            segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padding)))
        queries, keys, values = (
            jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
            for x in (
                queries,
                jnp.repeat(keys, copies, 2),
                jnp.repeat(values, copies, 2),
            )
        )
        scale = channels**-0.5
        y = triton.mha(
            queries, keys, values, segments, scale, True, interpret=interpret
        )
        y = y[:, :length]
    return jnp.swapaxes(y, 1, 2).reshape(batch, groups, copies, length, channels)


def _cudnn(queries, keys, values, window):
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _cudnn_objection(queries, keys, values, segments, window) -> str | None:
    """What it says itself, of channels, the library's version or that there is none."""
    if segments is not None:
        return "cuDNN is asked for tokens without segments only."
    try:
        jax.eval_shape(lambda *x: _cudnn(*x, window), queries, keys, values)
    except (NotImplementedError, RuntimeError) as error:
        return f"cuDNN does not take this call ({error})."
    return None
