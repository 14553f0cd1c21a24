"""The three models of Miras (arXiv 2504.13173, section 5.3)."""

from miras_jax.core.algorithm import GradientDescent
from miras_jax.core.bias import L2, Huber, Lp
from miras_jax.core.memory import MLP
from miras_jax.core.retention import KL, Decay, Lq
from miras_jax.core.rule import Rule


def moneta() -> Rule:
    """W = A / |A|_q^(q-2), A_t = keep A - learn grad |M(k) - v|_p^p, (p, q) = (3, 4).

    Miras, arXiv 2504.13173, eq. 24 and 25.
    """
    return Rule(MLP(), Lp(3.0), Lq(4.0), GradientDescent())


def yaad() -> Rule:
    """W_t = keep W - learn (grad L2 where |M(k) - v| <= delta, else delta grad L1).

    Miras, arXiv 2504.13173, eq. 26.
    """
    return Rule(MLP(), Huber("switch"), Decay(), GradientDescent())


def memora() -> Rule:
    """W_t = c softmax(keep log W - learn grad |M(k) - v|^2 / 2).

    Miras, arXiv 2504.13173, eq. 27.
    """
    return Rule(MLP(), L2(), KL(mass=64.0), GradientDescent())
