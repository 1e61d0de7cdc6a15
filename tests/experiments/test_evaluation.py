"""scripts/evaluate.py: the two modes against their plain formulas, resuming, intervals, and the other engines."""

from __future__ import annotations

import copy
import functools
import gzip
import importlib.util
import json
import math
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from clover_peft import CloverConfig
from clover_peft.experiments.commonsense import PROTOCOLS, TASKS, Example, evaluation, prepare, render
from clover_peft.experiments.training.answers import greedy_ids
from tests.support.tiny import load_script, perturb
from tests.support.tiny_chat import CHATML, save_chat_model, with_special_tokens

script = load_script("evaluate")
NAMES = list(TASKS)
SAVED = "adapter_model.safetensors"


def suite(rows: int = 5) -> prepare.Suite:
    def part(name: str, split: str) -> list[dict]:
        task = TASKS[name]
        choices = ("a cat", "a dog that is longer", "c", "d", "e")[: task.most if rows % 2 else 2] if task.word else ()
        return [render(task, Example(f"{name} {split} {'word ' * i}", choices, i % 2)) for i in range(rows)]

    return prepare.Suite(*(prepare.number({name: part(name, s) for name in TASKS}, s) for s in ("train", "test")))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> SimpleNamespace:
    """A tiny model with a CLOVER adapter that changes it, and a folder of questions."""
    folder = tmp_path_factory.mktemp("given")
    save_chat_model(folder / "model")
    whole = suite()
    prepare.set_aside(whole, 2, seed=0)
    prepare.write(whole, folder / "data", {})
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), CloverConfig(task_type="CAUSAL_LM"))
    perturb(model, scale=0.3)
    model.save_pretrained(folder / "adapter")
    return SimpleNamespace(folder=folder, data=folder / "data", model=model.eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def exact(given) -> SimpleNamespace:
    """The same model in float64."""
    base = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, given.folder / "adapter")
    return SimpleNamespace(model=model.eval(), tokenizer=given.tokenizer)


def read(given, **options) -> list[dict]:
    return evaluation.read_questions(given.data, "test", NAMES, **{"per_task": None, "seed": 0, **options})


# --- which questions --------------------------------------------------------------------------------


def test_questions_are_drawn_the_same_for_the_same_seed(given):
    everything = read(given)
    assert [row["id"] for row in everything[:2]] == ["boolq/test/0", "boolq/test/1"]
    assert len(everything) == 40
    drawn = [row["id"] for row in read(given, per_task=2)]
    assert len(drawn) == 16
    assert drawn == [row["id"] for row in read(given, per_task=2)]
    assert drawn != [row["id"] for row in read(given, per_task=2, seed=1)]
    assert [row["id"] for row in read(given, per_task=99)] == [row["id"] for row in everything]
    chosen = evaluation.read_questions(given.data, "validation", ["piqa"], None, 0)
    assert [row["id"].rsplit("/", 1)[0] for row in chosen] == ["piqa/train", "piqa/train"]
    assert len(evaluation.read_questions(given.data, "test", ["piqa", "piqa"], None, 0)) == 5


