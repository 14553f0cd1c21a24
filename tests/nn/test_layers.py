"""The layers against NumPy: what each computes, and what it starts from."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import variants
from miras_jax.nn.attention import Attention
from miras_jax.nn.layers import (
    CausalConvolution,
    Projection,
    RMSNorm,
    SwiGLU,
    l2_normalise,
    rms_norm,
    rotate,
)
from miras_jax.nn.miras import Miras
from tests.core import error
from tests.nn import normal, shake

BATCH, LENGTH, WIDTH, HEADS, CHANNELS = 2, 13, 32, 2, 16


# The same in NumPy.


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rope(x, positions):
    """Pairs (i, i + D/2) as complex numbers, turned by position / 10000^(2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(queries, keys, values, window):
    """Softmax attention of `[L, D]`, token by token over the last `window`."""
    rows = []
    for t in range(len(queries)):
        seen = slice(max(0, t + 1 - window), t + 1)
        scores = keys[seen] @ queries[t] / np.sqrt(keys.shape[1])
        weights = np.exp(scores - scores.max())
        rows.append(weights @ values[seen] / weights.sum())
    return np.stack(rows)


def heads_of(x):
    return x.reshape(*x.shape[:-1], HEADS, CHANNELS)


# Small layers.


def test_projection_is_a_product_and_a_bias():
    layer = Projection(6, 4, ("embed", "heads"), bias=jnp.arange(4.0), rngs=nnx.Rngs(0))
    x = normal(2, 3, 6)
    expected = x @ np.asarray(layer.weight[...]) + np.arange(4.0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer.bias.axes == ("heads",)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_projection_gives_unit_variance_times_its_scale(scale):
    layer = Projection(256, 256, ("embed", "heads"), scale=scale, rngs=nnx.Rngs(0))
    assert np.std(layer(normal(64, 256))) == pytest.approx(scale, rel=0.03)


def test_rms_norm():
    layer = shake(RMSNorm(WIDTH))
    x = 3 * normal(BATCH, LENGTH, WIDTH)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(x), expected, rtol=1e-5)
    np.testing.assert_allclose(layer(x), expected * layer.scale[...][None, None], 1e-5)


def test_norms_compute_in_float32():
    x = jnp.asarray(normal(4, 4096), jnp.bfloat16)
    for norm in (rms_norm, l2_normalise):
        expected = norm(x.astype(jnp.float32))
        actual = norm(x)
        assert actual.dtype == jnp.bfloat16
        # Rounded once, at the end: half a unit in the last of eight bits.
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=2**-8)


def test_l2_normalised_vectors_have_length_one_and_zero_stays_zero():
    y = l2_normalise(normal(5, WIDTH))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 1, rtol=1e-5)
    assert not np.any(l2_normalise(jnp.zeros((5, WIDTH))))


