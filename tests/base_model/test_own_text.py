"""`own_text`: what a language model writes by itself, for statistics."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import clover_peft
from clover_peft import CloverConfig, own_text
from tests.support.tiny import build


def ids(batches: list[dict]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def test_rows_have_the_length_asked_for_and_batches_do_not_change_their_first_tokens():
    model = build("llama")
    batches = own_text(model, rows=5, length=9, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 9), (2, 9), (1, 9)]
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
    assert torch.equal(ids(batches)[:, 0], ids(own_text(model, rows=5, length=2, batch_size=5))[:, 0])


def test_tokens_are_drawn_from_the_whole_distribution_of_the_model():
    model = build("llama").eval()
    found = ids(own_text(model, rows=4000, length=2, batch_size=4000, seed=1))
    whole = found[:, 1].bincount(minlength=model.config.vocab_size) / len(found)
    with torch.no_grad():
        expected = model(found[:, :1]).logits[:, -1].float().softmax(-1).mean(0)
    assert float((whole - expected).abs().sum()) < 0.25  # about 0.1 by chance for 4,000 draws


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1, "temperature": 0.1, "top_p": 0.5},
        {"repetition_penalty": 1.8},
        {"min_p": 0.9},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(40))},
        {"eos_token_id": list(range(40))},
        {"num_beams": 3},
        {"max_length": 4},
        {"bad_words_ids": [[5]]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_for_answers_do_not_change_the_text(settings, adapted):
    model = get_peft_model(build("llama"), CloverConfig()) if adapted else build("llama")
    found = ids(own_text(model, rows=8, length=40))
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config.to_dict()
    assert torch.equal(ids(own_text(model, rows=8, length=40)), found)
    assert model.generation_config.to_dict() == kept


def test_seeds_give_texts_of_their_own_and_leave_the_global_generator_and_the_model_alone():
    model = get_peft_model(build("llama"), CloverConfig()).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    once, again, other = (ids(own_text(model, rows=3, length=6, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert model.training


def test_an_adapter_gets_its_bases_from_it():
    model = get_peft_model(build("llama"), CloverConfig())
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "clover_U" in name}
    clover_peft.initialize_from_activations(model, own_text(model, rows=20, length=64))
    assert before
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_buffers() if name in before)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_model_that_writes_no_text_by_itself_is_refused(family):
    with pytest.raises(ValueError, match=r"expected a causal language model, found \w+, .*pass batches of real data"):
        own_text(build(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_no_longer_than_the_model_has_positions(family):
    model = build(family)
    model.config.max_position_embeddings = 40
    assert ids(own_text(model, rows=2)).shape == (2, 40)
    with pytest.raises(ValueError, match="length: expected at most the 40 positions of the model, found 41"):
        own_text(model, length=41)


@pytest.mark.parametrize("number", ["rows", "length", "batch_size"])
def test_numbers_that_are_too_small_are_refused(number):
    with pytest.raises(ValueError, match=rf"{number}: expected at least \d, found 0"):
        own_text(build("llama"), **{number: 0})