def test_rows_without_names_are_numbered_and_missing_files_named(given, tmp_path):
    (tmp_path / "test").mkdir()
    row = render(TASKS["piqa"], Example("q", ("a", "b"), 0))
    (tmp_path / "test" / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    assert evaluation.read_questions(tmp_path, "test", ["piqa"], None, 0)[0]["id"] == "piqa/test/0"
    (tmp_path / "test" / "piqa.jsonl").write_text(json.dumps({**row, "id": "Mercury_7175875"}) + "\n")
    assert evaluation.read_questions(tmp_path, "test", ["piqa"], None, 0)[0]["id"] == "piqa/test/0"
    for wrong in ({"answer": "Solution1"}, {"answer": "answer1", "instruction": "Please choose a/b"}):
        (tmp_path / "test" / "piqa.jsonl").write_text(json.dumps({**row, **wrong}) + "\n")
        with pytest.raises(ValueError, match=r"piqa/test/0: expected a question of piqa whose answer is one of its"):
            evaluation.read_questions(tmp_path, "test", ["piqa"], None, 0)
    (tmp_path / "test" / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"expected one of test/boolq\.jsonl.*found none"):
        evaluation.read_questions(tmp_path, "test", NAMES, None, 0)
    with pytest.raises(ValueError, match=r"expected validation rows, found none; prepare_data.py --validation"):
        evaluation.read_questions(tmp_path, "validation", NAMES, None, 0)
    (tmp_path / "test" / "boolq.jsonl").touch()
    with pytest.raises(ValueError, match="expected test questions of boolq, found none; leave the task out"):
        evaluation.read_questions(tmp_path, "test", ["piqa", "boolq"], None, 0)
    (tmp_path / "validation.jsonl.gz").write_bytes(gzip.compress(json.dumps({**row, "task": "piqa"}).encode()))
    with pytest.raises(ValueError, match="expected validation questions of boolq, found none"):
        evaluation.read_questions(tmp_path, "validation", ["boolq"], None, 0)


# --- the two modes ----------------------------------------------------------------------------------


def plain_score(given, row: dict, word: str, protocol) -> float:
    """The formula: the sum over the answer's own tokens, one option at a time, no padding, all logits."""
    before = "" if protocol is None else protocol.before_answer
    text = f"{evaluation.ask(row, protocol, given.tokenizer)}{before}the correct answer is {word}"
    others = [text.removesuffix(word) + other for other in row["instruction"].rpartition(": ")[2].split("/")]
    ids, *rest = (given.tokenizer(t, add_special_tokens=protocol is not None)["input_ids"] for t in [text, *others])
    shared = next(i for i in range(len(ids)) if len({t[i] if i < len(t) else None for t in rest}) > 1)
    with torch.no_grad():
        logits = given.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(shared, len(ids)))


@pytest.mark.parametrize("name", [None, *PROTOCOLS])
def test_options_are_scored_by_the_formula(given, exact, name):
    protocol = PROTOCOLS.get(name)
    rows = read(given)
    found = evaluation.scorer(exact.model, exact.tokenizer, protocol)(rows)
    right = 0
    for row, prediction in zip(rows, found, strict=True):
        scores = prediction["log_probabilities"]
        for word, score in scores.items():
            assert score == pytest.approx(plain_score(exact, row, word, protocol), abs=1e-9)
        assert prediction["predicted"] == max(scores, key=scores.get)
        assert (prediction["id"], prediction["answer"]) == (row["id"], row["answer"])
        right += prediction["predicted"] == row["answer"]
    assert 0 < right < len(rows)
    assert {len(p["log_probabilities"]) for p in found} == {2, 3, 4, 5}


