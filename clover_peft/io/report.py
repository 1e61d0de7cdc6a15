"""`Report`: what all reports of a rewritten model can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from .atomic import write_text


class Report:
    """Base of the dataclasses that report on a rewritten model."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses

    def save(self, path: str | PathLike[str]) -> None:
        """Write the report as JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")
