"""The loss of a batch and its gradients, of all of it at once or in parts."""

from typing import Any

import jax
import jax.numpy as jnp

from miras_jax.nn.functional import FunctionalModel, Parameters


def token_losses(
    model: FunctionalModel, parameters: Parameters, rows: jax.Array, carry: Any = None
) -> tuple[jax.Array, Any]:
    """Negative log-likelihood in nats of tokens 1 ... L of `[B, L + 1]`: `[B, L]`.

    Of packed documents `[B, 2, L + 1]`, tokens and segment ids, each document is read
    as if it were alone. With a carry reading goes on from it; also the one after these
    tokens.
    """
    tokens, segment_ids = split_rows(rows)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return model.losses(parameters, inputs, targets, carry, segment_ids)


def split_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Tokens `[B, L + 1]`, and the segment ids `[B, L]` of what is read, if any."""
    return (rows, None) if rows.ndim == 2 else (rows[:, 0], rows[:, 1, :-1])


def loss_and_gradients(
    model: FunctionalModel,
    parameters: Parameters,
    rows: jax.Array,
    carry: Any = None,
    parts: int = 1,
) -> tuple[tuple[jax.Array, Any], Parameters]:
    """`((loss, carry), gradients)`: nats per predicted token, none after padding.

    parts: read one after another, their gradients summed in the parameters' dtype. Loss
    and gradients are those of the whole batch, whatever padding is in which part; what
    backpropagation needs is in memory for one part at a time.
    """
    _, segment_ids = split_rows(rows)
    if segment_ids is None:
        predicted = jnp.ones(rows[:, 1:].shape, jnp.float32)
    else:
        predicted = (segment_ids != 0).astype(jnp.float32)
    weights = predicted / jnp.maximum(jnp.sum(predicted), 1)

    def part_loss(parameters, rows, weights, carry):
        losses, carry = token_losses(model, parameters, rows, carry)
        # Not weights * losses: behind padding a loss need not be finite.
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0)), carry

    gradient = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        return gradient(parameters, rows, weights, carry)

    def add(sums, part):
        (loss, carry), gradients = gradient(parameters, *part)
        return jax.tree.map(jnp.add, sums, (loss, gradients)), carry

    start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters)
    pieces = _cut(rows, parts, 0), _cut(weights, parts, 0)
    carries = jax.tree.map(lambda x: _cut(x, parts, 1), carry)
    (loss, gradients), carries = jax.lax.scan(add, start, (*pieces, carries))
    return (loss, jax.tree.map(lambda x: _join(x, 1), carries)), gradients


def _cut(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """The rows of x along an axis in parts `[parts, ..., rows / parts, ...]`.

    Of every `parts` rows in turn each part has one, so that devices hold as many rows
    of each, and none is sent elsewhere.
    """
    rows = x.shape[axis] // parts
    pieces = x.reshape(*x.shape[:axis], rows, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(pieces, axis + 1, 0)


def _join(pieces: jax.Array, axis: int) -> jax.Array:
    """Inverse of `_cut`."""
    x = jnp.moveaxis(pieces, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
