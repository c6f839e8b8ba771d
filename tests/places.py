"""Where things lie: the repository, its tests and examples, and the data beside it."""

from pathlib import Path

__all__ = ["DATA", "EXAMPLES", "ROOT", "SHARED", "TESTS"]

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "docs" / "examples"
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
