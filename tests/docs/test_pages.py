"""The pages are complete, their links lead somewhere, and the README's figures are those of the records."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from peft import PeftConfig

import clover_peft
from clover_peft import CloverConfig
from clover_peft.base_model.families import FAMILIES
from clover_peft.experiments.adaptation import report
from tests.support.pages import DOCS, ROOT, pages, read
from tests.support.tiny import load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = ROOT / "benchmarks" / "results"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_of_a_page_lead_somewhere(page):
    """On a forge; the built site is checked by `mkdocs build --strict`."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, link


def test_every_page_is_in_the_navigation():
    def paths(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(paths, entry.values() if isinstance(entry, dict) else entry))

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert paths(navigation) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_every_field_of_the_config_is_in_the_table():
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = {field.name for field in dataclasses.fields(CloverConfig)} - inherited
    assert {field for field in fields if f"`{field}`" not in page} == set()


def test_every_public_name_is_in_the_api():
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert {name for name in clover_peft.__all__ if f"`{name}`" not in page} == {"__version__"}


def test_every_family_is_in_the_table():
    page = (DOCS / "reference" / "families.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("|")]
    named = {name.strip() for row in rows for name in row.split("|")[1].split(",")}
    assert set(FAMILIES) <= named


def test_every_command_and_option_is_in_the_reference():
    command = pytest.importorskip("clover_peft.cli.command", reason="there is no clover command yet")
    page = (DOCS / "reference" / "command_line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## clover ([\w-]+)\n(.*?)(?=^## |\Z)", page, flags=re.S | re.M))
    assert set(sections) == set(command.COMMANDS)
    clover = (sys.executable, "-c", "import sys, clover_command; sys.exit(clover_command.main())")
    for name, section in sections.items():
        shown = subprocess.run([*clover, name, "--help"], check=True, capture_output=True, text=True, cwd=ROOT)
        options = set(re.findall(r"(?<!\w)--[a-z][\w-]*", shown.stdout))
        assert options == set(re.findall(r"(?<!\w)--[a-z][\w-]*", section)), f"run scripts/command_line.py ({name})"


def test_a_published_version_is_the_package_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == clover_peft.__version__
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), flags=re.M)[:2] == ["Unreleased", clover_peft.__version__]


def _record(name):
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def _ratio(figures, name="v_base"):
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.2f} ({low:.2f} to {high:.2f})"


def test_the_readme_cites_the_newest_record_of_each_benchmark():
    cited = set(re.findall(r"benchmarks/results/([\w-]+)\.json", README))
    assert cited
    for name in cited:
        benchmark, number = re.fullmatch(r"(.*?)(?:-(\d+))?", name).groups()
        found = [path.stem for path in RECORDS.glob(f"{benchmark}*.json")]
        newest = max(int(m[1] or 1) for stem in found if (m := re.fullmatch(rf"{benchmark}(?:-(\d+))?", stem)))
        assert int(number or 1) == newest, f"{name}: {benchmark}-{newest} is newer"


def test_figures_of_the_readme_are_those_of_the_records():
    """Each row of its table against the record that the row links to."""
    rows = {row.split(" | ")[0].strip("| "): row for row in README.splitlines() if row.startswith("| ")}

    def row(start):
        return next(text for name, text in rows.items() if name.startswith(start))

    large, small = (_record(f"train_step{name}")["figures"] for name in ("_large-3", "-9"))
    step = row("training step / frozen base, full")
    assert _ratio(large["clover"], "step_v_base") in step
    assert _ratio(large["lora"], "step_v_base") in step
    step = row("training step / frozen base, half")
    for method in ("clover", "lora", "lora on k v up"):
        assert _ratio(small[method], "step_v_base") in step
    for figures in (large, small):
        saved = [f"{figures[method]['saved_over_base_bytes'] / 2**20:.1f} MiB" for method in ("clover", "lora")]
        assert f"| {' | '.join(saved)} |" in README
    files = _record("adapter_io-4")["figures"]
    sizes = [round(files[name]["bytes"] / 2**20) for name in ("clover", "clover folded", "lora")]
    assert "| {} MiB; {} MiB folded | {} MiB |".format(*sizes) in row("adapter file")


@pytest.mark.parametrize("script", ["adaptation_tables", "pruning_tables"])
def test_the_published_tables_are_those_of_the_records(script):
    module = load_script(script)
    same = module.PAGE.read_text(encoding="utf-8") == module.page()
    assert same, f"run python scripts/{script}.py"


def test_rows_of_the_pruning_page_are_those_of_the_tables():
    """Its rows that name a method or a text are copies."""
    page, tables = ((DOCS / "results" / f"{name}.md").read_text("utf-8") for name in ("pruning", "pruning_tables"))
    starts = r"(?:CLOVER|vanilla), (?:data|weights), |(?:wikitext|python|french|all|own|wikitext and own) \|"
    rows = re.findall(rf"^\| (?:{starts}).*", page, re.M)
    assert len(rows) > 20
    assert [row for row in rows if row not in tables.splitlines()] == []


def registered(domain: str) -> tuple[dict, dict, dict, list[str]]:
    """The base's record, CLOVER's and LoRA's records by rate, and the other domains."""
    found = report.load(RECORDS / "adaptation_test")
    base, arms = found["base"], report.by_arm(found, domain)
    clover, lora = arms["clover_all_contrast_7"], arms["lora_all_r12"]
    assert all(len(runs) == 5 for rates in (clover, lora) for runs in rates.values())
    return base, clover, lora, report.other_domains(base, domain)


def forgotten_less(domain: str) -> list[tuple[float, float]]:
    """How much less CLOVER forgets than LoRA at the loss of each rate of LoRA, highest first; standard errors."""
    base, clover, lora, others = registered(domain)
    result = []
    for rate in sorted(lora, reverse=True):
        level = report.mean_loss(lora[rate], domain)
        mean, error = report.paired(report.at_level(base, clover, domain, level), lora[rate], others)
        result.append((-mean, error))
    return result


def test_the_readme_says_what_the_registered_test_found():
    less = forgotten_less("wikitext")
    assert all(mean > 2 * error for mean, error in less)
    assert "rises by {:.3f}, {:.3f} and {:.3f} less".format(*(mean for mean, _ in less)) in README
    less = forgotten_less("french")
    means, errors = [mean for mean, _ in less], [mean / error for mean, error in less]
    assert (
        f"lowers the loss on other text by {min(means):.3f} to {max(means):.3f} more, but one of these three" in README
    )
    assert f"misses the margin ({min(errors):.2f} standard errors" in README
    assert sum(ratio <= 2 for ratio in errors) == 1
    learned = {}
    for domain in ("wikitext", "french", "python"):
        _, clover, lora, others = registered(domain)
        best = [rates[report.best_rate(rates, domain)] for rates in (clover, lora)]
        learned[domain] = report.paired(*best, [domain])
    rose, _ = report.paired(*best, others)
    (wikitext, french, python) = ((abs(mean), error) for mean, error in learned.values())
    assert [mean > 0 for mean, _ in learned.values()] == [False, False, True]  # of losses, less is better
    assert "it learns as much as LoRA ({:.3f} more, standard error {:.3f})".format(*wikitext) in README
    assert "it learns {:.3f} ({:.3f}) more, and lowers the loss on other text by 0".format(*french) in README
    assert (
        "it learns {:.3f} ({:.3f}) more, and lowers the loss on other text by {:.3f} more".format(*python, rose)
        in README
    )
