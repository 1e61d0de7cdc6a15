"""The table of supported model families in docs/reference/families.md, made from `clover_peft.base_model.families`.

python scripts/support_matrix.py            prints it
python scripts/support_matrix.py --write    puts it into docs/reference/families.md, between its two markers
python scripts/support_matrix.py --check    fails if docs/reference/families.md has another
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clover_peft.base_model.families import FAMILIES, Family, If
from clover_peft.io.tables import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- support matrix: scripts/support_matrix.py --write -->", "<!-- end of support matrix -->"
POSITIONS = {
    "rotary": "rotary",
    "partial": "partial rotary",
    "decoupled": "decoupled rotary (MLA)",
    "disentangled": "disentangled",
    "none": "no rotation",
}
ALONE = {
    "norm": "alone (normalised)",
    "clip": "alone (clipped)",
    "stream": "alone (joint attention)",
    "other": "alone (O reads more)",
}
KEYS = {
    "rotary": "alone",
    "partial": "any unrotated part with Q",
    "decoupled": "unrotated part with Q",
    "disentangled": "alone",
    "none": "with Q",
}


def describe(fact: str | If, words: dict[str, str]) -> str:
    """A fact of the table in words, with what it depends on."""
    if isinstance(fact, If):
        return f"{describe(fact.then, words)} if `{fact.attribute}`, else {describe(fact.otherwise, words)}"
    return words[fact]


def is_gated(family: Family) -> bool:
    return any("gate" in str(layout) for layout in family.projections.values())


def pairing(family: Family, part: str, otherwise: str) -> str:
    """What a part is paired with: nothing where the table puts something between, else as the last argument says."""
    return describe(family.between.get(part, "nothing"), {**ALONE, "nothing": otherwise})


def matrix() -> str:
    """Markdown, one line for all model types of one family."""
    groups: dict[int, list[str]] = {}
    for model_type, family in FAMILIES.items():
        groups.setdefault(id(family), []).append(model_type)
    header, rows = ["model types", "adapted by default", "value", "key", "positions"], []
    for types in groups.values():
        family = FAMILIES[types[0]]
        rows.append(
            [
                ", ".join(types),
                ", ".join(f"`{name}`" for name in family.target_modules),
                pairing(family, "v", "alone (gated)" if is_gated(family) else "with O"),
                pairing(family, "k", describe(family.positions, KEYS)),
                describe(family.positions, POSITIONS),
            ]
        )
    return markdown_table(header, rows, left=len(header))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/reference/families.md")
    parser.add_argument("--check", action="store_true", help="fail if docs/reference/families.md has another table")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if (arguments.write or arguments.check) and not (rest and after):
        sys.exit(f"{PAGE}: expected the markers {BEGIN!r} and {END!r}, one after the other; put them back")
    wanted = f"{before}{BEGIN}\n{matrix()}\n{END}{after}"
    if arguments.check and text != wanted:
        sys.exit(f"{PAGE}: the support matrix differs from the table; run python scripts/support_matrix.py --write")
    if arguments.write:
        PAGE.write_text(wanted, encoding="utf-8")
    if not (arguments.write or arguments.check):
        print(matrix())


if __name__ == "__main__":
    main()
