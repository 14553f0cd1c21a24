"""Twenty steps of training on a language of one fixed successor for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from miras_jax.nn.model import Model
from tests import nn
from tests.core import jit

VOCAB, LENGTH, STEPS = 16, 16, 20


def check_that_it_learns(*mixers):
    """The loss falls by half, all is finite, every parameter has a gradient."""
    config = Model(width=nn.WIDTH, depth=len(mixers), mixers=mixers, hidden=32)
    graph, params = nnx.split(config.build(VOCAB, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    follower, tokens = rng.permutation(VOCAB), [rng.integers(0, VOCAB, (4, 1))]
    for _ in range(LENGTH):
        tokens.append(follower[tokens[-1]])
    tokens = np.concatenate(tokens, axis=1)
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits, _ = nnx.merge(graph, params)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    def step(carry, _):
        params, moments = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        reached = jax.tree.map(lambda g: jnp.any(g != 0), gradient)
        return (optax.apply_updates(params, updates), moments), (value, reached)

    @jit
    def train(params):
        carry = (params, optimizer.init(params))
        return jax.lax.scan(step, carry, length=STEPS)

    (params, _), (losses, reached) = train(params)
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
    assert losses[-1] < 0.5 * losses[0]
    for path, used in nn.leaves(reached).items():
        assert used[-1], f"{path} receives no gradient"
