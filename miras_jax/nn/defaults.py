"""The rates of a rule: which parametrisation each has, and what it starts from."""

from dataclasses import dataclass

from miras_jax.core.rule import Rule
from miras_jax.core.types import Choice
from miras_jax.nn.gain import gain
from miras_jax.nn.rates import LowRank, PerHead, Rate

THRESHOLD = (0.2, 0.6)
SHORTEST, LONGEST = 0.1, 10.0


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
    learn 0.4 u to 1.6 u, at most 6.4 u, u = unit / sqrt(C), where a write of learn =
    unit takes the whole error of its token, to first order and at the initial weights
    (`miras_jax.nn.gain`; within 0.1 and 10, and 0.1 where learn is the size of a step
    whatever its gradients, as Muon's learn="outside" has it). At chunks of 16 that is a
    tenth to two fifths of an error. A quarter of it with momentum, which adds the steps
    up, and of that a part where a window takes every gradient several times. momentum
    0.5 to 0.9.

    keep 0.999 to 0.99999. Behind a LayerNorm only the direction of the weights counts:
    steps make them longer, and so turn them less, and forgetting makes them shorter.
    Where the two balance, a token turns them by about sqrt(2 (1 - keep)), however small
    learn is. Where a hundredth was forgotten per token, a chunk's steps, all taken at
    the same weights, overshot together and the outer gradient grew with the distance.

    threshold 0.2 to 0.6. Where the norm of an error is beyond it, Huber's form "switch"
    goes on with signs of that size. An untrained memory's errors have a norm of 1.7, so
    about 0.2 in each of 64 channels: such signs make steps as long as the squared error
    does.

    Channel-wise of rank 32 for deep memories, where the rule allows it; else, for plain
    matrices, and for momentum and windows (Titans and Atlas weigh tokens by numbers),
    one per token and head.
    """
    if rule.keeps_tokens:
        return RateChoices()
    if rule.memory.is_linear:
        learn = PerHead("sigmoid", (0.5, 0.5))
        keep = PerHead("keep", (0.001, 0.1))
    else:
        with_momentum = "momentum" in rule.rates
        of_tokens = with_momentum or rule.algorithm.window > 1
        channelwise = rule.retention.channelwise and not of_tokens
        make = LowRank if channelwise else PerHead
        unit = _step(rule) * (0.25 if with_momentum else 1)
        learn = make("sigmoid", (0.4 * unit, 1.6 * unit), 6.4 * unit)
        keep = make("keep", (0.00001, 0.001))
    choices = {
        "learn": learn,
        "keep": keep,
        "momentum": PerHead("sigmoid", (0.5, 0.9)),
        "threshold": LowRank("sigmoid", THRESHOLD),
        "keep_value": keep,
        "erase": PerHead("sigmoid", (0.5, 0.5)),
    }
    return RateChoices(**{name: choices[name] for name in rule.rates})


def _step(rule: Rule) -> float:
    """The u of a deep memory in `default_rates`."""
    unit = SHORTEST
    if not rule.algorithm.strides:
        taken = gain(rule, sum(THRESHOLD) / 2)
        unit = min(max(unit, 1 / taken), LONGEST) if taken > 0 else unit
        unit /= rule.algorithm.window
    return unit / rule.chunk_size**0.5