class KeepsAllLogits(torch.nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_keeps_all_logits_scores_the_same(given, exact):
    rows = read(given)
    found = evaluation.scorer(exact.model, exact.tokenizer, None)(rows)
    plain = evaluation.scorer(KeepsAllLogits(exact.model), exact.tokenizer, None)(rows)
    for a, b in zip(found, plain, strict=True):
        assert a["log_probabilities"] == pytest.approx(b["log_probabilities"], abs=1e-9)


def test_chat_answers_are_scored_as_they_are_trained(given, exact):
    """Templates of models that think put an empty thought before an answer, which the prompt does not end with."""
    tokenizer = copy.deepcopy(given.tokenizer)
    tokenizer.chat_template = CHATML.replace(
        "message['content']", "('<t></t>' if message['role'] == 'assistant' else '') + message['content']"
    )
    row = read(given, per_task=1)[0]
    messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    trained = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("<|im_end|>\n")
    assert trained.endswith(f"<|im_start|>assistant\n<t></t>the correct answer is {row['answer']}")
    [other] = {"true", "false"} - {row["answer"]}
    texts = (trained, trained.removesuffix(row["answer"]) + other)
    ids, others = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    start = next(i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
    with torch.no_grad():
        logits = exact.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    plain = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
    [prediction] = evaluation.scorer(exact.model, tokenizer, None)([row])
    assert prediction["log_probabilities"][row["answer"]] == pytest.approx(plain, abs=1e-9)


def test_a_model_without_finite_probabilities_answers_nothing(given):
    model = copy.deepcopy(given.model)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    found = evaluation.scorer(model, given.tokenizer, None)(read(given, per_task=1))
    assert {prediction["predicted"] for prediction in found} == {None}
    summary = evaluation.summarise(found)
    assert summary["mean"] == 0
    assert {task["unparsed"] for task in summary["tasks"].values()} == {1}
    assert "loss" not in summary
    json.dumps([found, summary], allow_nan=False)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", [None, "clover"])
def test_batched_generation_is_one_by_one_generation(given, name, beams):
    protocol = PROTOCOLS.get(name)
    predict = evaluation.generator(given.model, given.tokenizer, protocol, beams, new_tokens=6)
    rows = read(given, per_task=1)
    together = predict(rows)
    assert [p["text"] for p in together] == [predict([row])[0]["text"] for row in rows]
    assert len({p["text"] for p in together}) > 1
    for row, prediction in zip(rows, together, strict=True):
        ids = given.tokenizer(
            evaluation.ask(row, protocol, given.tokenizer), return_tensors="pt", add_special_tokens=bool(protocol)
        )["input_ids"]
        if beams == 1:  # the formula
            new = []
            for _ in range(6):
                new.append(int(given.model(input_ids=ids).logits[0, -1].argmax()))
                if new[-1] == given.tokenizer.eos_token_id:
                    break
                ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
            assert prediction["text"] == given.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", [None, "clover"])
def test_no_end_token_stands_behind_a_prompt(given, name):
    """A tokenizer that puts one behind each text has the same answers as one that does not."""
    rows, texts = read(given, per_task=1), []
    for around in ("<|im_start|> $A", "<|im_start|> $A <|im_end|>"):
        tokenizer = with_special_tokens(copy.deepcopy(given.tokenizer), around)
        predict = evaluation.generator(given.model, tokenizer, PROTOCOLS.get(name), beams=1, new_tokens=6)
        texts.append([prediction["text"] for prediction in predict(rows)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("kind", ["model", "adapter", "prompt"])
def test_generation_obeys_its_arguments_alone(given, kind):
    model = AutoModelForCausalLM.from_pretrained(given.folder / "model").eval()
    if kind == "adapter":
        model = PeftModel.from_pretrained(model, given.folder / "adapter").eval()
    elif kind == "prompt":  # peft generates with virtual tokens, which the inner model lacks
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    inner = model if kind == "model" else model.get_base_model()
    predict = evaluation.generator(model, given.tokenizer, None, beams=1, new_tokens=12)
    rows, prompt = read(given, per_task=1), torch.tensor([[5, 6, 7]])
    expected = predict(rows), greedy_ids(model, given.tokenizer, prompt, 12).tolist()
    own = inner.generation_config = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, top_k=3)
    assert (predict(rows), greedy_ids(model, given.tokenizer, prompt, 12).tolist()) == expected
    assert model.generation_config is inner.generation_config is own
    assert "generation_config" not in vars(model) or kind == "model"


def test_a_text_without_an_answer_is_unparsed(given):
    row = read(given)[0]
    assert evaluation._parsed(row, "the correct answer is true")["predicted"] == "true"
    nothing = evaluation._parsed(row, "True? I cannot say")
    assert nothing["predicted"] is None
    summary = evaluation.summarise([nothing])
    assert summary["tasks"]["boolq"]["unparsed"] == 1
    assert summary["mean"] == 0


def test_an_adapter_of_another_base_is_named(given, tmp_path, capsys):
    config = AutoModelForCausalLM.from_pretrained(given.folder / "model").config
    config.num_hidden_layers, config.head_dim = 2, 32
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    given.tokenizer.save_pretrained(tmp_path / "model")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(given.folder / "model"), LoraConfig(r=2))
    lora.save_pretrained(tmp_path / "lora")
    options = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "lora"), "--data", str(given.data)]
    assert script.main([*options, "--out", str(tmp_path / "out")]) == 2
    assert "lora: expected an adapter of model, found another: Error(s) in loading" in capsys.readouterr().err


