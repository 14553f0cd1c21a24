"""Layers whose memory is one matrix that learns from its own error (delta rule)."""

from miras_jax.core import variants
from miras_jax.nn.features import Features
from miras_jax.nn.miras import Miras, RateChoices
from miras_jax.nn.output import Output
from miras_jax.nn.rates import ExpDecay, LowRank, PerHead

HALF = PerHead("sigmoid", (0.5, 0.5))


def delta_net(num_heads: int = 4) -> Miras:
    """learn = sigmoid(x w); q, k, v convolved, SiLU, q and k / |.|_2 (2406.06484, 3.3).

    RMSNorm per head, no gate, no positions. w without bias there: learn starts at 0.5.
    """
    return Miras(
        variants.delta_net(),
        num_heads,
        RateChoices(learn=HALF),
        rotary=0,
        output=Output(gate="none"),
    )


def gated_delta_net(num_heads: int = 4) -> Miras:
    """learn = sigmoid(x w), keep = exp(-a softplus(x w' + b)) (arXiv 2412.06464).

    Mamba-2's keep: a from 1 to 16, dt from 0.001 to 0.1, one per head. q, k, v are
    convolved with SiLU, q and k / |.|_2, RMSNorm per head, SiLU gate.
    """
    return Miras(
        variants.gated_delta_net(),
        num_heads,
        RateChoices(learn=HALF, keep=ExpDecay()),
        rotary=0,
    )


def delta_product(num_heads: int = 4, steps: int = 2) -> Miras:
    """`steps` keys, values and learn per token, one keep (arXiv 2502.10297).

    Else as Gated DeltaNet; learn = sigmoid. With 2 sigmoid, which the paper tries too,
    transitions may have negative eigenvalues.
    """
    return Miras(
        variants.delta_product(steps),
        num_heads,
        RateChoices(learn=HALF, keep=ExpDecay()),
        rotary=0,
    )


def kimi_delta_attention(num_heads: int = 4) -> Miras:
    """KDA (Kimi Linear, arXiv 2510.26692): keep per key channel, learn per head.

    keep = exp(-a softplus(x W_1 W_2 + b)) of low rank (the head's dimension there, 32
    here), learn = sigmoid(x w); q, k, v convolved with SiLU, q and k / |.|_2; RMSNorm
    per head, then a sigmoid gate (of low rank there, a full matrix here).
    """
    return Miras(
        variants.kimi_delta_attention(),
        num_heads,
        RateChoices(learn=HALF, keep=ExpDecay(rank=32)),
        rotary=0,
        output=Output(gate="sigmoid"),
    )


def longhorn(num_heads: int = 4) -> Miras:
    """learn = sigmoid(x W + b), per value channel (Longhorn, arXiv 2407.14207).

    The exact closed form in the place of Mamba's: convolution with SiLU, SiLU gate, no
    norm of keys or outputs, y + D v. W is of rank 32 here, b starts at 0; heads of many
    channels here, where the paper's kernel keeps one number per channel.
    """
    return Miras(
        variants.longhorn(),
        num_heads,
        RateChoices(learn=LowRank("sigmoid", (0.5, 0.5))),
        rotary=0,
        features=Features(norm="scale"),
        output=Output(norm="none", skip="values"),
    )


def rwkv7(num_heads: int = 4) -> Miras:
    """M_t = M (Diag(keep) - e (erase * e)^T) + v k^T (arXiv 2503.14456, eq. 17).

    keep = exp(-e^(-1/2) sigmoid(.)) and erase = sigmoid(.), per key channel, of low
    rank (32 here); erase starts at 0.5 and keep spreads from 0.7 to 0.999 (there a
    curve over the channels). e / |e|_2 is a projection of its own here; there it is the
    key times a learned vector, and the key is then scaled by 1 + (erase - 1) a. The
    token shift is a convolution here; heads are normalised (GroupNorm there) and gated
    (sigmoid, of low rank there).
    """
    return Miras(
        variants.rwkv7(),
        num_heads,
        RateChoices(
            keep=LowRank("bounded keep", (0.001, 0.3)),
            erase=LowRank("sigmoid", (0.5, 0.5)),
        ),
        rotary=0,
        output=Output(gate="sigmoid"),
    )


def mesa_net(num_heads: int = 4) -> Miras:
    """MesaNet (arXiv 2506.05233): learn and keep are sigmoids per head.

    q, k, v convolved with SiLU, q and k / |.|_2; RMSNorm per head, no gate, no
    positions. Starts are not stated; here learn 0.5, and keep 0.9 to 0.999.
    """
    return Miras(
        variants.mesa_net(),
        num_heads,
        RateChoices(learn=HALF, keep=PerHead("keep", (0.001, 0.1))),
        rotary=0,
        output=Output(gate="none"),
    )
