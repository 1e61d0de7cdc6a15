"""The training job on a tiny model: what it trains, what it refuses, how it fails. No network."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

import trl
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from clover_peft.experiments.training.answers import Questions
from clover_peft.experiments.training.card import show_training
from clover_peft.experiments.training.loading import load_tokenizer
from clover_peft.experiments.training.run import first_and_last, run
from clover_peft.experiments.training.verify import main as verify_main
from clover_peft.experiments.training.verify import verify
from clover_peft.io.hub_models import find_model
from tests.support.tiny_chat import CHATML, make_tokenizer, with_special_tokens, write_jsonl

METHODS = {"clover_contrast", "clover_diagonal", "clover_full", "dora", "full", "hira", "lora", "pissa"}


class Batch(TrainerCallback):
    """Keeps the first batch that training sees."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.batch = next(iter(train_dataloader))


class Evaluated(TrainerCallback):
    """Keeps the held-out rows, each without padding."""

    def on_evaluate(self, args, state, control, eval_dataloader=None, **kwargs):
        keys = ("input_ids", "labels")
        self.rows = [
            {key: batch[key][i][batch["attention_mask"][i] == 1] for key in keys}
            for batch in eval_dataloader
            for i in range(len(batch["input_ids"]))
        ]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_reloads_exactly(settings, method, tmp_path, capsys):
    record = run(settings(method, merge=method != "full"))
    out = tmp_path / "run"
    assert record["steps"] == 3
    assert len(record["loss"]["log"]) == 3
    assert record["parameters"]["trainable"] > 0
    saved = {file.name for file in (out / ("model" if method == "full" else "adapter")).iterdir()}
    assert {"README.md", "tokenizer.json"} <= saved
    assert not {"training_args.bin"} & saved
    if method == "full":
        assert record["parameters"]["trainable"] == record["parameters"]["total"]
        assert record["adapter"] is None
        return
    modules = record["adapter"]["modules"]
    paper = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    others = {"o_proj", "gate_proj"} if method == "clover_contrast" else set()
    assert {"k_proj", "v_proj", "up_proj"} <= set(modules) <= paper | others
    assert f"adapted modules: {', '.join(modules)}" in capsys.readouterr().out
    card = (out / "adapter" / "README.md").read_text()
    assert ("import clover_peft" in card) == method.startswith("clover")
    assert record["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    report = verify(out)
    assert report["adapter"] == 0.0
    assert report["merged"] < 1e-4
    assert report["problems"] == []


@pytest.mark.parametrize("template", [True, False])
def test_the_end_token_is_trained_and_prompt_and_padding_are_not(settings, tiny, tmp_path, template):
    model = tiny.model
    if not template:
        model = tmp_path / "plain"
        AutoModelForCausalLM.from_pretrained(tiny.model).save_pretrained(model)
        make_tokenizer(template=None).save_pretrained(model)
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    seen = Batch()
    record = run(settings("lora", model=model, max_steps=1), callbacks=[seen])
    assert record["prompt"] == ("chat" if template else "clover")
    ids, labels, mask = (seen.batch[key] for key in ("input_ids", "labels", "attention_mask"))
    assert mask.min() == 0, "the batch must contain padding for this test to mean anything"
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        assert (row_labels[row_mask == 0] == -100).all()
        trained = row_labels != -100
        assert torch.equal(row_labels[trained], row_ids[trained])
        text = tokenizer.decode(row_labels[trained])
        assert text.strip().removesuffix("<|im_end|>").strip() in {
            "the correct answer is true",
            "the correct answer is false",
        }
        ends = (row_ids == tokenizer.eos_token_id) & trained
        assert ends.sum() == 1
        first = int(trained.nonzero()[0])
        assert (row_labels[:first] == -100).all()
        assert tokenizer.decode(row_ids[:first]).endswith("assistant\n" if template else "### Response:")


def test_llm_adapters_trains_the_prompt_too_and_cuts_what_is_long(settings):
    seen = Batch()
    given = {"prompt": "llm_adapters", "completion_only_loss": "false", "max_length": 96, "max_steps": 1}
    run(settings("lora", **given), callbacks=[seen])
    ids, labels, mask = (seen.batch[key] for key in ("input_ids", "labels", "attention_mask"))
    assert ids.shape[1] == 96
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        assert torch.equal(row_labels[row_mask == 1], row_ids[row_mask == 1])
        assert (row_labels[row_mask == 0] == -100).all()
    text = make_tokenizer().decode(ids[0])
    assert text.startswith("Below is an instruction that describes a task.")
    assert "the correct answer is" not in text  # cut off, as published


def test_on_a_cpu_tokens_with_labels_alone_are_scored(settings, monkeypatch):
    """TRL has a tenth of the work then, and finds the same losses."""
    from trl.trainer import utils

    scored: list[int] = []
    function = utils._ChunkedLogProbFunction

    class Counted(function):
        @staticmethod
        def forward(ctx, hidden, *args):
            scored.append(len(hidden))
            return function.forward(ctx, hidden, *args)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    ours = run(settings(out="ours"))["loss"]
    with_labels = scored.copy()
    scored.clear()
    monkeypatch.setattr(
        "clover_peft.experiments.training.trainer.scoring_labels_alone", lambda device: contextlib.nullcontext()
    )
    plain = run(settings(out="plain"))["loss"]
    assert len(scored) == len(with_labels)
    assert all(a < b for a, b in zip(with_labels, scored, strict=True))
    for one, other in zip(ours["log"], plain["log"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert ours["held_out_after"] == pytest.approx(plain["held_out_after"], rel=1e-5)


def test_the_held_out_loss_is_the_mean_over_tokens_for_any_batch_size(settings, tmp_path):
    """Answers of 1 to 8 words: batches are padded, and some rows have far more tokens than others."""
    lines = [{"prompt": f"Row {i}:", "completion": " the correct answer" * (1 + i % 8)} for i in range(20)]
    data, seen = write_jsonl(tmp_path / "rows.jsonl", lines), Evaluated()
    given = {"data": data, "rows": 12, "max_steps": 1}
    found = [
        run(settings(out=f"run{size}", per_device_eval_batch_size=size, **given), callbacks=[seen])["loss"]
        for size in (1, 3, 8)
    ]
    for key in ("held_out_before", "held_out_after"):
        assert [loss[key] for loss in found] == pytest.approx([found[0][key]] * 3, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(settings(out="x").job.model).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="none", ignore_index=-100
            )
            for row in seen.rows
        ]
    tokens = sum(int((row["labels"][1:] != -100).sum()) for row in seen.rows)
    assert float(torch.cat(losses).sum()) / tokens == pytest.approx(found[0]["held_out_before"], rel=1e-5)


def test_the_callers_settings_of_trl_stay_as_they_are(settings):
    given = settings(max_steps=1, model_init_kwargs={"dtype": "float32"})
    run(given)
    assert given.sft.model_init_kwargs == {"dtype": "float32"}


def test_a_run_too_short_to_log_a_loss_says_so(settings, tmp_path, capsys):
    record = run(settings(max_steps=2, logging_steps=5, merge=True))
    assert record["loss"]["first"] is None
    assert "training loss: not logged in 2 steps\n" in capsys.readouterr().out
    out = tmp_path / "run"
    json.loads((out / "record.json").read_text(), parse_constant=pytest.fail)
    assert "| training loss | not logged in 2 steps |" in (out / "adapter" / "README.md").read_text()
    assert verify_main([str(out)]) == 0
    assert verify_main([str(out), "--loss-fell"]) == 1


def test_a_run_that_diverges_is_no_success(settings, tmp_path, capsys):
    record = run(settings(max_steps=4, **{"peft.learning_rate": 1e37}))
    assert "WARNING: training failed: from step 2 on the logged loss is no finite number" in capsys.readouterr().out
    assert [math.isfinite(entry["loss"]) for entry in record["loss"]["log"]] == [True, False, False, False]
    written = json.loads((tmp_path / "run" / "record.json").read_text(), parse_constant=pytest.fail)
    assert written["loss"]["last"] == written["loss"]["held_out_after"] == "NaN"
    assert "-> nan (mean of steps 4 to 4)" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_the_adapter_names_the_revision_it_was_trained_on(settings, tmp_path):
    run(settings(max_steps=1, **{"model_init_kwargs.revision": "v2"}))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["revision"] == "v2"


def test_the_rows_that_a_start_takes_are_counted(settings, capsys):
    """As many as there are, where more are asked for."""
    asked = {"calibration_rows": 50, "contrast_rows": 50, "rows": 6, "peft.low_rank": 2}
    run(settings(max_steps=1, held_out_rows=0, questions=0, **asked))
    said = capsys.readouterr().out
    assert "making bases from 6 training rows\n" in said
    assert "at what 6 training rows have and" in said


def test_the_old_name_of_a_dtype_counts(settings):
    record = run(settings(max_steps=1, **{"model_init_kwargs.torch_dtype": "bfloat16"}))
    assert record["model"]["dtype"] == "torch.bfloat16"
    with pytest.raises(ValueError, match=r"model_init_kwargs: expected dtype or torch_dtype, found both; leave torch"):
        run(settings(out="both", model_init_kwargs={"dtype": "float32", "torch_dtype": "bfloat16"}))


def test_what_peft_and_trl_refuse_is_one_sentence(settings, monkeypatch):
    def refuse(*_, **__):
        raise TypeError("expected a linear layer,\nfound an Embedding")

    with pytest.raises(ValueError, match=r"trainer: .*[Cc]lear-?ML"):
        run(settings(report_to="clearml"))
    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(ValueError, match="peft: expected a linear layer, found an Embedding"):
        run(settings())


def test_several_gpus_in_one_process_are_refused(settings):
    given = settings()
    given.sft._n_gpu = 2
    with pytest.raises(ValueError, match=r"expected one GPU a process, found 2, .*; use accelerate launch"):
        run(given)


def test_a_prompt_longer_than_max_length_is_said(settings, capsys):
    run(settings(max_steps=1, max_length=26))
    with pytest.raises(ValueError, match="max_length=4: expected room for an answer"):
        run(settings(max_steps=1, max_length=4, out="short"))
    assert "rows dropped, their prompts alone fill max_length=26" in capsys.readouterr().out


def test_held_out_rows_that_do_not_fit_are_counted_out(settings, tmp_path, capsys):
    """The loss is that of the others, and the record says how many they are."""
    lines = [{"prompt": f"{i}:" + " cat" * (40 * (i < 6)), "completion": "dog"} for i in range(30)]
    data, seen = write_jsonl(tmp_path / "rows.jsonl", lines), Evaluated()
    given = {"data": data, "rows": "null", "held_out_rows": 15, "prompt": "clover", "max_steps": 1, "max_length": 24}
    record = run(settings(**given), callbacks=[seen])
    assert 9 <= record["data"]["held_out_rows"] == len(seen.rows) < 15
    dropped = 15 - len(seen.rows)
    assert (
        f"data: {dropped} held-out rows dropped, their prompts alone fill max_length=24\n" in capsys.readouterr().out
    )
    packed = run(settings(out="packed", packing=True, eval_packing=True, padding_free=False, **given))
    assert packed["data"]["held_out_rows"] == 15


@pytest.mark.parametrize("kind", ["prompt", "text", "chat"])
def test_answers_that_max_length_cuts_are_counted(settings, tmp_path, capsys, kind):
    lines = [{"prompt": f"{i}:", "completion": " dog" * (40 if i < 5 else 1)} for i in range(20)]
    if kind == "text":  # windows end where they are cut
        lines = [{"text": " ".join(["cat", "dog", "river"] * 400)}]
    data = write_jsonl(tmp_path / "rows.jsonl", lines)
    given = {"data": data, "rows": "null", "held_out_rows": 0, "questions": 0, "max_steps": 1, "max_length": 24}
    run(settings(**given, **({} if kind == "chat" else {"prompt": "clover"})))
    said = capsys.readouterr().out
    warning = "data: 5 answers cut off by max_length=24: the model does not learn where they end; raise max_length"
    assert (warning in said) == ("cut off" in said) == (kind != "text")
    run(settings(out="enough", **(given | {"max_length": 96})))
    assert "cut off" not in capsys.readouterr().out


def test_a_template_reads_the_names_in_messages(settings, tmp_path):
    template = tmp_path / "named.jinja"
    template.write_text(
        CHATML.replace("message['content']", "(message['name'] or 'nobody') + ': ' + message['content']")
    )
    turns = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "dog"}]
    lines = [{"messages": [{**turns[0], "content": f"cat {i}?", "name": "Ann"}, turns[1]]} for i in range(12)]
    data, seen = write_jsonl(tmp_path / "rows.jsonl", lines), Batch()
    given = {"data": data, "rows": "null", "held_out_rows": 1, "questions": 1, "chat_template_path": template}
    run(settings(max_steps=1, **given), callbacks=[seen])
    texts = make_tokenizer().batch_decode(seen.batch["input_ids"])
    assert all("\nAnn: cat " in text and "\nnobody: dog<|im_end|>" in text for text in texts)
    prompt = load_file(tmp_path / "run" / "probe.safetensors")["prompt.0"][0]
    assert "\nAnn: cat " in make_tokenizer().decode(prompt)


