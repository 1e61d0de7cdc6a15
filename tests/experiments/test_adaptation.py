"""The adaptation benchmark: text domains, paired differences, a killed run that goes on to the same table."""

from __future__ import annotations

import copy
import gzip
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft import CloverConfig, initialize_from_contrast
from clover_peft.cli.ablate import main
from clover_peft.experiments.adaptation import mechanism, report, running
from clover_peft.experiments.adaptation.domains import Document, read_domain
from clover_peft.experiments.adaptation.lora_starts import add_lora_from_data, balance_lora, contrast_lora
from clover_peft.experiments.adaptation.plan import Experiment, Trial, read_experiment
from clover_peft.experiments.adaptation.trial import Laboratory, _State, drawn
from clover_peft.experiments.adaptation.troff import plain_text
from clover_peft.experiments.adaptation.windows import Windows, document_losses, restricted_head
from clover_peft.tuner.update_scale import SENSITIVITY

CONFIGS = Path(__file__).parents[2] / "configs" / "ablations"
PROBE = CONFIGS / "adaptation_probe.yaml"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


def tiny() -> Experiment:
    return read_experiment("adaptation_tiny")


RECORD = {
    "place": 0,
    "split": "validation",
    "first_rate": 0.1,
    "model": {"name": "model", "origin": "nowhere"},
    "vocabulary": {"a": None, "b": None},
    "settings": {"dtype": "float32"},
    "parameters": 7,
    "training_loss": [1.0],
    "seconds": {"train": 1.0},
    "peak_memory_bytes": 2**20,
    "adapter_bytes": 2**20,
}


# --- text -----------------------------------------------------------------------------------------


PAGE = r"""'\" t
.\" a comment
.TH CHAT 1 "mai 2024" "Outils"
.SH NOM
chat \- décrire un \fIanimal\fP
.SH SYNOPSIS
.B chat
.RI [ options ]
.if n \{\
.ne 3
.\}
.de XX
not text
..
.SS "Une section"
C'est l\(aqheure\~; \(Foun mot\(Fc et \[u00E9]t\('e\&.
.TP
\fB\-a\fR, \fB\-\-all\fR
tout
.TS
l l.
a	b
.TE
.EX
 x = 1 \e
   y = 2
.EE
.UR https://example.org
le site
.UE .
.SH TRADUCTION
Les traducteurs.
.SH APRES
rien
"""


def test_a_manual_page_as_text():
    assert plain_text(PAGE, "TRADUCTION").splitlines() == [
        "NOM",
        "chat - décrire un animal",
        "",
        "SYNOPSIS",
        "chat [options]",
        "",
        "Une section",
        "C'est l'heure ; «un mot» et ét.",
        "-a, --all tout",
        " x = 1 \\",
        "   y = 2",
        "https://example.org le site.",
    ]
    assert "Les traducteurs" in plain_text(PAGE)
    assert plain_text(".Dd 1 mai\n.Sh NOM\n") == ""


def test_documents_are_split_by_their_text_alone(tmp_path):
    texts = [f"{i} " * 400 for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(texts[0])
    (tmp_path / "short.txt").write_text("too short")
    domain = read_domain("numbers", f"text:{tmp_path}")
    assert sorted(document.text for document in domain.documents) == sorted(texts)
    for i in range(30):
        (tmp_path / f"{i}.txt").unlink()
    kept = {document.key: document.split for document in domain.documents}
    fewer = read_domain("numbers", f"text:{tmp_path}")
    assert all(kept[document.key] == document.split for document in fewer.documents)
    assert domain.describe()["documents"] == {
        split: len(domain.of(split)) for split in ("train", "validation", "test")
    }
    assert domain.describe()["sha256"] != fewer.describe()["sha256"]
    shares = [Document("", str(i)).split for i in range(2000)]
    assert abs(shares.count("train") / 2000 - 0.6) < 0.05
    assert abs(shares.count("test") / 2000 - 0.2) < 0.05


def test_manual_pages_of_a_folder(tmp_path):
    folder = tmp_path / "man1"
    folder.mkdir()
    for i in range(40):
        with gzip.open(folder / f"page{i}.1.gz", "wt", encoding="utf-8") as file:
            file.write(f".TH P{i} 1\n.SH NOM\n" + f"page {i} du manuel, " * 60 + "\n.SH TRADUCTION\nnon\n")
    domain = read_domain("french", f"manpages-fr:{tmp_path}")
    assert len(domain.documents) == 40
    assert all("non" not in document.text and "NOM" in document.text for document in domain.documents)


def test_articles_of_wikitext(tmp_path, monkeypatch):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    articles = "".join(f" = Title {i} = \n\n = = Part = = \n\n" + f"Text {i} . " * 80 + "\n" for i in range(30))
    for split in ("train", "validation", "test"):
        with gzip.open(folder / f"{split}.txt.gz", "wt", encoding="utf-8") as file:
            file.write(articles if split == "train" else "")
    monkeypatch.setenv("CLOVER_DATA", str(tmp_path))
    domain = read_domain("wikitext", "wikitext2")
    assert sorted(document.name for document in domain.documents) == sorted(f"Title {i}" for i in range(30))
    assert all("= = Part = =" in document.text for document in domain.documents)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("latin", "domains.x: expected one of wikitext2, manpages-fr, python, text, found 'latin'"),
        ("python:nothing", "expected a package of the standard library"),
        ("text:/nowhere.txt", "expected a .txt file or a folder of them, found none"),
        ("manpages-fr:/nowhere", "expected a folder with man1/"),
    ],
)
def test_domains_that_cannot_be_had(source, message):
    with pytest.raises(ValueError, match=message):
        read_domain("x", source)


