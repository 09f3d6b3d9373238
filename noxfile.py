"""The supported versions, each in an environment of its own: `nox` for a quick subset, `nox -- tests` for all tests.

nox -l                                  # the sessions
nox -s "versions(torch='2.12', transformers='newest')"
"""

from __future__ import annotations

import nox

# What hangs on private names and on the form of graphs and generated code: the rest is the same everywhere.
QUICK = [f"tests/test_{name}.py" for name in ("backend", "matching", "own_loops", "generated_code", "memory")]
TORCH = ["2.11", "2.12", "2.13", "newest"]
TRANSFORMERS = ["5.17", "newest"]

nox.options.default_venv_backend = "venv"


def requirement(name: str, version: str) -> str:
    """What pip is to install."""
    return name if version == "newest" else f"{name}=={version}.*"


@nox.session
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """Tests with one torch and one transformers. Without the range of pyproject.toml, so as to try what is newer."""
    session.install(requirement("torch", torch), requirement("transformers", transformers))
    session.install("jinja2", "sympy", "rich", "pytest", "hypothesis", "setuptools")
    session.install("--no-deps", ".")
    # The sources lie in folders of other names than the package has: the installed copy is meant.
    environment = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    session.run("python", "-m", "pytest", "-q", *(session.posargs or QUICK), env=environment)
