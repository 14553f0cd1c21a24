"""Loss and gradients of a batch do not depend on the parts in which it is read."""

import functools

import jax
import numpy as np
import pytest

from miras_jax import Rule, memory
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Mesh
from miras_jax.training.loss import loss_and_gradients
from miras_jax.training.run import Run
from pallas_kernels.aot import hlo
from tests.core import jit
from tests.training.runs import tiny

BATCH, LENGTH = 4, 8
MIXERS = (
    Miras(Rule(memory.Linear(), chunk_size=4), num_heads=2),
    Attention(num_heads=2, window=11),
)
MODEL = Model(width=16, depth=2, mixers=MIXERS, hidden=16, remat="block")


@pytest.fixture(scope="module")
def model():
    return FunctionalModel(MODEL, 60)


@pytest.fixture(scope="module")
def parameters(model):
    return model.init(jax.random.key(0))


def rows(batch=BATCH, length=LENGTH):
    tokens = np.random.default_rng(0).integers(1, 60, (batch, length + 1))
    return tokens.astype(np.int32)


def packed():
    """Rows of one, two and no documents, with more padding from row to row."""
    ids = np.zeros((BATCH, LENGTH + 1), np.int32)
    ids[0], ids[1, :4], ids[1, 4:], ids[2, :3] = 1, 1, 2, 1
    return np.stack([rows(), ids], axis=1)


@functools.cache
def program(model, parts):
    """Of tokens that go on from others."""

    def read(parameters, tokens):
        carry = model.start(parameters, BATCH, LENGTH)
        _, carry = model.apply(parameters, rows()[:, :LENGTH], carry)
        return loss_and_gradients(model, parameters, tokens, carry, parts)

    return jit(read)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("tokens", [rows(), packed()], ids=["whole", "packed"])
def test_parts_give_the_loss_and_gradients_of_the_batch(
    tokens, parts, model, parameters
):
    """And every row goes on in its own state."""
    (loss, carry), gradients = program(model, 1)(parameters, tokens)
    (found, after), summed = program(model, parts)(parameters, tokens)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for name, expected in gradients.items():
        np.testing.assert_allclose(
            summed[name], expected, rtol=1e-4, atol=1e-6, err_msg=name
        )
    for x, expected in zip(jax.tree.leaves(after), jax.tree.leaves(carry), strict=True):
        assert x.dtype == expected.dtype
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_parts_need_the_memory_of_one(model, parameters):
    function = functools.partial(loss_and_gradients, model)

    def memory_of(batch, parts):
        program = jax.jit(lambda p, t: function(p, t, None, parts))
        analysis = program.lower(parameters, rows(batch, 512)).compile()
        return analysis.memory_analysis().temp_size_in_bytes

    assert memory_of(16, 8) < 1.1 * memory_of(2, 1) < memory_of(16, 1) / 4


def test_no_row_is_sent_to_be_in_a_part(tmp_path):
    """Of a batch over eight devices each part has rows of all of them."""
    experiment = tiny(
        tmp_path,
        model=MODEL,
        mesh=Mesh(2, 4, 1),
        batch_size=64,
        accumulation=4,
        windows="consecutive",
    )
    run = Run(experiment, tmp_path / "run")
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    tokens = struct((64, 2, 33), sharding=run.batch_sharding)
    stop = struct((8,), sharding=run.flag_sharding)
    program = run.train_step.lower(run.abstract_state, tokens, stop).compile()
    # Parameters and gradients.
    assert hlo.sent(program.as_text()).keys() == {"all-gather", "all-reduce"}


def test_rows_that_parts_do_not_divide(tmp_path):
    run = Run(tiny(tmp_path, mesh=Mesh(data=8), accumulation=3), tmp_path / "run")
    with pytest.raises(UserError, match="in 3 parts each; use a multiple of 24"):
        run.check_rows()
    with pytest.raises(UserError, match="accumulation must be at least 1"):
        tiny(tmp_path, accumulation=0)
