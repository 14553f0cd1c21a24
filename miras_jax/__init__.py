"""Miras in JAX: sequence layers as associative memories, defined by four choices.

Names are imported when they are first used, so that the command line can print its help
without waiting for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miras_jax.core import algorithm as algorithm
    from miras_jax.core import bias as bias
    from miras_jax.core import memory as memory
    from miras_jax.core import retention as retention
    from miras_jax.core import variants as variants
    from miras_jax.core.engine import run as run
    from miras_jax.core.engine import step as step
    from miras_jax.core.info import Info as Info
    from miras_jax.core.info import observe as observe
    from miras_jax.core.rule import Rule as Rule
    from miras_jax.core.types import Documents as Documents
    from miras_jax.core.types import Params as Params
    from miras_jax.core.types import Rates as Rates
    from miras_jax.core.types import State as State
    from miras_jax.core.types import Tokens as Tokens

__version__ = "0.1.0"

_HOMES = {
    "run": "engine",
    "step": "engine",
    "Info": "info",
    "observe": "info",
    "Rule": "rule",
    "Documents": "types",
    "Params": "types",
    "Rates": "types",
    "State": "types",
    "Tokens": "types",
}
_MODULES = ("algorithm", "bias", "memory", "retention", "variants")

__all__ = [*_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"miras_jax.core.{name}")
    if name in _HOMES:
        return getattr(import_module(f"miras_jax.core.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'miras_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
