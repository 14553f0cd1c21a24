"""Layers whose memory is a network, or a matrix behind a norm."""

from dataclasses import replace

from miras_jax.core import variants
from miras_jax.nn.features import Features
from miras_jax.nn.miras import Miras, RateChoices
from miras_jax.nn.output import Output
from miras_jax.nn.rates import ChunkStart, PerHead


def yaad(num_heads: int = 4) -> Miras:
    """Miras, eq. 26 and section 5.4: rates channel-wise of rank 32, the layer's own.

    Convolution, RoPE, q and k / |.|_2, RMSNorm, gate. Activations and starts are not
    stated; here those of `default_rates`.
    """
    return Miras(variants.yaad(), num_heads)


def moneta(num_heads: int = 4) -> Miras:
    """Miras, eq. 24 and 25; the layer as `yaad`."""
    return Miras(variants.moneta(), num_heads)


def memora(num_heads: int = 4) -> Miras:
    """Miras, eq. 27; the layer as `yaad`."""
    return Miras(variants.memora(), num_heads)


def titans(num_heads: int = 4) -> Miras:
    """Titans LMM (arXiv 2501.00663, eq. 13 and 14).

    q, k, v convolved with SiLU, q and k / |.|_2; norm and gate before the output. The
    rates are functions of the token; which is not stated, here those of `default_rates`
    (sigmoids, one per head). No positions are stated for the memory; none here.
    """
    return Miras(variants.titans(), num_heads, rotary=0)


def ttt_linear(num_heads: int = 4) -> Miras:
    """TTT-Linear (arXiv 2407.04620): learn = sigmoid(x w), one per head.

    eta_base 1 times sigmoid, for keys of norm one here (there divided by K, for keys of
    unit variance); RoPE; q and k convolved, here v too; norm, then a GELU gate.
    """
    return _ttt(variants.ttt_linear(), num_heads, 1.0)


def ttt_mlp(num_heads: int = 4) -> Miras:
    """TTT-MLP (arXiv 2407.04620): as `ttt_linear`, eta_base 0.1."""
    return _ttt(variants.ttt_mlp(), num_heads, 0.1)


def _ttt(rule, num_heads, base):
    learn = PerHead("sigmoid", (base / 2, base / 2), base)
    return Miras(
        rule,
        num_heads,
        RateChoices(learn=learn),
        rotary=1,
        output=Output(gate="gelu"),
    )


def omega_net(num_heads: int = 4, key_dim: int = 8) -> Miras:
    """OmegaNet (Atlas, arXiv 2505.23735), the memory's inputs as in `atlas`."""
    return _atlas(variants.omega_net(), num_heads, key_dim)


def atlas(num_heads: int = 4, key_dim: int = 8) -> Miras:
    """Atlas (arXiv 2505.23735, eq. 32 and 33): q and k as monomials of degree 2.

    Their coefficients are learned from 1 / i! there. The memory adds its input
    to its output, so that values are as wide as the features: 45 for keys of 8. Degree
    and dimensions are not stated; here so that a head stays of the usual size. Rates
    are those of `default_rates`; convolution, norm and gate as in `titans`.
    """
    return _atlas(variants.atlas(), num_heads, key_dim)


def _atlas(rule, num_heads, key_dim):
    features = Features(degree=2)
    return Miras(
        rule,
        num_heads,
        rotary=0,
        key_dim=key_dim,
        value_dim=features.dim(key_dim),
        features=features,
    )


def lact(num_heads: int = 4, chunk_size: int = 2048) -> Miras:
    """LaCT (arXiv 2505.23884): learn = softplus(x w + b), from 0.001.

    One per head (there one for each of the memory's three matrices); momentum
    sigmoid(x w), one for a whole chunk: here of its first token, the mean over the
    chunk there. q, k, v pass SiLU, q and k / |.|_2, RoPE; RMSNorm per head, no gate.
    SiLU comes with a convolution here. There the layer also holds a sliding window.
    """
    rule = replace(variants.lact(), chunk_size=chunk_size)
    momentum = ChunkStart(PerHead("sigmoid", (0.5, 0.9)), chunk_size)
    return Miras(
        rule,
        num_heads,
        RateChoices(learn=PerHead("softplus", (0.001, 0.001)), momentum=momentum),
        rotary=1,
        output=Output(gate="none"),
    )