def test_prompts_are_the_published_ones(given):
    row = {"instruction": "Q"}
    gap = " " * 16
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    asked = f"{head} \n\n{gap}### Instruction:\n{gap}Q\n\n{gap}### Response:\n{gap}"
    trained = f"{head}  # noqa: E501\n\n{gap}### Instruction:\n{gap}Q\n{gap}\n{gap}### Response:\n{gap}"
    plain = f"{head}\n\n### Instruction:\nQ\n\n### Response:"
    assert evaluation.ask(row, PROTOCOLS["llm_adapters"], given.tokenizer) == asked
    assert PROTOCOLS["llm_adapters"].question("Q", training=True) == trained
    assert evaluation.ask(row, PROTOCOLS["clover"], given.tokenizer) == plain
    chat = evaluation.ask(row, None, given.tokenizer)
    assert chat == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert [(p.beams, p.new_tokens) for p in (PROTOCOLS["clover"], PROTOCOLS["llm_adapters"])] == [(1, 32), (4, 32)]


# --- resuming, accuracy -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["", '{"id": "boolq/te'])
def test_an_evaluation_that_was_cut_off_goes_on(given, tmp_path, cut):
    rows, asked = read(given), []

    def predict(batch):
        if len(asked) == 3 and asked[-1] != "resumed":
            raise KeyboardInterrupt
        asked.append(len(batch))
        return [{"id": r["id"], "task": r["task"], "answer": r["answer"], "predicted": r["answer"]} for r in batch]

    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(rows, predict, 7, tmp_path / "out", {"mode": "score"})
    kept = tmp_path / "out" / "predictions.jsonl"
    kept.write_text(kept.read_text() + cut)
    with pytest.raises(ValueError, match=r"mode: expected .* as in .*, found .*; choose another folder"):
        evaluation.evaluate(rows, predict, 7, tmp_path / "out", {"mode": "generate"})
    asked.append("resumed")
    found = evaluation.evaluate(rows, predict, 7, tmp_path / "out", {"mode": "score"})
    assert asked == [7, 7, 7, "resumed", 7, 7, 5]
    assert sorted(p["id"] for p in found) == sorted(row["id"] for row in rows)
    assert [json.loads(line) for line in kept.read_text().splitlines()] == found
    assert evaluation.evaluate(rows, predict, 7, tmp_path / "out", {"mode": "score"}) == found  # asks nothing more
    assert asked[-1] == 5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder, found files"):
        evaluation.evaluate(rows, predict, 7, tmp_path / "other", {})


def test_an_evaluation_goes_on_with_the_same_questions_only(given, tmp_path):
    def predict(batch):
        return [{"id": r["id"], "task": r["task"], "answer": r["answer"], "predicted": None} for r in batch]

    rows, out = read(given, per_task=1), tmp_path / "out"
    evaluation.evaluate(rows, predict, 4, out, {"mode": "score"})
    settings, kept = out / "settings.json", out / "predictions.jsonl"
    whole = kept.read_text()
    for key in ("id", "instruction", "answer"):
        other = [{**rows[0], key: rows[0][key] + "x"}, *rows[1:]]
        with pytest.raises(ValueError, match=r"questions: expected .* as in .*, found .*; choose another folder"):
            evaluation.evaluate(other, predict, 4, out, {"mode": "score"})
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: value for key, value in written.items() if key != "questions"}))
    evaluation.evaluate(rows, predict, 4, out, {"mode": "score"})  # as an earlier version wrote them
    with pytest.raises(ValueError, match=r"predictions.jsonl: expected answers to these questions, found others"):
        evaluation.evaluate([{**rows[0], "id": "boolq/test/new"}, *rows[1:]], predict, 4, out, {"mode": "score"})
    for garbage in ("\0\0\n", "3\n", "{}\n"):
        kept.write_text(whole + garbage)
        with pytest.raises(
            ValueError, match=r"predictions.jsonl: expected a prediction in line 9, found .*; delete it"
        ):
            evaluation.evaluate(rows, predict, 4, out, {"mode": "score"})
    settings.write_text("")
    with pytest.raises(ValueError, match=r"settings.json: expected a JSON object, found .*; delete .*out and"):
        evaluation.evaluate(rows, predict, 4, out, {"mode": "score"})