# --- measuring ------------------------------------------------------------------------------------


def test_losses_are_those_of_a_softmax_over_the_vocabulary():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, initializer_range=0.3)).eval()
    vocabulary = torch.tensor([3, 7, 8, 20, 49])
    ids = vocabulary[torch.randint(5, (4, 12))]
    head = model.get_output_embeddings()
    for kept, tokens in ((vocabulary, vocabulary), (None, torch.arange(50))):
        found = document_losses(model, Windows(ids, ids, ["a", "b", "c", "d"], kept), 3)
        logits = model(ids).logits[:, :-1, tokens]
        targets = torch.searchsorted(tokens, ids[:, 1:])
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(-1)
        assert list(found) == ["a", "b", "c", "d"]
        assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-5)
        with restricted_head(model, kept) as labels:
            whole = model(input_ids=ids, labels=labels[ids]).loss
        assert float(whole) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert model.get_output_embeddings() is head
    assert model.config.vocab_size == 50


def record(arm: str, seed: int, losses: dict[str, dict[str, float]], **more) -> dict:
    return {
        "trial": {"domain": "a", "arm": arm, "rate": 1e-3, "seed": seed},
        "place": 0,
        "losses": losses,
        "diverged_at_step": None,
        **more,
    }


def test_paired_differences_by_document_and_seed():
    keys = [f"d{i}" for i in range(50)]
    effects = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    one = [
        record("x", seed, {"a": {k: 3.0 + e + shift for k, e in zip(keys, effects, strict=True)}})
        for seed, shift in ((0, 0.0), (1, 0.3), (2, -0.3), (7, 9.0))
    ]
    other = [record("y", seed, {"a": dict.fromkeys(keys, 3.0)}) for seed in (0, 1, 2)]
    mean, error = report.paired(one, other, ["a"])
    assert mean == pytest.approx(statistics.fmean(effects))
    assert error**2 == pytest.approx(statistics.variance(effects) / 50 + statistics.variance([0.0, 0.3, -0.3]) / 3)
    _, alone = report.paired(one[:1], other, ["a"])
    assert alone == pytest.approx((statistics.variance(effects) / 50) ** 0.5)
    assert report.paired(one[3:], other, ["a"]) is None
    assert report.paired([{**one[0], "diverged_at_step": 3}], other, ["a"]) is None


def curve(arm: str, points: dict[float, tuple[float, float]], **more) -> dict[float, list]:
    """Records of two documents by rate: rate -> losses on the domain and on the other."""
    return {
        rate: [record(arm, 0, {"a": {"d": a, "e": a}, "b": {"d": b, "e": b + 1}}, split="validation", **more)]
        for rate, (a, b) in points.items()
    }


def test_forgetting_at_equal_learning_is_interpolated_between_rates():
    base = curve("base", {0.0: (3.0, 1.0)})[0.0][0]
    rates = curve("x", {1e-3: (2.8, 1.2), 2e-3: (2.6, 1.8), 4e-3: (2.7, 2.5)})
    for level, forgot in ((3.0, 1.0), (2.9, 1.1), (2.8, 1.2), (2.65, 1.65), (2.6, 1.8)):
        (found,) = report.at_level(base, rates, "a", level)
        assert found["losses"]["a"]["d"] == pytest.approx(level)
        assert found["losses"]["b"] == pytest.approx({"d": forgot, "e": forgot + 1})
    assert report.at_level(base, rates, "a", 2.59) is None  # not reached, and the curve does not go on to 4e-3
    found = {
        "base": {**base, "model": {"name": "m", "origin": "o"}, "settings": {"dtype": "float32"}},
        **{f"y{rate}": runs[0] for rate, runs in curve("y", {1e-3: (2.9, 1.0), 2e-3: (2.7, 1.0)}).items()},
        **{f"x{rate}": {**runs[0], "place": 1} for rate, runs in rates.items()},
    }
    for one in found.values():
        one["trial"] = {**one["trial"], "arm": "base" if one is found["base"] else one["trial"]["arm"]}
        one |= dict(vocabulary={"a": None, "b": None}, parameters=1, seconds={"train": 1.0}, training_loss=[1.0])
        one |= dict(peak_memory_bytes=0, adapter_bytes=None)
    for name, one in found.items():
        one["trial"]["rate"] = 0.0 if name == "base" else float(name[1:])
    shown = report.markdown(found)
    assert "| x | +0.1000 (0.0000) | +0.5000 (0.0000) |" in shown
    assert report.markdown(found, "y") == shown
    other = report.markdown(found, "x")
    assert "Loss less that of x at 0.002" in other
    assert other.index("| y |") < other.index("| x |", other.index("no adapter"))  # the rows keep their order
    with pytest.raises(ValueError, match="reference: expected one of x, y, found 'z'"):
        report.markdown(found, "z")


