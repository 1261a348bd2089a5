"""The contract of public interfaces: no module uses a private name that is not its own.

Private is a name with a leading underscore, of another package or of another module of ours. It is
refused as an import, as an attribute, as a string for getattr, and in a class whose base comes from
another package and has that name. Replacing an attribute of something imported is refused too.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"tuneyard": ROOT / "operator", "tuneyard_trainer": ROOT / "trainer"}

EXCEPTIONS = {
    # ADR 0010: a vLLM engine that is dropped destroys the process group of Ray Train, in which its
    # worker still trains. vLLM has no public way to prevent it.
    "engine.llm_engine.engine_core._finalizer",
}
DOCUMENTED = {"os._exit", "_asdict", "_fields", "_field_defaults", "_make", "_replace"}
"""Names with an underscore that Python's own documentation lists: of os, and of named tuples."""
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    """Whether a name is private: `__dunder__` is not, nor is an enum's `_sunder_`."""
    return name.startswith("_") and not name.endswith("_") and name not in DOCUMENTED


def violations(source: str, namespace: dict[str, Any]) -> Iterator[str]:
    """Yield one phrase for each use of a name that is not the module's own.

    `namespace`: the globals of the executed module, where base classes are looked up.
    """
    tree = ast.parse(source)
    replaceable = _imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from _private_imports([alias.name for alias in names])
            case ast.ImportFrom(module=module, names=names):
                yield from _private_imports([f"{module}.{alias.name}" for alias in names])
            case ast.Attribute(attr=name, value=owner) if is_private(name):
                if not _is_own(owner) and ast.unparse(node) not in DOCUMENTED:
                    yield ast.unparse(node)
            case ast.Call(func=ast.Name(id=call), args=[owner, ast.Constant(value=str(name)), *_]):
                if call in BY_NAME and is_private(name):
                    yield ast.unparse(node)
                elif call in {"setattr", "delattr"} and _root(owner) in replaceable:
                    yield f"replaces {ast.unparse(owner)}.{name}"
            case ast.ClassDef():
                yield from _private_names_of_bases(node, namespace)
        is_target = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if is_target and _root(node) in replaceable:
            yield f"replaces {ast.unparse(node)}"


def _imported(tree: ast.Module) -> set[str]:
    """The names that imports bind, and those that are assigned from them as they are."""
    nodes = list(ast.walk(tree))
    names = {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in nodes:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Name(id=value))
            ) if value in names:
                names.add(name)
    return names


def _private_imports(names: list[str]) -> Iterator[str]:
    for name in names:
        if any(is_private(part) for part in name.split(".")):
            yield f"imports {name}"


def _root(node: ast.expr) -> str | None:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_own(owner: ast.expr) -> bool:
    """Whether an attribute's owner is `self`, `cls` or `super()`."""
    match owner:
        case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
            return True
    return False


def _private_names_of_bases(node: ast.ClassDef, namespace: dict[str, Any]) -> Iterator[str]:
    """Overridden or used private names that a base class of another package defines."""
    foreign = {
        name: f"{ancestor.__module__}.{ancestor.__qualname__}"
        for base in node.bases
        for ancestor in _ancestors(base, namespace)
        for name in vars(ancestor)
        if is_private(name)
    }
    for name in sorted(foreign.keys() & set(_names_in(node))):
        yield f"{node.name} has {name} of {foreign[name]}"


def _ancestors(base: ast.expr, namespace: dict[str, Any]) -> list[type]:
    """The classes of other packages that a base is or derives from."""
    found = eval(ast.unparse(base), namespace)
    mro = getattr(get_origin(found) or found, "__mro__", ())  # NamedTuple is a function
    ours = {*SOURCES, namespace["__name__"]}
    return [one for one in mro if one.__module__.partition(".")[0] not in ours]


def _names_in(node: ast.ClassDef) -> Iterator[str]:
    """What a class body defines, and what is asked of `self`, `cls` and `super()` in it."""
    for statement in node.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and _is_own(inner.value):
            yield inner.attr


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_only_public_interfaces_are_used_but_for_the_named_exceptions() -> None:
    found = {
        f"{module}: {violation}": violation
        for package, root in SOURCES.items()
        for path in sorted((root / package).rglob("*.py"))
        for module in [_module_name(path.relative_to(root))]
        for violation in violations(path.read_text(), vars(importlib.import_module(module)))
    }
    assert [place for place, name in found.items() if name not in EXCEPTIONS] == []
    assert set(found.values()) == EXCEPTIONS, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import ray._private.worker", "imports ray._private.worker"),
        ("from a.v2._internal.b import C", "imports a.v2._internal.b.C"),
        ("from tuneyard.errors import _lines", "imports tuneyard.errors._lines"),
        ("ray._private.worker._global_node.kill()", "ray._private.worker._global_node"),
        ("def f(module): return module._buffers_set", "module._buffers_set"),
        ("def f(engine): engine.core._finalizer.detach()", "engine.core._finalizer"),
        ("def f(job): return job.__secret", "job.__secret"),
        ("def f(job): return getattr(job, '_state', None)", "getattr(job, '_state', None)"),
        ("import gguf\ngguf.GGUFReader = None", "replaces gguf.GGUFReader"),
        ("import gguf\npackage: Any = gguf\npackage.X, y = 1, 2", "replaces package.X"),
        ("from a import b as c\nsetattr(c.d, 'run', None)", "replaces c.d.run"),
        ("import a.b\ndel a.b.c", "replaces a.b.c"),
    ],
)
def test_a_private_name_of_anything_else_is_refused(source: str, named: str) -> None:
    assert named in violations(source, {})


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("def _get_formatter(self): ...", "_get_formatter"),
        ("async def _get_formatter(self): ...", "_get_formatter"),
        ("_pop_action_class = None", "_pop_action_class"),
        ("_get_args: object = None", "_get_args"),
        ("def run(self): return self._get_values()", "_get_values"),
        ("def run(self): return super()._get_values()", "_get_values"),
    ],
)
@pytest.mark.parametrize("base", ["argparse.ArgumentParser", "Ours"])
def test_a_private_name_of_a_base_from_another_package_is_refused(
    body: str, named: str, base: str
) -> None:
    source = f"""
import argparse
class Ours(argparse.ArgumentParser): ...
class Parser({base}):
    {body}
"""
    namespace: dict[str, Any] = {"__name__": "planted"}
    exec(source, namespace)
    (found,) = violations(source, namespace)
    assert found.startswith(f"Parser has {named} of argparse.")


def test_own_and_documented_names_are_left_alone() -> None:
    source = """
from __future__ import annotations
import os
from typing import Generic, NamedTuple, TypeVar
T = TypeVar("T")
class Pair(NamedTuple):
    left: int
    def moved(self): return self._replace(left=1)
class Base(Generic[T]):
    _count = 0
    def _step(self): return self._count
class Derived(Base[int]):
    def _step(self): return super()._step() + self._count
def leave(pair: Pair): os._exit(pair._replace(left=2).left)
def _private(): return _private.__name__
settings = Derived()
settings.count = 3
"""
    namespace: dict[str, Any] = {"__name__": "planted"}
    exec(source, namespace)
    assert list(violations(source, namespace)) == []
