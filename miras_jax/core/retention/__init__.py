"""Retention gates: a linear recurrence of a dual state and a map from dual to weights.

    A_s = keep_s A_{s-1} + step_s          W_s = weights(A_s)

Proximal gates (`settles`) also take a step of their own where a chunk ends: A becomes
settle(A_c, A), with A_c the dual at the chunk's start. Each method takes and gives one
matrix `[in, out]` of the memory.
"""

from miras_jax.core.retention.gate import Decay as Decay
from miras_jax.core.retention.gate import Gate as Gate
from miras_jax.core.retention.gate import Identity as Identity
from miras_jax.core.retention.gate import Keep as Keep
from miras_jax.core.retention.gate import Retention as Retention
from miras_jax.core.retention.mirror import Bregman as Bregman
from miras_jax.core.retention.mirror import Lq as Lq
from miras_jax.core.retention.mirror import Sigmoid as Sigmoid
from miras_jax.core.retention.mirror import SignedPower as SignedPower
from miras_jax.core.retention.simplex import KL as KL
from miras_jax.core.retention.simplex import FDivergence as FDivergence
from miras_jax.core.retention.sparse import ElasticNet as ElasticNet
from miras_jax.core.retention.sphere import Sphere as Sphere
