"""Gives attention modules heads of other widths.

A narrow module is the model's own with smaller projections and another forward: a subclass, made when it is needed.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...base_model.attention import WIDTHS, AttentionBlock
from ...base_model.rewritten import become
from ...base_model.weight import refuse_computed
from .attention import STYLES, NarrowAttnProcessor, Part, Projection
from .calls import call_of, check_parameters

# Modules that read the sizes of their heads from attributes of their own: key, value, and what depends on them.
SELF_DESCRIBED = ("DeepseekV2Attention", "DeepseekV3Attention")
# Attributes of a module that was made narrow: what `narrow` was called with, which its config has to record, and the
# dimensions of a key and value head that the module was built with.
MADE, BUILT = "clover_made", "clover_built"


def check_projections(block: AttentionBlock) -> None:
    """Raises ValueError, naming the module, if weights of a block cannot be changed: adapters, quantised ones."""
    for path in (*(block.prefix + projection for projection in block.present()), block.prefix + block.family.output):
        projection = block.model.get_submodule(path)
        if type(projection) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"{path}: expected nn.Linear or Conv1D, found {type(projection).__name__}; prune before adapters are "
                "added or weights quantised"
            )
        refuse_computed(projection, path)


def check_supported(block: AttentionBlock) -> None:
    """Raises ValueError, naming the module, if the block cannot be made narrow."""
    module: Any = block.modules[0]
    stock = _stock_class(module)
    owner = stock.__module__.partition(".")[0]
    known = {"transformers": (*STYLES, *SELF_DESCRIBED), "diffusers": ("Attention",)}
    # A class of the same name in a model's own remote code may do anything.
    if stock.__name__ not in known.get(owner, ()):
        raise ValueError(
            f"{block.path}: expected attention that can be made narrow, found {stock.__name__} of {stock.__module__}; "
            "pass masked=True, which zeroes directions and keeps all shapes; those that can are "
            f"{', '.join(sorted(known['transformers']))}, and diffusers' Attention"
        )
    if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
        raise ValueError(f"{block.path}: expected an output projection in one piece, found slow_but_exact; unset it")
    if "forward" in vars(module):
        raise ValueError(
            f"{block.path}: expected a module whose forward is its class's, found one that hooks have replaced (by a "
            "device_map?); call accelerate.hooks.remove_hook_from_submodules(model) first, or load without device_map"
        )
    processor = type(getattr(module, "processor", None)).__name__
    if owner == "diffusers" and processor not in ("AttnProcessor", "AttnProcessor2_0", "NarrowAttnProcessor"):
        raise ValueError(
            f"{block.path}: expected diffusers' plain attention processor, found {processor}; call "
            "set_default_attn_processor() first"
        )
    try:
        _check_calls(module, stock)
    except ValueError as error:
        raise ValueError(f"{block.path}: {error}") from None


def _check_calls(module: Any, stock: Any) -> None:
    """Raises ValueError, naming the class, if the stock forward has a parameter that the narrow one would not read."""
    if stock.__name__ in STYLES:
        call_of(stock, STYLES[stock.__name__].forward)
    elif hasattr(module, "set_processor"):
        diffusers = sys.modules["diffusers"]
        # Positional arguments more than these are what diffusers itself ignores.
        known = {*inspect.signature(NarrowAttnProcessor.__call__).parameters, "args"}
        for owner, function in ((stock, stock.forward), (type(module.processor), type(module.processor).__call__)):
            check_parameters(owner.__name__, function, known, f"diffusers {diffusers.__version__}")


@contextlib.contextmanager
def undone_on_error(block: AttentionBlock) -> Iterator[None]:
    """Within it a block may be made narrow; after an error it is as it was."""
    module: Any = block.modules[0]
    kind, attributes = type(module), dict(vars(module))
    paths = [block.prefix + name for name in (*block.present(), block.family.output)]
    projections = {path: block.model.get_submodule(path) for path in paths}
    try:
        yield
    except BaseException:
        for path, projection in projections.items():
            block.model.set_submodule(path, projection)
        for name in set(vars(module)) - set(attributes):
            delattr(module, name)
        vars(module).update(attributes)
        module.__class__ = kind
        raise


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of an attention module, of a narrow one that which it was made from."""
    return getattr(type(module), "clover_stock", type(module))


def narrow(block: AttentionBlock, key_width: int, value_width: int, output_bias: bool) -> None:
    """Give the heads of an attention block other widths. The projections are new, with weights yet to be filled.

    Args:
        block: one that `check_supported` does not refuse.
        key_width: dimensions of a query and key head, with those that are rotated.
        value_width: dimensions of a value head.
        output_bias: whether the output projection is to have a bias.

    Raises:
        ValueError: if calls of the class cannot be read; nothing is changed then.
    """
    module: Any = block.modules[0]
    _check_calls(module, _stock_class(module))
    vars(module).setdefault(BUILT, widths(block))
    sizes = {"q": key_width, "k": key_width, "v": value_width}
    if type(module).__name__ in SELF_DESCRIBED:
        sizes["q"] += module.qk_rope_head_dim
    projections = []
    for name in block.present():
        slices, by_head = block.layout(block.prefix + name, name), block.layout_of(name).order == "head"
        parts = tuple(Part(part, heads.count, sizes[part]) for part, heads in slices.items())
        projections.append(Projection(name.rpartition(".")[2], parts, by_head))
    for name, projection in zip(block.present(), projections, strict=True):
        features = sum(part.count * part.width for part in projection.parts)
        _replace(block.model, block.prefix + name, out_features=features)
    heads = next(part.count for projection in projections for part in projection.parts if part.name == "q")
    _replace(block.model, block.prefix + block.family.output, heads * value_width, bias=output_bias)
    setattr(module, MADE, (key_width, value_width, output_bias))
    if type(module).__name__ in SELF_DESCRIBED:
        module.qk_nope_head_dim, module.v_head_dim = key_width, value_width
        module.qk_head_dim = key_width + module.qk_rope_head_dim
        return
    setattr(module, WIDTHS, (key_width, value_width))
    module.clover_projections = tuple(projections)
    if hasattr(module, "set_processor"):
        become(module, _narrow_of_diffusers)
        module.set_processor(NarrowAttnProcessor())
    else:
        become(module, _narrow)


