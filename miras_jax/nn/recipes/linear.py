"""Layers whose memory is one matrix that is written without looking (Hebbian)."""

import math

from miras_jax.core import variants
from miras_jax.nn.features import Features
from miras_jax.nn.miras import Miras, RateChoices
from miras_jax.nn.output import Output
from miras_jax.nn.rates import (
    Constants,
    Discretised,
    Fixed,
    FromKeys,
    LowRank,
    PerHead,
)

NO_GATE = Output(gate="none")
SCALED = Features(norm="scale")


def linear_attention(num_heads: int = 4) -> Miras:
    """y_t = phi(q_t)^T sum phi(k) v^T, phi = elu + 1 (arXiv 2006.16236).

    No convolution, gate or positions. The paper divides by phi(q_t)^T sum phi(k), one
    number per head and token; here RMSNorm per head removes that factor, as in
    TransNormer (arXiv 2210.10340), where the division proved unstable.
    """
    return Miras(
        variants.linear_attention(),
        num_heads,
        RateChoices(),
        rotary=0,
        convolution=None,
        features=Features("elu + 1", norm="none"),
        output=NO_GATE,
    )


def retnet(num_heads: int = 4) -> Miras:
    """Retention (RetNet, arXiv 2307.08621): keep = 1 - 2^(-5-h) of head h, fixed.

    learn = 1; queries and keys turned by xPos (here RoPE, all channels) and scaled by
    1 / sqrt(K), without convolution; the heads normalised (GroupNorm there, RMSNorm
    here) and gated by swish(x W). Values as wide as keys; they are twice as wide there.
    """
    keep = Fixed((2.0**-5, 2.0 ** (-4 - num_heads)), "keep")
    return Miras(
        variants.retnet(),
        num_heads,
        RateChoices(keep=keep),
        rotary=1,
        convolution=None,
        features=SCALED,
    )


def lightning_attention(num_heads: int = 4) -> Miras:
    """keep = exp(-8 h / H), h = 1 ... H; learn = 1 (arXiv 2401.04658, 2307.14995).

    Swish of queries and keys, RMSNorm, sigmoid gate, no convolution. TransNormerLLM
    multiplies 8 h / H by 1 - l / L in layer l of L; here layers share one setting.
    Values pass no activation there either.
    """
    heads = range(1, num_heads + 1)
    keep = Constants(tuple(math.exp(-8 * h / num_heads) for h in heads))
    return Miras(
        variants.lightning_attention(),
        num_heads,
        RateChoices(keep=keep),
        rotary=1,
        convolution=None,
        features=Features("silu", norm="scale"),
        output=Output(gate="sigmoid"),
    )


def gla(num_heads: int = 4) -> Miras:
    """keep = sigmoid(x W_1 W_2 + b)^(1/16), rank 16, per key channel; learn = 1.

    Gated Linear Attention, arXiv 2312.06635: no convolution or
    activation, queries and keys scaled by 1 / sqrt(K), RMSNorm per head, swish gate. b
    starts at 0, that is, keep at 0.958. Keys are half as wide as values there; here as
    wide.
    """
    forgotten = 1 - 0.5 ** (1 / 16)
    keep = LowRank("keep", (forgotten, forgotten), temperature=16.0, rank=16)
    return Miras(
        variants.gla(),
        num_heads,
        RateChoices(keep=keep),
        rotary=0,
        convolution=None,
        features=SCALED,
    )


def dfw(num_heads: int = 4) -> Miras:
    """M_t = (f_v f_k^T) * M + v k^T, f = sigmoid(x W + b) (arXiv 2210.04243).

    Decaying fast weights, per channel of keys and of values. Starts are not stated;
    here keep is 0.9 to 0.999. W is of rank 32 here. No convolution, no gate; heads are
    normalised here.
    """
    keep = LowRank("keep", (0.001, 0.1))
    return Miras(
        variants.dfw(),
        num_heads,
        RateChoices(keep=keep, keep_value=keep),
        rotary=0,
        convolution=None,
        features=SCALED,
        output=NO_GATE,
    )


def hgrn2(num_heads: int = 4) -> Miras:
    """keep = f, key = 1 - f, f = sigmoid(x W); learn = 1 (arXiv 2404.07904).

    Queries pass swish, values nothing; no convolution, no positions, RMSNorm, no gate.
    There f lies above a bound that is learned and rises with the layer, from 0 in the
    first; here every layer is like the first.
    """
    return Miras(
        variants.hgrn2(),
        num_heads,
        RateChoices(keep=FromKeys()),
        rotary=0,
        convolution=None,
        features=Features("silu", norm="none"),
        key_features=Features("sigmoid", norm="none"),
        output=NO_GATE,
    )


def mamba(width: int, expand: int = 2, key_dim: int = 16) -> Miras:
    """S6 (Mamba, arXiv 2312.00752): a head for each inner channel.

    h_t = exp(dt A) * h + dt x B_t, y = C_t^T h + D x, gated by SiLU(z). dt = softplus,
    from 0.001 to 0.1 (log-uniform); A = -1 ... -N, learned; D from 1; B and C shared by
    all channels. dt has a full matrix here, one of rank width / 16 there; the
    convolution passes over B and C too, as in Mamba-2.
    """
    return Miras(
        variants.mamba(),
        expand * width,
        RateChoices(
            learn=PerHead("softplus", (0.001, 0.1)),
            keep=Discretised((1.0, float(key_dim)), over="channels"),
        ),
        rotary=0,
        key_dim=key_dim,
        value_dim=1,
        num_qk_heads=1,
        features=Features(norm="none"),
        output=Output(norm="none", skip="values"),
    )


def mamba2(
    num_heads: int = 4, key_dim: int = 64, value_dim: int | None = None
) -> Miras:
    """SSD (Mamba-2, arXiv 2405.21060): keep = exp(-a dt), learn = dt, per head.

    dt = softplus(x w + b), from 0.001 to 0.1 (log-uniform); a from 1 to 16, learned; B
    and C shared by all heads; a convolution over x, B and C; y + D x; gate. There the
    norm follows the gate and is over all heads; here it precedes it, per head.
    """
    return Miras(
        variants.mamba2(),
        num_heads,
        RateChoices(learn=PerHead("softplus", (0.001, 0.1)), keep=Discretised()),
        rotary=0,
        key_dim=key_dim,
        num_qk_heads=1,
        features=Features(norm="none"),
        output=Output(skip="values"),
    )
