"""Every kind of rule through the kernels, against the same chunks through XLA."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import variants
from miras_jax.core import engine
from miras_jax.errors import UserError
from pallas_kernels.fused_scan import target, tpu
from tests import core, kernels

KERNELS = ("tpu", "gpu")


@pytest.fixture(autouse=True)
def one_element_per_grid_step(monkeypatch):
    """Several cost a multiple to compile; test_fused_scan has them."""
    monkeypatch.setattr(tpu, "GROUP", 1)
    # Two blocks of the exact linear rules are enough, too.
    monkeypatch.setattr(engine, "KERNEL_TILES", dict.fromkeys(KERNELS, TILE))


TILE = 32
CHUNKS = 2
ROWS = 2

NAMES = (
    "yaad",
    "moneta",
    "memora",
    "titans",
    "ttt_linear",
    "linear_attention",
    "gated_delta_net",
    "implicit-channels",
    "delta_product",
    "huber-switch-channels",
    "decay-value-channels",
    "gated-mlp-norm-channels",
    "mesa_net",
    "f-kl",
    "elastic-smooth-channels",
    "momentum-lq-exact",
    "omega_net",
)
CASES = [case for case in core.all_cases() if case.name in NAMES]
# What differs for a kernel that works by tiles; the others are made of the same parts.
BY_TILES = (
    "huber-switch-channels",
    "decay-value-channels",
    "memora",
    "gated_delta_net",
    "implicit-channels",
    "mesa_net",
    "omega_net",
)
MEANS = ("memora", "f-kl")
"""Whose weights are positive, so that outputs are means of the same hidden units, of
which a LayerNorm takes the small differences. With first weights as of other rules
float32 itself is 1e-4 to 6e-4 from float64, by how a CPU adds up; with six times as
large ones, which tell the units apart, 3e-5."""

PAIRS = [
    pytest.param(case, kernel, id=f"{case.name}-{kernel}")
    for kernel in KERNELS
    for case in CASES
    if kernel == "tpu" or case.name in BY_TILES
]


def batch(case, dtype=np.float32, length=None):
    """Parameters of one head and tokens of a few sequences."""
    # Exact linear rules go through the kernel in tiles.
    size = case.rule.chunk_size if case.rule.chunk_size > 1 else TILE
    length = length or CHUNKS * size + 2
    several = [core.inputs(case, length, seed=seed) for seed in range(ROWS)]
    params = jax.tree.map(lambda x: x.astype(np.float32), several[0][0])
    if case.name in MEANS:
        params = params._replace(weights=tuple(6 * w for w in params.weights))
    tokens = [tokens for _, tokens in several]
    return params, jax.tree.map(lambda *x: np.stack(x).astype(dtype), *tokens)


def run(rule, implementation):
    """Outputs of every sequence and the weights that it leaves."""

    def one(params, tokens):
        state = rule.start(params)
        outputs, state = miras.run(
            rule, params, state, tokens, implementation=implementation
        )
        return {"outputs": outputs, "weights": rule.weights(state)}

    return jax.vmap(one, (None, 0))


@cache
def expected(case, dtype):
    return kernels.results(run(case.rule, "xla"), batch(case, dtype))


@pytest.mark.parametrize("case, kernel", PAIRS)
def test_outputs_state_and_every_gradient(case, kernel):
    with target(kernel, interpret=True):
        actual = kernels.results(run(case.rule, "pallas"), batch(case))
    found = kernels.errors(actual, expected(case, np.float32))
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["yaad", "decay-value-channels", "mesa_net"])
def test_bfloat16_tokens(name, kernel):
    (case,) = (case for case in CASES if case.name == name)
    dtype = jax.numpy.bfloat16
    with target(kernel, interpret=True):
        actual = kernels.results(run(case.rule, "pallas"), batch(case, dtype))
    found = kernels.errors(actual, expected(case, dtype))
    assert max(found.values()) < 2e-2, found


@pytest.mark.parametrize("name", ["yaad", "gated_delta_net"])
def test_lowers_to_triton(name):
    """Every operation of both kernels is one that Triton's compiler takes."""
    (case,) = (case for case in CASES if case.name == name)
    dtype = jax.numpy.bfloat16
    params, tokens = batch(case, dtype)

    def both(params, tokens):
        outputs, pull_back = jax.vjp(run(case.rule, "pallas"), params, tokens)
        return pull_back(jax.tree.map(jax.numpy.ones_like, outputs))

    with target("gpu"):
        traced = jax.jit(both).trace(params, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("kernel", ("tpu",))
def test_a_sequence_in_two_parts_that_are_no_whole_chunks(kernel):
    """The first ends inside a chunk, at a place known while compiling."""
    (case,) = (case for case in CASES if case.name == "yaad")
    params, tokens = batch(case, length=11)

    def in_parts(implementation):
        def one(params, tokens):
            state, outputs = case.rule.start(params), []
            for part in (slice(0, 6), slice(6, 11)):
                some = jax.tree.map(lambda x, part=part: x[part], tokens)
                output, state = miras.run(
                    case.rule, params, state, some, implementation=implementation
                )
                outputs.append(output)
            return jax.numpy.concatenate(outputs)

        return core.jit(jax.vmap(one, (None, 0)))

    whole = in_parts("xla")(params, tokens)
    with target(kernel, interpret=True):
        actual = in_parts("pallas")(params, tokens)
    assert core.error(actual, whole) < 1e-5


def test_another_rule_is_noticed():
    (case,) = (case for case in CASES if case.name == "yaad")
    other = replace(case.rule, bias=miras.bias.Huber(form="norm"))
    with target("tpu", interpret=True):
        actual = kernels.results(run(other, "pallas"), batch(case))
    found = kernels.errors(actual, expected(case, np.float32))
    assert min(found.values()) > 1e-3, found


def test_pallas_needs_a_chip():
    case = core.Case("yaad", core.small(variants.yaad()))
    with pytest.raises(UserError, match="TPU or a GPU"):
        run(case.rule, "pallas")(*batch(case))
