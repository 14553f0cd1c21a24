"""Published models as rules: Table 1 of Miras (arXiv 2504.13173), one function each.

Conventions: `learn` is the step size, `keep` the fraction kept, gradients are of the
losses in `bias` (L2 carries the factor 1/2). Any part can be exchanged by
`dataclasses.replace`.
"""

from miras_jax.core.algorithm import GradientDescent, Implicit, Momentum
from miras_jax.core.bias import L2, DotProduct, Huber, Lp
from miras_jax.core.memory import MLP, Linear
from miras_jax.core.retention import KL, Decay, Keep, Lq
from miras_jax.core.rule import Rule


def moneta() -> Rule:
    """W = A / |A|_q^(q-2), A_t = keep A - learn grad |M(k) - v|_p^p, (p, q) = (3, 4).

    Miras, eq. 24 and 25.
    """
    return Rule(MLP(), Lp(3.0), Lq(4.0), GradientDescent())


def yaad() -> Rule:
    """W_t = keep W - learn (grad L2 where |M(k) - v| <= delta, else delta grad L1).

    Miras, eq. 26.
    """
    return Rule(MLP(), Huber("switch"), Decay(), GradientDescent())


def memora() -> Rule:
    """W_t = c softmax(keep log W - learn grad |M(k) - v|^2 / 2). Miras, eq. 27."""
    return Rule(MLP(), L2(), KL(mass=64.0), GradientDescent())


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


def linear_attention() -> Rule:
    """M_t = M + v k^T (arXiv 2006.16236), at learn = 1."""
    return Rule(Linear(), DotProduct(), Keep(), GradientDescent(), chunk_size=1)


def retnet() -> Rule:
    """M_t = keep M + v k^T, keep fixed per head (arXiv 2307.08621, eq. 5)."""
    return Rule(Linear(), DotProduct(), Decay(), GradientDescent(), chunk_size=1)


def delta_net() -> Rule:
    """M_t = (I - learn k k^T) M + learn v k^T (arXiv 2406.06484, eq. 2)."""
    return Rule(Linear(), L2(), Keep(), GradientDescent(), chunk_size=1)


def gated_delta_net() -> Rule:
    """M_t = keep (I - learn k k^T) M + learn v k^T (arXiv 2412.06464, eq. 10).

    The error is taken at the decayed memory.
    """
    algorithm = GradientDescent(at="retained")
    return Rule(Linear(), L2(), Decay(), algorithm, chunk_size=1)


def gated_delta_net_miras() -> Rule:
    """M_t = (keep I - learn k k^T) M + learn v k^T: the error at the old memory.

    The gated delta rule in the form that Miras and Titans give it (Titans, appendix C).
    """
    return Rule(Linear(), L2(), Decay(), GradientDescent(), chunk_size=1)


def longhorn() -> Rule:
    """M_t = (I - s k k^T) M + s v k^T, s = learn / (1 + learn |k|^2).

    The exact online solution of |M - M_{t-1}|^2 + learn |M k - v|^2, learn one number
    or one per value channel (arXiv 2407.14207, eq. 6 and 7).
    """
    return Rule(Linear(), L2(), Keep(), Implicit(), chunk_size=1)


def delta_product(steps: int = 2) -> Rule:
    """`steps` delta rules per token, each with a key, value and learn of its own.

    Gated DeltaProduct, arXiv 2502.10297, section 3; one step is Gated DeltaNet.
    """
    algorithm = GradientDescent(at="retained", steps=steps)
    return Rule(Linear(), L2(), Decay(), algorithm, chunk_size=1)


ALL = (
    moneta,
    yaad,
    memora,
    titans,
    ttt_mlp,
    ttt_linear,
    linear_attention,
    retnet,
    delta_net,
    gated_delta_net,
    gated_delta_net_miras,
    longhorn,
    delta_product,
)
"""Every named rule, in the order of the table that `miras variants` prints."""