def test_accuracies_and_intervals():
    assert evaluation.wilson(8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-5)  # textbook values
    assert evaluation.wilson(0, 10)[0] == 0
    assert evaluation.wilson(10, 10)[1] == pytest.approx(1)
    made = [("boolq", "true", "true")] * 3 + [("boolq", "true", "false")] + [("piqa", "solution1", None)] * 2
    shuffled = [(f"{made[i][0]}/test/{10 - i}", *made[i]) for i in (3, 0, 5, 1, 2, 4)]
    summary = evaluation.summarise([{"id": i, "task": t, "answer": a, "predicted": p} for i, t, a, p in shuffled])
    assert summary["tasks"].keys() == {"boolq", "piqa"}
    assert summary["tasks"]["boolq"]["accuracy"] == 0.75
    assert summary["tasks"]["boolq"]["right"] == "0111"  # by their numbers, of which 10 is after 9
    assert summary["tasks"]["piqa"]["unparsed"] == 2
    assert summary["mean"] == 0.375  # of the tasks, however many questions they have
    (low, high), (_, most) = (summary["tasks"][name]["interval"] for name in ("boolq", "piqa"))
    below, above = 0.75 - low, ((high - 0.75) ** 2 + most**2) ** 0.5
    assert summary["interval"] == pytest.approx([0.375 - below / 2, 0.375 + above / 2])
    assert "| mean | | 37.5% |" in evaluation.show(summary)
    assert "loss" not in summary  # there are no probabilities
    made = [("boolq", {"true": -1.0, "false": -2.0}), ("boolq", {"true": -9.0, "false": -9.0}), ("piqa", {"a": -3.0})]
    scored = [
        {"id": "/0", "task": t, "answer": next(iter(p)), "predicted": None, "log_probabilities": p} for t, p in made
    ]
    boolq = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    summary = evaluation.summarise(scored)
    assert summary["tasks"]["boolq"]["loss"] == pytest.approx(boolq)
    assert summary["loss"] == pytest.approx(boolq / 2)  # a single option is certain


# --- the script -------------------------------------------------------------------------------------


