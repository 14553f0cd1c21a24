"""Models that learn a network, or a matrix behind a LayerNorm, while they read."""

from miras_jax.core.algorithm import GradientDescent, Momentum
from miras_jax.core.bias import L2
from miras_jax.core.memory import MLP, Linear
from miras_jax.core.retention import Decay, Keep
from miras_jax.core.rule import Rule


def titans() -> Rule:
    """W_t = keep W + S_t, S_t = momentum S - learn grad L2 (Titans LMM).

    arXiv 2501.00663, eq. 13 and 14; keep is one minus its forgotten fraction.
    """
    return Rule(MLP(), L2(), Decay(), Momentum())


def ttt_mlp() -> Rule:
    """W_t = W - learn grad L2 on x + LN(gelu(x W_1) W_2), mini-batches of 16.

    TTT-MLP, arXiv 2407.04620, eq. 1 and section 2.7.
    """
    return Rule(MLP(), L2(), Keep(), GradientDescent(), chunk_size=16)


def ttt_linear() -> Rule:
    """W_t = W - learn grad L2 on x + LN(x W), mini-batches of 16 (TTT-Linear)."""
    memory = Linear(residual=True, norm=True)
    return Rule(memory, L2(), Keep(), GradientDescent(), chunk_size=16)
