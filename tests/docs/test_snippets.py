"""The Python of README, tutorials and how-to pages runs, and their command lines parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clover_peft.base_model import families
from tests.support.pages import ROOT, SKIPPED, command_lines, guides, pages, read, snippets

HUB_NAMES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf")


def _for_a_small_machine(code: str, folder: str) -> str:
    """The snippet on a local model, and on the CPU whatever the machine has."""
    for name in HUB_NAMES:
        code = code.replace(name, folder)
    on_cpu = "use_cpu=True, " if "bf16=" in code.replace("also bf16=", "") else "use_cpu=True, bf16=False, "
    return code.replace("SFTConfig(", f"SFTConfig({on_cpu}")


def test_there_are_snippets():
    """Those of the README are short programs of their own, which import what registers CLOVER."""
    readme = snippets(Path("README.md"), "python")
    assert len(readme) == 2
    assert all("import clover_peft" in snippet.code for snippet in readme)
    assert sum(bool(snippets(page, "python")) for page in guides()) >= 9


@pytest.mark.parametrize("page", [page for page in guides() if snippets(page, "python")], ids=str)
def test_the_python_of_a_page_runs(page, stand_in, monkeypatch):
    """All of it, from top to bottom, as one program."""
    found = [snippet for snippet in snippets(page, "python") if not snippet.skipped]
    code = "".join(snippet.code for snippet in found)
    for module, extra in (("trl", "train"), ("bitsandbytes", "quant")):
        if module in code or ("BitsAndBytes" in code and module == "bitsandbytes"):
            pytest.importorskip(module, reason=f"needs the extra {extra}")
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # a page adds to it
    namespace = {"__name__": "page"}
    for snippet in found:
        padded = "\n" * (snippet.line - 1) + _for_a_small_machine(
            snippet.code, stand_in
        )  # so that errors name the line
        exec(compile(padded, str(page), "exec"), namespace)


def test_few_snippets_are_left_out():
    assert sum(snippet.skipped for page in guides() for snippet in snippets(page, "python")) == 0
    assert sum(snippet.skipped for page in pages() for snippet in snippets(page, "bash")) <= 3
    marks = sum(len(re.findall(r"<!-- not (?:run|parsed)", read(page))) for page in pages())
    assert marks == sum(len(re.findall(SKIPPED.pattern.rstrip("$") + "```", read(page))) for page in pages())


@pytest.mark.parametrize("page", [page for page in pages() if command_lines(page)], ids=str)
def test_the_command_lines_of_a_page_parse(page):
    command = pytest.importorskip("clover_peft.cli.command", reason="there is no clover command yet")
    for words in command_lines(page):
        if words in (["--help"], ["COMMAND", "--help"], ["NAME", "--help"]):
            continue
        try:
            name, given = command.parse(words)
        except SystemExit as stop:  # argparse has printed what is wrong
            pytest.fail(f"{page}: clover {' '.join(words)}: {stop}")
        assert name == words[0]
        if name == "sft":
            pytest.importorskip("trl", reason="needs the extra train")
            from clover_peft.experiments.training.arguments import parse

            parse(given.config, [*given.overrides, "use_cpu=true"])  # wherever the tests run


@pytest.mark.parametrize("page", pages(), ids=str)
def test_a_page_names_files_that_exist(page):
    for path in re.findall(r"(?:\./)?((?:scripts|configs|benchmarks|clover_peft|tests)/[\w./-]+\.\w+)", read(page)):
        if not path.endswith("my_benchmark.py"):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in guides() if "prune(" in read(page)], ids=str)
def test_pages_calibrate_with_several_rows_a_batch(page):
    """A pass for each row took the README's example nine minutes."""
    assert "for text in texts" not in read(page)
