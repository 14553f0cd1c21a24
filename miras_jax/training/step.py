"""The pure functions of training: state, train step, evaluation step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from miras_jax.nn.functional import FunctionalModel, Parameters
from miras_jax.training.config import Guard
from miras_jax.training.loss import loss_and_gradients, token_losses

LOSS_AVERAGE_DECAY = 0.95
"""Of the running mean of the loss that the guard compares with: about 20 steps."""


class TrainState(NamedTuple):
    """All that the next step depends on; what a checkpoint stores."""

    parameters: Parameters
    optimizer: Any
    step: jax.Array  # int32, steps taken, skipped ones included
    average_loss: jax.Array  # float32, running mean of accepted losses
    skipped: jax.Array  # int32, updates skipped so far
    skipped_in_row: jax.Array  # int32
    carry: Any = None  # the model's state at the end of the last window, of all rows


class Metrics(NamedTuple):
    """Diagnostics of one step, all scalars."""

    loss: jax.Array  # nats per token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    stop: jax.Array  # above 0 where any process was asked to stop


class Walk(NamedTuple):
    """The shape of consecutive windows: what the carried state depends on."""

    rows: int
    context_length: int


def init_state(
    model: FunctionalModel, optimizer, walk: Walk | None, key: jax.Array
) -> TrainState:
    """The state before the first step; walk: of consecutive windows."""
    # Without weak types (jnp.full(n, 0.5) has one): no update would keep them, and the
    # train step would be compiled again for its second call.
    parameters = _strong(model.init(key))
    # One array each: the state is donated, and a buffer can be given away only once.
    return TrainState(
        parameters,
        optimizer.init(parameters),
        step=jnp.zeros((), jnp.int32),
        average_loss=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        carry=None if walk is None else start_carry(model, walk, parameters),
    )


def start_carry(model: FunctionalModel, walk: Walk, parameters: Parameters) -> Any:
    """The model's state before the first window, every leaf `[groups, B, ...]`.

    Attention without a window keeps context_length tokens from before each window.
    """
    return _strong(model.start(parameters, walk.rows, walk.context_length))


def _strong(tree):
    return jax.tree.map(lambda x: x.astype(x.dtype), tree)


def train_step(
    model: FunctionalModel,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    guard: Guard,
    walk: Walk | None,
    parts: int,
    state: TrainState,
    tokens: jax.Array,
    stop: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One update on tokens `[B, L + 1]`, skipped if loss or gradient are no good.

    Packed documents come as `[B, 2, L + 1]`, tokens and segment ids, and so do
    consecutive windows. Those begin in the state that the last ones left, a constant
    here: no gradient goes beyond the window's edge. After a skipped update all rows
    begin anew, as the state may be what was no good.

    parts: in which the batch is read, one after another (gradient accumulation).

    stop `[devices]`: 1 where a process was asked to stop; the sum reaches all of them
    in the same step.
    """
    (loss, carry), gradients = loss_and_gradients(
        model, state.parameters, tokens, state.carry, parts
    )
    norm = optax.tree.norm(gradients)
    first = state.step == state.skipped
    average = jnp.where(first, loss, state.average_loss)
    good = jnp.isfinite(loss) & (loss <= guard.spike * average) & (norm <= guard.norm)

    updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    average = LOSS_AVERAGE_DECAY * average + (1 - LOSS_AVERAGE_DECAY) * loss

    def accept(new, old):
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    if walk is not None:
        carry = accept(carry, start_carry(model, walk, state.parameters))
    skipped = state.skipped + jnp.where(good, 0, 1)
    in_row = jnp.where(good, 0, state.skipped_in_row + 1)
    new_state = TrainState(
        accept(parameters, state.parameters),
        accept(moments, state.optimizer),
        state.step + 1,
        accept(average, state.average_loss),
        skipped,
        in_row,
        carry,
    )
    learning_rate = rate(state.step - state.skipped)
    return new_state, Metrics(loss, norm, learning_rate, skipped, in_row, jnp.sum(stop))


def evaluate_step(
    model: FunctionalModel,
    parameters: Parameters,
    carry: Any,
    tokens: jax.Array,
    weights: jax.Array,
    stop: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Weighted sums over the batch of loss and weight per position `[L]`, stop, and the
    carry after these tokens."""
    losses, carry = token_losses(model, parameters, tokens, carry)
    losses = weights * losses
    return jnp.sum(losses, axis=0), jnp.sum(weights, axis=0), jnp.sum(stop), carry
