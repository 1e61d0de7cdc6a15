"""Registers CLOVER with peft, which keeps its methods in a closed enum and has no hook for plugins."""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.utils import PeftType, register_peft_method

_NAME = "CLOVER"


def _extend_peft_type() -> PeftType:
    """Add CLOVER to `PeftType` in place, as the enum's own machinery would; once."""
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member: Any = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_map_[_NAME] = member
    PeftType._member_names_.append(_NAME)
    PeftType._value2member_map_[_NAME] = member
    if (hashable := getattr(PeftType, "_hashable_values_", None)) is not None:
        hashable.append(_NAME)
    # EnumType.__setattr__ refuses to assign members.
    type.__setattr__(PeftType, _NAME, member)
    return member


CLOVER = _extend_peft_type()


def register(config_cls: type, model_cls: type) -> None:
    """Enter CLOVER in peft's tables. A second import or a reload replaces the entries.

    Raises:
        ImportError: if peft ships a CLOVER of its own.
    """
    for table in (mapping.PEFT_TYPE_TO_TUNER_MAPPING, mapping.PEFT_TYPE_TO_CONFIG_MAPPING):
        known = table.get(CLOVER)
        if known is not None and known.__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise ImportError(
                f"peft already has a method {_NAME}, {known.__module__}.{known.__qualname__}; use that one, or an "
                "older peft together with clover_peft"
            )
        table.pop(CLOVER, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(CLOVER, None)
    register_peft_method(name=_NAME.lower(), config_cls=config_cls, model_cls=model_cls)
