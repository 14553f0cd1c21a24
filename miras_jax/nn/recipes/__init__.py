"""Layers of published models, with rates and features as their papers have them.

A variant (`miras_jax.variants`) is a rule; a recipe is the layer around it: what its
rates are made of and start from, what queries and keys pass through, what becomes of
the output. Each docstring says where it follows its paper and where it does not, or
where the paper is silent. All return a mixer, hybrids several, for `Model(mixers=...)`.
"""

from miras_jax.nn.recipes.architectures import gated_delta_net_h1 as gated_delta_net_h1
from miras_jax.nn.recipes.architectures import gated_delta_net_h2 as gated_delta_net_h2
from miras_jax.nn.recipes.architectures import miras_h as miras_h
from miras_jax.nn.recipes.architectures import samba as samba
from miras_jax.nn.recipes.architectures import titans_mac as titans_mac
from miras_jax.nn.recipes.architectures import titans_mag as titans_mag
from miras_jax.nn.recipes.architectures import titans_mal as titans_mal
from miras_jax.nn.recipes.architectures import tnt as tnt
from miras_jax.nn.recipes.attention import sliding_window as sliding_window
from miras_jax.nn.recipes.attention import softmax as softmax
from miras_jax.nn.recipes.deep import atlas as atlas
from miras_jax.nn.recipes.deep import lact as lact
from miras_jax.nn.recipes.deep import memora as memora
from miras_jax.nn.recipes.deep import moneta as moneta
from miras_jax.nn.recipes.deep import omega_net as omega_net
from miras_jax.nn.recipes.deep import titans as titans
from miras_jax.nn.recipes.deep import ttt_linear as ttt_linear
from miras_jax.nn.recipes.deep import ttt_mlp as ttt_mlp
from miras_jax.nn.recipes.deep import yaad as yaad
from miras_jax.nn.recipes.delta import delta_net as delta_net
from miras_jax.nn.recipes.delta import delta_product as delta_product
from miras_jax.nn.recipes.delta import gated_delta_net as gated_delta_net
from miras_jax.nn.recipes.delta import kimi_delta_attention as kimi_delta_attention
from miras_jax.nn.recipes.delta import longhorn as longhorn
from miras_jax.nn.recipes.delta import mesa_net as mesa_net
from miras_jax.nn.recipes.delta import rwkv7 as rwkv7
from miras_jax.nn.recipes.linear import dfw as dfw
from miras_jax.nn.recipes.linear import gla as gla
from miras_jax.nn.recipes.linear import hgrn2 as hgrn2
from miras_jax.nn.recipes.linear import lightning_attention as lightning_attention
from miras_jax.nn.recipes.linear import linear_attention as linear_attention
from miras_jax.nn.recipes.linear import mamba as mamba
from miras_jax.nn.recipes.linear import mamba2 as mamba2
from miras_jax.nn.recipes.linear import retnet as retnet
