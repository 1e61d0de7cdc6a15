"""`onloaded` brings weights that are elsewhere, and takes them away again."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

import clover_peft.runtime.sharding
from clover_peft.runtime.sharding import onloaded


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def offloaded() -> nn.Linear:
    module = linear()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    return module


def test_what_is_here_stays_as_it_is():
    module = linear()
    data = [parameter.data_ptr() for parameter in module.parameters()]
    with onloaded(module):
        assert [parameter.data_ptr() for parameter in module.parameters()] == data
    add_hook_to_module(module, AlignDevicesHook("cpu"))  # a hook that only moves inputs
    with onloaded(module):
        assert [parameter.data_ptr() for parameter in module.parameters()] == data


def test_offloaded_weights_are_there_until_the_outermost_context_ends():
    module = offloaded()
    assert module.weight.is_meta
    with onloaded(module):
        for _ in range(2):
            with onloaded(module):
                assert torch.equal(module.weight, linear().weight)
            assert torch.equal(module.bias, linear().bias)
    assert module.weight.is_meta
    assert module.bias.is_meta


def test_offloaded_weights_leave_after_an_error_too():
    module = offloaded()
    with pytest.raises(RuntimeError, match="inside"), onloaded(module):
        raise RuntimeError("inside")
    assert module.weight.is_meta


def test_sharded_weights_are_gathered_once_and_only_those_that_are_empty(monkeypatch):
    module, gathered = linear(), []
    weight = module.weight.data
    module.weight.ds_shape, module.bias.ds_shape = weight.shape, module.bias.shape
    module.weight.data = torch.empty(0)  # DeepSpeed keeps small parameters, as the bias, whole

    @contextmanager
    def gather(parameters, modifier_rank=0):
        gathered.append((list(parameters), modifier_rank))
        module.weight.data = weight
        yield
        module.weight.data = torch.empty(0)

    monkeypatch.setattr(clover_peft.runtime.sharding, "gather_params_ctx", gather)
    with onloaded(module), onloaded(module):
        assert torch.equal(module.weight, linear().weight)
    assert not module.weight.numel()
    assert len(gathered) == 1
    ((parameters, modifier_rank),) = gathered
    assert [id(p) for p in parameters] == [id(module.weight)]
    assert modifier_rank is None  # they are read, not written
