"""What a package index shows: README.md, with links that work there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    """Links of README.md are relative, for readers of a checkout; in the package's metadata they lead to the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the text that the index shows."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, metadata["urls"]["Repository"])}


def with_absolute_links(text: str, repository: str) -> str:
    """The text with links to files of the repository in place of relative ones; images as files."""
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)([^)]+)\)", rf"\1{repository}/raw/HEAD/\2)", text)
    return re.sub(r"(\]\()(?![a-z]+:|#)([^)]+)\)", rf"\1{repository}/blob/HEAD/\2)", text)
