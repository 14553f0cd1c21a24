"""Attentional biases: the inner loss, by its value and its cotangent at the prediction.

`r = M(k) - v` is the residual. The engine only needs `cotangent`, d loss / d
prediction, because the gradient with respect to the weights is that vector pulled back
through the memory. `threshold` is `rates.threshold`, broadcastable to the prediction,
or None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from miras_jax.core.types import Choice
from miras_jax.errors import UserError


class Bias(Protocol):
    """What a rule needs of an attentional bias. Arrays are `[..., V]`."""

    rates: tuple[str, ...]  # the rates that it uses: threshold, or none

    def loss(self, prediction, value, threshold=None) -> jax.Array:
        """The inner loss, summed over V: `[...]`."""

    def cotangent(self, prediction, value, threshold=None) -> jax.Array:
        """Its gradient with respect to the prediction: `[..., V]`."""


def smooth_sign(r: jax.Array) -> jax.Array:
    """tanh(10 r) for Sign(r) (Miras, remark 5, which leaves the slope open)."""
    return jnp.tanh(10 * r)


def norm(r: jax.Array) -> jax.Array:
    """Euclidean norm over the last axis, kept; its gradient at zero is zero."""
    square = jnp.sum(r * r, axis=-1, keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


@dataclass(frozen=True, repr=False)
class DotProduct(Choice):
    """-<M(k), v>: Hebbian, the bias of linear attention (Miras, eq. 8)."""

    rates = ()

    def loss(self, prediction, value, threshold=None):
        return -jnp.sum(prediction * value, axis=-1)

    def cotangent(self, prediction, value, threshold=None):
        return -value


@dataclass(frozen=True, repr=False)
class L2(Choice):
    """|r|_2^2 / 2: the delta rule, TTT, Titans (Miras, eq. 9 and section 4)."""

    rates = ()

    def loss(self, prediction, value, threshold=None):
        return 0.5 * jnp.sum(jnp.square(prediction - value), axis=-1)

    def cotangent(self, prediction, value, threshold=None):
        return prediction - value


@dataclass(frozen=True, repr=False)
class Lp(Choice):
    """sum |r|^p, p >= 1 (Miras, eq. 10 and 11), Moneta's bias.

    `smooth` (remark 5): cotangent p tanh(10 r) (r^2 + 1e-6)^((p-1)/2); otherwise the
    exact p Sign(r) |r|^(p-1), which gives the outer loop no derivative of the sign.
    """

    p: float = 3.0
    smooth: bool = True

    rates = ()

    def __post_init__(self):
        if self.p < 1:
            raise UserError(f"bias.Lp needs p >= 1 to be convex; got p={self.p}.")

    def loss(self, prediction, value, threshold=None):
        return jnp.sum(jnp.abs(prediction - value) ** self.p, axis=-1)

    def cotangent(self, prediction, value, threshold=None):
        r = prediction - value
        if self.smooth:
            return self.p * smooth_sign(r) * (r * r + 1e-6) ** ((self.p - 1) / 2)
        return self.p * jnp.sign(r) * jnp.abs(r) ** (self.p - 1)


def L1(smooth: bool = True) -> Lp:
    """sum |r|: the value-less memory (Miras, eq. 12), that is `Lp(1)`."""
    return Lp(1.0, smooth)


@dataclass(frozen=True, repr=False)
class Huber(Choice):
    """Quadratic near the target, linear beyond a threshold delta (Miras, eq. 13).

    "coordinate"  sum_j H(r_j): r_j, clipped to [-delta, delta] (eq. 14)
    "norm"        H(|r|_2): r, shortened to length delta (eq. 15)
    "switch"      r where |r|_2 <= delta, else delta times the smooth gradient of L1
                  (eq. 16, Yaad); a gradient of no loss, its `loss` is the form "norm"

    delta is `rates.threshold` (a channel-wise one is compared per coordinate), or the
    field `threshold` where a token brings none.
    """

    form: Literal["coordinate", "norm", "switch"] = "switch"
    threshold: float = 1.0

    rates = ("threshold",)

    def __post_init__(self):
        if self.form not in ("coordinate", "norm", "switch"):
            raise UserError(
                "bias.Huber(form=...) is 'coordinate', 'norm' or 'switch'; "
                f"got {self.form!r}."
            )

    def loss(self, prediction, value, threshold=None):
        delta = self.threshold if threshold is None else threshold
        r = prediction - value
        size = jnp.abs(r) if self.form == "coordinate" else norm(r)
        huber = jnp.where(size <= delta, size * size / 2, delta * (size - delta / 2))
        # A channel-wise delta gives the norm forms one value per channel: their mean.
        reduce = jnp.sum if self.form == "coordinate" else jnp.mean
        return reduce(huber, axis=-1)

    def cotangent(self, prediction, value, threshold=None):
        delta = self.threshold if threshold is None else threshold
        r = prediction - value
        match self.form:
            case "coordinate":
                return jnp.where(jnp.abs(r) <= delta, r, delta * jnp.sign(r))
            case "norm":
                size = norm(r)
                return jnp.where(
                    size <= delta, r, delta * r / jnp.where(size > 0, size, 1)
                )
            case "switch":
                return jnp.where(norm(r) <= delta, r, delta * smooth_sign(r))


@dataclass(frozen=True, repr=False)
class Linf(Choice):
    """A smooth largest error: T log mean_j exp(|r_j| / T), |r| = sqrt(r^2 + 1e-6).

    The limit p -> infinity of the L_p bias: between the mean error and, as the
    temperature T goes to 0, the largest one.
    """

    temperature: float = 0.1

    rates = ()

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(f"bias.Linf needs temperature > 0; got {self.temperature}.")

    def loss(self, prediction, value, threshold=None):
        r = prediction - value
        size = jnp.sqrt(r * r + 1e-6) / self.temperature
        width = r.shape[-1]
        return self.temperature * jax.nn.logsumexp(size, axis=-1, b=1 / width)

    def cotangent(self, prediction, value, threshold=None):
        r = prediction - value
        size = jnp.sqrt(r * r + 1e-6)
        return jax.nn.softmax(size / self.temperature, axis=-1) * r / size


@dataclass(frozen=True, repr=False)
class Robust(Choice):
    """(|r|_2 + radius)^2 / 2, the worst case over shifts of the value by `radius`.

    Cotangent r + radius r / |r|_2 (Miras, eq. 17 and below); 0 at r = 0.
    """

    radius: float = 0.1

    rates = ()

    def __post_init__(self):
        if self.radius < 0:
            raise UserError(f"bias.Robust needs radius >= 0; got {self.radius}.")

    def loss(self, prediction, value, threshold=None):
        size = norm(prediction - value)[..., 0]
        return jnp.square(size + self.radius) / 2

    def cotangent(self, prediction, value, threshold=None):
        r = prediction - value
        size = norm(r)
        return r + self.radius * r / jnp.where(size > 0, size, 1)


@dataclass(frozen=True, repr=False)
class Function(Choice):
    """Any differentiable inner loss `function(prediction_V, value_V) -> scalar`."""

    function: Callable[[jax.Array, jax.Array], jax.Array]

    rates = ()

    def loss(self, prediction, value, threshold=None):
        return jnp.vectorize(self.function, signature="(v),(v)->()")(prediction, value)

    def cotangent(self, prediction, value, threshold=None):
        gradient = jnp.vectorize(jax.grad(self.function), signature="(v),(v)->(v)")
        return gradient(prediction, value)
