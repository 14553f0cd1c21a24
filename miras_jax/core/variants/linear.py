"""Models whose memory is one matrix: exact in blocks of any size."""

from miras_jax.core.algorithm import GradientDescent, Implicit
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.memory import Linear
from miras_jax.core.retention import Decay, Keep
from miras_jax.core.rule import Rule


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
