"""The exact linear models against the loop of each paper, in the paper's own rates.

150 tokens are longer than any block. Each model is run as the definition, in blocks and
token by token from a random state, in float64. The rates are what the papers compute
them from, so that the mapping that a variant's docstring states is tested too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import bias, memory, retention, variants
from tests import core
from tests.core import error, recurrences

pytestmark = pytest.mark.usefixtures("float64")

LENGTH, KEY, VALUE = 150, 4, 6


class Random:
    """Random inputs of one model: keys have norm one, gates are near one and near zero.

    Ten tokens in a row keep 1e-3 of what they find.
    """

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.queries = self.rng.normal(size=(LENGTH, KEY))
        self.keys, self.others = (self.unit(KEY) for _ in range(2))
        self.values = self.rng.normal(size=(LENGTH, VALUE))
        self.start = self.rng.normal(size=(VALUE, KEY))  # as the papers: [V, K]

    def unit(self, width):
        x = self.rng.normal(size=(LENGTH, width))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def gate(self, *width):
        gate = self.rng.uniform(0.05, 1, (LENGTH, *width))
        gate[40:50] = 1e-3
        return gate

    def learn(self, *width):
        return self.rng.uniform(0.05, 0.95, (LENGTH, *width))

    def tokens(self, keys=None, values=None, erase_keys=None, **rates):
        keys = self.keys if keys is None else keys
        values = self.values if values is None else values
        rates = miras.Rates(**rates)
        return miras.Tokens(self.queries, keys, values, rates, erase_keys)


def dfw(x):
    key, value = x.gate(KEY), x.gate(VALUE)
    expected = recurrences.dfw(x.start, x.queries, x.keys, x.values, key, value)
    return expected, x.tokens(keep=key, keep_value=value)


def lightning_attention(x):
    decay = np.exp(-8 * 3 / 8 * (1 - 2 / 12))  # head 3 of 8, layer 2 of 12
    sequences = x.queries, x.keys, x.values, np.full(LENGTH, decay)
    return recurrences.retnet(x.start, *sequences), x.tokens(keep=sequences[3])


def mamba2(x):
    dt, a = x.rng.uniform(0.001, 1, LENGTH), 3.0
    expected = recurrences.mamba2(x.start, x.queries, x.keys, x.values, dt, a)
    return expected, x.tokens(keep=np.exp(-a * dt), learn=dt)


def gla(x):
    alpha = x.gate(KEY)
    expected = recurrences.gla(x.start, x.queries, x.keys, x.values, alpha)
    return expected, x.tokens(keep=alpha)


def hgrn2(x):
    forget = x.gate(KEY)
    expected = recurrences.hgrn2(x.start, x.queries, x.values, forget)
    return expected, x.tokens(keys=1 - forget, keep=forget)


def kimi_delta_attention(x):
    beta, alpha = x.learn(), x.gate(KEY)
    expected = recurrences.kimi_delta_attention(
        x.start, x.queries, x.keys, x.values, beta, alpha
    )
    return expected, x.tokens(learn=beta, keep=alpha)


def rwkv7(x):
    w, a = x.gate(KEY), x.learn(KEY)
    k = x.keys * x.rng.uniform(0.5, 1.5, (LENGTH, KEY))
    expected = recurrences.rwkv7(x.start, x.queries, w, x.others, a, k, x.values)
    return expected, x.tokens(keys=k, keep=w, erase=a, erase_keys=x.others)


MODELS = (dfw, lightning_attention, mamba2, gla, hgrn2, kimi_delta_attention, rwkv7)
by_name = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)


def agree(rule, start, tokens, expected):
    """Each implementation from the state `start` `[V, K]`, and a cut inside a block."""
    params = miras.Params((start.T,))
    for implementation in ("definition", "xla"):
        outputs, _ = core.run_whole(rule, implementation)(params, tokens)
        assert error(outputs, expected) < 1e-10, implementation
    outputs, states = core.run_steps(rule, params, tokens)
    assert error(outputs, expected) < 1e-10, "step"
    rest = jax.tree.map(lambda x: x[43:], tokens)
    outputs, state = core.run(rule, None)(params, states[42], rest)
    assert error(outputs, expected[43:]) < 1e-10
    assert error(state.dual[0], states[-1].dual[0]) < 1e-10


@by_name
def test_a_model_is_the_recurrence_of_its_paper(model):
    x = Random()
    expected, tokens = model(x)
    agree(getattr(variants, model.__name__)(), x.start, tokens, expected)


@by_name
def test_single_precision_stays_finite_and_close(model):
    """With gradients, though a gate keeps nothing for ten tokens."""
    x = Random()
    expected, tokens = model(x)
    rule = getattr(variants, model.__name__)()

    def loss(start, tokens):
        params = miras.Params((start,))
        outputs, _ = miras.run(rule, params, rule.start(params), tokens)
        return jnp.sum(outputs**2), outputs

    with jax.enable_x64(False):
        single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens)
        start = jnp.asarray(x.start.T, jnp.float32)
        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, outputs), gradients = core.jit(gradient)(start, single)
    assert error(outputs, expected) < 1e-5
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


# Models whose heads have a single value.


def heads_of_one(rule, start, tokens, keep, learn, values):
    """A head for each of D channels, which share their queries and keys."""

    def one(start, keep, learn, values):
        rates = miras.Rates(learn=learn, keep=keep)
        own = tokens._replace(values=values[:, None], rates=rates)
        params = miras.Params((start[:, None],))
        return miras.run(rule, params, rule.start(params), own)[0][:, 0]

    over_heads = jax.vmap(one, in_axes=(0, 1, 1, 1), out_axes=1)
    return core.jit(over_heads)(start, keep, learn, values)


def test_mamba_is_the_recurrence_of_its_paper():
    x = Random()
    dt = x.rng.uniform(0.001, 0.5, (LENGTH, VALUE))
    dt[40:50] = 7  # keeps e^-7 and less
    a = -np.arange(1.0, KEY + 1) * x.rng.uniform(0.5, 1.5, (VALUE, KEY))
    expected = recurrences.mamba(x.start, x.values, dt, a, x.keys, x.queries)
    outputs = heads_of_one(
        variants.mamba(),
        x.start,
        x.tokens(),
        keep=np.exp(dt[:, :, None] * a[None]),
        learn=dt,
        values=x.values,
    )
    assert error(outputs, expected) < 1e-10


def test_longhorn_as_shipped_is_its_diagonal():
    x = Random()
    beta = x.learn(VALUE)
    expected = recurrences.longhorn_diagonal(x.start, x.queries, x.keys, x.values, beta)
    learn = beta / (1 + beta)  # keys have norm one
    outputs = heads_of_one(
        variants.longhorn_diagonal(),
        x.start,
        x.tokens(),
        keep=1 - learn[:, :, None] * x.keys[:, None] ** 2,
        learn=learn,
        values=x.values,
    )
    assert error(outputs, expected) < 1e-10


# What blocks promise of any rates.


@pytest.mark.parametrize("axis", ["key", "value", "both"])
@pytest.mark.parametrize("smallest", [1e-3, 1e-30, 0.0])
def test_blocks_of_64_with_channels_are_exact_and_finite(axis, smallest):
    """Neither results nor gradients overflow, however much ten tokens forget."""
    rule = miras.Rule(
        memory.Linear(), bias.DotProduct(), retention.Decay(axis), chunk_size=64
    )
    x = Random()
    keep, keep_value = x.gate(VALUE if axis == "value" else KEY), x.gate(VALUE)
    for gate in (keep, keep_value):
        gate[40:50] = smallest
    ones = np.ones_like(keep_value)
    key = keep if axis != "value" else np.ones((LENGTH, KEY))
    value = {"key": ones, "value": keep, "both": keep_value}[axis]
    expected = recurrences.dfw(x.start, x.queries, x.keys, x.values, key, value)
    tokens = x.tokens(keep=keep, keep_value=keep_value if axis == "both" else None)
    params = miras.Params((x.start.T,))
    outputs, _ = core.run_whole(rule, "xla")(params, tokens)
    assert error(outputs, expected) < 1e-10

    def loss(tokens):
        return jnp.sum(miras.run(rule, params, rule.start(params), tokens)[0] ** 2)

    gradients = core.jit(jax.grad(loss))(tokens)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("axis", ["key", "value", "both"])
@pytest.mark.parametrize("readout", ["linear", "start"])
def test_two_derivatives_by_channel_keeps(axis, readout):
    """The first is written by hand, in sums at readers and writers."""
    rule = miras.Rule(
        memory.Linear(),
        bias.DotProduct(),
        retention.Decay(axis),
        chunk_size=1,
        readout=readout,
    )
    x = Random()
    gates = x.rng.uniform(0.5, 1, (2, 12, VALUE))
    first = gates[0] if axis == "value" else gates[0, :, :KEY]
    params = miras.Params((x.start.T,))

    def loss(keep):
        rates = miras.Rates(keep=keep, keep_value=gates[1] if axis == "both" else None)
        tokens = x.tokens()._replace(rates=rates)
        tokens = jax.tree.map(lambda a: a[:12], tokens)
        return jnp.sum(jnp.sin(miras.run(rule, params, rule.start(params), tokens)[0]))

    along = x.rng.normal(size=first.shape)

    def slope(keep):
        return jnp.vdot(jax.grad(loss)(keep), along)

    def difference(function, step=1e-5):
        ahead, behind = (core.jit(function)(first + s * along) for s in (step, -step))
        return (ahead - behind) / (2 * step)

    def curvature(keep):
        return jnp.vdot(jax.grad(slope)(keep), along)

    for derivative, function in ((slope, loss), (curvature, slope)):
        expected = difference(function)
        assert abs(core.jit(derivative)(first) - expected) < 1e-6 * abs(expected)


@pytest.mark.parametrize("loss", [bias.DotProduct(), bias.L2()])
def test_a_vector_is_a_recurrence_of_every_channel(loss):
    """w_t = keep w_{t-1} - learn k (M(k) - v), or + learn k v, elementwise."""
    x = Random()
    rule = miras.Rule(memory.Vector(), loss, retention.Decay(), chunk_size=1)
    queries, keys, values = x.rng.normal(size=(3, LENGTH, KEY))
    keep, learn = x.gate(KEY), x.learn()
    tokens = miras.Tokens(queries, keys / 2, values, miras.Rates(learn, keep))
    w, expected = x.start[0].copy(), []
    for t in range(LENGTH):
        error_t = keys[t] / 2 * w if loss == bias.L2() else 0
        w = keep[t] * w + learn[t] * keys[t] / 2 * (values[t] - error_t)
        expected.append(w * queries[t])
    agree(rule, x.start[0][:, None], tokens, np.array(expected))
