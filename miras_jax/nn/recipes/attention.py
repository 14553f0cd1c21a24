"""Softmax attention, whose memory is the tokens themselves."""

from miras_jax.nn.attention import Attention


def softmax(num_heads: int = 4, num_kv_heads: int | None = None) -> Attention:
    """Transformer++: RoPE, softmax(q k^T / sqrt(K)) v over all tokens (1706.03762)."""
    return Attention(num_heads, num_kv_heads=num_kv_heads)


def sliding_window(num_heads: int = 4, window: int = 128) -> Attention:
    """The same over the last `window` tokens (Longformer, arXiv 2004.05150)."""
    return Attention(num_heads, window)
