"""docs/results/adaptation_tables.md and the pictures of docs/results/adaptation.md, from records alone.

python scripts/adaptation_tables.py    writes them anew; the pictures need the plots extra
"""

from __future__ import annotations

from pathlib import Path

from clover_peft.experiments.adaptation import mechanism, report

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results"
MECHANISM = RECORDS / "adaptation_mechanism"  # of the adapters of the registered test with seed 2
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "results" / "adaptation_tables.md"
REFERENCE = "lora_all_r12"
# Heading of the tables, folder of their records, the arm that the others are compared with, the domain (None: all).
PARTS = [
    ("The registered test", "adaptation_test", REFERENCE, None),
    ("Against a LoRA with the same start", "adaptation_test", f"{REFERENCE}_contrast", "wikitext"),
    ("Two domains in turn", "adaptation_sequence", REFERENCE, None),
    ("The search", "adaptation_search", REFERENCE, None),
]
PICTURES = ["adaptation_test", "adaptation_search"]  # of these folders; the others have single rates so far
HEAD = """# Tables of learning and forgetting

`python scripts/adaptation_tables.py` makes this page from the records in `benchmarks/results/`. \
[Learning and forgetting](adaptation.md) says what the tables show, and \
[how to read the tables](../how_to/adaptation_benchmark.md#read-the-tables) explains the columns. \
Seconds a step are those of shared machines and cannot be compared.
"""


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for heading, folder, reference, domain in PARTS:
        found = report.load(RECORDS / folder)
        if domain is not None:  # "" is that of the model without an adapter
            found = {name: record for name, record in found.items() if record["trial"]["domain"] in ("", domain)}
        tables = report.markdown(found, reference).strip()
        command = f"clover ablate --table benchmarks/results/{folder} --reference {reference}"
        nested = tables.replace("## Adapted to", f"### {heading}: adapted to")
        parts.append(f"## {heading}\n\nFrom `{command}`:\n\n{nested}\n")
    return "\n".join([*parts, mechanism.markdown(RECORDS / "adaptation_test", MECHANISM)])


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    for folder in PICTURES:
        report.pictures(report.load(RECORDS / folder), IMAGES, folder)
    mechanism.picture(RECORDS / "adaptation_test", MECHANISM, IMAGES)


if __name__ == "__main__":
    main()
