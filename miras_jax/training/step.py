"""The pure functions of training: state, train step, evaluation step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from miras_jax.nn.functional import FunctionalModel, Parameters
from miras_jax.training.config import Guard, Optimizer

LOSS_AVERAGE_DECAY = 0.95
"""Of the running mean of the loss that the guard compares with: about 20 steps."""

_DECAYED = ("weight", "embedding")
"""Last parts of the names of parameters with weight decay."""


class TrainState(NamedTuple):
    """All that the next step depends on; what a checkpoint stores."""

    parameters: Parameters
    optimizer: Any
    step: jax.Array  # int32, steps taken, skipped ones included
    average_loss: jax.Array  # float32, running mean of accepted losses
    skipped: jax.Array  # int32, updates skipped so far
    skipped_in_row: jax.Array  # int32


class Metrics(NamedTuple):
    """Diagnostics of one step, all scalars."""

    loss: jax.Array  # nats per token
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    stop: jax.Array  # above 0 where any process was asked to stop


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate after n updates: linear warm-up, then a cosine."""
    warmup = min(config.warmup_steps, max(steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW with the schedule and the weight-decay mask of `config`."""

    def decayed(parameters):
        return {
            name: name.rsplit("/", 1)[-1] in _DECAYED and "convolution" not in name
            for name in parameters
        }

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def init_state(model: FunctionalModel, optimizer, key: jax.Array) -> TrainState:
    """The state before the first step."""
    # Without weak types (jnp.full(n, 0.5) has one): no update would keep them, and the
    # train step would be compiled again for its second call.
    parameters = {name: p.astype(p.dtype) for name, p in model.init(key).items()}
    # One array each: the state is donated, and a buffer can be given away only once.
    return TrainState(
        parameters,
        optimizer.init(parameters),
        step=jnp.zeros((), jnp.int32),
        average_loss=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def token_losses(
    model: FunctionalModel, parameters: Parameters, tokens: jax.Array
) -> jax.Array:
    """Negative log-likelihood in nats of tokens 1 ... L of `[B, L + 1]`: `[B, L]`.

    Of packed documents `[B, 2, L + 1]`, tokens and segment ids, each document is read
    as if it were alone.
    """
    tokens, segment_ids = split_rows(tokens)
    logits, _ = model.apply(parameters, tokens[:, :-1], segment_ids=segment_ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def split_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Tokens `[B, L + 1]`, and the segment ids `[B, L]` of what is read, if any."""
    return (rows, None) if rows.ndim == 2 else (rows[:, 0], rows[:, 1, :-1])


def mean_loss(
    model: FunctionalModel, parameters: Parameters, rows: jax.Array
) -> jax.Array:
    """Nats per predicted token; what follows padding is not predicted."""
    losses = token_losses(model, parameters, rows)
    _, segment_ids = split_rows(rows)
    if segment_ids is None:
        return jnp.mean(losses)
    predicted = segment_ids != 0
    total = jnp.sum(jnp.where(predicted, losses, 0))
    return total / jnp.maximum(jnp.sum(predicted), 1)


def train_step(
    model: FunctionalModel,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    guard: Guard,
    state: TrainState,
    tokens: jax.Array,
    stop: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One update on tokens `[B, L + 1]`, skipped if loss or gradient are no good.

    Packed documents come as `[B, 2, L + 1]`, tokens and segment ids.

    stop `[devices]`: 1 where a process was asked to stop; the sum reaches all of them
    in the same step.
    """

    def loss_of(parameters):
        return mean_loss(model, parameters, tokens)

    loss, gradients = jax.value_and_grad(loss_of)(state.parameters)
    norm = optax.tree.norm(gradients)
    first = state.step == state.skipped
    average = jnp.where(first, loss, state.average_loss)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= guard.spike * average)

    updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    average = LOSS_AVERAGE_DECAY * average + (1 - LOSS_AVERAGE_DECAY) * loss

    def accept(new, old):
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    skipped = state.skipped + jnp.where(good, 0, 1)
    in_row = jnp.where(good, 0, state.skipped_in_row + 1)
    new_state = TrainState(
        accept(parameters, state.parameters),
        accept(moments, state.optimizer),
        state.step + 1,
        accept(average, state.average_loss),
        skipped,
        in_row,
    )
    learning_rate = rate(state.step - state.skipped)
    return new_state, Metrics(loss, norm, learning_rate, skipped, in_row, jnp.sum(stop))


def evaluate_step(
    model: FunctionalModel,
    parameters: Parameters,
    tokens: jax.Array,
    weights: jax.Array,
    stop: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sums over the batch of loss and weight per position `[L]`, and stop."""
    losses = weights * token_losses(model, parameters, tokens)
    return jnp.sum(losses, axis=0), jnp.sum(weights, axis=0), jnp.sum(stop)
