"""`GuardedTensors` keep at least float32, whatever casts, moves, copies or loads them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from clover_peft.runtime.tensors import GuardedTensors


def numbers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator).to(dtype) for name in ("k", "v")}


KINDS = {
    "parameters": dict(trainable=True),
    "guarded parameters": dict(trainable=True, guarded=True),
    "buffers": dict(),
    "buffers beside the state dict": dict(persistent=False),
}


def holders(dtype: torch.dtype = torch.float32) -> list[GuardedTensors]:
    return [GuardedTensors(numbers(dtype), **options) for options in KINDS.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("before", "cast", "after"),
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_a_cast_of_the_model_never_goes_below_float32(kind, before, cast, after):
    holder = GuardedTensors(numbers(before), **KINDS[kind])
    nn.Sequential(holder).to(cast)
    for name, tensor in numbers(before).items():
        assert holder.get(name).dtype == after
        assert torch.equal(holder.get(name), tensor.to(after))


def test_a_cast_behind_the_modules_back_is_undone_where_it_is_guarded():
    plain, guarded = (GuardedTensors(numbers(), trainable=True, guarded=guarded) for guarded in (False, True))
    for holder in (plain, guarded):
        for parameter in holder.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        nn.Sequential(holder).train()  # as every trainer calls it
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    for name, tensor in numbers().items():
        assert torch.equal(guarded.get(name), tensor)  # not a bit is lost


def test_numbers_that_were_written_after_such_a_cast_are_kept():
    holder = GuardedTensors(numbers(), trainable=True, guarded=True)
    for parameter in holder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16) + 1
    expected = {name: parameter.detach().float() for name, parameter in holder.named_parameters()}
    holder.restore()
    for name, tensor in expected.items():
        assert holder.get(name).dtype == torch.float32
        assert torch.equal(holder.get(name), tensor)


def test_a_larger_dtype_behind_the_modules_back_stays():
    holder = GuardedTensors(numbers(), trainable=True, guarded=True)
    for parameter in holder.parameters():
        parameter.data = parameter.data.double()
    holder.restore()
    assert {p.dtype for p in holder.parameters()} == {torch.float64}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_copies_are_guarded_and_independent(how):
    holder = GuardedTensors(numbers(), trainable=True, guarded=True)
    other = how(holder)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    other.train()
    with torch.no_grad():
        other.get("k").zero_()
    for name, tensor in numbers().items():
        assert torch.equal(holder.get(name), tensor)
        assert other.get(name).dtype == torch.float32
    assert torch.equal(other.get("v"), numbers()["v"])


def test_a_state_dict_has_what_is_persistent_and_takes_what_is_offered():
    for kind, holder in zip(KINDS, holders(), strict=True):
        assert set(holder.state_dict()) == (set() if kind == "buffers beside the state dict" else {"k", "v"})
        found = holder.load_state_dict({"k": torch.ones(3, 4)}, strict=False)
        assert torch.equal(holder.get("k"), torch.ones(3, 4))
        assert torch.equal(holder.get("v"), numbers()["v"])
        assert found.missing_keys == ([] if kind == "buffers beside the state dict" else ["v"])
        assert set(holder.state_dict()) == (set() if kind == "buffers beside the state dict" else {"k", "v"})


def test_a_load_into_parameters_that_were_cast_is_in_float32():
    holder = GuardedTensors(numbers(), trainable=True, guarded=True)
    for parameter in holder.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    fine = {name: tensor + 1e-3 for name, tensor in numbers().items()}
    holder.load_state_dict(fine)
    holder.restore()
    assert all(torch.equal(holder.get(name), tensor) for name, tensor in fine.items())


def test_buffers_that_were_never_loaded_stay_on_the_meta_device():
    """`to_empty` would give them numbers that mean nothing."""
    for kind, holder in zip(KINDS, holders(), strict=True):
        assert holder.devices() == {torch.device("cpu")}
        on_meta = GuardedTensors({name: tensor.to("meta") for name, tensor in numbers().items()}, **KINDS[kind])
        assert on_meta.devices() == {torch.device("meta")}
        on_meta.to_empty(device="cpu")
        assert on_meta.devices() == {torch.device("meta" if kind.startswith("buffers") else "cpu")}


def test_tensors_are_found_by_name():
    for holder in holders():
        assert holder("v", lambda tensor: tensor.sum()) == numbers()["v"].sum()
        assert holder.registered("v") is holder.get("v") is holder.v
        assert holder.get("nothing") is None
        assert holder.registered("nothing") is None
        del holder.v
        holder.v = torch.zeros(3, 4)  # as FSDP1 does
        assert holder.registered("v") is None
        assert not holder("v", torch.sum)
