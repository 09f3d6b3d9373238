"""The accuracy study. It takes models and texts of the examples."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
