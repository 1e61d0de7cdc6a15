"""Model cards: what the hub reads, and what people read."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from clover_peft.io.cards import write_card

COMMON = dict(title="a title", library="peft", tags=["sft"], code="import x\nx.load()", ending="The end.")


@pytest.mark.parametrize(("base", "named"), [("someone/tiny", "someone/tiny"), ("a_folder", None)])
def test_a_card_is_one_that_the_hub_reads(base, named, tmp_path):
    (tmp_path / "README.md").write_text("that of peft")
    write_card(tmp_path, base=base, facts={"base model": base, "rows": "a | b"}, **COMMON)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == named
    assert card.data.library_name == "peft"
    assert card.data.tags == ["sft"]
    assert card.text.strip() == (
        "# a title\n\n```python\nimport x\nx.load()\n```\n\n"
        f"| | |\n| --- | --- |\n| base model | {base} |\n| rows | a \\| b |\n\nThe end."
    )


def test_text_stands_above_the_table(tmp_path):
    write_card(tmp_path, base="a/b", facts={"seed": "0"}, text="Some *text*.", **COMMON)
    assert "```\n\nSome *text*.\n\n| | |\n| --- | --- |\n| seed | 0 |" in (tmp_path / "README.md").read_text()
