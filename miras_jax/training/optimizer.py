"""Optimizers of the outer loop: learning rates, weight decay, clipping, by optax.

`AdamW` and `Muon` are here; any frozen dataclass with the two methods of `Optimizer` is
another. Parameters come by name, those of blocks stacked: `groups/.../weight` of shape
`[groups, inputs, outputs]`.
"""

from dataclasses import dataclass
from typing import Protocol

import optax
from optax import contrib

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.functional import Parameters

_DECAYED = ("weight", "embedding")
"""Last parts of the names of parameters with weight decay."""


class Optimizer(Protocol):
    """What training needs of an optimizer, for a run of so many steps."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate after n updates."""
        ...

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """From gradients to what is added to the parameters."""
        ...


@dataclass(frozen=True, repr=False)
class AdamW(Choice):
    """AdamW: linear warm-up, cosine decay to a fraction of the peak, clipped gradients.

    decay_part: the last part of the updates after warm-up, in which the learning rate
    decays. 1 is the usual cosine; 0.2 keeps the peak for four fifths of them (warm-up,
    stable, decay).

    Weight decay acts on projections and the embedding only: not on norms, biases,
    convolutions or what a memory starts from.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    decay_part: float = 1.0

    def __post_init__(self):
        if not 0 < self.decay_part <= 1:
            raise UserError(
                f"{type(self).__name__}.decay_part is {self.decay_part}; it is a part "
                "of the updates: above 0, at most 1"
            )

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate after n updates."""
        warmup = min(self.warmup_steps, max(steps - 1, 1))
        decay = max(round(self.decay_part * (steps - warmup)), 1)
        peak = self.learning_rate
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warmup),
                optax.constant_schedule(peak),
                optax.cosine_decay_schedule(peak, decay, self.final_fraction),
            ],
            [warmup, max(steps - decay, warmup)],
        )

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """From gradients to what is added to the parameters."""
        adamw = optax.adamw(
            self.schedule(steps),
            b1=self.beta1,
            b2=self.beta2,
            weight_decay=self.weight_decay,
            mask=_decayed,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


@dataclass(frozen=True, repr=False)
class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW for all others.

    W <- W - rate (O(M) + decay W), M the momentum of the gradients, O five steps of
    Newton-Schulz towards an orthogonal matrix, times 0.2 sqrt(max(inputs, outputs)),
    which makes it as large as AdamW's updates (arXiv 2502.16982): one learning rate
    serves both. Weight decay acts on those matrices only.
    """

    momentum: float = 0.95

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """From gradients to what is added to the parameters."""
        muon = contrib.muon(
            self.schedule(steps),
            beta=self.momentum,
            weight_decay=self.weight_decay,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), muon)


def _decayed(parameters: Parameters) -> dict[str, bool]:
    return {
        name: name.rsplit("/", 1)[-1] in _DECAYED and "convolution" not in name
        for name in parameters
    }


def _matrices(parameters: Parameters) -> dict[str, contrib.MuonDimensionNumbers | None]:
    """Inputs and outputs of each matrix of a block, None for what is none."""
    axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return {
        name: axes if decays and name.startswith("groups/") else None
        for name, decays in _decayed(parameters).items()
    }
