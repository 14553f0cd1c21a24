"""Models that keep the tokens themselves: non-parametric memories."""

from miras_jax.core.algorithm import NonParametric
from miras_jax.core.bias import L2
from miras_jax.core.memory import Cache
from miras_jax.core.retention import Keep
from miras_jax.core.rule import Rule


def softmax_attention() -> Rule:
    """M_t = M_{t-1} + {(k_t, v_t)}, y = softmax(q^T k / sqrt(K)) v over all of them.

    The Transformer (arXiv 1706.03762), which Table 1 of Miras reads as the
    Nadaraya-Watson solution of the L2 loss. Its state grows with what it reads.
    """
    return Rule(Cache(), L2(), Keep(), NonParametric(), chunk_size=1)


def sliding_window_attention(window: int = 128) -> Rule:
    """The same over the last `window` tokens, the present one included.

    Longformer, arXiv 2004.05150, made causal: a state of constant size.
    """
    return Rule(Cache(window), L2(), Keep(), NonParametric(), chunk_size=1)