def test_the_script_in_both_modes(given, tmp_path, capsys):
    common = ["--model", str(given.folder / "model"), "--data", str(given.data), "--batch-size", "8"]
    adapter = ["--adapter", str(given.folder / "adapter")]
    for out, options in {
        "score": [*adapter, "--mode", "score"],
        "merged": [*adapter, "--mode", "score", "--merge"],
        "generate": [*adapter, "--new-tokens", "4", "--rows", "2"],
        "base": ["--mode", "score", "--tasks", "boolq", "piqa"],
        "validation": ["--mode", "score", "--split", "validation"],
    }.items():
        assert script.main([*common, *options, "--out", str(tmp_path / out)]) == 0, capsys.readouterr().err
    record = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")}
    kept = {path.parent.name: path.read_text().splitlines() for path in tmp_path.glob("*/predictions.jsonl")}
    assert {name: len(lines) for name, lines in kept.items()} == {
        "score": 40, "merged": 40, "generate": 16, "base": 10, "validation": 16,
    }  # fmt: skip
    assert record["score"]["tasks"].keys() == TASKS.keys()
    assert record["score"]["mean"] == record["merged"]["mean"]
    assert record["base"]["tasks"].keys() == {"boolq", "piqa"}
    assert record["generate"]["asked"]["beams"] == 1
    assert record["score"]["environment"]["versions"]["torch"] == torch.__version__
    assert "instruction" not in "".join(kept["score"])  # row ids, not the data set's text
    assert "| mean | |" in capsys.readouterr().out
    assert script.main([*common, *adapter, "--mode", "score", "--out", str(tmp_path / "score")]) == 2
    assert "found a finished one" in capsys.readouterr().err
    assert script.main([*common, "--prompt", "zzz", "--out", str(tmp_path / "new")]) == 2
    assert "expected one of chat, clover, llm_adapters" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert script.main([*common[:2], "--out", str(tmp_path / "new")]) == 2
    assert "--data is needed without --harness: expected a folder" in capsys.readouterr().err
    assert script.main([*common, "--merge", "--out", str(tmp_path / "new")]) == 2
    assert "--merge: expected --adapter, found none to merge" in capsys.readouterr().err
    assert script.main([*common, "--harness", "mmlu", "--out", str(tmp_path / "new")]) == 2
    assert "--data: expected none with --harness" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record", [{"settings": {"prompt": "llm_adapters"}}, {"settings": {}, "prompt": "llm_adapters"}]
)
def test_the_prompt_is_that_of_training(given, tmp_path, capsys, record):
    shutil.copytree(given.folder / "adapter", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "record.json").write_text(json.dumps({**record, "model": {"dtype": "torch.bfloat16"}}))
    command = [
        "--model",
        str(given.folder / "model"),
        "--data",
        str(given.data),
        "--mode",
        "score",
        "--tasks",
        "boolq",
    ]
    command += ["--adapter", str(tmp_path / "run" / "adapter")]
    for out, more, expected in (("as trained", [], "llm_adapters"), ("chosen", ["--prompt", "clover"], "clover")):
        assert script.main([*command, *more, "--out", str(tmp_path / out)]) == 0
        why = "as in training" if out == "as trained" else "as asked for"
        assert f"prompt: {expected} ({why}); weights: bfloat16" in capsys.readouterr().out
        asked = json.loads((tmp_path / out / "record.json").read_text())["asked"]
        assert (asked["prompt"], asked["dtype"]) == (expected, "bfloat16")


@pytest.mark.parametrize("method", ["clover", "lora"])
@pytest.mark.parametrize("merge", [False, True])
def test_the_base_is_quantised_as_in_training(given, tmp_path, capsys, monkeypatch, method, merge):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    config = CloverConfig if method == "clover" else functools.partial(LoraConfig, target_modules=["q_proj"])
    base = AutoModelForCausalLM.from_pretrained(given.folder / "model")
    get_peft_model(base, config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "run" / "adapter")
    settings = {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
    (tmp_path / "run" / "record.json").write_text(json.dumps({"settings": settings}))
    seen = []
    monkeypatch.setattr(script.evaluation, "scorer", lambda model, *_: seen.append(model) or evaluation.unanswered)
    command = ["--model", str(given.folder / "model"), "--data", str(given.data), "--mode", "score"]
    command += ["--adapter", str(tmp_path / "run" / "adapter"), "--out", str(tmp_path / "out")]
    assert script.main([*command, *(["--merge"] if merge else [])]) == 0, capsys.readouterr().err
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in seen[0].modules()) != merge
    said = "--merge: the base is loaded unquantised" if merge else "the base is quantised as in training"
    assert said in capsys.readouterr().out
    asked = json.loads((tmp_path / "out" / "record.json").read_text())["asked"]
    assert ("quantization_config" in asked) != merge


