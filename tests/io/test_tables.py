"""Markdown tables."""

from __future__ import annotations

import pytest

from clover_peft.io.tables import markdown_table


def test_figures_are_aligned_to_the_right():
    assert markdown_table(["name", "n", "share"], [["a", 1, "5 %"], ["b", None, ""]]) == (
        "| name | n | share |\n| --- | ---: | ---: |\n| a | 1 | 5 % |\n| b | None | |"
    )


def test_more_columns_of_text_and_no_rows():
    assert markdown_table(["a", "b", "c"], [], left=2) == "| a | b | c |\n| --- | --- | ---: |"
    assert markdown_table(["a"], iter([["x"]]), left=3) == "| a |\n| --- |\n| x |"


def test_a_bar_in_a_cell_ends_no_cell():
    assert markdown_table(["a|b", "c"], [["q|k", 1]]).splitlines()[2] == r"| q\|k | 1 |"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"table: expected 2 cells a row, found 1: \['x'\]"):
        markdown_table(["a", "b"], [["y", 1], ["x"]])
