"""The rates of a Miras layer: their ranges, and where untrained ones start."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax import Rates, variants
from miras_jax.errors import UserError
from miras_jax.nn.gain import gain
from miras_jax.nn.miras import Miras, RateChoices, default_rates
from miras_jax.nn.rates import Fixed, LowRank, PerHead
from tests.core import error
from tests.nn import normal, shake

BATCH, LENGTH, WIDTH, HEADS, CHANNELS = 2, 13, 32, 2, 16


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
CHANNELWISE = {"moneta", "yaad", "ttt_mlp", "ttt_linear"}
DEEP = {"memora", "omega_net"} | WITH_MOMENTUM | CHANNELWISE
STARTS = {"momentum": (0.5, 0.9), "threshold": (0.2, 0.6), "erase": (0.5, 0.5)}


@pytest.mark.parametrize("variant", variants.ALL)
def test_default_rates_start_where_their_docstring_says(variant):
    rule, name = variant(), variant.__name__
    heads, channels, x = 4, 8, normal(4, 64, WIDTH)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    choices = default_rates(rule)
    deep = name in DEEP
    whole = 1 / gain(rule, 0.4) if deep and not rule.algorithm.strides else 0.1
    unit = np.clip(whole, 0.1, 10) / np.sqrt(rule.chunk_size)
    unit /= 4 if name in WITH_MOMENTUM else 1
    unit /= 16 if name == "omega_net" else 1
    learn = (0.4 * unit, 1.6 * unit) if deep else (0.5, 0.5)
    keep = (0.999, 0.99999) if deep else (0.9, 0.999)
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
