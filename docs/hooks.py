"""Pages of the site that stand elsewhere in the repository, where people look for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = {
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add them, with links to where they are on the site."""
    for source, page in _PAGES.items():
        files.append(File.generated(config, page, content=_relinked(_ROOT / source)))
    return files


def _relinked(source: Path) -> str:
    def target(link: re.Match[str]) -> str:
        path = (source.parent / link[1]).resolve()
        known = _PAGES.get(str(path.relative_to(_ROOT))) if path.is_relative_to(_ROOT) else None
        return f"]({known or path.name})" if path.exists() else link[0]

    return re.sub(r"\]\(([^)#:]+)\)", target, source.read_text(encoding="utf-8"))
