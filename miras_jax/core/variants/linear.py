"""Models whose memory is one matrix: exact in blocks of any size.

A row is M_t = W_t^T, with keys as columns, as the papers print it. Several models are
the same rule and differ in the parametrisation of its rates alone, as their docstrings
say.
"""

from dataclasses import replace

from miras_jax.core.algorithm import EraseWrite, GradientDescent, Implicit, Newton
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.memory import Linear
from miras_jax.core.retention import Decay, Keep
from miras_jax.core.rule import Rule

# Hebbian: the dot-product bias.


def linear_attention() -> Rule:
    """M_t = M + v k^T (arXiv 2006.16236), at learn = 1.

    keys and queries are elu(x) + 1 there, and the output is divided by q^T sum k.
    """
    return Rule(Linear(), DotProduct(), Keep(), GradientDescent(), chunk_size=1)


def retnet() -> Rule:
    """M_t = keep M + v k^T (arXiv 2307.08621), at learn = 1.

    keep is a constant of the head h = 0, 1, ...: 1 - 2^(-5-h).
    """
    return Rule(Linear(), DotProduct(), Decay(), GradientDescent(), chunk_size=1)


def lightning_attention() -> Rule:
    """M_t = keep M + v k^T (Lightning Attention-2, arXiv 2401.04658): RetNet's rule.

    keep is a constant of head h of H and of layer l of L, exp(-(8 h / H) (1 - l / L))
    (TransNormerLLM, arXiv 2307.14995); learn = 1.
    """
    return retnet()


def mamba2() -> Rule:
    """M_t = keep M + learn v k^T (arXiv 2405.21060): RetNet's rule.

    learn = dt = softplus(x w + b) and keep = exp(-a dt) with a > 0, both one per head
    and token; k = B_t and q = C_t are shared by the heads.
    """
    return retnet()


def dfw() -> Rule:
    """M_t = (keep_value keep^T) * M + v k^T, decaying fast weights, at learn = 1.

    Both factors are channel-wise sigmoids of projections of the token (arXiv
    2210.04243).
    """
    rule = retnet()
    return replace(rule, retention=Decay(axis="both"))


def gla() -> Rule:
    """M_t = M Diag(keep) + v k^T (arXiv 2312.06635), at learn = 1.

    RetNet's rule with one keep per key channel: sigmoid(x W_1 W_2 + b)^(1/16) of rank
    16.
    """
    return retnet()


def hgrn2() -> Rule:
    """M_t = M Diag(keep) + v (1 - keep)^T (arXiv 2404.07904): GLA's rule.

    The key is one minus the forget gate, which is a sigmoid above a lower bound that
    rises with the layer; learn = 1. Table 1 of Miras marks the bias as L1, whose
    gradient is sign(M k - v) k^T; its write rule and that of HGRN2 itself are Hebbian,
    as here. `replace(hgrn2(), bias=L1())` is the rule of the mark.
    """
    return gla()


def mamba() -> Rule:
    """h_t = keep * h + learn x B_t, y_t = C_t^T h_t (S6, arXiv 2312.00752).

    GLA's rule, a head for each channel: value_dim 1 (x, a single number), key_dim N,
    and k = B_t and q = C_t shared by all channels. learn = dt = softplus(x W_1 W_2 + b)
    and keep = exp(dt A), A < 0 of size N per channel, that is, the zero-order hold
    with dt B for the input.
    """
    return gla()


def longhorn_diagonal() -> Rule:
    """h_t = (1 - learn k * k) * h + learn v k, learn = b / (1 + b |k|^2).

    What Longhorn's kernel computes in place of `longhorn` (arXiv 2407.14207): its
    transition I - learn k k^T without what is off the diagonal. With a learn per value
    channel that is Mamba's rule, a head of value_dim 1 for each, at keep = 1 - learn k
    * k; b is a sigmoid.
    """
    return mamba()


# Delta rules: the L2 bias.


def delta_net() -> Rule:
    """M_t = M (I - learn k k^T) + learn v k^T (arXiv 2406.06484).

    learn is a sigmoid, one per head and token; keys have norm one.
    """
    return Rule(Linear(), L2(), Keep(), GradientDescent(), chunk_size=1)


def gated_delta_net() -> Rule:
    """M_t = keep M (I - learn k k^T) + learn v k^T (arXiv 2412.06464).

    The error is taken at the decayed memory. learn is a sigmoid, keep Mamba2's.
    """
    algorithm = GradientDescent(at="retained")
    return Rule(Linear(), L2(), Decay(), algorithm, chunk_size=1)


def gated_delta_net_miras() -> Rule:
    """M_t = M (keep I - learn k k^T) + learn v k^T: the error at the old memory.

    The gated delta rule as Titans has it without momentum (arXiv 2501.00663, app. C).
    """
    return Rule(Linear(), L2(), Decay(), GradientDescent(), chunk_size=1)


def kimi_delta_attention() -> Rule:
    """M_t = M Diag(keep) (I - learn k k^T) + learn v k^T (arXiv 2510.26692).

    Gated DeltaNet's rule with one keep per key channel, a low-rank projection of the
    token under Mamba2's activation; learn is a sigmoid.
    """
    return gated_delta_net()


def delta_product(steps: int = 2) -> Rule:
    """`steps` delta rules per token, each with a key, value and learn of its own.

    Gated DeltaProduct, arXiv 2502.10297; one step is Gated DeltaNet.
    """
    algorithm = GradientDescent(at="retained", steps=steps)
    return Rule(Linear(), L2(), Decay(), algorithm, chunk_size=1)


def rwkv7() -> Rule:
    """M_t = M (Diag(keep) - e (erase * e)^T) + v k^T (arXiv 2503.14456, eq. 17).

    e = `erase_keys`, of norm one, is what the memory is asked for and what is erased,
    with a rate `erase` per key channel; k is written instead, at learn = 1. keep =
    exp(-e^(-1/2) sigmoid(.)) in (0.545, 1) and erase = sigmoid(.) of low-rank
    projections; e = normalised key * xi and k = key * (1 + (erase - 1) * alpha) with
    learned xi and alpha (their section on weight preparation).
    """
    return Rule(Linear(), L2(), Decay(), EraseWrite(), chunk_size=1)


def longhorn() -> Rule:
    """M_t = M (I - s k k^T) + s v k^T, s = learn / (1 + learn |k|^2).

    The exact online solution of |M - M_{t-1}|^2 + learn |M k - v|^2, learn one number
    or one per value channel, a sigmoid (arXiv 2407.14207).
    """
    return Rule(Linear(), L2(), Keep(), Implicit(), chunk_size=1)


def mesa_net() -> Rule:
    """M_t = G_t (H_t + Lambda)^-1, G = keep G + learn v k^T, H = keep H + learn k k^T.

    The least-squares solution of all pairs so far by 30 rounds of conjugate gradients
    (MesaNet, arXiv 2506.05233): learn and keep sigmoids per token and head,
    Lambda learned per key channel, at least 0.25 and 1 at first.
    """
    return Rule(Linear(), L2(), Decay(), Newton(), chunk_size=1)
