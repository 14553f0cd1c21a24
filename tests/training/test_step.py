"""One step: the golden one, the guard, the schedule, what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.runs import SharedRun, bad_batch, bits, tiny


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """`(change, tokens) -> before, after, metrics` of one step from the third on."""
    experiment = tiny(tmp_path_factory.mktemp("one_step"))
    run = SharedRun(experiment, "nowhere")
    tokens = np.random.default_rng(0).integers(0, 257, (8, 33), np.int32)

    def take(change=lambda state: state, tokens=tokens):
        state = jax.device_put(run.fresh, run.state_shardings)
        for _ in range(2):
            state, _ = run.the_step(state, run.to_devices(tokens_0), no_stop)
        state = jax.device_put(change(state), run.state_shardings)
        before = jax.tree.map(np.array, state)
        after, metrics = run.the_step(state, run.to_devices(tokens), no_stop)
        return before, jax.tree.map(np.array, after), metrics

    tokens_0, no_stop = tokens, run.stop_flags(False)
    return take


def with_average(factor):
    """The running mean such that the next loss, about 5.5, is `factor` times it."""
    return lambda state: state._replace(average_loss=state.average_loss / factor)


def with_nan(state):
    """One NaN among the parameters."""
    embedding = state.parameters["embedding"].at[0, 0].set(jnp.nan)
    return state._replace(parameters=state.parameters | {"embedding": embedding})


def with_steep_loss(state):
    """Logits of 1e8, and a running mean that allows for the loss that they make."""
    embedding = 1e8 * state.parameters["embedding"]
    parameters = state.parameters | {"embedding": embedding}
    return state._replace(parameters=parameters, average_loss=jnp.float32(1e12))


@pytest.mark.parametrize(
    "case",
    [{"tokens": bad_batch()}, {"change": with_nan},
     {"change": with_average(2.2)}, {"change": with_steep_loss}],
    ids=["nan batch", "nan parameter", "spike", "steep"],
)  # fmt: skip
def test_a_skipped_update_changes_nothing_but_the_counters(case, one_step):
    before, after, metrics = one_step(**case)
    counters = {"step": 3, "skipped": 1, "skipped_in_row": 1}
    expected = before._replace(**{n: np.int32(v) for n, v in counters.items()})
    assert bits(after) == bits(expected)
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 1)


def test_an_update_is_accepted_below_the_spike_and_ends_a_row(one_step):
    def change(state):
        state = with_average(1.8)(state)
        return state._replace(skipped=jnp.int32(1), skipped_in_row=jnp.int32(1))

    before, after, metrics = one_step(change)
    assert bits(after.parameters) != bits(before.parameters)
    assert (after.step, after.skipped, after.skipped_in_row) == (3, 1, 0)
    mean = 0.95 * before.average_loss + 0.05 * float(metrics.loss)
    assert after.average_loss == pytest.approx(mean, rel=1e-6)


# Loss (about log 257) and gradient norm of the tiny configuration's first step.
GOLDEN = (5.54805850982666, 1.2922130823135376)


def test_golden_first_step(one_step, tmp_path):
    run = SharedRun(tiny(tmp_path), "nowhere")
    tokens = np.arange(8 * 33, dtype=np.int32).reshape(8, 33) * 7 % 257
    state = jax.device_put(run.fresh, run.state_shardings)
    _, metrics = run.the_step(state, run.to_devices(tokens), run.stop_flags(False))
    found = (metrics.loss.item(), metrics.gradient_norm.item())
    assert found == pytest.approx(GOLDEN, rel=1e-5), (
        f"the first step gives loss and gradient norm {found}, not {GOLDEN}: the "
        "model, its initial values or the loss have changed. If that was meant, write "
        "the new numbers into GOLDEN and say so in CHANGELOG.md"
    )
