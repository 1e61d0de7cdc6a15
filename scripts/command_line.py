"""The help texts in docs/reference/command_line.md.

python scripts/command_line.py    puts what `clover NAME --help` prints under every heading "## clover NAME"
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command_line.md"
SECTION = re.compile(r"^(## clover ([\w-]+)\n.*?^```text\n).*?(^```$)", flags=re.S | re.M)


def help_text(name: str) -> str:
    command = [sys.executable, "-c", "import clover_command; clover_command.main()", name, "--help"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(SECTION.sub(lambda m: m[1] + help_text(m[2]).rstrip() + "\n" + m[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()