def test_curves_are_of_the_seeds_that_all_rates_have():
    """Seeds of the best rate alone must not move the level at which curves are compared."""

    def with_seeds(name, points):
        rates = curve(name, points)
        rates[1e-3] += [record(name, 7, {"a": {"d": 1.0, "e": 1.0}, "b": {"d": 9.0, "e": 9.0}})]
        return rates

    base = curve("base", {0.0: (3.0, 1.0)})[0.0][0]
    points = {"y": {1e-3: (2.7, 1.0), 2e-3: (2.9, 1.5)}, "x": {1e-3: (2.7, 1.3), 2e-3: (2.6, 1.8)}}
    whole = {arm: with_seeds(arm, rates) for arm, rates in points.items()}
    plain = {arm: curve(arm, rates) for arm, rates in points.items()}
    found, expected = (report._at_equal_learning(base, arms, "a", ["b"]) for arms in (whole, plain))
    assert "| x | +0.3000 (0.0000) |" in expected
    assert found == expected


def test_further_seeds_can_be_of_the_first_rate_alone():
    experiment = read_experiment(PROBE, ["seeds=[0, 1, 2]", "curve_seeds=1"])
    trials = experiment.trials()
    assert len(trials) == 1 + 5 * 4 + 5 * 2
    assert {trial.rate for trial in trials if trial.seed} == {arm.rates[0] for arm in experiment.arms}
    assert len(read_experiment(PROBE, ["seeds=[0, 1, 2]"]).trials()) == 1 + 5 * 4 * 3


def test_the_rate_is_chosen_on_validation_text_alone():
    points = {1e-3: (2.8, 1.2), 2e-3: (2.6, 1.8)}
    assert report.best_rate(curve("x", points), "a") == 2e-3
    rates = curve("x", points)
    for (one,) in rates.values():
        one |= {"split": "test", "first_rate": 1e-3}
    assert report.best_rate(rates, "a") == 1e-3
    for (one,) in rates.values():
        one["trial"]["rate"] = one["first_rate"] = 1e-3 if one is rates[1e-3][0] else 2e-3
    with pytest.raises(ValueError, match=r"x: expected records of one first rate.*found 0\.001 and 0\.002"):
        report.best_rate(rates, "a")


def test_rates_are_chosen_by_the_seeds_that_all_of_them_have():
    rates = curve("x", {1e-3: (2.7, 1.0), 2e-3: (2.8, 1.0)})
    rates[1e-3] += [record("x", 7, {"a": {"d": 9.0, "e": 9.0}, "b": {"d": 1.0, "e": 1.0}}, split="validation")]
    assert report.best_rate(rates, "a") == 1e-3


def test_an_arm_that_diverged_keeps_its_row_and_a_reference_that_did_is_named():
    arms = {arm: curve(arm, {1e-3: (2.7, 1.0)}) for arm in ("x", "y", "z")}
    arms["y"][1e-3][0]["diverged_at_step"] = 3
    columns = {"learned": ["a"], "b": ["b"]}
    assert "| y, diverged | | |" in report._differences(arms, "a", columns)
    shown = report._differences({"y": arms["y"], "x": arms["x"], "z": arms["z"]}, "a", columns)
    assert shown == "y, which the other arms would be compared with, diverged.\n"


def test_arms_of_several_configurations_need_a_reference():
    found = {name: curve(name, {1e-3: (2.7, 1.0)})[1e-3][0] for name in ("x", "y")}
    with pytest.raises(ValueError, match="found x and y, of different ones; name the arm"):
        report.markdown(found)


# --- running --------------------------------------------------------------------------------------


def test_the_probe_counts_the_parameters_that_it_says():
    experiment = read_experiment(PROBE)
    assert experiment.evaluation.split == "validation"
    assert [len(arm.rates) for arm in experiment.arms] == [4] * 5
    trials = experiment.trials()
    assert len({trial.name for trial in trials}) == len(trials) == 21
    assert [trial.arm for trial in trials[1:6]] == [arm.name for arm in experiment.arms]


def losses(out: Path) -> dict:
    found = report.load(out / "records")
    return {name: (record["losses"], record.get("training_loss")) for name, record in found.items()}


class Killed(Exception):
    pass


def kill_at(step: int):
    def on_step(trial: Trial, done: int) -> None:
        if done == step:
            raise Killed

    return on_step