def test_swiglu():
    layer = SwiGLU(6, 10, scale=0.5, rngs=nnx.Rngs(0))
    gate, up, down = (
        np.asarray(part.weight[...]) for part in (layer.gate, layer.up, layer.down)
    )
    x = normal(2, 3, 6)
    expected = (silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_causal_convolution():
    layer = CausalConvolution(6, rngs=nnx.Rngs(0))
    weight = np.asarray(layer.weight[...])
    x, past = normal(2, 5, 6), normal(2, 3, 6, seed=1)
    expected = np.zeros_like(x)
    together = np.concatenate([past, x], axis=1)
    for t in range(5):
        for back in range(4):  # the last row of the weight is the present
            expected[:, t] += weight[3 - back] * together[:, 3 + t - back]
    parts, cache = layer([x[..., :2], x[..., 2:]], past)
    assert [part.shape[-1] for part in parts] == [2, 4]
    y = np.concatenate(parts, axis=-1)
    np.testing.assert_allclose(y, silu(expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache, x[:, -3:])
    assert not np.any(layer.start(2, jnp.float32))


def test_untrained_convolution_mostly_hears_the_present():
    weight = np.asarray(CausalConvolution(512, rngs=nnx.Rngs(0)).weight[...])
    np.testing.assert_allclose(weight.mean(axis=1), [0, 0, 0, 1], atol=0.02)
    np.testing.assert_allclose(weight.std(axis=1), 0.1, rtol=0.1)


# RoPE.


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_rope_turns_pairs_of_the_first_channels(share):
    x = normal(BATCH, LENGTH, HEADS, CHANNELS)
    positions = np.stack([np.arange(LENGTH), 100 + np.arange(LENGTH)])
    turned = int(share * CHANNELS)
    expected = [rope(x[..., :turned], positions), x[..., turned:]]
    np.testing.assert_allclose(
        rotate(x, positions, turned), np.concatenate(expected, axis=-1), atol=1e-4
    )


def test_scores_under_rope_depend_on_the_distance_alone():
    query, key = normal(1, 1, 1, CHANNELS), normal(1, 1, 1, CHANNELS, seed=1)

    def score(i, j):
        turned = [
            rotate(x, np.full((1, 1), position), CHANNELS)
            for x, position in ((query, i), (key, j))
        ]
        return float(np.sum(turned[0] * turned[1]))

    for i, j in ((5, 2), (40, 37), (1003, 1000)):
        assert score(i, j) == pytest.approx(score(3, 0), abs=1e-3)
    assert abs(score(6, 0) - score(3, 0)) > 0.1
    assert abs(score(0, 3) - score(3, 0)) > 0.1


# Attention.


def attention(window):
    return Attention(HEADS, window).build(WIDTH, 1.0, nnx.Rngs(0))


@pytest.mark.parametrize("window", [None, 1, 4, LENGTH, 50])
def test_attention(window):
    layer, x = attention(window), normal(BATCH, LENGTH, WIDTH)
    parts = np.split(x @ np.asarray(layer.qkv.weight[...]), 3, axis=-1)
    queries, keys, values = (heads_of(part) for part in parts)
    positions = np.arange(LENGTH)[None]
    queries, keys = rope(queries, positions), rope(keys, positions)
    y = np.zeros((BATCH, LENGTH, HEADS, CHANNELS))
    for b in range(BATCH):
        for h in range(HEADS):
            one = (queries[b, :, h], keys[b, :, h], values[b, :, h])
            y[b, :, h] = attend(*one, window or LENGTH)
    expected = y.reshape(x.shape) @ np.asarray(layer.output.weight[...])
    assert error(layer(x)[0], expected) < 1e-5


def test_a_window_is_full_attention_as_far_as_it_reaches():
    x = normal(BATCH, LENGTH, WIDTH)
    full = attention(None)(x)[0]
    assert error(attention(LENGTH)(x)[0], full) < 1e-6
    narrow = attention(4)(x)[0]
    assert error(narrow[:, :4], full[:, :4]) < 1e-6
    for t in range(4, LENGTH):
        assert error(narrow[:, t], full[:, t]) > 1e-2


def test_the_cache_of_a_window_holds_the_last_keys():
    layer, x = attention(4), normal(BATCH, LENGTH, WIDTH)
    _, cache = layer(x, layer.start(BATCH, 100, jnp.float32))
    expected = np.arange(LENGTH - 4, LENGTH)
    np.testing.assert_array_equal(cache.indices, np.stack([expected] * BATCH))
    keys = rope(
        heads_of(x @ np.asarray(layer.qkv.weight[...])[:, WIDTH : 2 * WIDTH])[:, -4:],
        expected[None],
    )
    assert error(cache.keys, keys) < 1e-5


# The Miras layer.


def test_miras_layer_with_linear_attention():
    """convolution -> RoPE, l2 norm -> y_t = q_t (W_0 + sum v k^T) -> norm, gate."""
    mixer = Miras(variants.linear_attention(), HEADS, rotary=0.5)
    layer, x = shake(mixer.build(WIDTH, 1.0, nnx.Rngs(0))), normal(BATCH, LENGTH, WIDTH)
    start = layer.convolution.start(BATCH, x.dtype)
    (mixed,), _ = layer.convolution([layer.qkv(x)], start)
    queries, keys, values = (heads_of(p) for p in np.split(mixed, 3, axis=-1))
    values = values / np.sqrt(CHANNELS)
    half, positions = CHANNELS // 2, np.arange(LENGTH)[None]

    def half_turned(part):
        turned = rope(part[..., :half], positions)
        return np.concatenate([turned, part[..., half:]], axis=-1)

    queries, keys = (
        part / np.linalg.norm(part, axis=-1, keepdims=True)
        for part in (half_turned(queries), half_turned(keys))
    )
    projection = layer.rates["learn"].projection
    weight, bias = np.asarray(projection.weight[...]), np.asarray(projection.bias[...])
    learn = sigmoid(x @ weight + bias)
    (start,) = layer.memory_params.weights

    y = np.zeros((BATCH, LENGTH, HEADS, CHANNELS))
    for b in range(BATCH):
        for h in range(HEADS):
            memory = np.array(start[h], float)
            for t in range(LENGTH):
                memory += learn[b, t, h] * np.outer(keys[b, t, h], values[b, t, h])
                y[b, t, h] = queries[b, t, h] @ memory
    y /= np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    y = (y * np.asarray(layer.output.norm[...])).reshape(x.shape)
    expected = (y * silu(x @ np.asarray(layer.output.gate.weight[...]))) @ np.asarray(
        layer.output.projection.weight[...]
    )
    assert error(layer(x)[0], expected) < 1e-4
