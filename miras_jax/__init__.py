"""Miras in JAX: sequence layers as associative memories, defined by four choices."""

from miras_jax.core import algorithm as algorithm
from miras_jax.core import bias as bias
from miras_jax.core import memory as memory
from miras_jax.core import retention as retention
from miras_jax.core import variants as variants
from miras_jax.core.engine import run as run
from miras_jax.core.engine import step as step
from miras_jax.core.rule import Rule as Rule
from miras_jax.core.types import Params as Params
from miras_jax.core.types import Rates as Rates
from miras_jax.core.types import State as State
from miras_jax.core.types import Tokens as Tokens

__version__ = "0.1.0"
