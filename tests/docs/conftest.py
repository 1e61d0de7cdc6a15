"""A tiny model with a tokenizer, in the place of the models on the hub that pages and examples name."""

from __future__ import annotations

import re

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.pages import guides, read
from tests.support.tiny import VOCAB, build


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder of a tiny Llama whose tokenizer knows the words of the pages. Files are written to `tmp_path`."""
    words = re.findall(r"\w+|[^\w\s]+", " ".join(re.findall(r'"([^"\n]*)"', "".join(read(page) for page in guides()))))
    frequent = ["Is", "more", "than", "?", "the", "correct", "answer", "is", "true", "false", *map(str, range(20))]
    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *frequent, *words]))
    }
    vocabulary = {word: i for word, i in vocabulary.items() if i < VOCAB}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "base"
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    # These widths are multiples of what the kernels for 4-bit weights need.
    build("llama", hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return str(folder)
