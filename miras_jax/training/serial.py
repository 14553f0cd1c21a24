"""Frozen dataclasses to JSON and back, so that a run remembers what it is.

A dataclass becomes `{"is": "module.Name", field: value, ...}`, a function
`{"is": "function", "name": "module.name"}`, a tuple a list. Reading imports the named
modules, so configurations come from runs one trusts, like any Python file.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

from miras_jax.errors import UserError


def to_json(value: Any) -> Any:
    """The JSON form of nested dataclasses, functions, tuples and plain values."""
    if is_dataclass(value):
        kind = type(value)
        _check_importable(kind)
        parts = {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
        return {"is": f"{kind.__module__}.{kind.__qualname__}", **parts}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Callable):
        name = f"{value.__module__}.{value.__qualname__}"
        if "<" in name:
            raise UserError(
                f"{name} cannot be stored with the run; define the function at the top "
                "of a module instead"
            )
        return {"is": "function", "name": name}
    return value


def from_json(value: Any) -> Any:
    """Inverse of `to_json`. Lists come back as tuples."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if value["is"] == "function":
        return _find(value["name"])
    parts = {name: from_json(v) for name, v in value.items() if name != "is"}
    return _find(value["is"])(**parts)


def with_new_fields(stored: Any) -> Any:
    """The JSON form with the fields that its dataclasses have gained since it was
    stored, at their defaults: what is stored means the same as before they came.

    So the default of a new field must be what was done without it.
    """
    if isinstance(stored, list):
        return [with_new_fields(v) for v in stored]
    if not isinstance(stored, dict):
        return stored
    whole = {name: with_new_fields(v) for name, v in stored.items()}
    try:
        kind = _find(stored.get("is", ""))
    except (UserError, ValueError):
        return whole  # of no class that is here, hence no gain
    for field in fields(kind) if is_dataclass(kind) else ():
        if field.default is not MISSING:
            whole.setdefault(field.name, to_json(field.default))
        elif field.default_factory is not MISSING:
            whole.setdefault(field.name, to_json(field.default_factory()))
    return whole


def first_difference(saved: Any, given: Any, path: str = "") -> str | None:
    """One line on the first difference of two JSON values, or None."""
    if isinstance(saved, list) and isinstance(given, list):
        saved, given = dict(enumerate(saved)), dict(enumerate(given))
    if not (isinstance(saved, dict) and isinstance(given, dict)):
        return None if saved == given else f"{path}: saved {saved}, expected {given}"
    for name in [*given, *saved]:
        below = f"{path}.{name}" if path else str(name)
        ours, theirs = saved.get(name, "nothing"), given.get(name, "nothing")
        if (difference := first_difference(ours, theirs, below)) is not None:
            return difference
    return None


def _check_importable(kind: type) -> None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        _find(name)
    except UserError as error:
        raise UserError(
            f"{name} cannot be stored with the run: evaluate and generate could not "
            "import it. Define it at the top of a module that Python finds (a file in "
            "this folder, with PYTHONPATH=.), not in the experiment file"
        ) from error


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the run uses {name}, which cannot be imported here ({error})"
        ) from error
