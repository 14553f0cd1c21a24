"""Omega: every token learns from a window of pairs, not from its own alone."""

from dataclasses import dataclass

from miras_jax.core.algorithm.descent import Algorithm, GradientDescent, Momentum
from miras_jax.core.types import Choice
from miras_jax.errors import UserError


@dataclass(frozen=True, repr=False)
class Omega(Choice):
    """u_t = -sum of learn_i grad loss(W; k_i, v_i) over the last `window` tokens i.

    The Omega rule (Atlas, arXiv 2505.23735, section 3.2): all gradients of a step are
    taken at the weights before it, those of the chunk's start also for the tokens of
    the window that an earlier chunk read. `inner` makes the step of u_t: with
    GradientDescent() W_t = keep_t W_{t-1} + u_t (OmegaNet), with Momentum() or
    Muon(learn="outside") theirs (Atlas). A window of one is `inner` itself.
    """

    window: int = 16
    inner: Algorithm = GradientDescent()

    steps = 1
    implicit = False
    erases = False
    curves = False

    def __post_init__(self):
        if self.window < 1:
            raise UserError(f"algorithm.Omega needs window >= 1; got {self.window}.")
        inner = self.inner
        known = isinstance(inner, GradientDescent | Momentum) and inner.steps == 1
        if not known or inner.at != "previous":
            raise UserError(
                "algorithm.Omega(inner=...) is GradientDescent(), Momentum() or "
                "Muon(), with at='previous' and one step per token; got "
                f"{inner}."
            )

    @property
    def at(self):
        return self.inner.at

    @property
    def rates(self):
        return self.inner.rates

    @property
    def axis(self):
        return self.inner.axis

    @property
    def settles(self):
        return self.inner.settles

    @property
    def strides(self):
        return self.inner.strides

    def step_size(self, learn, keys):
        return self.inner.step_size(learn, keys)

    def start(self, dual):
        return self.inner.start(dual)

    def step(self, carried, update, momentum):
        return self.inner.step(carried, update, momentum)

    def flow(self, decay, momentum, side, when, written):
        return self.inner.flow(decay, momentum, side, when, written)

    def settle(self, dual, momentum, stride, dot):
        return self.inner.settle(dual, momentum, stride, dot)

    def provisional(self, momentum, stride):
        return self.inner.provisional(momentum, stride)
