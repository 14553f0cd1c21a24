"""Published models as rules: Table 1 of Miras (arXiv 2504.13173), one function each.

Conventions: `learn` is the step size, `keep` the fraction kept, gradients are of the
losses in `bias` (L2 carries the factor 1/2). Any part can be exchanged by
`dataclasses.replace`.
"""

from miras_jax.core.variants.attention import (
    sliding_window_attention as sliding_window_attention,
)
from miras_jax.core.variants.attention import softmax_attention as softmax_attention
from miras_jax.core.variants.deep import atlas as atlas
from miras_jax.core.variants.deep import atlas_gated as atlas_gated
from miras_jax.core.variants.deep import lact as lact
from miras_jax.core.variants.deep import omega_net as omega_net
from miras_jax.core.variants.deep import titans as titans
from miras_jax.core.variants.deep import ttt_linear as ttt_linear
from miras_jax.core.variants.deep import ttt_mlp as ttt_mlp
from miras_jax.core.variants.linear import delta_net as delta_net
from miras_jax.core.variants.linear import delta_product as delta_product
from miras_jax.core.variants.linear import dfw as dfw
from miras_jax.core.variants.linear import gated_delta_net as gated_delta_net
from miras_jax.core.variants.linear import (
    gated_delta_net_miras as gated_delta_net_miras,
)
from miras_jax.core.variants.linear import gla as gla
from miras_jax.core.variants.linear import hgrn2 as hgrn2
from miras_jax.core.variants.linear import kimi_delta_attention as kimi_delta_attention
from miras_jax.core.variants.linear import lightning_attention as lightning_attention
from miras_jax.core.variants.linear import linear_attention as linear_attention
from miras_jax.core.variants.linear import longhorn as longhorn
from miras_jax.core.variants.linear import longhorn_diagonal as longhorn_diagonal
from miras_jax.core.variants.linear import mamba as mamba
from miras_jax.core.variants.linear import mamba2 as mamba2
from miras_jax.core.variants.linear import mesa_net as mesa_net
from miras_jax.core.variants.linear import retnet as retnet
from miras_jax.core.variants.linear import rwkv7 as rwkv7
from miras_jax.core.variants.miras import memora as memora
from miras_jax.core.variants.miras import moneta as moneta
from miras_jax.core.variants.miras import yaad as yaad

ALL = (
    moneta,
    yaad,
    memora,
    titans,
    ttt_mlp,
    ttt_linear,
    lact,
    omega_net,
    atlas,
    atlas_gated,
    linear_attention,
    retnet,
    lightning_attention,
    mamba2,
    dfw,
    gla,
    hgrn2,
    mamba,
    longhorn_diagonal,
    delta_net,
    gated_delta_net,
    gated_delta_net_miras,
    kimi_delta_attention,
    delta_product,
    rwkv7,
    longhorn,
    mesa_net,
    softmax_attention,
    sliding_window_attention,
)
"""Every named rule, in the order of the table that `miras variants` prints."""

CHANNELWISE = {
    dfw: ("keep", "keep_value"),
    gla: ("keep",),
    hgrn2: ("keep",),
    mamba: ("keep",),
    longhorn_diagonal: ("keep",),
    kimi_delta_attention: ("keep",),
    rwkv7: ("keep", "erase"),
}
"""Rates of matrix memories of which their papers have one per channel; of the others,
one per token and head."""