def test_questions_end_as_prompts_do_in_training(settings, tiny, tmp_path):
    """Not in the end token that some tokenizers put behind a text; one in the text itself stays."""
    model = tmp_path / "ending"
    AutoModelForCausalLM.from_pretrained(tiny.model).save_pretrained(model)
    with_special_tokens(make_tokenizer(template=None), "<|im_start|> $A <|im_end|>").save_pretrained(model)
    lines = [{"prompt": f"{i}: cat<|im_end|>", "completion": " dog"} for i in range(20)]
    data, seen = write_jsonl(tmp_path / "rows.jsonl", lines), Batch()
    given = {"model": model, "data": data, "rows": "null", "held_out_rows": 1, "questions": 1, "max_steps": 1}
    run(settings(**given), callbacks=[seen])
    prompt = load_file(tmp_path / "run" / "probe.safetensors")["prompt.0"][0].tolist()
    ids, labels = seen.batch["input_ids"][0], seen.batch["labels"][0]
    trained = ids[: int((labels != -100).nonzero()[0])].tolist()
    tokenizer = make_tokenizer()
    if Version(trl.__version__) < Version("1.16") and trained[-1] != tokenizer.eos_token_id:
        pytest.skip("TRL 1.9 takes the first token of an answer for a part of the prompt with such a tokenizer")
    assert [prompt[0], *prompt[-2:]] == [trained[0], *trained[-2:]]
    assert tokenizer.decode(prompt).endswith("cat<|im_end|>")
    assert not tokenizer.decode(prompt).endswith("<|im_end|><|im_end|>")


