"""TPU: the splash attention of JAX, which skips blocks that nothing sees."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
"""Of a TPU's registers: the smallest block of a kernel."""


def objection(queries, keys, values, segments, always, *, window) -> str | None:
    """What of a call the kernels cannot run, if anything."""
    if queries.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 or float32, not {queries.dtype}."
    if always is not None:
        return "splash attention has no keys that all tokens see, whatever the segment."
    if queries.shape[1] < LANES:
        return (
            f"{queries.shape[1]} tokens are less than the smallest block of splash "
            f"attention, {LANES}."
        )
    return None


def attention(queries, keys, values, segments, *, window, interpret):
    """Queries `[B, G, R, L, K]`, keys and values `[B, G, S, .]` -> `[B, G, R, L, V]`.

    R heads of queries read the keys of one group; segments `[B, S]` or None.
    """
    *lead, length, channels = queries.shape
    before = keys.shape[2] - length
    block = _block(length, window)
    # Every query has its own key, and sees it, also those that are padding: a row that
    # saw nothing would put NaN into the gradients of the others.
    padding = -length % block
    own = -(-(before + length + padding) // block) * block - keys.shape[2]
    # The kernels multiply without the scale.
    queries = queries * jnp.asarray(channels**-0.5, queries.dtype)
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, padding), (0, 0)))
    keys, values = (
        jnp.pad(x, ((0, 0),) * 2 + ((0, own), (0, 0))) for x in (keys, values)
    )
    ids = None
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, own)))
        of_queries = segments[:, before : before + length + padding]
        ids = splash.SegmentIds(of_queries, segments)
    queries = queries.reshape(lead[0], -1, *queries.shape[3:])
    y = _attend(before, window, block, interpret, queries, keys, values, ids)
    return y.reshape(*lead, *y.shape[2:])[..., :length, :]


def _block(length: int, window: int | None) -> int:
    """Tokens per block. Small ones leave matrix units idle, large ones waste a window.

    Bundles per token that libtpu schedules for v5e, forward and backward at 64 channels
    and 4096 tokens, in blocks of 128, 256, 512 and 1024: 192, 94, 56, 51; with a window
    of 256 tokens: 34, 22, 23, 35.
    """
    widest = 512 if window is None or window > 256 else 256
    return min(widest, max(LANES, 1 << (length - 1).bit_length()))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(before, window, block, interpret, queries, keys, values, ids):
    """Queries `[B, H, L, K]`, keys and values `[B, G, S, .]`; whole blocks."""
    return _forward(before, window, block, interpret, queries, keys, values, ids)[0]


def _forward(before, window, block, interpret, queries, keys, values, ids):
    shape = (queries.shape[2], keys.shape[2])
    if window is None:
        mask = splash.CausalMask(shape, before)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), before)
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dq", "block_kv_dq")
        + ("block_q_dkv", "block_kv_dkv"),
        block,
    )

    def read(queries, keys, values):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * queries.shape[1]),
            block_sizes=splash.BlockSizes(**sizes),
            interpret=interpret,
        )
        if ids is None:
            return jax.vmap(kernel)(queries, keys, values)
        return jax.vmap(kernel)(queries, keys, values, ids)

    with _precision(queries):
        return jax.vjp(read, queries, keys, values)


def _backward(before, window, block, interpret, pull, d):
    with _precision(d):
        return *pull(d), None


_attend.defvjp(_forward, _backward)


def _precision(x):
    """float32 is multiplied as float32; the kernels leave it to the context."""
    is_float32 = x.dtype == jnp.float32
    return jax.default_matmul_precision("highest" if is_float32 else "default")
