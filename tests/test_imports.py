"""The house plan: who may import whom, and that what is public is there and described.

Imports point one way, and the tables below say which. They are checked on the source
text, so that imports inside functions count too.
"""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import miras_jax
from miras_jax import variants

ROOT = Path(__file__).parents[1]
PACKAGES = ("experiments", "miras_jax", "pallas_kernels")

LAYERS = (
    ("tests",),
    ("experiments",),
    ("miras_jax.cli",),
    ("miras_jax.benchmarks", "miras_jax.commands"),
    (
        "miras_jax.evaluation",
        "miras_jax.export",
        "miras_jax.generate",
        "miras_jax.training",
    ),
    ("miras_jax.nn",),
    ("miras_jax",),  # the package itself: what it re-exports of core
    ("miras_jax.core",),
    ("miras_jax.errors", "miras_jax.compiler"),
    ("pallas_kernels",),
)
"""From the top: a module may import its own layer and those below."""

AXES = tuple(
    f"miras_jax.core.{axis}" for axis in ("memory", "bias", "retention", "algorithm")
)
"""The four axes never import each other."""

DEPENDENCIES = {
    "miras_jax": {"jax", "numpy"},
    "miras_jax.core": {"jax", "numpy"},
    "pallas_kernels": {"jax", "numpy"},
}
"""The only packages from outside (besides the standard library) of these places."""

STANDARD = sys.stdlib_module_names


def files(*packages):
    return [path for name in packages for path in sorted((ROOT / name).rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files(*PACKAGES, "tests")}


def imports(name, source):
    """Full names of the modules that a module with this source imports."""
    is_package = MODULES.get(name, Path()).name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *filter(None, [base])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            names = inside & set(MODULES)
            # A name that is no module of ours is something inside the module itself.
            found |= names if names == inside else names | {base}
    return found


def place(module):
    """The entry of LAYERS that holds a module: the longest that is a prefix of it."""
    entries = [entry for layer in LAYERS for entry in layer]
    holders = [e for e in entries if module == e or module.startswith(e + ".")]
    return max(holders, key=len, default=None)


def depth(entry):
    return next(i for i, layer in enumerate(LAYERS) if entry in layer)


def violations(name, source):
    """What a module with this name and source imports against the tables."""
    here, wrong = place(name), []
    for target in sorted(imports(name, source) - {name}):
        there = place(target)
        top = target.split(".")[0]
        if there is None:
            allowed = DEPENDENCIES.get(here)
            if top not in STANDARD and allowed is not None and top not in allowed:
                wrong.append(f"{name} imports {top}, {here} only {sorted(allowed)}")
        elif depth(there) < depth(here):
            wrong.append(f"{name} imports {target}, which is above it")
        elif name in AXES and target in AXES:
            wrong.append(f"{name} imports {target}, another axis")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    wrong = []
    for path in files(package):
        wrong += violations(module_name(path), path.read_text())
    assert not wrong, "\n".join(wrong)


FORBIDDEN = [
    ("miras_jax.core.bias", "from miras_jax.core.memory import MLP"),
    ("miras_jax.core.bias", "from miras_jax.core import memory"),
    ("miras_jax.core.bias", "from . import memory"),
    ("miras_jax.core.retention", "import miras_jax.core.algorithm as a"),
    ("miras_jax.core.bias", "from miras_jax import memory"),
    ("miras_jax.core.rule", "from flax import nnx"),
    ("miras_jax.core.rule", "def f():\n    import flax.nnx"),
    ("miras_jax.core.engine", "from ..nn import layers"),
    ("miras_jax.core.new", "import optax"),
    ("miras_jax", "from miras_jax.nn import model"),
    ("miras_jax.nn.layers", "from miras_jax.training import data"),
    ("miras_jax.nn.layers", "from miras_jax import generate"),
    ("miras_jax.training.data", "import miras_jax.cli"),
    ("miras_jax.generate", "from experiments import bench"),
    ("miras_jax.errors", "from miras_jax.core import types"),
    ("pallas_kernels.fused_scan.api", "from miras_jax.core.rule import Rule"),
    ("pallas_kernels.fused_scan.api", "import miras_jax"),
    ("pallas_kernels.fused_scan.api", "import flax"),
    ("experiments.new", "from tests import core"),
]

ALLOWED = [
    ("experiments.new", "import miras_jax, numpy\nfrom miras_jax.training import data"),
    ("miras_jax.cli", "import argparse\nfrom miras_jax.evaluation import recall"),
    ("miras_jax.training.data", "import grain\nfrom miras_jax.nn.model import Model"),
    ("miras_jax.nn.layers", "from flax import nnx\nfrom miras_jax.core import engine"),
    ("miras_jax.core.engine", "from pallas_kernels.fused_scan import api"),
    ("miras_jax.core.rule", "from . import memory, bias\nimport jax.numpy as jnp"),
    ("miras_jax.core.bias", "from miras_jax.core.types import Choice"),
    ("pallas_kernels.fused_scan.api", "import functools\nimport jax"),
]


@pytest.mark.parametrize(("name", "source"), FORBIDDEN)
def test_a_forbidden_import_is_caught(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(("name", "source"), ALLOWED)
def test_an_allowed_import_is_let_through(name, source):
    assert violations(name, source) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_place_of_its_own_in_the_table(package):
    """A new part of miras_jax is put into LAYERS, not taken for the package itself."""
    for path in files(package):
        name = module_name(path)
        assert place(name) != "miras_jax" or name == "miras_jax", name


# What is public.

PUBLIC = {
    "Params", "Rates", "Rule", "State", "Tokens", "run", "step",
    "algorithm", "bias", "memory", "retention", "variants",
}  # fmt: skip


def test_the_package_exports_the_names_it_declares():
    """What type checkers are told is what is found when the program runs."""
    exported = set()
    for node in ast.walk(ast.parse(MODULES["miras_jax"].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("miras_jax."):
            for alias in node.names:
                # "X as X" marks a re-export.
                assert alias.asname == alias.name
                value = getattr(miras_jax, alias.name)
                home = importlib.import_module(node.module)
                assert value is getattr(home, alias.name), alias.name
                assert value.__doc__, alias.name
                exported.add(alias.name)
    assert exported == set(miras_jax.__all__)
    assert exported >= PUBLIC
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        miras_jax.nothing  # noqa: B018


def test_the_list_of_variants_holds_every_rule_of_its_modules():
    public = []
    for path in files("miras_jax/core/variants"):
        nodes = ast.parse(path.read_text()).body
        functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
        public += [name for name in functions if not name.startswith("_")]
    assert sorted(variant.__name__ for variant in variants.ALL) == sorted(public)
    for variant in variants.ALL:
        assert getattr(variants, variant.__name__) is variant
        assert isinstance(variant(), miras_jax.Rule)


def undescribed(tree):
    """Public functions and classes at the top level that have no docstring."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in tree.body
        if isinstance(node, definitions)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def test_everything_public_has_a_docstring():
    missing = []
    for path in files("miras_jax", "pallas_kernels"):
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            missing.append(module_name(path))
        missing += [f"{module_name(path)}.{name}" for name in undescribed(tree)]
    assert not missing, missing


def test_a_missing_docstring_is_caught():
    source = 'def a():\n  "A."\ndef b(): pass\ndef _c(): pass\nclass D: pass\n'
    assert undescribed(ast.parse(source)) == ["b", "D"]
