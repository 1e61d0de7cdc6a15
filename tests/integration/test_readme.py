"""The README's snippets run, and its lists are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import transformers as hf
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from clover_peft import CloverConfig
from clover_peft.base_model.families import FAMILIES
from tests.support.tiny import VOCAB, build

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A tiny Llama with a tokenizer of words, where the README names a model on the hub."""
    words = re.findall(r"\w+|[^\w\s]+", README)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *words]))}
    vocabulary = {word: i for word, i in vocabulary.items() if i < VOCAB}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "base"
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    build("llama").save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return str(folder)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3
    assert all("import clover_peft" in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[2])
def test_every_snippet_runs(snippet, stand_in):
    if "trl" in snippet:
        pytest.importorskip("trl", reason="needs the train extra")
    code = snippet.replace(BASE, stand_in).replace("SFTConfig(", "SFTConfig(bf16=False, use_cpu=True, ")
    exec(compile(code, "README.md", "exec"), {})


def test_every_field_of_the_config_is_in_the_table():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = {field.name for field in dataclasses.fields(CloverConfig)} - inherited
    assert {field for field in fields if f"`{field}`" not in README} == set()


def test_every_family_is_in_the_table():
    rows = [row for row in README.splitlines() if row.startswith("|")]
    named = {name.strip() for row in rows for name in row.split("|")[1].split(",")}
    assert {family for family in FAMILIES if family != "gemma3_text"} <= named


def test_examples_name_what_exists():
    root = Path(__file__).parents[2]
    for path in re.findall(r"(?:\./)?((?:scripts|configs|benchmarks)/[\w./]+\.\w+)", README):
        assert (root / path).is_file(), path
