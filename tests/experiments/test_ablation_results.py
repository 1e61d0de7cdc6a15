"""The table of an ablation is arithmetic on its records, and takes no record that does not fit."""

from __future__ import annotations

import statistics

import pytest

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.ablation import report, results, trial_runner
from clover_peft.experiments.ablation.grid import read_grid
from tests.support.ablation_records import RUN, result, write


def test_rates_are_chosen_by_loss_and_else_by_accuracy():
    def candidate(rate: float, accuracy: float, **loss: float | str) -> dict:
        return {"trial": {"learning_rate": rate}, "validation": {"mean": accuracy, **loss}}

    by_loss = [candidate(0.1, 0.6, loss=0.7), candidate(0.2, 0.5, loss=0.6), candidate(0.3, 0.7, loss=0.6)]
    assert results.choose(by_loss)["trial"]["learning_rate"] == 0.2
    by_accuracy = [candidate(0.3, 0.7), candidate(0.1, 0.6), candidate(0.2, 0.7)]
    assert results.choose(by_accuracy)["trial"]["learning_rate"] == 0.2
    diverged = [candidate(0.1, 0.9), candidate(0.2, 0.9, loss="NaN"), candidate(0.3, 0.1, loss=9.0)]
    assert results.choose(diverged)["trial"]["learning_rate"] == 0.3
    assert results.choose(diverged[:2])["trial"]["learning_rate"] == 0.1


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(ValueError, match=r"a.json: expected a JSON object, found .*; delete it"):
        results.load(tmp_path)


def test_the_table_is_arithmetic_on_records(tmp_path):
    folder = tmp_path / "records"
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        write(folder, f"a-lr0.1-seed{seed}", "a", 0.1, seed, validation=result(0.9))
        tried = ["a-lr0.1-seed0", "a-lr0.3-seed0"]
        write(folder, f"a-lr0.1-seed{seed}.test", "a", 0.1, seed, test=result(accuracy), chosen_from=tried)
        write(folder, f"b-lr0.2-seed{seed}", "b", 0.2, seed, validation=result(0.3))
        write(folder, f"b-lr0.2-seed{seed}.test", "b", 0.2, seed, test=result(0.5))
    write(folder, "a-lr0.3-seed0", "a", 0.3, 0, validation={**result(0.8), "loss": 0.25})  # tried
    rows = {row.method: row for row in results.table_rows(results.load(folder))}
    assert rows["a"].average == pytest.approx(0.6)
    assert rows["a"].sd == pytest.approx(0.1)
    assert rows["a"].interval == pytest.approx([0.5, 0.7])
    assert rows["a"].candidates == {0.1: (0.9, None), 0.3: (0.8, 0.25)}
    assert rows["a"].at_edge
    assert rows["a"].unparsed == 3
    found = results.difference(rows["a"], rows["b"])
    assert (found.points, found.of_seeds) == pytest.approx((0.1, 0.1 / 3**0.5))
    assert found.of_questions is None  # the records do not say which were right
    shown = report.markdown(results.load(folder))
    assert "| a | 10 | 60.0 | 60.00 ± 10.00 | 50.0 to 70.0 |" in shown
    assert "- a against b: +10.00 points (standard error: 5.77 of the seeds)" in shown
    assert "| a | 0.1 (edge) | 0.1: 90.0%, 0.3: 80.0% (loss 0.250) | 3 | 3 | 1.0 | 2 | 1 | 1.0 |" in shown
    for seed in (2, 5):  # falling: rates were tried at the first, 5
        write(tmp_path / "falling", f"a-lr0.1-seed{seed}", "a", 0.1, seed, validation=result(seed / 10))
        tried = ["a-lr0.1-seed5", "a-lr0.3-seed5"]
        write(tmp_path / "falling", f"a-lr0.1-seed{seed}.test", "a", 0.1, seed, test=result(0.5), chosen_from=tried)
    write(tmp_path / "falling", "a-lr0.3-seed5", "a", 0.3, 5, validation={**result(0.1), "loss": "NaN"})
    [row] = results.table_rows(results.load(tmp_path / "falling"))
    assert row.candidates == {0.1: (0.5, None), 0.3: (0.1, None)}
    assert report.markdown({}) == "No method has answered the test questions yet."
    searched = {name: record for name, record in results.load(folder).items() if not name.endswith(".test")}
    lines = report.markdown(searched).splitlines()
    assert lines[4] == "| a | 10 | 0.3 | 0.2500 | 80.0% | 5 | 2 | `a-lr0.3-seed0.json` |"
    assert sum(line.startswith("| ") for line in lines) == 2 + 7


