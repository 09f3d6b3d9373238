"""The supported versions, each in an environment of its own: `nox` for a quick subset, `nox -- tests` for all tests.

nox -l                                  # the sessions
nox -s "versions(torch='2.12', transformers='newest')"

To try a newer torch or transformers, raise the bound in pyproject.toml and add the torch here; "newest" is the newest
transformers that the bound admits.
"""

from __future__ import annotations

import shutil

import nox

# What hangs on private names, on the form of graphs and generated code, and on Triton: the rest is the same everywhere.
QUICK = ("backend", "matching", "own_loops", "generated_code", "memory", "kernels")
TORCH = ["2.11", "2.12", "2.13", "2.14", "2.15"]
TRANSFORMERS = ["5.17", "newest"]

nox.options.default_venv_backend = "venv"


def requirement(name: str, version: str) -> str:
    """What pip is to install."""
    return name if version == "newest" else f"{name}=={version}.*"


@nox.session
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """Tests with one torch and one transformers, and what else pip finds for them."""
    shutil.rmtree("build", ignore_errors=True)  # pip would install what an older build left there, too
    session.install(".[test]", requirement("torch", torch), requirement("transformers", transformers))
    quick = [f"tests/test_{name}.py" for name in QUICK]
    # The sources lie in folders of other names than the package has: the installed copy is meant.
    environment = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    session.run("python", "-m", "pytest", "-q", *(session.posargs or quick), env=environment)
