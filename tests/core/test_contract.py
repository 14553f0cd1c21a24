"""Properties that every rule keeps, whatever its four choices are."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import algorithm, bias, memory, retention, variants
from miras_jax.errors import UserError
from tests import core
from tests.core import Case, error, oracle

pytestmark = pytest.mark.usefixtures("float64")

VARIANTS = core.variant_cases()
CASES = core.all_cases()


def by_name(case):
    return case.name


def variant(name):
    return next(case.rule for case in VARIANTS if case.name == name)


def part(tokens, start, stop):
    return jax.tree.map(lambda x: x[start:stop], tokens)


every_rule = pytest.mark.parametrize("case", CASES, ids=by_name)
every_variant = pytest.mark.parametrize("case", VARIANTS, ids=by_name)


# A rule is a value.


def test_rules_built_twice_are_equal_and_changed_ones_are_not():
    for first, second in zip(CASES, core.all_cases(), strict=True):
        assert first.rule == second.rule
        assert hash(first.rule) == hash(second.rule)
        other = "linear" if first.rule.readout == "exact" else "exact"
        assert replace(first.rule, readout=other) != second.rule


@every_rule
def test_a_rule_prints_its_four_choices(case):
    text = repr(case.rule)
    for axis in ("memory", "bias", "retention", "algorithm"):
        assert repr(getattr(case.rule, axis)) in text


def test_an_equal_rule_is_not_traced_again():
    traced = []

    def start(rule, params):
        traced.append(rule)
        return rule.start(params)

    compiled = jax.jit(start, static_argnums=0)
    params, _ = core.inputs(Case("yaad", variant("yaad")))
    compiled(core.small(variants.yaad()), params)
    compiled(core.small(variants.yaad()), params)
    assert len(traced) == 1
    compiled(replace(variant("yaad"), chunk_size=2), params)
    assert len(traced) == 2


# What a layer relies on: batches, cuts, mixed precision.


@every_variant
def test_vmap_equals_a_loop(case):
    singles = [core.inputs(case, seed=seed) for seed in (1, 2)]
    params, tokens = jax.tree.map(lambda *x: np.stack(x), *singles)

    def whole(params, tokens):
        return miras.run(case.rule, params, case.rule.start(params), tokens)[0]

    batched = core.jit(jax.vmap(whole))(params, tokens)
    looped = [core.run_whole(case.rule, None)(*single)[0] for single in singles]
    assert error(batched, np.stack(looped)) < 1e-12


@every_rule
def test_a_sequence_in_two_parts_equals_the_whole(case):
    """The cut at 5 is inside a chunk, at a place that is data to the program."""
    params, tokens = core.inputs(case, length=10)
    whole, last = core.run_whole(case.rule, None)(params, tokens)
    go = core.run(case.rule, None)
    first, state = go(params, core.start(case.rule)(params), part(tokens, 0, 5))
    second, state = go(params, state, part(tokens, 5, 10))
    assert error(np.concatenate([first, second]), whole) < 1e-12
    assert jax.tree.structure(state) == jax.tree.structure(last)
    for actual, expected in zip(*map(jax.tree.leaves, (state, last)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, readout, implementation, cuts",
    [
        ("yaad", "linear", "xla", range(1, core.LENGTH)),
        ("gated_delta_net", "linear", "xla", range(1, core.LENGTH)),
        ("yaad", "linear", "definition", (3, 8)),
        ("titans", "linear", "xla", (3, 8)),
        ("memora", "exact", "xla", (3, 8)),
    ],
)
def test_cuts_anywhere_equal_the_whole(name, readout, implementation, cuts):
    rule = replace(variant(name), readout=readout)
    params, tokens = core.inputs(Case(name, rule))
    whole, _ = core.run_whole(rule, implementation)(params, tokens)
    go, start = core.run(rule, implementation), core.start(rule)(params)
    for cut in cuts:
        first, state = go(params, start, part(tokens, 0, cut))
        second, _ = go(params, state, part(tokens, cut, core.LENGTH))
        assert error(np.concatenate([first, second]), whole) < 1e-12, cut


@pytest.mark.parametrize("cut", [3, 4, 6])
@pytest.mark.parametrize("name", ["yaad", "moneta", "titans", "delta_net"])
def test_cuts_known_while_compiling(name, cut):
    rule = variant(name)
    params, tokens = core.inputs(Case(name, rule))
    whole, _ = core.run_whole(rule, None)(params, tokens)

    def in_two_parts(params, tokens):
        first, rest = part(tokens, 0, cut), part(tokens, cut, core.LENGTH)
        first, state = miras.run(rule, params, rule.start(params), first)
        second, _ = miras.run(rule, params, state, rest)
        return jnp.concatenate([first, second])

    assert error(core.jit(in_two_parts)(params, tokens), whole) < 1e-12


@every_variant
def test_run_continues_after_steps_and_steps_after_run(case):
    params, tokens = core.inputs(case)
    whole, _ = core.run_whole(case.rule, None)(params, tokens)
    _, states = core.run_steps(case.rule, params, tokens)
    output, state = core.run(case.rule, None)(params, states[2], part(tokens, 3, 8))
    assert error(output, whole[3:8]) < 1e-12
    token = jax.tree.map(lambda x: x[8], tokens)
    output, _ = core.step(case.rule)(params, state, token)
    assert error(output, whole[8]) < 1e-12


def test_sequences_at_different_places_of_a_chunk_run_in_one_batch():
    """Serving: under vmap the place is data, and differs between rows."""
    rule = variant("yaad")
    params, tokens = core.inputs(Case("yaad", rule))
    _, states = core.run_steps(rule, params, tokens)
    pairs = [states[0], states[2]]
    parts = [part(tokens, 1, 9), part(tokens, 3, 11)]
    state, rows = (jax.tree.map(lambda *x: jnp.stack(x), *x) for x in (pairs, parts))
    go = jax.vmap(partial(miras.run, rule, params))
    outputs, _ = core.jit(go)(state, rows)
    whole, _ = core.run_whole(rule, None)(params, tokens)
    assert error(outputs, np.stack([whole[1:9], whole[3:11]])) < 1e-12


@every_variant
def test_bfloat16_inputs_keep_a_float32_state(case):
    params, tokens = core.inputs(case, seed=1)
    with jax.enable_x64(False):
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tokens)
        full = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        outputs, state = core.run_whole(case.rule, None)(full, low)
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
        first = jax.eval_shape(case.rule.start, half)
    for leaf in jax.tree.leaves((state, first)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    assert outputs.dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float64), low)
    expected, _ = oracle.run(case.rule, params, rounded)
    assert error(outputs, expected) < 0.1


@every_variant
def test_the_first_weights_are_the_learned_ones(case):
    params, _ = core.inputs(case)
    weights = case.rule.weights(core.start(case.rule)(params))
    kl = isinstance(case.rule.retention, retention.KL)
    if case.rule.keeps_tokens:
        assert not any(np.any(rows) for rows in weights)  # none, or a window's empty
        return
    assert len(weights) == len(params.weights)
    for actual, given in zip(weights, params.weights, strict=True):
        if kl:
            assert np.all(actual > 0)
        else:
            np.testing.assert_allclose(actual, given, rtol=1e-10)


@every_variant
def test_init_is_random_and_runs(case, key):
    key_dim, value_dim = core.dims(case.rule)
    _, tokens = core.inputs(case)
    first, second = (
        case.rule.init(k, key_dim=key_dim, value_dim=value_dim)
        for k in jax.random.split(key)
    )
    outputs, state = core.run_whole(case.rule, None)(first, tokens)
    assert outputs.shape == (core.LENGTH, value_dim)
    assert np.all(np.isfinite(outputs))
    linear_from_zero = all(np.all(w == 0) for w in first.weights)
    assert linear_from_zero or error(first.weights[0], second.weights[0]) > 0.1


# Twins of the comparisons: what must change the result, does.


@every_variant
def test_order_and_forgetting_matter(case):
    params, tokens = core.inputs(case)
    whole, _ = core.run_whole(case.rule, None)(params, tokens)
    reverse = tokens._replace(keys=tokens.keys[::-1].copy())
    outputs, _ = core.run_whole(case.rule, None)(params, reverse)
    assert error(outputs, whole) > 1e-3
    for rate, given in tokens.rates._asdict().items():
        if given is not None:
            rates = tokens.rates._replace(**{rate: given[::-1].copy()})
            flipped = tokens._replace(rates=rates)
            outputs, _ = core.run_whole(case.rule, None)(params, flipped)
            assert error(outputs, whole) > 1e-3, rate


def test_the_readout_is_no_choice_where_weights_are_the_dual():
    rule = variant("titans")
    params, tokens = core.inputs(Case("titans", rule))
    whole, _ = core.run_whole(rule, "xla")(params, tokens)
    exact, _ = core.run_whole(replace(rule, readout="exact"), "xla")(params, tokens)
    assert error(exact, whole) < 1e-12


def test_readout_and_chunk_size_are_part_of_the_model():
    rule = variant("moneta")
    params, tokens = core.inputs(Case("moneta", rule))
    whole, _ = core.run_whole(rule, "xla")(params, tokens)
    for change in ({"readout": "exact"}, {"chunk_size": 1}):
        outputs, _ = core.run_whole(replace(rule, **change), "xla")(params, tokens)
        assert error(outputs, whole) > 1e-3


# Mistakes are named, with their fix, as early as possible.


@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: replace(variant("yaad"), readout="linaer"), "readout"),
        (lambda: replace(variant("yaad"), chunk_size=0), "chunk_size"),
        (lambda: bias.Huber(form="smooth"), "form"),
        (lambda: bias.Lp(0.5), "p >= 1"),
        (lambda: retention.Lq(4.0, form="printed"), "form"),
        (lambda: retention.Lq(1.0, form="mirror"), "q > 1"),
        (lambda: retention.Decay(axis="row"), "axis"),
        (lambda: retention.KL(mass=1.0, axis=2), "axis"),
        (lambda: retention.KL(mass=0.0, axis=0), "mass"),
        (lambda: algorithm.GradientDescent(at="next"), "at="),
        (lambda: replace(variant("gated_delta_net"), chunk_size=4), "chunk_size=1"),
        (lambda: algorithm.GradientDescent(steps=0), "steps"),
        (lambda: algorithm.GradientDescent(axis="row"), "axis"),
        (lambda: algorithm.EraseWrite("next"), "at="),
        (lambda: replace(variant("rwkv7"), chunk_size=4), "chunk_size=1"),
        (lambda: replace(variant("rwkv7"), bias=bias.L1()), "bias.L2"),
        (lambda: replace(variant("dfw"), memory=memory.Vector()), "key axis"),
        (lambda: replace(variant("dfw"), algorithm=algorithm.Momentum()), "momentum"),
        (lambda: replace(variant("longhorn"), chunk_size=4), "chunk_size=1"),
        (lambda: replace(variant("longhorn"), bias=bias.L1()), "bias.L2"),
        (lambda: replace(variant("yaad"), algorithm=algorithm.Implicit()), "at='prev"),
        (lambda: algorithm.Muon(iterations=0), "algorithm.Momentum"),
        (lambda: algorithm.Muon(learn="both"), "'inside'"),
        (lambda: algorithm.Omega(0), "window"),
        (lambda: algorithm.Newton(iterations=0), "iterations"),
        (lambda: algorithm.Newton(ridge=0.1), "0.25"),
        (lambda: replace(variant("mesa_net"), chunk_size=4), "chunk_size=1"),
        (lambda: replace(variant("mesa_net"), bias=bias.L1()), "bias.L2"),
        (lambda: replace(variant("mesa_net"), memory=memory.MLP()), "memory.Linear"),
        (lambda: replace(variant("mesa_net"), retention=retention.Lq()), "Decay"),
        (lambda: algorithm.Omega(4, algorithm.Newton()), "inner"),
        (lambda: algorithm.Omega(4, algorithm.Implicit()), "inner"),
        (
            lambda: algorithm.Omega(4, algorithm.Momentum(at="retained")),
            "at='previous'",
        ),
        (lambda: algorithm.Omega(4, algorithm.GradientDescent(steps=2)), "one step"),
        (
            lambda: replace(variant("omega_net"), retention=retention.Decay("both")),
            "axis='value'",
        ),
        (lambda: retention.FDivergence("jensen"), "reverse_kl"),
        (lambda: retention.FDivergence(axis=2), "axis"),
        (lambda: retention.FDivergence(mass=-1.0), "mass"),
        (lambda: retention.ElasticNet("hard"), "form"),
        (lambda: retention.ElasticNet(threshold=0.0), "retention.Decay"),
        (lambda: retention.SignedPower(0.0), "power"),
        (lambda: bias.Linf(0.0), "temperature"),
        (lambda: bias.Robust(-1.0), "radius"),
        (lambda: memory.Cache(0), "window"),
        (lambda: replace(variant("softmax_attention"), bias=bias.L1()), "bias.L2"),
        (
            lambda: replace(variant("softmax_attention"), retention=retention.Decay()),
            "retention.Keep",
        ),
        (
            lambda: replace(variant("yaad"), algorithm=algorithm.NonParametric()),
            "memory.Cache",
        ),
        (lambda: replace(variant("softmax_attention"), chunk_size=4), "chunk_size=1"),
        (lambda: memory.GatedMLP(expansion=0), "expansion"),
        (lambda: memory.MLP(depth=0, expansion=4), "depth"),
        (lambda: memory.MLP(depth=2, expansion=0), "expansion"),
    ],
)
def test_impossible_choices_fail_at_construction(build, word):
    with pytest.raises(UserError, match=word) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        memory.MLP(),
        memory.Linear(residual=True),
        memory.GatedMLP(residual=True),
        memory.Vector(),
    ],
)
def test_a_residual_memory_needs_equal_widths(kind, key):
    rule = replace(variant("yaad"), memory=kind)
    with pytest.raises(UserError, match="key_dim"):
        rule.init(key, key_dim=4, value_dim=6)


def refuse(rule, word, implementation=None, **rates):
    """Expect a named mistake from `run` and `step` with these rates replaced."""
    params, tokens = core.inputs(Case("refused", rule))
    tokens = tokens._replace(rates=tokens.rates._replace(**rates))
    state = rule.start(params)
    with pytest.raises(UserError, match=word):
        miras.run(rule, params, state, tokens, implementation=implementation)
    if implementation is None:
        token = jax.tree.map(lambda x: x[0], tokens)
        with pytest.raises(UserError, match=word):
            miras.step(rule, params, state, token)


def test_an_unknown_implementation_is_refused():
    refuse(variant("yaad"), "definition", implementation="cuda")


def test_momentum_without_its_rate_is_refused():
    refuse(variant("titans"), "momentum", momentum=None)


def test_erasing_without_its_rate_or_its_keys_is_refused():
    rule = variant("rwkv7")
    refuse(rule, "erase", erase=None)
    params, tokens = core.inputs(Case("refused", rule))
    tokens = tokens._replace(erase_keys=None)
    with pytest.raises(UserError, match="erase_keys"):
        miras.run(rule, params, rule.start(params), tokens)


def test_a_step_size_outside_of_muon_is_one_per_token():
    refuse(variant("atlas"), "learn='inside'", learn=np.full((core.LENGTH, 4), 0.3))


@pytest.mark.parametrize("name", ["learn", "keep"])
def test_newton_refuses_channelwise_rates(name):
    given = {name: np.full((core.LENGTH, 4), 0.3)}
    refuse(variant("mesa_net"), f"rates.{name} is one number", **given)


def test_kl_refuses_channelwise_keep():
    refuse(variant("memora"), "keep", keep=np.full((core.LENGTH, 4), 0.9))


def test_tokens_without_a_pair_for_every_step_are_refused():
    rule = variant("delta_product")
    params, tokens = core.inputs(Case("refused", rule))
    fewer = tokens._replace(keys=tokens.keys[:, :1])
    with pytest.raises(UserError, match="first axes"):
        miras.run(rule, params, rule.start(params), fewer)


def test_channelwise_momentum_is_refused():
    refuse(variant("titans"), "momentum", momentum=np.full((core.LENGTH, 4), 0.9))
