"""scripts/peft_conformance.py: what it unpacks. That it runs peft's tests is seen by running it."""

from __future__ import annotations

import io
import runpy
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_archive_is_unpacked_inside_its_folder_only(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "peft_conformance.py"))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in ("peft/tests/test_a.py", "../outside.py", "/outside.py"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
        link = tarfile.TarInfo("peft/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../outside.py"
        tar.addfile(link)
    script["unpack"](tmp_path / "a.tar.gz", tmp_path / "in")
    found = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if not path.is_dir()]
    assert found == ["a.tar.gz", "in/peft/tests/test_a.py"]
    assert (tmp_path / "in/peft/tests/test_a.py").read_bytes() == b"ok"
