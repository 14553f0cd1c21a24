"""How much of a token's error its write takes, for each unit of learn."""

from functools import cache

import jax
import jax.numpy as jnp

from miras_jax.core.rule import Rule

CHANNELS, PAIRS = 32, 64


@cache
def gain(rule: Rule, threshold: float) -> float:
    """g: a write at the initial weights takes the part learn g of its error r.

    To first order and as a mean over random pairs of norm one: g = r^T J_A g_W / r^T r,
    r = M(k) - v, g_W the loss's gradient by the weights, J_A the derivative of M(k) by
    the dual. For a plain matrix and the squared error it is |k|^2 = 1; an MLP behind a
    LayerNorm has about 3, as long as its matrices are as `memory.MLP` draws them, and
    a gate that maps the dual to larger weights less. Of one step alone: momentum and
    windows add several up. Channels are 32: g hardly depends on their number. Two
    digits, so that all machines have the same.
    """

    def mean():
        of_weights, of_keys, of_values = jax.random.split(jax.random.key(0), 3)
        params = rule.init(of_weights, CHANNELS, CHANNELS)
        dual = rule.start(params).dual

        def weights(dual):
            return tuple(rule.retention.weights(a) for a in dual)

        def part(key, value):
            def recall(weights):
                return rule.memory.read(lambda i, x: x @ weights[i], params, key)

            prediction, pull_back = jax.vjp(recall, weights(dual))
            cotangent = rule.bias.cotangent(prediction, value, threshold)
            (gradient,) = pull_back(cotangent)
            _, taken = jax.jvp(lambda a: recall(weights(a)), (dual,), (gradient,))
            error = prediction - value
            return jnp.sum(error * taken), jnp.sum(error * error)

        keys, values = (_unit_rows(key) for key in (of_keys, of_values))
        taken, error = jax.vmap(part)(keys, values)
        return jnp.sum(taken) / jnp.sum(error)

    # Layers may be built while something is traced; this is a number at once.
    with jax.ensure_compile_time_eval():
        return float(f"{float(jax.jit(mean)()):.1e}")


def _unit_rows(key):
    x = jax.random.normal(key, (PAIRS, CHANNELS))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
