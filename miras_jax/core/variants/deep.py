"""Models that learn a network, or a matrix behind a LayerNorm, while they read."""

from miras_jax.core.algorithm import GradientDescent, Momentum, Muon, Omega
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.memory import MLP, GatedMLP, Linear
from miras_jax.core.retention import Decay, Keep, Sphere
from miras_jax.core.rule import Rule


def titans() -> Rule:
    """W_t = keep W + S_t, S_t = momentum S - learn grad L2 (Titans LMM).

    arXiv 2501.00663, eq. 13 and 14; keep is one minus its forgotten fraction.
    """
    return Rule(MLP(), L2(), Decay(), Momentum())


def ttt_mlp() -> Rule:
    """W_t = W - learn grad L2 on x + LN(gelu(x W_1) W_2), mini-batches of 16.

    TTT-MLP, arXiv 2407.04620.
    """
    return Rule(MLP(), L2(), Keep(), GradientDescent(), chunk_size=16)


def ttt_linear() -> Rule:
    """W_t = W - learn grad L2 on x + LN(x W), mini-batches of 16.

    TTT-Linear, arXiv 2407.04620.
    """
    memory = Linear(residual=True, norm=True)
    return Rule(memory, L2(), Keep(), GradientDescent(), chunk_size=16)


def lact() -> Rule:
    """W_c+1 = L2norm(W_c + O(m)), m of -<M(k), v>, M = (silu(x W_1) * x W_2) W_3.

    Large chunks of 2,048 tokens that all read W_c, apply-then-update; learn weighs each
    token's gradient (LaCT, arXiv 2505.23884). Its momentum is one number per
    chunk: that of the chunk's first token here, with 1 for the others.
    """
    memory = GatedMLP(expansion=1)
    return Rule(memory, DotProduct(), Sphere(), Muon(), 2048, readout="start")


def omega_net() -> Rule:
    """W_t = keep W - sum of the last 16 tokens' learn grad L2 (OmegaNet).

    Atlas, arXiv 2505.23735. The length of the window is not printed; its
    largest tried, 16, was best. Polynomial features of keys and queries are a layer's.
    """
    return Rule(MLP(), L2(), Decay(), Omega(16))


def atlas() -> Rule:
    """W = keep W + learn O(S), S = momentum S - sum of 16 tokens' grad L2 (Atlas).

    arXiv 2505.23735, eq. 32 and 33, O five steps of Newton-Schulz, once per chunk; with
    chunk_size=1 the printed recurrence. Window and features as in `omega_net`.
    """
    return Rule(MLP(), L2(), Decay(), Omega(16, Muon(learn="outside")))


def atlas_gated() -> Rule:
    """Atlas with the memory x + (silu(x W_1) * x W_2) W_3 (Atlas++, 2505.23735)."""
    memory = GatedMLP(residual=True)
    return Rule(memory, L2(), Decay(), Omega(16, Muon(learn="outside")))
