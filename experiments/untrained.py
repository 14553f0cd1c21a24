"""The rates of an untrained layer, for looking at a rule without training it."""

import math

import jax.numpy as jnp

import miras_jax as miras
from miras_jax.nn.defaults import default_rates


def rates(rule: miras.Rule, length: int) -> miras.Rates:
    """The middle of those that a layer's heads start from, the same for all tokens."""
    if rule.keeps_tokens:
        return miras.Rates()
    choices, steps = default_rates(rule), rule.algorithm.steps

    def rate(name):
        middle = math.sqrt(math.prod(getattr(choices, name).initial))
        several = steps > 1 and name in ("learn", "threshold")
        value = 1 - middle if name.startswith("keep") else middle
        return jnp.full((length, steps) if several else length, value)

    return miras.Rates(**{name: rate(name) for name in rule.rates})