def test_a_file_that_is_no_record_of_its_name_stops_the_grid(tiny_grid, tmp_path):
    grid, step = read_grid(tiny_grid.path), "clover-lr0.001-seed3"
    (tmp_path / f"{step}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{step}.json: expected a record or no file, found another; take it out"):
        trial_runner.make(grid, step, tmp_path, tmp_path)
    write(tmp_path, step, "clover", 0.001, 3, test=result(0.1))  # validation is missing
    with pytest.raises(ValueError, match=f"{step}.json: expected the record of {step}, found one of"):
        results.load(tmp_path)
    (tmp_path / f"{step}.json").unlink()
    write(tmp_path, "clover-lr0.001-seed4.test", "clover", 0.001, 3, test=result(0.1))
    with pytest.raises(ValueError, match=r"the record of clover-lr0.001-seed4.test, found one of clover-lr0"):
        results.load(tmp_path)
    write(tmp_path, "clover-lr0.001-seed4.test", "clover", 0.001, 3, test=result(0.1), trial={"seed": 1})
    with pytest.raises(ValueError, match=r"the record of clover-lr0.001-seed4.test, found one of {'seed': 1}"):
        results.load(tmp_path)


def test_records_that_were_asked_otherwise_are_not_one_table(tmp_path):
    write(
        tmp_path,
        "a-lr1-seed0.test",
        "a",
        1,
        0,
        test={**result(0.1), "questions": "x", "evaluation": {"mode": "score"}},
    )
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test=result(0.1))  # an old one, which does not say
    results.table_rows(results.load(tmp_path))
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test={**result(0.1), "evaluation": {"mode": "generate"}})
    with pytest.raises(ValueError, match=r"b-lr1-seed0.test: expected the evaluation of a-lr1-seed0.test, .*score"):
        results.table_rows(results.load(tmp_path))
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test={**result(0.1), "questions": "y"})
    with pytest.raises(ValueError, match=r"expected the questions of a-lr1-seed0.test, x, found y; take out"):
        results.table_rows(results.load(tmp_path))


def test_what_runs_differ_in_and_what_is_missing_is_said(tmp_path):
    for method, steps in (("a", 5), ("b", 9)):
        own = {"calibration_rows": 64} if method == "b" else {}
        settings = {"max_steps": steps, "seed": steps, "save_steps": 3, "peft": {"r": steps}, **own}
        run = {**RUN, "settings": settings}
        write(tmp_path, f"{method}-lr1-seed0", method, 1, 0, validation=result(0.1), run=run)
        tried = {"chosen_from": [f"{method}-lr1-seed0", f"{method}-lr2-seed0"]}
        write(tmp_path, f"{method}-lr1-seed0.test", method, 1, 0, test=result(0.1), **tried)
    shown = report.markdown(results.load(tmp_path))
    assert "- settings: calibration_rows 64 or null; max_steps 5 or 9\n" in shown + "\n"
    assert "Rates were also chosen from records that are not here: a-lr2-seed0, b-lr2-seed0." in shown


def answered(right: str) -> dict:
    count = right.count("1")
    return {"questions": len(right), "correct": count, "unparsed": 0, "accuracy": count / len(right), "right": right}


def test_questions_that_both_answer_are_compared_in_pairs(tmp_path):
    marks = {"a": ("1111000000", "1110000001"), "b": ("1100000000", "1100000000")}
    for method, seeds in marks.items():
        for seed, right in enumerate(seeds):
            tasks = {name: answered(part) for name, part in (("boolq", right), ("piqa", right[1:5]))}
            mean = statistics.mean(task["accuracy"] for task in tasks.values())
            found = {"tasks": tasks, "mean": mean, "interval": [0, 1], "questions": "a digest"}
            write(tmp_path, f"{method}-lr1-seed{seed}", method, 1, seed, validation=result(0.5))
            write(tmp_path, f"{method}-lr1-seed{seed}.test", method, 1, seed, test=found)
    one, other = results.table_rows(results.load(tmp_path))
    paired = results.difference(one, other)
    differences = [0, 0, 1, 0.5, 0, 0, 0, 0, 0, 0.5]
    both = [differences, differences[1:5]]
    assert paired.points == pytest.approx(statistics.mean(map(statistics.mean, both)))
    squares = [statistics.variance(part) / len(part) for part in both]
    assert paired.of_questions == pytest.approx(sum(squares) ** 0.5 / 2)
    del found["questions"]  # as in old records
    write(tmp_path, "b-lr1-seed0.test", "b", 1, 0, test=found)
    assert results.difference(*results.table_rows(results.load(tmp_path))).of_questions is None
    write(tmp_path, "a-lr2-seed0.test", "a", 2, 0, test=result(0.9))
    with pytest.raises(
        ValueError, match="a: expected test records at the one learning rate chosen for it, found 1, 2"
    ):
        results.table_rows(results.load(tmp_path))
