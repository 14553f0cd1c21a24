"""The rates of a rule: which parametrisation each has, and what it starts from."""

from dataclasses import dataclass

from miras_jax.core.rule import Rule
from miras_jax.core.types import Choice
from miras_jax.nn.rates import LowRank, PerHead, Rate


@dataclass(frozen=True, repr=False)
class RateChoices(Choice):
    """Parametrisation of each rate; None: the rule does without it."""

    learn: Rate | None = None
    keep: Rate | None = None
    momentum: Rate | None = None
    threshold: Rate | None = None
    keep_value: Rate | None = None
    erase: Rate | None = None


def default_rates(rule: Rule) -> RateChoices:
    """What an untrained layer starts from, where a model does not say otherwise.

    Of a plain matrix: learn 0.5, half of the error, and erase as much; keep 0.9 to
    0.999.

    Of a deep memory, whose gradients are taken at the start of a chunk of C tokens:
    learn limit / 8 to limit / 2, limit 0.32 / sqrt(C); a quarter of that with momentum,
    which adds the steps up, and of that a part where a window takes every gradient
    several times (but not of Muon's learn="outside", the size of a step whatever its
    gradients). keep 0.99 to 0.9999; momentum 0.5 to 0.9; threshold 0.05 to
    0.2. Behind a LayerNorm only the direction of the weights counts, so that what
    forgetting takes from their norm it adds to the effective step; and a chunk's steps,
    all taken at the same weights, overshoot together. Larger steps or more forgetting
    made the outer gradient explode within a hundred steps of training.

    Beyond its threshold delta, Huber's form "switch" has slope 10 delta at small
    residuals; with thresholds near 0.1 its two branches join smoothly.

    Channel-wise of rank 32 for deep memories, where the rule allows it; else, and for
    momentum rules and plain matrices, one per token and head.
    """
    if rule.memory.is_linear:
        learn = PerHead("sigmoid", (0.5, 0.5))
        keep = PerHead("keep", (0.001, 0.1))
    else:
        with_momentum = "momentum" in rule.rates
        channelwise = rule.retention.channelwise and not with_momentum
        make = LowRank if channelwise else PerHead
        limit = (0.08 if with_momentum else 0.32) * rule.chunk_size**-0.5
        if not rule.algorithm.strides:
            limit /= rule.algorithm.window
        learn = make("sigmoid", (limit / 8, limit / 2), limit)
        keep = make("keep", (0.0001, 0.01))
    choices = {
        "learn": learn,
        "keep": keep,
        "momentum": PerHead("sigmoid", (0.5, 0.9)),
        "threshold": LowRank("sigmoid", (0.05, 0.2)),
        "keep_value": keep,
        "erase": PerHead("sigmoid", (0.5, 0.5)),
    }
    return RateChoices(**{name: choices[name] for name in rule.rates})
