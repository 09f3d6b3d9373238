"""transformers' own tests of generation, as they are and with every ``generate`` compiled by this backend.

``python tests/peers.py --source DIR`` names the tests whose outcomes differ, and fails if there are any. DIR is a
checkout of transformers, or its archive unpacked, at the tag of the installed version: PyPI distributes no tests.
``--models NAME ...`` adds the tests that these models take from ``GenerationTesterMixin``; what stands behind ``--``
goes to pytest. Nothing is pruned, and graphs run op by op: it is about what becomes of all the ways to generate.

The module is a plugin of pytest, too, for the processes that run the tests.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

COMPILED = "--generate-compiled"
MIXIN = "GenerationTesterMixin"
OPTIONS = {"key_sparsity": 0.0, "value_sparsity": 0.0, "window": 4, "raise_errors": True}


class SourceError(Exception):
    """What ``--source`` names does not have the tests of the installed version."""


# ------------------------------------------------------------------------------------------------------- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(COMPILED, action="store_true", help="compile the model of each generate with backend='mustafar'")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests of models, those of generation."""
    models = config.rootpath / "tests" / "models"
    items[:] = [item for item in items if not item.path.is_relative_to(models) or _is_of_generation(item)]


def _is_of_generation(item: pytest.Item) -> bool:
    return getattr(getattr(item, "function", None), "__qualname__", "").startswith(f"{MIXIN}.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if not item.config.getoption(COMPILED):
        return (yield)
    with _generate_compiled() as report:
        try:
            return (yield)
        finally:
            item.user_properties.append(("compressed", len(report.matched)))


@contextmanager
def _generate_compiled() -> Iterator[Any]:
    """Within it, each ``generate`` compiles its model for as long as it runs. Gives the report of all of them."""
    from transformers import GenerationMixin

    from compilers import without_compiler
    from mustafar_compile import explain

    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model._compiled_call_impl is not None:  # by the test, or around this call
            return original(model, *args, **kwargs)
        model.compile(backend="mustafar", options=OPTIONS)
        try:
            return original(model, *args, **kwargs)
        finally:
            model._compiled_call_impl = None

    with pytest.MonkeyPatch.context() as patch, without_compiler(), explain() as report:
        patch.setattr(GenerationMixin, "generate", generate)
        yield report


# ------------------------------------------------------------------------------------------------------- the runner


def check_source(source: Path) -> None:
    """Raise SourceError where ``source`` does not hold the tests of the installed version of transformers."""
    from transformers import __version__ as installed

    init = source / "src" / "transformers" / "__init__.py"
    if not init.is_file() or not (source / "tests" / "generation").is_dir():
        raise SourceError(f"{source} has no src/transformers and tests/generation, as a source of transformers has")
    found = re.search(r'^__version__ = "(.+)"', init.read_text(), re.MULTILINE)
    version = found.group(1) if found else "unknown"
    if version != installed:
        raise SourceError(f"{source} is transformers {version}; accepted is {installed}, which is installed")


def run(source: Path, models: Sequence[str], more: Sequence[str] = ()) -> dict[str, tuple[str, int]]:
    """The outcome of each test, and how many layers it compressed. more: arguments of pytest."""
    tests = ["tests/generation", *(f"tests/models/{name}/test_modeling_{name}.py" for name in models)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        how = ["-p", "peers", "-q", "--disable-warnings", "--continue-on-collection-errors"]
        where = [f"--rootdir={source}", f"--junitxml={results}"]
        command = [sys.executable, "-m", "pytest", *how, *where, *more, *tests]
        subprocess.run(command, cwd=source, env=os.environ | {"PYTHONPATH": paths}, check=False)
        if not results.is_file():
            raise SourceError("pytest ran no tests, see above")
        return dict(map(_outcome, ElementTree.parse(results).iter("testcase")))


def _outcome(case: ElementTree.Element) -> tuple[str, tuple[str, int]]:
    """(name, (outcome, layers compressed)) of a test of pytest's report."""
    outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
    compressed = sum(int(x.get("value", 0)) for x in case.iter("property") if x.get("name") == "compressed")
    return f"{case.get('classname')}.{case.get('name')}", (outcome, compressed)


def differing(plain: Mapping[str, Any], compiled: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, outcome, outcome compiled) of each test that has two of them."""
    nothing = ("not run", 0)
    both = ((name, plain.get(name, nothing)[0], compiled.get(name, nothing)[0]) for name in plain | compiled)
    return sorted(row for row in both if row[1] != row[2])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, behind --")
    given = parser.parse_args(arguments)
    try:
        check_source(given.source)
        plain, compiled = (run(given.source, given.models, [*given.pytest, *how]) for how in ([], [COMPILED]))
    except SourceError as error:
        parser.error(str(error))
    rows = differing(plain, compiled)
    for row in [("test", "as it is", "compiled"), *rows] if rows else []:
        print("| {} | {} | {} |".format(*row))
    counts = Counter(outcome for outcome, _ in compiled.values())
    layers = sum(compressed > 0 for _, compressed in compiled.values())
    print(f"{len(rows)} of {len(compiled)} tests differ; compiled: {dict(counts)}, with a compressed cache {layers}")
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