def test_a_killed_run_goes_on_to_the_same_table(tmp_path, capsys):
    experiment = tiny()
    running.run(experiment, tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 3

    out = tmp_path / "killed"
    with pytest.raises(Killed):  # in the first trial, behind its checkpoint of step 3
        running.run(experiment, out, kill_at(5))
    assert [*losses(out)] == ["base"]
    assert len([*(out / "checkpoints").glob("*.pt")]) == 1
    with pytest.raises(Killed):  # in the second, in its first step: the first went on, from step 3
        running.run(experiment, out, kill_at(1))
    assert len(losses(out)) == 2
    seen: list[int] = []
    running.run(experiment, out, lambda trial, step: seen.append(step))
    assert seen == list(range(1, 9))
    assert losses(out) == whole
    assert not [*(out / "checkpoints").glob("*.pt")]
    running.run(experiment, out, kill_at(1))  # there is nothing left to do

    shown, again = (running.show(tmp_path / name / "records", None) for name in ("whole", "killed"))
    columns = [[line.split("|")[:7] for line in text.splitlines()] for text in (shown, again)]
    assert columns[0] == columns[1]
    assert "## Adapted to asyncio" in shown
    assert "clover_balanced" in shown

    with pytest.raises(ValueError, match=r"evaluation.documents: expected 4 as in .*base.json, found 3"):
        running.run(replace(experiment, evaluation=replace(experiment.evaluation, documents=3)), out)
    capsys.readouterr()


@pytest.fixture
def in_turn() -> Experiment:
    experiment = read_experiment(
        "adaptation_tiny", ["domains.workers=python:multiprocessing", "adapt_to=[asyncio, asyncio+email]"]
    )
    return replace(experiment, arms=[replace(arm, rates=(5e-3,)) for arm in experiment.arms])


def test_domains_in_turn_go_on_where_they_were_killed(in_turn, tmp_path):
    second = replace(in_turn, adapt_to=["asyncio+email"])
    steps = in_turn.training.steps
    for step in (steps, steps + 4):  # at the border, and in the second domain
        with pytest.raises(Killed):
            running.run(second, tmp_path / "killed", kill_at(step))
    for out in (tmp_path / "killed", tmp_path / "whole"):
        running.run(second, out)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_domains_in_turn_are_learned_and_tabulated(in_turn, tmp_path):
    running.run(in_turn, tmp_path)
    records = report.load(tmp_path / "records")
    base = records["base"]
    for arm in in_turn.arms:
        first, both = (records[f"{task}-{arm.name}-lr0.005-seed0"] for task in in_turn.adapt_to)
        assert both["training_loss"][: in_turn.training.steps] == first["training_loss"]
        assert len(both["training_loss"]) == 2 * in_turn.training.steps
        assert report.mean_loss([both], "email") < min(report.mean_loss([one], "email") for one in (base, first))
        rise = report.mean_loss([both], "workers") - report.mean_loss([base], "workers")
        assert report.point(base, [both], "asyncio+email")[1] == pytest.approx(rise)  # of what was not trained on
    shown = running.show(tmp_path / "records", tmp_path / "pictures")
    assert "## Adapted to asyncio\n" in shown
    assert "## Adapted to asyncio, then to email\n" in shown
    assert "| email loss | asyncio rise | workers rise |" in shown
    assert "| asyncio, learned before | workers | all others |" in shown
    assert mechanism._split({"asyncio": 1.0, "email": 2.0, "workers": 4.0}, ["asyncio", "email"]) == {
        "domain": 2.0,
        "others": 4.0,
    }


def test_what_diverges_on_the_first_of_two_domains_is_not_trained_on_the_second(in_turn, tmp_path):
    wild = replace(in_turn.arms[0], name="wild", rates=(1e37,))
    found = Laboratory(replace(in_turn, arms=[wild]), tmp_path).run(Trial("asyncio+email", "wild", 1e37, 0))
    assert found["diverged_at_step"] == len(found["training_loss"]) < in_turn.training.steps


def test_each_domain_in_turn_has_a_schedule_and_an_optimizer_of_its_own(in_turn, tmp_path, monkeypatch):
    rates, moments = [], []
    advance = _State.advance

    def watched(state, *arguments):
        moments.append(sum(len(kept) for kept in state.optimizer.state.values()))
        rates.append(state.optimizer.param_groups[0]["lr"])
        advance(state, *arguments)

    monkeypatch.setattr(_State, "advance", watched)
    Laboratory(in_turn, tmp_path).run(Trial("asyncio+email", in_turn.arms[0].name, 5e-3, 0))
    steps = in_turn.training.steps
    assert rates[:steps] == rates[steps:]
    assert len(set(rates)) > 2
    assert [bool(count) for count in moments] == [step % steps > 0 for step in range(2 * steps)]


def test_the_rise_on_the_models_own_text_is_the_kl_divergence_from_it(tmp_path, capsys):
    experiment = replace(tiny(), dtype="bfloat16")
    experiment = replace(experiment, evaluation=replace(experiment.evaluation, own_text=48))
    trial = Trial("asyncio", "lora", 1e-2, 0)
    laboratory = Laboratory(experiment, tmp_path)
    base = laboratory.run(Trial("", "base", 0.0, 0))
    file = tmp_path / "records" / "own_text.safetensors"
    written = file.read_bytes()
    after = laboratory.run(trial)
    assert file.read_bytes() == written, "every trial is measured on the same text"
    assert list(after["losses"]) == ["asyncio", "email", "own text"]
    assert set(after["losses"]["own text"]) == {f"own text {row}" for row in range(48)}
    rise = statistics.fmean(after["losses"]["own text"].values()) - statistics.fmean(
        base["losses"]["own text"].values()
    )

    ids = load_file(file)["input_ids"]
    adapted = PeftModel.from_pretrained(laboratory.load(), tmp_path / "adapters" / trial.name).eval()
    with torch.no_grad():
        new = adapted(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        with adapted.disable_adapter():
            old = adapted(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    kl = (old.exp() * (old - new)).sum(-1)
    drawn_rise = (old - new).gather(-1, ids[:, 1:, None])[..., 0]
    assert rise == pytest.approx(float(drawn_rise.mean()), abs=1e-5), "of the text, as recorded"
    error = float((drawn_rise - kl).std() / drawn_rise.numel() ** 0.5)
    assert 5 * error < kl.mean()
    assert abs(rise - kl.mean()) < 4 * error

    experiment = replace(experiment, evaluation=replace(experiment.evaluation, own_text=47))
    with pytest.raises(ValueError, match=r"expected 47 windows of 32 tokens .* found \(48, 32\)"):
        Laboratory(experiment, tmp_path).run(trial)
    experiment = replace(experiment, dtype="float32", evaluation=replace(experiment.evaluation, own_text=48))
    with pytest.raises(ValueError, match=r"by the model .*float32.* found .*bfloat16"):
        Laboratory(experiment, tmp_path).run(trial)


def test_tables_show_the_rise_on_own_text_apart_from_forgetting():
    def record(arm, rate, learned, other, own):
        losses = {"a": {"1": learned}, "b": {"1": other}, "own text": {"1": own}}
        return RECORD | {"trial": {"domain": "a", "arm": arm, "rate": rate, "seed": 0}, "losses": losses}

    found = {
        "base": record("base", 0.0, 3.0, 2.0, 1.0) | {"place": -1},
        "one": record("one", 0.1, 2.0, 2.2, 1.1),
        "other": record("other", 0.1, 1.0, 2.6, 1.4) | {"place": 1},
    }
    shown = report.markdown(found)
    assert "own text 1 documents" in shown
    assert "KL divergence" in shown
    assert "| one | 0.1 | 1 | 7 | **2.0000** | +0.2000 | +0.1000 |" in shown
    assert "| arm, best rate | learned | b | all others | own text |" in shown
    assert "| other, 0.1 | -1.0000 (0.0000) | +0.4000 (0.0000) | +0.4000 (0.0000) | +0.3000 (0.0000) |" in shown
    at_equal = [line for line in shown.splitlines() if line.startswith("| other | +")]
    assert at_equal == ["| other | +0.1000 (0.0000) |", "| other | +0.1000 (0.0000) |"]
    assert "loss on b less that of one" in shown
    assert "loss on own text less that of one" in shown


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    experiment = tiny()
    with pytest.raises(Killed):
        running.run(experiment, tmp_path, kill_at(4))
    changed = replace(experiment, training=replace(experiment.training, weight_decay=0.1))
    with pytest.raises(ValueError, match=r"training.weight_decay: expected 0.0 as in .*\.pt, found 0.1"):
        running.run(changed, tmp_path)


def test_all_kinds_of_arms_learn(tmp_path):
    experiment = tiny()
    arm = experiment.arms[0]
    targets = ["q_proj", "v_proj"]
    arms = [
        replace(arm, name="full", peft="full", rates=(1e-3,)),
        replace(arm, name="muon", peft={"peft_type": "CLOVER"}, rates=(0.02,), optimizer="muon"),
        *(
            replace(arm, name=on, peft={"peft_type": "CLOVER"}, initialize_from_activations=3, activations_on=on)
            for on in ("domain", "others", "own")
        ),
        replace(arm, name="contrast", peft={"peft_type": "CLOVER", "low_rank": 2}, contrast=3),
        replace(arm, name="random", peft={"peft_type": "CLOVER", "low_rank": 2}),
        replace(arm, name="lora", peft={"peft_type": "LORA", "target_modules": targets}, contrast=3),
        *(
            replace(
                arm,
                name=start,
                peft={"peft_type": "LORA", "init_lora_weights": start, "target_modules": targets, **more},
                initialize_from_activations=3,
                activations_on=on,
            )
            for start, on, more in (
                ("eva", "domain", {"eva_config": {"rho": 1.0}}),
                ("corda", "own", {"corda_config": {"corda_method": "kpm"}}),
            )
        ),
        replace(arm, name="plus", peft={"peft_type": "LORA", "target_modules": targets}, rate_factors={"lora_B": 4.0}),
        replace(arm, name="dora", peft={"peft_type": "LORA", "use_dora": True, "target_modules": targets}),
        replace(
            arm, name="pissa", peft={"peft_type": "LORA", "init_lora_weights": "pissa", "target_modules": targets}
        ),
        replace(arm, name="hira", peft={"peft_type": "HIRA", "target_modules": targets}, rates=(1e-2,)),
        replace(arm, name="oft", peft={"peft_type": "OFT", "oft_block_size": 16, "target_modules": targets}),
    ]
    experiment = replace(experiment, arms=[replace(arm, rates=(max(arm.rates),)) for arm in arms])
    experiment = replace(experiment, training=replace(experiment.training, steps=12))
    with pytest.raises(Killed):
        running.run(experiment, tmp_path, kill_at(4))
    running.run(experiment, tmp_path)
    found = report.load(tmp_path / "records")
    base = report.mean_loss([found["base"]], "asyncio")
    assert len(found) == 16
    rate = max(arm.rates)
    folders = [tmp_path / f"adapters/asyncio-{on}-lr{rate:g}-seed0" for on in ("domain", "others", "own")]
    assert all(json.loads((folder / "adapter_config.json").read_text())["from_activations"] for folder in folders)
    bases = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    name = next(name for name in bases[0] if "clover_U" in name)
    assert len({bytes(tensors[name].numpy()) for tensors in bases}) == 3  # the text makes a difference
    losses = [found[f"asyncio-{name}-lr{rate:g}-seed0"]["training_loss"] for name in ("contrast", "random")]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2:] != losses[1][2:]  # the first step is from B = 0
    arms_of_records = {name: made["settings"]["arm"] for name, made in found.items() if name != "base"}
    on = {name.split("-")[1]: arm.get("activations_on") for name, arm in arms_of_records.items()}
    assert {on[name] for name in ("others", "own")} == {"others", "own"}
    assert not {on["domain"], on["full"]} - {None}  # as in records of before there was a choice
    for name, made in found.items():
        if name != "base":
            assert report.mean_loss([made], "asyncio") < base, name
            assert (made["adapter_bytes"] is None) == (made["trial"]["arm"] in ("full", "corda"))


def test_a_lora_gets_the_start_of_clovers_low_rank_part():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).double().eval()
    new, known = ([{"input_ids": torch.randint(50, (1, 40))} for _ in range(6)] for _ in range(2))
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=targets)).double()
    contrast_lora(lora, new, known)
    clover = get_peft_model(base, CloverConfig(target_modules=targets, low_rank=3)).double()
    initialize_from_contrast(clover, new, known)
    found, expected = (
        {name: p for name, p in model.named_parameters() if key in name}
        for model, key in ((lora, "lora_A"), (clover, "clover_A"))
    )
    assert len(found) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    torch.nn.init.ones_(next(m for m in lora.modules() if isinstance(m, LoraLayer)).lora_B["default"].weight)
    with pytest.raises(ValueError, match="whose B is zero"):
        contrast_lora(lora, new, known)
    mixed = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=targets, rank_pattern={"v_proj": 2}))
    with pytest.raises(ValueError, match=r"expected one rank, found \[2, 3\]; leave out rank_pattern"):
        contrast_lora(mixed, new, known)