def _narrow_of_diffusers(stock: Any) -> tuple[str, dict[str, Any]]:
    """diffusers' attention with a processor that stays: others derive the softmax scale from the width of a key, and
    give a value the same width."""

    def refuse(found: str) -> None:
        raise ValueError(
            f"{stock.__name__} with pruned heads: expected {NarrowAttnProcessor.__name__}, because other processors "
            f"expect heads as wide as they were built, found {found}; keep the processor, or prune with masked=True"
        )

    def set_processor(self: Any, processor: Any) -> None:
        if not isinstance(processor, NarrowAttnProcessor):
            refuse(type(processor).__name__)
        stock.set_processor(self, processor)

    def fuse_projections(self: nn.Module, fuse: bool = True) -> None:
        refuse("a call that fuses the projections")

    return stock.__name__, {"set_processor": set_processor, "fuse_projections": fuse_projections}


def _narrow(stock: Any) -> tuple[str, dict[str, Any]]:
    """An attention class with the forward of its narrow form. How its calls are read is found out here, once."""
    style = STYLES[stock.__name__]
    call = call_of(stock, style.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return style.forward(self, **call.read(args, kwargs))

    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    modeling = sys.modules[stock.__module__]
    attributes = {"forward": forward, "clover_call": call, "clover_style": style, "clover_modeling": modeling}
    return f"Narrow{stock.__name__}", attributes


def _replace(
    model: nn.Module,
    path: str,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool | None = None,
) -> None:
    """Put a projection of other sizes, yet to be filled, in place of one: of the same class, dtype and device. One
    that has these sizes stays."""
    old: Any = model.get_submodule(path)
    weight = old.weight
    sizes = (old.nx, old.nf) if isinstance(old, Conv1D) else (old.in_features, old.out_features)
    read, written = in_features or sizes[0], out_features or sizes[1]
    has_bias = old.bias is not None if bias is None else bias
    if (read, written, has_bias) == (*sizes, old.bias is not None):
        return
    with torch.device("meta"):  # nothing is drawn at random
        new: Any = Conv1D(written, read) if isinstance(old, Conv1D) else nn.Linear(read, written, bias=has_bias)
    new = new.to(weight.dtype).to_empty(device=weight.device)
    for name, parameter in new.named_parameters():
        like = getattr(old, name)
        parameter.requires_grad_(weight.requires_grad if like is None else like.requires_grad)
    new.train(old.training)
    model.set_submodule(path, new)


def padded_width(block: AttentionBlock, kind: str, most: int) -> int:
    """The directions that all heads of a block are given room for when one keeps this many: at least one; an even
    number where DeepSeek-V2 turns pairs of features behind them."""
    if kind == "qk" and type(block.modules[0]).__name__ == "DeepseekV2Attention":
        return max(2, most + most % 2)
    return max(1, most)


@torch.no_grad()
def become_stock(model: Any, blocks: Mapping[str, AttentionBlock]) -> bool:
    """Where all blocks describe their heads themselves and have the same widths, enter these in the model's config, so
    that the model is one of its own class with nothing to record.

    The class derives the softmax scale from the widths: queries are rescaled to keep the product as it was.

    Args:
        model: the model.
        blocks: all its attention blocks by path.

    Returns:
        Whether it was possible.
    """
    described = all(type(block.modules[0]).__name__ in SELF_DESCRIBED for block in blocks.values())
    config: Any = getattr(model, "config", None)
    own = all(block.config is config for block in blocks.values())  # not a part of a larger model
    if not described or not own or len({widths(block) for block in blocks.values()}) != 1:
        return False
    (key_width, value_width), before = widths(next(iter(blocks.values()))), config.qk_head_dim
    config.qk_nope_head_dim, config.v_head_dim = key_width, value_width
    config.qk_head_dim = key_width + config.qk_rope_head_dim
    factor = (config.qk_head_dim / before) ** 0.5
    for block in blocks.values():
        module: Any = block.modules[0]
        query = module.q_proj if module.q_proj is not None else module.q_b_proj
        query.weight.mul_(factor)
        module.scaling /= factor
        for name in (MADE, BUILT):
            vars(module).pop(name, None)
    return True


def is_narrower(block: AttentionBlock) -> bool:
    """Whether its heads have other widths than when the model was built, which its own class cannot load then."""
    module = block.modules[0]
    return hasattr(module, MADE) and getattr(module, MADE)[:2] != getattr(module, BUILT)


def widths(block: AttentionBlock) -> tuple[int, int]:
    """Dimensions of a key head, without the rotated ones that MLA has apart, and of a value head."""
    path = block.prefix + block.present()[0]
    return block.dim("k", path), block.dim("v", path)
