"""Attention in plain JAX: any dtype, any shape, a tile of queries at a time."""

import jax
import jax.numpy as jnp

QUERY_TILE = 128
"""Queries whose scores exist at once; changes the memory, never the result."""

LEAST_TILE = 64
"""The same for a window, whose tiles are as long as itself, but not shorter."""


def attention(queries, keys, values, segments, always, *, window):
    """As `api.attention`."""
    length, total = queries.shape[1], keys.shape[1]
    tile = min(length, QUERY_TILE if window is None else max(LEAST_TILE, window))
    padding = -length % tile
    # Keys in front of the first query. Those that a window does not reach are left out,
    # and where there are fewer than it reaches, there are rows that nothing sees.
    before = total - length
    missing = 0 if window is None else window - 1 - before
    rows = before + length + padding if window is None else window - 1 + tile

    def fit(x):
        widths = ((0, 0), (max(missing, 0), padding)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x[:, max(-missing, 0) :], widths)

    keys, values = fit(keys), fit(values)
    tiles = [_pad_and_cut(queries, padding, tile)]
    if segments is not None:
        tiles.append(_pad_and_cut(segments[:, before:], padding, tile))
        segments = fit(segments)
    # How many tokens ago each row was read; a window's rows move with the tile.
    age = jnp.arange(tile)[:, None] - jnp.arange(rows)[None] + before + missing

    def attend_tile(first, queries, own=None):
        start = 0 if window is None else first

        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1)

        ago = age + first - start
        seen = ago >= 0
        if window is not None:
            seen &= (ago < window) & (start + jnp.arange(rows)[None] >= missing)
        seen = seen[None]
        if own is not None:
            seen = seen & (own[:, :, None] == take(segments)[:, None, :])
        return attend(queries, take(keys), take(values), seen, always)

    if length == tile:
        return attend_tile(0, *(x[0] for x in tiles))
    firsts = jnp.arange(len(tiles[0])) * tile

    @jax.checkpoint
    def body(_, inputs):
        return (), attend_tile(*inputs)

    _, outputs = jax.lax.scan(body, (), (firsts, *tiles))
    outputs = jnp.moveaxis(outputs, 0, 1)
    return outputs.reshape(len(queries), -1, *outputs.shape[3:])[:, :length]


def _pad_and_cut(x, padding, tile):
    """`[B, L, ...]` as `[tiles, B, tile, ...]`."""
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(len(x), -1, tile, *x.shape[2:]), 1, 0)


def attend(queries, keys, values, seen, always=None) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over what is seen, `[B or 1, L, S]`.

    queries `[B, L, H, K]`, keys and values `[B, S, G, .]`, always two arrays
    `[N, G, .]`; what they are, `api.attention` tells. Scores and their softmax are in
    float32 or more. Queries that see nothing get the mean.
    """
    batch, length, heads, channels = queries.shape
    if always is not None:
        keys, values = (
            jnp.concatenate([jnp.repeat(a[None].astype(x.dtype), batch, 0), x], axis=1)
            for a, x in zip(always, (keys, values), strict=True)
        )
        known = jnp.ones((*seen.shape[:2], len(always[0])), bool)
        seen = jnp.concatenate([known, seen], axis=2)
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    # Numbers of 16 bits are multiplied as they are: rounded, and in float32, as XLA:CPU
    # lacks some of the other products.
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None

    def product(form, x, y):
        return jnp.einsum(form, x.astype(dtype), y.astype(dtype), precision=precision)

    grouped = queries.reshape(batch, length, keys.shape[2], -1, channels)
    scores = product("blghk,bsgk->bghls", grouped, keys) * channels**-0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(dtype).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    y = product("bghls,bsgv->blghv", weights, values)
    return y.reshape(batch, length, heads, -1).astype(values.dtype)
