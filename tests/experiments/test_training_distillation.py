"""Training on plain text and towards another model's predictions."""

from __future__ import annotations

import copy
import gzip
import json
import shutil

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from clover_peft.experiments.training.distillation import Teacher
from clover_peft.experiments.training.run import run
from clover_peft.experiments.training.verify import verify
from tests.support.tiny_chat import rows, save_chat_model


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A file of plain text."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("\n".join(f"{row['instruction']} {row['output']}." for row in rows(600, seed=3)))
    return path


def models(tiny):
    student = AutoModelForCausalLM.from_pretrained(tiny.model)
    teacher = copy.deepcopy(student)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student, teacher.eval()


def batch(model, length=13):
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (3, length))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_the_formula(tiny, weight, temperature, monkeypatch):
    monkeypatch.setattr("clover_peft.experiments.training.distillation._CHUNK", 5)  # several parts, the last shorter
    student, teacher = (model.double() for model in models(tiny))
    inputs = batch(student)
    total, count = Teacher(teacher, weight, temperature).loss(student, inputs)
    total.backward()
    found = student.lm_head.weight.grad.clone()

    student.zero_grad()
    labels = inputs["labels"][:, 1:].reshape(-1)
    ours, theirs = (m(inputs["input_ids"]).logits[:, :-1].flatten(0, 1)[labels != -100] for m in (student, teacher))
    labels = labels[labels != -100]
    soft = kl_div((ours / temperature).log_softmax(-1), (theirs / temperature).softmax(-1).detach(), reduction="sum")
    expected = (1 - weight) * cross_entropy(ours, labels, reduction="sum") + weight * temperature**2 * soft
    expected.backward()
    assert count == len(labels)
    assert torch.allclose(total, expected, rtol=1e-10)
    assert torch.allclose(found, student.lm_head.weight.grad, rtol=1e-6, atol=1e-10)


def test_a_model_is_its_own_perfect_pupil(tiny):
    student = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    total, _ = Teacher(copy.deepcopy(student), 1.0, 1.0).loss(student, batch(student))
    assert total.abs() < 1e-4


@pytest.mark.parametrize("can", [True, False])
def test_a_teacher_makes_logits_only_where_some_row_has_labels(tiny, can, monkeypatch):
    student, teacher = models(tiny)
    if not can:  # as in a class of its own
        forward = teacher.forward
        monkeypatch.setattr(teacher, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    made = []
    teacher.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.shape[1]))
    inputs = batch(student)
    inputs["labels"][:, 7] = -100
    Teacher(teacher, 1.0, 1.0).loss(student, inputs)
    assert made == [13 - 4 - 1 if can else 13]  # without the prompt, and the token that no row has a label for


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_teacher_with_code_of_its_own_is_loaded_where_the_model_may_be(settings, tiny, prose, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "own")
    (tmp_path / "own" / "own.py").write_text(CODE)
    path = tmp_path / "own" / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": names}))
    chosen = {"data": prose, "teacher": tmp_path / "own", "max_length": 32, "max_steps": 1, "questions": 0}
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(settings("lora", out="refused", **chosen))
    record = run(settings("lora", out="allowed", **chosen, trust_remote_code=True))
    assert record["loss"]["first"] > 0


@pytest.mark.parametrize("method", ["clover_full", "lora", "full"])
def test_a_damaged_model_is_trained_back_to_its_teacher_on_plain_text(settings, tiny, prose, method, tmp_path):
    damaged = tmp_path / "damaged"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.add_(0.5 * torch.randn_like(layer.self_attn.v_proj.weight))
    save_chat_model(damaged)
    model.save_pretrained(damaged)
    record = run(
        settings(
            method,
            model=damaged,
            data=prose,
            teacher=tiny.model,
            teacher_weight=1.0,
            max_length=32,
            max_steps=12,
            **{"peft.learning_rate": 1e-2},
            merge=method != "full",
        )
    )
    assert record["loss"]["last"] < 0.95 * record["loss"]["first"]
    assert record["settings"]["teacher"] == str(tiny.model)
    assert record["data"]["held_out_rows"] == 8
    assert len(record["answers"]) == 2
    if method != "full":
        assert verify(tmp_path / "run")["problems"] == []


def test_gradient_accumulation_gives_the_same_step(settings, prose, tiny):
    found = []
    for name, sizes in {"whole": (4, 1), "parts": (1, 4)}.items():
        chosen = {"data": prose, "teacher": tiny.model, "max_length": 32, "max_steps": 2, "questions": 0}
        size = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
        found.append(run(settings("clover_full", out=name, **chosen, **size))["loss"]["log"])
    for whole, parts in zip(*found, strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-4)
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-3)


def test_text_rows_and_text_files_give_the_same_windows(settings, prose, tmp_path):
    text = prose.read_text()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with gzip.open(tmp_path / "prose.txt.gz", "wt") as file:
        file.write(text)
    found = {
        run(settings("lora", out=str(i), data=path, max_length=32, max_steps=1, questions=0))["data"]["fingerprint"]
        for i, path in enumerate((prose, tmp_path / "rows.jsonl", tmp_path / "prose.txt.gz"))
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "other"}, "expected the tokens of the model's tokenizer"),
        ({"teacher_weight": 0.0}, "teacher_weight: expected more than 0 and at most 1, found 0.0"),
        (
            {"loss_type": "dft"},
            "teacher: expected a whole model in each process and no other loss, found loss_type=dft",
        ),
        ({"label_smoothing_factor": 0.1}, "no other loss, found label_smoothing_factor"),
        ({"teacher_temperature": -1.0}, "teacher_temperature: expected a positive number"),
        ({"data": "mixed.jsonl"}, "expected rows of one kind, found 1 with plain text and 1 with instructions"),
        ({"data": "short.txt"}, "expected at least 32 tokens"),
        ({"data": "missing.txt"}, "found no such path"),
        ({"max_length": None}, "max_length=null: expected a number for plain text"),
    ],
)
def test_refusals(settings, tiny, prose, change, message, tmp_path):
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "short.txt").write_text("too short")
    chosen = {"data": prose, "teacher": tiny.model, "max_length": 32, **change}
    if change.get("teacher"):
        save_chat_model(tmp_path / "other")
        tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["Ƕ"] = len(vocabulary) + len(tokenizer["added_tokens"])
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
        chosen["teacher"] = tmp_path / "other"
    if "data" in change:
        chosen["data"] = tmp_path / change["data"]
    if chosen["max_length"] is None:
        chosen["max_length"] = "null"
    with pytest.raises(ValueError, match=message):
        run(settings("lora", **chosen))