def test_the_script_goes_on_with_the_same_adapter_only(given, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(given.folder / "adapter", adapter)
    command = ["--model", str(given.folder / "model"), "--data", str(given.data), "--adapter", str(adapter)]
    command += ["--mode", "score", "--tasks", "boolq", "--out", str(tmp_path / "out")]
    assert script.main(command) == 0
    (tmp_path / "out" / "record.json").unlink()
    weights = load_file(adapter / SAVED)
    save_file({name: 1.01 * t if "clover_S" in name else t for name, t in weights.items()}, adapter / SAVED)
    assert script.main(command) == 2
    assert "adapter_sha256: expected" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rows", "--batch-size", "--beams", "--new-tokens"])
def test_the_script_refuses_numbers_below_one(option, tmp_path, capsys):
    assert script.main([option, "0", "--out", str(tmp_path / "out")]) == 2
    assert f"error: {option}: expected at least 1, found 0" in capsys.readouterr().err


def test_the_script_refuses_a_dtype_that_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--dtype", "foo", "--out", str(tmp_path / "out")])
    assert "argument --dtype: invalid choice: 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize("beams", [1, 4])
def test_vllm_generates_where_it_is_installed(given, tmp_path, monkeypatch, beams, capsys):
    """Against a stand-in with vLLM's interface, which answers with the second option."""
    answer = given.tokenizer("the correct answer is false solution2 answer2 ending2 option2")["input_ids"]
    calls = []

    class Engine:
        def __init__(self, model, dtype):
            calls.append((model, dtype))

        def generate(self, prompts, params):
            calls.append((params.temperature, params.max_tokens))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for _ in prompts]

        def beam_search(self, prompts, params):
            calls.append((params.beam_width, params.max_tokens))
            found = [SimpleNamespace(tokens=p["prompt_token_ids"] + answer) for p in prompts]
            return [SimpleNamespace(sequences=[sequence]) for sequence in found]

    stub = SimpleNamespace(
        LLM=Engine,
        SamplingParams=SimpleNamespace,
        sampling_params=SimpleNamespace(BeamSearchParams=lambda w, t: SimpleNamespace(beam_width=w, max_tokens=t)),
    )
    options = ["--model", str(given.folder / "model"), "--data", str(given.data), "--vllm", "--beams", str(beams)]
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert script.main([*options, "--out", str(tmp_path / "none")]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vllm", stub)
    assert script.main([*options, "--out", str(tmp_path / "out")]) == 0
    assert calls[0] == (str(given.folder / "model"), "float32")
    assert calls[1] == ((0.0, 32) if beams == 1 else (4, 32))
    found = json.loads((tmp_path / "out" / "record.json").read_text())
    assert {name: task["correct"] for name, task in found["tasks"].items()} == {
        name: 3 if name == "boolq" else 2 for name in TASKS
    }
    assert script.main([*options[:-2], "--mode", "score", "--out", str(tmp_path / "no")]) == 2
    assert "pass its folder as --model" in capsys.readouterr().err


def test_the_harness_is_asked_for_where_it_is_missing(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ["--model", str(given.folder / "model"), "--harness", "arc_easy", "--out", str(tmp_path / "out")]
    assert script.main(options) == 2
    assert "pip install lm-eval" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install lm-eval"
)
def test_the_harness_loads_adapters(given, tmp_path):
    """A task of our own: the hub's need the hub."""
    words = ["cat", "dog", "sky", "sun", "red"]
    drawn = random.Random(0)
    questions = [
        {"question": f"{i} {drawn.choice(words)}", "choices": drawn.sample(words, 3), "answer": i % 3}
        for i in range(60)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    merged = AutoModelForCausalLM.from_pretrained(given.folder / "model")
    merged = PeftModel.from_pretrained(merged, given.folder / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    given.tokenizer.save_pretrained(tmp_path / "merged")
    found = {}
    for name, options in {
        "adapter": ["--model", str(given.folder / "model"), "--adapter", str(given.folder / "adapter")],
        "merged": ["--model", str(tmp_path / "merged")],
        "base": ["--model", str(given.folder / "model")],
    }.items():
        options += ["--harness", "tiny", "--harness-tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / name)]
        assert script.main(options) == 0
        found[name] = json.loads((tmp_path / name / "record.json").read_text())["results"]["tiny"]["acc,none"]
    assert found["adapter"] == found["merged"] != found["base"]
