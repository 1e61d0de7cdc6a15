"""Methods of other libraries that are wrapped, and modules that get a class of their own."""

from __future__ import annotations

import copy
import pickle

from torch import nn

from clover_peft.base_model.rewritten import become, wrap_once


class Library:
    def method(self):
        return [type(self).__name__]

    @classmethod
    def made(cls):
        return [cls.__name__]


class Heir(Library):
    pass


def test_methods_are_wrapped_once():
    def make(function):
        return lambda self: [*function(self), "ours"]

    for name in ("method", "made", "missing"):
        for _ in range(2):
            wrap_once(Library, name, make)
    assert Heir().method() == Heir.made() == ["Heir", "ours"]
    assert not hasattr(Library, "missing")


def _louder(stock: type, by: int):
    return f"Louder{stock.__name__}", {"extra_repr": lambda self: stock.extra_repr(self) + "!" * by}


def test_a_module_gets_its_class_once_and_keeps_it_in_copies():
    module, other = nn.Linear(3, 2), nn.Linear(2, 2)
    for each in (module, module, other):
        become(each, _louder, 2)
    assert type(module) is type(other)
    assert type(module).__mro__[1] is type(module).clover_stock is nn.Linear
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert twin.extra_repr().endswith("!!")
        assert twin.weight.equal(module.weight)
