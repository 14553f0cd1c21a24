"""The loss of a language model without the logits of its whole vocabulary at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    rows: jax.Array,
    targets: jax.Array,
    blocks: int = 1,
) -> jax.Array:
    """-log softmax(x W^T)[target] in nats, `[B, L]`, for x `[B, L, D]`, W `[V, D]`.

    logits(x, rows of W) are those of these rows, `[B, L, rows]` in float32. With
    several blocks of the vocabulary there are logits of one block at a time, computed
    again on the way back: log sum exp of the whole is that of the blocks'.
    """
    if blocks == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits(x, rows), targets)
    vocab, size = len(rows), -(-len(rows) // blocks)
    # Every blocks-th row: devices that share the vocabulary have as much of each block.
    spread = jnp.pad(rows, ((0, size * blocks - vocab), (0, 0)))
    spread = jnp.swapaxes(spread.reshape(size, blocks, -1), 0, 1)
    # Its gradient is summed over blocks, which needs more digits than a product.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def read(_, block):
        first, rows = block
        tokens = (first + blocks * jnp.arange(size))[None, None]
        scores = logits(wide.astype(x.dtype), rows)
        scores = jnp.where(tokens < vocab, scores, -jnp.inf)
        of_target = jnp.where(targets[..., None] == tokens, scores, 0)
        return None, (jax.nn.logsumexp(scores, axis=-1), jnp.sum(of_target, axis=-1))

    body = jax.checkpoint(read, prevent_cse=False)
    _, (sums, of_targets) = jax.lax.scan(body, None, (jnp.arange(blocks), spread))
    return jax.nn.logsumexp(sums, axis=0) - jnp.sum(of_targets, axis=0)
