"""Imports go one way: what each part may import, and no cycles. See docs/design.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mustafar_compile import __name__ as NAME
from mustafar_compile import __path__ as whole
from mustafar_compile._compat.probe import probe
from mustafar_compile.lowering import __path__ as lowering
from mustafar_compile.patterns import __path__ as patterns


def modules(name: str, root: Path) -> dict[str, Path]:
    """The files under a package's folder by their dotted names."""
    found = {(name, *path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in found.items()}


# An editable install leaves the two parts in folders of their own.
PACKAGES = {NAME: whole, f"{NAME}.lowering": lowering, f"{NAME}.patterns": patterns}
MODULES = {key: path for name, (root,) in PACKAGES.items() for key, path in modules(name, Path(root)).items()}


def statements(body: list[ast.stmt], deep: bool) -> Iterator[ast.stmt]:
    """Those that run when a module is imported; deep: those of functions, too."""
    for statement in body:
        yield statement
        typing_only = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        if not typing_only and (deep or not isinstance(statement, ast.FunctionDef)):
            for name in ("body", "orelse", "handlers", "finalbody"):
                yield from statements(getattr(statement, name, []), deep)


def imported(module: str, deep: bool = False) -> set[str]:
    """The modules of the project that a module imports by name."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for statement in statements(ast.parse(path.read_text()).body, deep):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
            base = ".".join([*parents, *(statement.module or "").split(".")]).rstrip(".")
            names = {f"{base}.{alias.name}" for alias in statement.names}
            found |= {name if name in MODULES else base for name in names}
    return found & MODULES.keys()


def test_there_are_no_cycles():
    order = list(TopologicalSorter({module: imported(module) for module in MODULES}).static_order())  # else CycleError
    assert len(order) == len(MODULES) > 100


def beyond(part: str) -> dict[str, set[str]]:
    """What modules of a part import that is not of it, by function, too."""
    inside = [module for module in MODULES if f"{module}.".startswith(f"{NAME}.{part}.")]
    others = {module: {x for x in imported(module, deep=True) if x not in inside} for module in inside}
    return {module: names for module, names in others.items() if names}


def test_lowering_imports_nothing_of_the_project_but_names_of_torch():
    assert set().union(*beyond("lowering").values()) == {f"{NAME}._compat"}


def test_patterns_know_of_lowering_the_layout_only():
    assert set().union(*beyond("patterns").values()) == {f"{NAME}._compat", f"{NAME}.lowering.layout"}


def test_all_names_of_torch_are_probed_when_the_backend_loads():
    rooms = {module for module in MODULES if module.startswith(f"{NAME}._compat.")}
    assert imported(f"{NAME}._compat") == rooms - {f"{NAME}._compat.probe"}


def test_an_unsupported_version_is_told_at_once():
    words = r"needs torch\.nowhere, which torch \S+ does not have; supported: torch 2\.11 to"
    with pytest.raises(ImportError, match=words):
        probe("torch", "nowhere")
