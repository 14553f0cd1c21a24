"""Logits of a part of the vocabulary at a time change nothing but the memory."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.model import Model
from miras_jax.training import sharding
from miras_jax.training.config import Mesh
from miras_jax.training.loss import loss_and_gradients
from pallas_kernels.aot import hlo
from tests.core import error, jit

MODEL = Model(width=16, depth=1, mixers=(Attention(num_heads=2),), hidden=16)
BATCH, LENGTH, VOCAB = 2, 8, 29


def losses(model, vocab=VOCAB, length=LENGTH):
    """The program of losses and of gradients, each token's loss weighed; parameters."""
    functional = FunctionalModel(model, vocab)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (BATCH, length + 1))
    weights = rng.normal(size=(BATCH, length))

    def weighed(parameters):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        values, _ = functional.losses(parameters, inputs, targets)
        return (weights * values).sum(), values

    program = jit(jax.value_and_grad(weighed, has_aux=True))
    return program, functional.init(jax.random.key(0))


@pytest.mark.parametrize("embedding", ["tied", "untied"])
@pytest.mark.parametrize("blocks", [2, 5, VOCAB])
def test_losses_and_gradients_are_those_of_the_whole(blocks, embedding):
    model = replace(MODEL, embedding=embedding)
    whole, parameters = losses(model)
    in_blocks, _ = losses(replace(model, vocab_blocks=blocks))
    (_, expected), gradients = whole(parameters)
    (_, found), others = in_blocks(parameters)
    assert error(found, expected) < 1e-6
    for name, gradient in gradients.items():
        assert error(others[name], gradient) < 1e-5, name


def test_bfloat16_gradients_are_summed_in_float32():
    """Over more blocks than bfloat16 could add up."""
    model = replace(MODEL, compute_dtype="bfloat16")
    whole, parameters = losses(model, vocab=600)
    in_blocks, _ = losses(replace(model, vocab_blocks=600), vocab=600)
    _, gradients = whole(parameters)
    _, others = in_blocks(parameters)
    for name, gradient in gradients.items():
        assert error(others[name], gradient) < 2e-2, name


def test_blocks_need_the_memory_of_one():
    def memory(blocks):
        model = replace(MODEL, vocab_blocks=blocks)
        program, parameters = losses(model, vocab=8192, length=256)
        analysis = program.lower(parameters).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert 4 * memory(32) < BATCH * 256 * 8192 * 4 < memory(1)


@pytest.mark.parametrize("sizes", [Mesh(2, 4, 1), Mesh(2, 2, 2)])
def test_no_more_is_sent_between_devices(sizes):
    """Not the matrix once more, and of its gradient the block that it is of."""
    mesh = sharding.make_mesh(sizes)

    def sent(blocks):
        model = replace(MODEL, vocab_blocks=blocks, compute_dtype="bfloat16")
        functional = FunctionalModel(model, 256)
        splits = {
            name: sharding.parameter_sharding(mesh, name, axes, shape.shape)
            for (name, shape), axes in zip(
                functional.shapes.items(), functional.axes.values(), strict=True
            )
        }
        parameters = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=splits[name])
            for name, x in functional.shapes.items()
        }
        rows = jax.ShapeDtypeStruct(
            (8, 33), np.int32, sharding=NamedSharding(mesh, sharding.BATCH)
        )
        function = functools.partial(loss_and_gradients, functional)
        step = sharding.on_mesh(mesh, lambda p, rows: function(p, rows)[1])
        program = jax.jit(step, out_shardings=splits).lower(parameters, rows)
        return hlo.sent(program.compile().as_text())

    whole, in_blocks = sent(1), sent(4)
    added = in_blocks.pop("all-reduce") - whole.pop("all-reduce")
    assert in_blocks == whole
    # The gradient of what is read is summed over the devices that share the vocabulary,
    # block by block: of two rows of 32 tokens, in float32.
    assert added <= (sizes.model - 1) * 4 * (2 * 32 * MODEL.width * 4)


def test_no_block_is_refused():
    with pytest.raises(UserError, match="vocab_blocks=.* at least 1; got 0"):
        replace(MODEL, vocab_blocks=0)


def test_more_blocks_than_tokens_are_refused():
    model = replace(MODEL, vocab_blocks=VOCAB + 1)
    with pytest.raises(UserError, match="more blocks than the vocabulary has tokens"):
        model.build(VOCAB, nnx.Rngs(0))
