"""What a learning algorithm is, and the descents whose steps enter the dual at once."""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from miras_jax.core import causal
from miras_jax.core.product import Dot
from miras_jax.core.types import Choice, Weights
from miras_jax.errors import UserError

At = Literal["previous", "retained"]


class Algorithm(Protocol):
    """What a rule needs of a learning algorithm."""

    at: str  # gradient at W ("previous"), at keep_s W ("retained") or at 0 ("zero")
    rates: tuple[str, ...]  # the rates without which it cannot run
    steps: int  # key-value pairs per token
    implicit: bool  # whether it solves for the step, which only the delta rule allows
    erases: bool  # whether it erases at keys of their own: the delta rule, taken apart
    axis: str  # "key" or "value": where a channel-wise learn acts on a single matrix
    curves: bool  # whether it divides by a curvature, of which the dual is one side
    settles: bool  # whether its step is taken by settle, at a chunk's end
    window: int  # last tokens whose gradients make one step
    strides: bool  # whether learn multiplies that step instead of the gradients

    def step_size(self, learn: jax.Array | None, keys: jax.Array) -> jax.Array | None:
        """What multiplies the gradients, from rates.learn; keys `[..., K]`."""

    def start(self, dual: Weights) -> Weights:
        """Its state before the first token."""

    def step(self, carried: jax.Array | None, update: jax.Array, momentum):
        """(step that enters the dual, new state) of one matrix at one token."""

    def flow(self, decay, momentum, side, when, written) -> causal.Flow:
        """The recurrences of one matrix over a block of tokens."""

    def settle(
        self, dual: Weights, momentum: Weights, stride: Weights, dot: Dot
    ) -> Weights:
        """The dual with the step at a chunk's end; stride: () or its sizes."""

    def provisional(self, momentum: jax.Array, stride: jax.Array | float) -> jax.Array:
        """That step of one matrix as the linear readout sees it."""


def _check_at(at: str) -> None:
    if at not in ("previous", "retained"):
        raise UserError(
            "An algorithm takes the gradient at='previous' weights or at='retained' "
            f"(already decayed) ones; got {at!r}."
        )


class Descent(Choice):
    """What most algorithms have in common: one step, which enters the dual as it is."""

    rates = ()
    steps = 1
    implicit = False
    erases = False
    axis = "value"
    curves = False
    strides = False
    window = 1

    @property
    def settles(self):
        return type(self).settle is not Descent.settle

    def step_size(self, learn, keys):
        return learn

    def start(self, dual):
        return ()

    def step(self, carried, update, momentum):
        return update, None

    def flow(self, decay, momentum, side, when, written):
        return causal.decay_flow(decay, side, when)

    def settle(self, dual, momentum, stride, dot):
        return dual


@dataclass(frozen=True, repr=False)
class GradientDescent(Descent):
    """step_s = u_s (Miras, eq. 5).

    The gradient is taken at the weights before this token's decay (Miras, Titans) or,
    with at="retained", at the decayed ones, keep_s W_{s-1} (Gated DeltaNet, Mamba-2;
    see footnote 2 of Miras on the difference).

    steps: descents per token, each on a key-value pair of its own (DeltaProduct, arXiv
    2502.10297, section 3). Tokens then bring keys `[L, steps, K]`, values and, of the
    rates, learn and threshold with that axis too; the token forgets once, before its
    first descent, and is read after its last. Chunks are of whole tokens.

    axis: where a channel-wise learn acts on a memory of a single matrix: a rate for
    each value, or for each "key" channel, which is a diagonal preconditioner.
    """

    at: At = "previous"
    steps: int = 1
    axis: Literal["key", "value"] = "value"

    def __post_init__(self):
        _check_at(self.at)
        if self.axis not in ("key", "value"):
            raise UserError(
                f"algorithm.GradientDescent(axis=...) is 'key' or 'value'; got "
                f"{self.axis!r}."
            )
        if self.steps < 1:
            raise UserError(
                f"algorithm.GradientDescent needs steps >= 1; got {self.steps}."
            )


@dataclass(frozen=True, repr=False)
class Implicit(Descent):
    """W_s = argmin |W - keep_s W_{s-1}|^2 / 2 learn_s + loss(W): the proximal step.

    For a plain matrix and the L2 bias that is the delta rule at the decayed weights
    with step size learn / (1 + learn |k|^2) (Longhorn, arXiv 2407.14207, eq. 6 and 7);
    it never overshoots, however large learn is. A channel-wise learn acts per value.
    """

    at = "retained"
    implicit = True

    def step_size(self, learn, keys):
        learn = jnp.ones(keys.shape[:-1], keys.dtype) if learn is None else learn
        square = jnp.sum(keys * keys, axis=-1, keepdims=learn.ndim == keys.ndim)
        return learn / (1 + learn * square)


@dataclass(frozen=True, repr=False)
class EraseWrite(Descent):
    """step_s = learn_s k_s v_s^T - (erase_s * e_s) M(e_s)^T, e = `tokens.erase_keys`.

    The L2 gradient k M(k)^T - k v^T taken apart: what is recalled at one key is erased,
    and the value written at another (RWKV-7, arXiv 2503.14456, eq. 17; at e = k and
    erase = learn the delta rule). erase is one per token or per key channel.
    """

    at: At = "previous"

    rates = ("erase",)
    erases = True

    def __post_init__(self):
        _check_at(self.at)


@dataclass(frozen=True, repr=False)
class Momentum(Descent):
    """step_s = m_s = momentum_s m_{s-1} + u_s (Titans, eq. 9 and 13), from m_0 = 0."""

    at: At = "previous"

    rates = ("momentum",)

    def __post_init__(self):
        _check_at(self.at)

    def start(self, dual):
        return tuple(jnp.zeros_like(a) for a in dual)

    def step(self, carried, update, momentum):
        m = momentum * carried + update
        return m, m

    def flow(self, decay, momentum, side, when, written):
        return causal.momentum_flow(decay, momentum, side, when, written)


@dataclass(frozen=True, repr=False)
class NonParametric(Descent):
    """No step: the solution for all tokens that memory.Cache keeps (Table 1)."""

    at = "previous"