@pytest.fixture
def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def test_eva_starts_along_the_largest_directions_of_its_batches(small_llama):
    batches = [{"input_ids": torch.randint(50, (1, 60))} for _ in range(4)]
    seen: list[torch.Tensor] = []
    handle = small_llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, x, y: seen.append(x[0][0]))
    for batch in batches:
        small_llama(**batch)
    handle.remove()
    x = torch.cat(seen).detach()
    config = LoraConfig(r=3, init_lora_weights="eva", target_modules=["q_proj"], eva_config=EvaConfig(rho=1.0))
    model = add_lora_from_data(small_llama, config, batches)
    a = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-4, rtol=0)
    best = torch.linalg.svdvals(x - x.mean(0))[:3].square().sum()
    assert ((x - x.mean(0)) @ a.T).square().sum() > 0.9 * best


def test_cordas_start_is_taken_out_of_the_base_and_depends_on_its_batches(small_llama):
    named = {"target_modules": ["q_proj", "down_proj"], "corda_config": {"corda_method": "kpm"}}
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = copy.deepcopy(small_llama)
        before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
        batches = [{"input_ids": torch.randint(50, (2, 40))} for _ in range(3)]
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="corda", **named)
        layer = add_lora_from_data(base, config, batches).base_model.model.model.layers[0].self_attn.q_proj
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        assert (layer.weight - before).abs().max() > 1e-3
        torch.testing.assert_close(layer.weight + 2 * b @ a, before, atol=1e-5, rtol=0)
        starts.append(a)
    assert (starts[0] - starts[1]).abs().max() > 1e-3


