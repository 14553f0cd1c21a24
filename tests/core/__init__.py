"""The rules that every core test runs on, random inputs for them, and their programs.

A case is one row of the table: a rule and whether its rates are channel-wise. Every
published variant has a row, and so has every value of each of the four axes. Shapes
are tiny and compiled functions are kept, because compiling dominates the time.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import numpy as np

import miras_jax as miras
from miras_jax import algorithm, bias, memory, retention, variants

VARIANT_NAMES = (
    "moneta",
    "yaad",
    "memora",
    "titans",
    "ttt_mlp",
    "ttt_linear",
    "lact",
    "omega_net",
    "atlas",
    "atlas_gated",
    "linear_attention",
    "retnet",
    "lightning_attention",
    "mamba2",
    "dfw",
    "gla",
    "hgrn2",
    "mamba",
    "longhorn_diagonal",
    "delta_net",
    "gated_delta_net",
    "gated_delta_net_miras",
    "kimi_delta_attention",
    "delta_product",
    "rwkv7",
    "longhorn",
    "mesa_net",
    "softmax_attention",
    "sliding_window_attention",
)
LENGTH = 11  # two chunks of four and an unfinished one


class Case(NamedTuple):
    name: str
    rule: miras.Rule
    channelwise: bool | tuple[str, ...] = False  # all the rates that may be, or these


def small(rule):
    """The same rule with short chunks, a narrow memory and a mass to match."""
    if isinstance(rule.memory, memory.MLP):
        rule = replace(rule, memory=replace(rule.memory, expansion=2))
    if isinstance(rule.retention, retention.KL):
        rule = replace(rule, retention=replace(rule.retention, mass=4.0))
    if rule.memory == memory.Cache(128):
        rule = replace(rule, memory=memory.Cache(3))
    if isinstance(rule.algorithm, algorithm.Omega):
        inner = replace(rule, algorithm=rule.algorithm.inner)
        short = algorithm.Omega(3, small(inner).algorithm)
        rule = replace(rule, algorithm=short)
    if isinstance(rule.algorithm, algorithm.Muon):
        rule = replace(rule, algorithm=replace(rule.algorithm, iterations=2))
    return replace(rule, chunk_size=min(rule.chunk_size, 4))


def variant_cases():
    return [
        Case(
            name,
            small(getattr(variants, name)()),
            variants.CHANNELWISE.get(getattr(variants, name), False),
        )
        for name in VARIANT_NAMES
    ]


def axis_cases():
    """One row per value of each axis; the other three stay at their plainest value."""
    plain = miras.Rule(
        memory=memory.MLP(depth=2, expansion=2),
        bias=bias.L2(),
        retention=retention.Decay(),
        algorithm=algorithm.GradientDescent(),
        chunk_size=4,
        readout="linear",
    )
    linear = replace(plain, memory=memory.Linear())
    normed = replace(plain, memory=memory.Linear(residual=True, norm=True))
    deep = replace(plain, memory=memory.MLP(depth=3, expansion=2))
    by_value = replace(linear, retention=retention.Decay(axis="value"))
    yaad = replace(plain, bias=bias.Huber(form="switch"))
    moneta = replace(
        plain, bias=bias.Lp(3.0), retention=retention.Lq(4.0, form="paper")
    )
    mirror = replace(plain, retention=retention.Lq(4.0, form="mirror"))
    moving = replace(plain, algorithm=algorithm.Momentum())
    retained = {
        "algorithm": algorithm.GradientDescent(at="retained"),
        "chunk_size": 1,
    }
    gated = memory.GatedMLP(expansion=2, residual=True, norm=True)
    power = retention.Bregman(retention.SignedPower(2.0))
    longhorn = replace(linear, retention=retention.Keep())
    two_steps = algorithm.GradientDescent(steps=2)
    two_retained = {
        "algorithm": algorithm.GradientDescent(at="retained", steps=2),
        "chunk_size": 1,
    }
    implicit = {"algorithm": algorithm.Implicit(), "chunk_size": 1}
    by_key = {"algorithm": algorithm.GradientDescent(axis="key"), "chunk_size": 1}
    vector = replace(linear, memory=memory.Vector())
    both = replace(linear, retention=retention.Decay(axis="both"))
    erase_retained = {"algorithm": algorithm.EraseWrite("retained"), "chunk_size": 1}
    muon = replace(plain, algorithm=algorithm.Muon(iterations=2))
    atlas = replace(muon, algorithm=algorithm.Muon(iterations=2, learn="outside"))
    omega = replace(plain, algorithm=algorithm.Omega(6, algorithm.GradientDescent()))
    newton = replace(linear, algorithm=algorithm.Newton(ridge=0.7), chunk_size=1)
    hebbian = {"memory": memory.Linear(), "bias": bias.DotProduct(), "chunk_size": 1}
    omega_lq = replace(mirror, algorithm=algorithm.Omega(3, algorithm.Momentum()))
    momentum_lq = replace(mirror, algorithm=algorithm.Momentum())
    momentum_retained = replace(
        linear, algorithm=algorithm.Momentum(at="retained"), chunk_size=1
    )
    return [
        Case("linear", linear),
        Case("linear-channels", linear, channelwise=True),
        Case("linear-norm-channels", normed, channelwise=True),
        Case("linear-l1", replace(linear, bias=bias.L1(), chunk_size=1)),
        Case("vector", replace(vector, bias=bias.DotProduct())),
        Case("vector-channels", vector, channelwise=True),
        Case("mlp-1-channels", replace(plain, memory=memory.MLP(depth=1)), True),
        Case("mlp-2-channels", plain, channelwise=True),
        Case("mlp-3", deep),
        Case("mlp-3-channels", deep, channelwise=True),
        Case("gated-mlp", replace(plain, memory=memory.GatedMLP(expansion=2))),
        Case("gated-mlp-norm-channels", replace(plain, memory=gated), True),
        Case("linf", replace(plain, bias=bias.Linf())),
        Case("robust", replace(plain, bias=bias.Robust(0.3))),
        Case("dot-product", replace(plain, bias=bias.DotProduct())),
        Case("lp-exact", replace(plain, bias=bias.Lp(3.0, smooth=False))),
        Case("l1", replace(plain, bias=bias.L1())),
        Case("huber-coordinate", replace(plain, bias=bias.Huber(form="coordinate"))),
        Case("huber-norm", replace(plain, bias=bias.Huber(form="norm"))),
        Case("huber-switch-channels", yaad, channelwise=True),
        Case("keep", replace(plain, retention=retention.Keep())),
        Case("decay-value-channels", by_value, channelwise=True),
        Case("decay-both-channels", both, channelwise=True),
        Case("decay-both", replace(both, memory=plain.memory)),
        Case("learn-key-channels", replace(linear, **by_key), channelwise=True),
        Case("erase-retained", replace(linear, **erase_retained), ("erase",)),
        Case("lq-paper-channels", moneta, channelwise=True),
        Case("lq-paper-3", replace(plain, retention=retention.Lq(3.0, "paper"))),
        Case("lq-mirror", mirror),
        Case("lq-mirror-1.5", replace(plain, retention=retention.Lq(1.5, "mirror"))),
        Case("kl-0", replace(plain, retention=retention.KL(mass=3.0, axis=0))),
        Case("kl-1", replace(plain, retention=retention.KL(mass=3.0, axis=1))),
        Case("kl-last", replace(plain, retention=retention.KL(mass=3.0, axis=-1))),
        *(
            Case(f"f-{name}", replace(plain, retention=gate))
            for name, gate in {
                "kl": retention.FDivergence("kl", mass=3.0),
                "reverse-kl": retention.FDivergence("reverse_kl", mass=3.0, axis=1),
                "chi-square": retention.FDivergence("chi_square", mass=3.0),
                "hellinger": retention.FDivergence("hellinger", mass=3.0, axis=-1),
            }.items()
        ),
        *(
            Case(f"elastic-{name}", replace(plain, retention=gate), name != "hard")
            for name, gate in {
                "hard": retention.ElasticNet(threshold=0.02),
                "hard-channels": retention.ElasticNet(threshold=0.02),
                "smooth-channels": retention.ElasticNet(threshold=0.02, smooth=True),
                "lazy-channels": retention.ElasticNet("lazy", 0.05),
                "lazy-smooth-channels": retention.ElasticNet("lazy", 0.05, True),
            }.items()
        ),
        Case("bregman-sigmoid", replace(plain, retention=retention.Bregman())),
        Case("bregman-power-channels", replace(plain, retention=power), True),
        Case("two-steps-channels", replace(yaad, algorithm=two_steps), True),
        Case("two-steps-retained", replace(linear, **two_retained)),
        Case("implicit", replace(linear, **implicit)),
        Case("implicit-value-channels", replace(by_value, **implicit), True),
        Case("implicit-keep", replace(longhorn, **implicit)),
        Case("implicit-channels", replace(longhorn, **implicit), True),
        Case("learn-value-channels", replace(linear, **retained), ("learn",)),
        Case("retained-channels", replace(plain, **retained), channelwise=True),
        Case("momentum-channels", moving, channelwise=True),
        Case("momentum-linear", replace(moving, memory=memory.Linear())),
        Case("momentum-retained", momentum_retained),
        Case("momentum-lq", momentum_lq),
        Case("muon-channels", replace(muon, retention=retention.Sphere()), True),
        Case("muon-outside-channels", atlas, ("keep",)),
        # Huber's "switch" jumps, and six steps together blow up what was rounded.
        Case("omega-channels", replace(omega, bias=bias.Huber("norm")), True),
        Case("omega-momentum-lq", omega_lq),
        Case("omega-dot-product", replace(omega, **hebbian)),
        Case("newton-start", replace(newton, readout="start")),
        Case("start-channels", replace(moneta, readout="start"), True),
        Case("start-one", replace(linear, readout="start", chunk_size=1)),
        Case("momentum-lq-exact", replace(momentum_lq, readout="exact")),
    ]


def all_cases():
    return variant_cases() + axis_cases()


def dims(rule):
    """Key and value width; a residual needs them equal."""
    always = isinstance(rule.memory, (memory.MLP, memory.Vector))
    same = always or getattr(rule.memory, "residual", False)
    return (4, 4) if same else (4, 6)


def inputs(case, length=LENGTH, seed=0):
    """Random float64 parameters and tokens, as NumPy arrays."""
    rule, channelwise = case.rule, case.channelwise
    rng = np.random.default_rng(seed)
    key_dim, value_dim = dims(rule)

    steps = rule.algorithm.steps
    pairs = (length,) if steps == 1 else (length, steps)

    def rate(name, low, high, width, tokens=(length,)):
        wide = name in channelwise if isinstance(channelwise, tuple) else channelwise
        shape = (*tokens, width) if wide and width else tokens
        return rng.uniform(low, high, shape)

    def parameter(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[0].name == "weights":
            return noise / np.sqrt(leaf.shape[0])
        return float(path[0].name == "norm_scale") + 0.3 * noise

    shapes = jax.eval_shape(
        lambda: rule.init(jax.random.key(0), key_dim=key_dim, value_dim=value_dim)
    )
    params = jax.tree.map_with_path(parameter, shapes)
    has_gate = "keep" in rule.rates
    by_value = rule.retention.axis == "value"
    learn_dim = key_dim if rule.algorithm.axis == "key" else value_dim
    erases = "erase" in rule.rates
    has_momentum = "momentum" in rule.rates
    has_threshold = "threshold" in rule.rates
    rates = miras.Rates(
        learn=rate("learn", 0.1, 0.6, learn_dim, pairs) / steps
        if "learn" in rule.rates
        else None,
        keep=rate("keep", 0.7, 0.99, value_dim if by_value else key_dim)
        if has_gate
        else None,
        momentum=rate("momentum", 0.4, 0.9, None) if has_momentum else None,
        threshold=rate("threshold", 0.8, 2.5, value_dim, pairs)
        if has_threshold
        else None,
    )
    if "keep_value" in rule.rates:
        rates = rates._replace(keep_value=rate("keep_value", 0.7, 0.99, value_dim))
    if erases:
        rates = rates._replace(erase=rate("erase", 0.1, 0.6, key_dim))
    tokens = miras.Tokens(
        queries=rng.normal(size=(length, key_dim)) / np.sqrt(key_dim),
        keys=rng.normal(size=(*pairs, key_dim)) / np.sqrt(key_dim),
        values=rng.normal(size=(*pairs, value_dim)),
        rates=rates,
    )
    if erases:
        erase_keys = rng.normal(size=(length, key_dim)) / np.sqrt(key_dim)
        tokens = tokens._replace(erase_keys=erase_keys)
    return params, tokens


def jit(function):
    """jax.jit at the lowest effort: these programs run once, compiling is the cost."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@cache
def start(rule):
    return jit(rule.start)


@cache
def run(rule, implementation):
    """Compiled `miras.run` from a state whose place in the chunk is data."""

    def run_from(params, state, tokens):
        return miras.run(rule, params, state, tokens, implementation=implementation)

    return jit(run_from)


@cache
def run_whole(rule, implementation):
    """Compiled `miras.run` from the first token, a place known while compiling."""

    def run_all(params, tokens):
        state = rule.start(params)
        return miras.run(rule, params, state, tokens, implementation=implementation)

    return jit(run_all)


@cache
def step(rule):
    return jit(lambda params, state, token: miras.step(rule, params, state, token))


def run_steps(rule, params, tokens):
    """Decode token by token; return the outputs and the state after each token."""
    state, outputs, states = start(rule)(params), [], []
    for t in range(len(tokens.keys)):
        token = jax.tree.map(lambda x, t=t: x[t], tokens)
        output, state = step(rule)(params, state, token)
        outputs.append(output)
        states.append(state)
    return np.array(outputs), states


def error(actual, expected):
    """RMS of the difference relative to the RMS of the expected array."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
