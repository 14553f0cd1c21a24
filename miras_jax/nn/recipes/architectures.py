"""Architectures of several parts: memory beside attention, and memories of two speeds.

Hybrids are tuples of mixers for `Model(mixers=...)`, each of which is followed by an
MLP, as in their papers.
"""

from dataclasses import replace

from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras
from miras_jax.nn.recipes.deep import titans, yaad
from miras_jax.nn.recipes.delta import gated_delta_net
from miras_jax.nn.recipes.linear import mamba, mamba2
from miras_jax.nn.titans import MAC, MAG, MAL
from miras_jax.nn.tnt import TNT

PERSISTENT = 4
"""Persistent tokens; the paper does not state their number."""


def titans_mac(num_heads: int = 4, segment: int = 64) -> MAC:
    """Titans, memory as a context (arXiv 2501.00663, MAC)."""
    memory = titans(num_heads)
    chunk = min(memory.rule.chunk_size, segment)
    memory = replace(memory, rule=replace(memory.rule, chunk_size=chunk))
    return MAC(memory, segment, num_heads, PERSISTENT)


def titans_mag(num_heads: int = 4, window: int = 128) -> MAG:
    """Titans, memory as a gate beside a sliding window (MAG)."""
    return MAG(titans(num_heads), Attention(num_heads, window, persistent=PERSISTENT))


def titans_mal(num_heads: int = 4, window: int = 128) -> MAL:
    """Titans, memory as a layer under a sliding window (MAL)."""
    return MAL(titans(num_heads), Attention(num_heads, window, persistent=PERSISTENT))


def tnt(
    num_heads: int = 4,
    chunk_size: int = 2048,
    local_chunk_sizes: tuple[int, ...] = (16,),
    shard: int = 2048,
) -> TNT:
    """TNT (arXiv 2511.07343): Titans memories of a large chunk and of small ones.

    Its equations leave out momentum and gates, for clarity; here they are in.
    """

    def memory(size: int) -> Miras:
        mixer = titans(num_heads)
        return replace(mixer, rule=replace(mixer.rule, chunk_size=size))

    local = tuple(memory(size) for size in local_chunk_sizes)
    return TNT(memory(chunk_size), local, shard)


def samba(
    width: int, num_heads: int = 4, window: int = 2048
) -> tuple[Miras, Attention]:
    """Samba (arXiv 2406.07522): Mamba and a sliding window in turn."""
    return mamba(width), Attention(num_heads, window)


def gated_delta_net_h1(
    num_heads: int = 4, window: int = 2048
) -> tuple[Miras, Attention]:
    """Gated DeltaNet-H1 (arXiv 2412.06464, its hybrids): with a sliding window."""
    return gated_delta_net(num_heads), Attention(num_heads, window)


def gated_delta_net_h2(
    num_heads: int = 4, window: int = 2048
) -> tuple[Miras, Miras, Attention]:
    """Gated DeltaNet-H2 (the same paper): Mamba-2, then the layers of H1."""
    return mamba2(num_heads), *gated_delta_net_h1(num_heads, window)


def miras_h(
    memory: Miras | None = None, num_heads: int = 4, window: int = 128
) -> tuple[Miras, Attention]:
    """Miras-H (Miras, section 5.4): a Miras layer and a sliding window in turn.

    memory None: Yaad. The window's length is not stated.
    """
    memory = yaad(num_heads) if memory is None else memory
    return memory, Attention(num_heads, window)