def test_a_trial_that_diverges_is_recorded_as_such(tmp_path):
    experiment = tiny()
    arm = replace(experiment.arms[0], name="wild", rates=(1e37,))
    running.run(replace(experiment, arms=[arm]), tmp_path)
    shown = running.show(tmp_path / "records", tmp_path / "pictures")
    assert "| diverged |" in shown
    assert (tmp_path / "pictures" / "table.md").read_text() == shown + "\n"


def test_records_that_an_experiment_no_longer_describes_are_refused(tmp_path):
    experiment = tiny()
    experiment = replace(experiment, evaluation=replace(experiment.evaluation, split="test"))
    experiment = replace(experiment, training=replace(experiment.training, steps=2))
    arm = replace(experiment.arms[0], rates=(1e-3,))
    running.run(replace(experiment, arms=[arm]), tmp_path)
    running.run(replace(experiment, arms=[arm]), tmp_path)
    with pytest.raises(ValueError, match=r"first_rate.*0\.001.*0\.002"):
        running.run(replace(experiment, arms=[replace(arm, rates=(2e-3, 1e-3))]), tmp_path)
    name = next(name for name in experiment.domains if name not in experiment.adapt_to)
    other = {**experiment.domains, name: "python:multiprocessing"}
    with pytest.raises(ValueError, match="expected"):
        running.run(replace(experiment, arms=[arm], domains=other), tmp_path)


def test_another_process_at_a_trial_is_passed_over(tmp_path, capsys):
    from filelock import FileLock

    experiment = tiny()
    trial = experiment.trials()[1]
    with FileLock(running._lock(tmp_path, trial)):
        running.run(experiment, tmp_path)
    assert f"{trial.name}: another process is at it" in capsys.readouterr().out
    assert trial.name not in report.load(tmp_path / "records")
    assert len(report.load(tmp_path / "records")) == 2


