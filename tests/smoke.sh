#!/usr/bin/env bash
# Install a wheel or an sdist into an environment of its own and try it out, without network: torch and the other
# dependencies are those of PYTHON.
set -euo pipefail
package=$(realpath "$1") work=$(mktemp -d) model=$(realpath "$(dirname "$0")/../examples/tiny_llama")
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv --system-site-packages --without-pip "$work/venv"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$site/dependencies.pth"
"$PYTHON" -m pip --python "$work/venv" install --quiet --no-index --no-deps --no-build-isolation --ignore-installed "$package"
cd "$work"
"$work/venv/bin/python" - "$work/venv" <<'SMOKE'
import sys
from importlib.metadata import entry_points, version
import mustafar_compile
assert mustafar_compile.__file__.startswith(sys.argv[1]), mustafar_compile.__file__
for name in mustafar_compile.__all__:
    getattr(mustafar_compile, name)
assert entry_points(group="torch_dynamo_backends")["mustafar"].load()
print("mustafar-compile", version("mustafar-compile"))
SMOKE
"$work/venv/bin/mustafar" explain "$model" --preset small
printf 'def add(a, b):\n    return a' | "$work/venv/bin/mustafar" generate "$model" --prompt - --new-tokens 8