def test_tokenizer_settings(settings, tiny, tmp_path):
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(tiny.model).save_pretrained(plain)
    tokenizer = make_tokenizer(template=None)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(plain)
    source = find_model(str(plain))
    with pytest.raises(ValueError, match="expected a tokenizer with an end token"):
        load_tokenizer(source, settings().sft)
    template = tmp_path / "chatml.jinja"
    with pytest.raises(ValueError, match=r"expected a \.jinja file"):
        load_tokenizer(source, settings(eos_token="<|im_end|>", chat_template_path=template).sft)
    template.write_text(CHATML)
    loaded = load_tokenizer(source, settings(eos_token="<|im_end|>", chat_template_path=template).sft)
    assert loaded.chat_template == CHATML
    assert loaded.pad_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("every", "logged", "shown"),
    [
        (10, 7, "1.000 (mean of steps 1 to 10) -> 7.000 (mean of steps 61 to 70)"),
        (1, 75, "5.000 (mean of steps 1 to 9) -> 71.000 (mean of steps 67 to 75)"),
        (5, 1, "1.000 (mean of steps 1 to 5)"),
    ],
)
def test_a_loss_is_shown_with_the_steps_it_is_the_mean_of(every, logged, shown):
    log = [{"step": every * i, "loss": float(i)} for i in range(1, logged + 1)]
    assert show_training({**first_and_last([entry["loss"] for entry in log]), "log": log}, 75) == shown


def test_answers_are_counted_and_marked(settings, capsys, monkeypatch):
    monkeypatch.setattr(Questions, "texts", lambda self, answers: [self.rows[0]["completion"][-1]["content"], "no"])
    run(settings())
    said = capsys.readouterr().out
    assert "answers as expected, word for word: 1 of 2 before, 1 after" in said
    assert said.count("no   (not as expected)\n") == said.count("(not as expected)") == 2


def test_losses_are_compared_over_eighths():
    assert first_and_last([4.0, 3.0, 2.0]) == {"first": 4.0, "last": 2.0}
    assert first_and_last([4.0, 2.0, *[9.0] * 12, 1.0, 3.0]) == {"first": 3.0, "last": 2.0}