def test_seeds_and_epochs_have_orders_of_their_own():
    windows = Windows(torch.arange(10).view(5, 2), torch.empty(0, 2), [], None)
    orders = {}
    for seed in (0, 1):
        found = drawn(windows, 2, seed)
        orders[seed] = torch.cat([next(found) for _ in range(4)])[:, 0].tolist()
        assert len(set(orders[seed][:4])) == 4
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapt_to=[latin]", r"adapt_to: expected some of french, wikitext, python, .*, found \['latin'\]"),
        ("adapt_to=[french+latin]", r"adapt_to: expected some of french, .*, found \['french\+latin'\]"),
        ("adapt_to=[french+wikitext+python]", r"adapt_to: expected .* different ones \(not all\) in turn"),
        ("adapt_to=[french, french]", r"adapt_to: expected .* different ones .*, found \['french', 'french'\]"),
        ("adapt_to=[french+french]", r"adapt_to: expected .* different ones .*, found \['french\+french'\]"),
        ("domains.a+b=text:x", r"domains: expected at least two, .* or with a \+, found"),
        ("evaluation.split=train", "evaluation.split: expected validation or test, found 'train'"),
        ("training.epochs=3", "training: expected some of steps, .*, found epochs"),
        ("arms.clover.peft={peft_type: NONE}", "arms.clover.peft: "),
        ("arms.clover.rates=[1e-3, 1e-3]", "arms.clover.rates: expected different positive numbers"),
        (
            "arms.full={peft: full, rates: [1e-4], balance_updates: 3}",
            "expected peft_type: CLOVER, or a LORA with init_lora_weights: true or gaussian",
        ),
        (
            "arms.full={peft: full, rates: [1e-4], initialize_from_activations: 3}",
            "arms.full.initialize_from_activations: expected peft_type: CLOVER",
        ),
        (
            "arms.lora={peft: {peft_type: LORA}, rates: [1e-4], initialize_from_activations: 3}",
            "arms.lora.initialize_from_activations: expected peft_type: CLOVER, or a LORA with .*: corda or eva",
        ),
        (
            "arms.lora={peft: {peft_type: LORA, rank_pattern: {v_proj: 3}}, rates: [1e-4], contrast: 3}",
            "arms.lora.contrast: expected .* a LORA with init_lora_weights: true or gaussian and one rank",
        ),
        (
            "arms.lora={peft: {peft_type: LORA, init_lora_weights: eva}, rates: [1e-4]}",
            "arms.lora.initialize_from_activations: expected a number of batches for init_lora_weights: eva, found 0",
        ),
        *(
            (
                f"arms.lora={{peft: {{peft_type: LORA, init_lora_weights: corda, {given}}}, rates: [1e-4], "
                "initialize_from_activations: 3}",
                "arms.lora.peft: expected target_modules as a list and corda_config: {corda_method: kpm or ipm}",
            )
            for given in (
                "target_modules: [v_proj]",
                "target_modules: [v_proj], corda_config: {corda_method: best}",
                "target_modules: [v_proj], corda_config: {corda_method: kpm, cache_file: x}",
                "target_modules: all-linear, corda_config: {corda_method: kpm}",
            )
        ),
        (
            "arms.lora={peft: {peft_type: LORA, init_lora_weights: pissa}, rates: [1e-4], contrast: 3}",
            "arms.lora.contrast: expected .* a LORA with init_lora_weights: true or gaussian and one rank",
        ),
        (
            "arms.clover={peft: {peft_type: CLOVER}, rates: [1e-3], contrast: 3}",
            "arms.clover.contrast: expected peft_type: CLOVER with low_rank, .* found {'peft_type': 'CLOVER'}",
        ),
        *(
            (
                f"arms.clover={{peft: {{peft_type: CLOVER, low_rank: 2}}, rates: [1e-3], {key}: {value}}}",
                f"arms.clover.{key}: expected a number of batches from 0 on, found {value}",
            )
            for key, value in (("contrast", -3), ("initialize_from_activations", 2.5), ("balance_updates", -1))
        ),
        (
            "arms.clover={peft: {peft_type: CLOVER}, rates: [1e-3], activations_on: own}",
            "arms.clover.activations_on: expected initialize_from_activations beside it",
        ),
        (
            "arms.a={peft: {peft_type: CLOVER}, rates: [1e-3], initialize_from_activations: 3, activations_on: x}",
            "arms.a.activations_on: expected domain, others or own, found 'x'",
        ),
        ("arms.base={}", "arms: expected blocks by name, none called base"),
        ("seeds=[]", "seeds: expected different whole numbers"),
        ("curve_seeds=-1", "curve_seeds: expected a number of seeds, found -1"),
        ("training.steps=0", "training.steps: expected a whole number from 1 on, found 0"),
        ("training.warmup_steps=2.5", "training.warmup_steps: expected a whole number from 0 on, found 2.5"),
        ("training.max_grad_norm=-1", "training.max_grad_norm: expected a number from 0 on"),
        ("evaluation.batch_size=-1", "evaluation.batch_size: expected a whole number from 1 on, found -1"),
        ("evaluation.length='32'", "evaluation.length: expected a whole number from 2 on, found '32'"),
        ("evaluation.zeroshot=5", "evaluation.zeroshot: expected 0, or at least one of each of 7 sets, found 5"),
        ("dtype=bf16", "dtype: expected one of float32, bfloat16, .*, found 'bf16'"),
        ("domains.x=3", "domains: expected names of sources"),
        ("training.schedule=cosin", "training.schedule: expected one of linear, cosine, .*, found 'cosin'"),
        ("something=1", "expected the keys model"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        read_experiment(PROBE, [override])


def test_every_experiment_can_be_read():
    for path in CONFIGS.glob("adaptation_*.yaml"):
        read_experiment(path)


def test_the_command(tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"Paragraph {i}. " * 40 for i in range(300)))
    experiment = read_experiment(PROBE, [f"domains.notes=text:{text}"])
    assert experiment.domains["notes"] == f"text:{text}"
    command = [sys.executable, "-m", "clover_peft", "ablate", "--config", "adaptation_tiny"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--jobs", "2"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(report.load(tmp_path / "out" / "records")) == 3
    made_by_processes = [*(tmp_path / "out" / "records").glob("*.json")]
    made = json.loads((tmp_path / "out" / "records" / "base.json").read_text())
    assert {"environment", "model", "domains", "vocabulary", "settings", "losses"} <= made.keys()
    assert main(["--table", str(tmp_path / "out" / "records")]) == 0
    assert capsys.readouterr().out.strip() in done.stdout
    assert {json.loads(path.read_text())["environment"]["torch_threads"] for path in made_by_processes} == {1}
    assert main(["--config", "adaptation_tiny", "--out", str(tmp_path / "out"), "--minutes", "1"]) == 2
    assert "minutes: expected none beside an adaptation experiment" in capsys.readouterr().err
    assert main(["--table", str(tmp_path)]) == 2
    assert "expected a folder of records, found none" in capsys.readouterr().err


def test_the_mechanism_is_measured_on_saved_adapters(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the plots extra")
    arguments = ["--config", "adaptation_tiny", "--out", str(tmp_path), "--mechanism"]
    arguments.append("arms.lora.rates=[1e-3,3e-3]")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "mechanism"
    adapters = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {path.stem for path in folder.iterdir()} == adapters
    for path in folder.iterdir():
        found = json.loads(path.read_text())
        assert found["relative_size"] > 0
        assert found["kl"]["domain"] > 0
        assert found["output_change"]["others"] > 0
        assert abs(found["merged_rise"]) < 0.05
    assert "Rank correlations over" in shown
    for name in mechanism.PROPERTIES:
        assert f"| {name} |" in shown
    assert (tmp_path / "pictures" / "mechanism.png").stat().st_size > 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(adapters) == 3
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    capsys.readouterr()
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "Rank correlations over" in told.out
    assert '[plots]"' in told.err


def test_a_balanced_lora_starts_as_the_base_and_every_module_gets_one_sensitivity():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(50, (3, 1, 20))
    batches = [{"input_ids": row, "labels": row} for row in ids]
    expected = base(input_ids=ids[0]).logits
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj", "down_proj"])).double()
    balance_lora(model, batches)
    assert torch.equal(model.eval()(input_ids=ids[0]).logits, expected)
    # By the plain formula: gradients of B for single predictions are products of A x and g.
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        seen: dict[str, list] = {"x": [], "g": []}
        handles = [
            layer.register_forward_hook(
                lambda _, i, o, seen=seen: (seen["x"].append(i[0].detach()), o.register_hook(seen["g"].append))[0]
            )
        ]
        for batch in batches:
            (model(**batch).loss * 19).backward()  # the first token is not predicted
        handles[0].remove()
        x, g = (torch.cat([t.flatten(0, 1) for t in seen[key]]) for key in ("x", "g"))
        a = layer.lora_A["default"].weight
        squares = ((x @ a.T).square().mean(), g.square().sum(0).mean() / (3 * 19))
        kappa = layer.scaling["default"] * (squares[0] * squares[1]).sqrt()
        assert kappa.item() == pytest.approx(SENSITIVITY, rel=1e-6)
    torch.nn.init.ones_(next(m for m in model.modules() if isinstance(m, LoraLayer)).lora_B["default"].weight)
    with pytest.raises(ValueError, match="whose B is zero"):
        balance_lora(model, batches)


def test_rank_correlation():
    assert mechanism.spearman([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert mechanism.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert mechanism.spearman([1, 1, 2], [5, 5, 7]) == pytest.approx(1)
    assert mechanism.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_zero_shot_questions_are_scored(tmp_path, monkeypatch):
    folder = tmp_path / "zeroshot"
    folder.mkdir()
    choices = {"question": "What?", "choices": ["one", "two"], "answer": 1}
    rows = {
        "arc_easy_test": choices,
        "arc_challenge_test": choices,
        "openbookqa_test": choices,
        "piqa_validation": {"goal": "Do", "sol1": "a", "sol2": "b", "label": 0},
        "hellaswag_validation": {"activity_label": "Run", "ctx": "He", "endings": ["a", "b"], "label": "1"},
        "winogrande_xl_validation": {"sentence": "As _ is new.", "option1": "it", "option2": "he", "answer": "1"},
        "mmlu_validation": {"subject": "us_law", "question": "What?", "choices": ["a", "b", "c", "d"], "answer": 3},
    }
    for name, row in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write(f"{json.dumps(row)}\n" * 6)
    experiment = tiny()
    experiment = replace(experiment, evaluation=replace(experiment.evaluation, zeroshot=28))
    monkeypatch.delenv("CLOVER_DATA", raising=False)
    with pytest.raises(ValueError, match="zeroshot: expected the environment variable CLOVER_DATA"):
        Laboratory(experiment, tmp_path)
    monkeypatch.setenv("CLOVER_DATA", str(tmp_path))
    made = Laboratory(experiment, tmp_path).run(experiment.trials()[0])
    assert {name: len(found) for name, found in made["zeroshot"].items()} == dict.fromkeys(rows, 4)
    assert 0 <= report.accuracy(made) <= 1
