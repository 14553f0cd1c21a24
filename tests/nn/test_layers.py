"""The layers against NumPy: what each computes, and what it starts from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import Rates, variants
from miras_jax.errors import UserError
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
from miras_jax.nn.miras import Miras, RateChoices, default_rates
from miras_jax.nn.rates import Fixed, LowRank, PerHead
from tests.core import error
from tests.nn import shaken

BATCH, LENGTH, WIDTH, HEADS, CHANNELS = 2, 13, 32, 2, 16


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shake(module):
    """The module with noise on every parameter."""
    graph, params = nnx.split(module)
    return nnx.merge(graph, shaken(params))


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
    y, cache = layer(x, past)
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
    mixed = layer.convolution(layer.qkv(x), layer.convolution.start(BATCH, x.dtype))[0]
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
    y = (y * np.asarray(layer.output_norm[...])).reshape(x.shape)
    expected = (y * silu(x @ np.asarray(layer.gate.weight[...]))) @ np.asarray(
        layer.output.weight[...]
    )
    assert error(layer(x)[0], expected) < 1e-4


# Rates.


def rate(choice, x, channels=CHANNELS):
    """The untrained rate of the inputs x."""
    return choice.build(x.shape[-1], HEADS, channels, nnx.Rngs(0))(x)


RANGES = {
    "sigmoid": (0.05, 0.8),
    "softplus": (0.02, 4.0),
    "keep": (0.001, 0.1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", RANGES)
@pytest.mark.parametrize("kind", [PerHead, LowRank])
def test_rates_have_their_shape_and_range(kind, activation, dtype):
    x = jnp.asarray(10 * normal(BATCH, LENGTH, WIDTH), dtype)
    choice = kind(activation, RANGES[activation])
    layer = shake(choice.build(WIDTH, HEADS, CHANNELS, nnx.Rngs(0)))
    values = layer(x)
    channels = (CHANNELS,) if kind is LowRank else ()
    assert values.shape == (BATCH, LENGTH, HEADS, *channels)
    assert values.dtype == jnp.float32
    assert np.all(values > 0)
    if activation != "softplus":
        assert np.all(values <= 1)
    # Every token, head and channel has its own.
    assert np.all(np.ptp(values, axis=1) > 0)


@pytest.mark.parametrize("activation", RANGES)
def test_channels_start_log_uniformly_spread_over_the_stated_range(activation):
    low, high = RANGES[activation]
    values = rate(LowRank(activation, (low, high)), normal(BATCH, LENGTH, WIDTH))
    start = 1 - values if activation == "keep" else values
    expected = np.geomspace(low, high, HEADS * CHANNELS).reshape(HEADS, CHANNELS)
    expected = np.broadcast_to(expected, values.shape)
    np.testing.assert_allclose(start, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", [PerHead, LowRank])
def test_a_sigmoid_stays_below_its_limit(kind):
    choice = kind("sigmoid", (0.01, 0.04), limit=0.08)
    layer = choice.build(WIDTH, HEADS, CHANNELS, nnx.Rngs(0))
    x = normal(BATCH, LENGTH, WIDTH)
    start = np.asarray(layer(0 * x))
    assert start.min() == pytest.approx(0.01) and start.max() == pytest.approx(0.04)
    values = shake(layer)(1000 * x)
    assert 0.079 < np.max(values) <= 0.08


@pytest.mark.parametrize(
    ("activation", "initial", "limit"),
    [
        ("sigmoid", (0.1, 0.5), 0.5),
        ("sigmoid", (0.5, 0.1), 1.0),
        ("softplus", (0.0, 0.1), 1.0),
        ("softplus", (0.1, 0.2), 0.5),
        ("keep", (0.1, 1.0), 1.0),
    ],
)
def test_rates_that_cannot_start_there_are_refused(activation, initial, limit):
    for kind in (PerHead, LowRank):
        with pytest.raises(UserError, match=kind.__name__):
            kind(activation, initial, limit)


def test_low_rank_keeps_its_rank():
    layer = LowRank("keep", (0.001, 0.1), rank=3).build(
        WIDTH, HEADS, CHANNELS, nnx.Rngs(0)
    )
    assert layer.down.weight.shape == (WIDTH, 3)
    assert layer.up.weight.shape == (3, HEADS * CHANNELS)


def test_fixed_rates_are_constants_without_parameters():
    # RetNet (arXiv 2307.08621, eq. 8): 1 - 2^-5 ... 1 - 2^-8.
    choice = Fixed((2**-5, 2**-8), "keep")
    layer = choice.build(WIDTH, 4, CHANNELS, nnx.Rngs(0))
    values = layer(normal(BATCH, LENGTH, WIDTH))
    expected = np.broadcast_to(1 - 2.0 ** -np.arange(5, 9), (BATCH, LENGTH, 4))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert values.dtype == jnp.float32
    assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
    plain = Fixed((0.5, 2.0)).build(WIDTH, 2, CHANNELS, nnx.Rngs(0))
    np.testing.assert_allclose(plain(normal(1, 1, WIDTH)), [[[0.5, 2.0]]])


WITH_MOMENTUM = {"titans", "lact", "atlas", "atlas_gated"}
CHANNELWISE = {"moneta", "yaad", "ttt_mlp", "ttt_linear", "omega_net"}
DEEP = {"memora"} | WITH_MOMENTUM | CHANNELWISE
STARTS = {"momentum": (0.5, 0.9), "threshold": (0.05, 0.2), "erase": (0.5, 0.5)}


@pytest.mark.parametrize("variant", variants.ALL)
def test_default_rates_start_where_their_docstring_says(variant):
    rule, name = variant(), variant.__name__
    heads, channels, x = 4, 8, normal(4, 64, WIDTH)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    choices = default_rates(rule)
    limit = (0.08 if name in WITH_MOMENTUM else 0.32) / np.sqrt(rule.chunk_size)
    limit /= 16 if name == "omega_net" else 1
    deep = name in DEEP
    learn = (limit / 8, limit / 2) if deep else (0.5, 0.5)
    keep = (0.99, 0.9999) if deep else (0.9, 0.999)
    starts = {"learn": learn, "keep": keep, "keep_value": keep, **STARTS}
    for field in Rates._fields:
        choice = getattr(choices, field)
        assert (choice is not None) == (field in rule.rates)
        if choice is None:
            continue
        values = choice.build(WIDTH, heads, channels, nnx.Rngs(0))(x)
        channelwise = field == "threshold" or (
            field != "momentum" and name in CHANNELWISE
        )
        assert (values.ndim == 4) == channelwise
        typical = np.median(values, axis=(0, 1))
        low, high = starts[field]
        assert typical.min() == pytest.approx(low, rel=0.05), field
        assert typical.max() == pytest.approx(high, rel=0.05), field
        if field == "keep":
            forgotten = 1 - typical
            assert forgotten.min() == pytest.approx(1 - keep[1], rel=0.05)
            assert forgotten.max() == pytest.approx(1 - keep[0], rel=0.05)


def test_a_layer_builds_the_rates_it_is_given():
    rates = RateChoices(learn=Fixed((0.3, 0.3)), keep=Fixed((0.1, 0.2), "keep"))
    mixer = Miras(variants.retnet(), HEADS, rates)
    layer = mixer.build(WIDTH, 1.0, nnx.Rngs(0))
    assert set(layer.rates) == {"learn", "keep"}
    assert "rates" not in nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    x = normal(BATCH, LENGTH, WIDTH)
    other = replace(mixer, rates=replace(rates, keep=Fixed((0.5, 0.6), "keep")))
    changed = other.build(WIDTH, 1.0, nnx.Rngs(0))(x)[0]
    assert error(changed, layer(x)[0]) > 1e-2
