"""Is this checkout fit to be published? ``make release-check`` names everything that is not, and fails."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import gradreg
import tables

ROOT = Path(__file__).parents[1]


def faults(root: Path = ROOT, tag: str = "") -> list[str]:
    """What must be done before this checkout is published, under ``tag`` if there is one."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found: list[str] = []
    if any("OWNER" in address for address in project["urls"].values()):
        found.append("pyproject.toml: [project.urls] must name the repository; got OWNER. Fill it in, then make tables.")
    if not re.fullmatch(r"\d+\.\d+\.\d+", gradreg.__version__):
        found.append(f"src/gradreg/__init__.py: __version__ must be that of a release, as 0.1.0; got {gradreg.__version__!r}.")
    if not re.search(rf"^## \[{re.escape(gradreg.__version__)}\] - \d{{4}}-\d\d-\d\d$", changelog, flags=re.MULTILINE):
        found.append(f"CHANGELOG.md: must have a heading with the day of the release, as ## [{gradreg.__version__}] - 2026-12-01.")
    if tag and tag != f"v{gradreg.__version__}":
        found.append(f"the tag must be v{gradreg.__version__}, that of the version; got {tag!r}.")
    if tables.main(["--check"]):
        found.append("generated files: run make tables.")
    return found


if __name__ == "__main__":
    if missing := faults(tag=sys.argv[1] if len(sys.argv) > 1 else ""):
        sys.exit("not fit to be published:\n" + "\n".join(f"- {one}" for one in missing))
