"""`resolve`: the slices of a target module, and the modules that are targets by default."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .attention import AttentionBlock, divide
from .families import Layout, family_of, find_suffix, owner_of, unknown_family_message, wraps_known_models
from .slices import HeadSlice, TargetSlice
from .weight import base_of, feature_counts, is_projection


def default_targets(model: nn.Module) -> dict[str, str]:
    """The modules of known families that compute key, value or up-projection: path -> name in the table.

    Empty if no part of the model is known; the config of each tower of a multimodal model names its family.
    """
    found = {}
    for path, module in model.named_modules():
        if path and is_projection(base_of(module)):
            family = family_of(model, path)
            name = None if family is None else find_suffix(path, family.target_modules)
            if name is not None:
                found[path] = name
    return found


def resolve(
    model: nn.Module, path: str, *, head_dim: int | None = None, num_heads: int | None = None, described: bool = False
) -> tuple[TargetSlice, ...]:
    """The slices of the target at `path`.

    Args:
        model: the model the path is relative to.
        path: module path of an `nn.Linear`, a `Conv1D` or a tuner layer around one.
        head_dim: output features of a head; where the table knows the model it must agree.
        num_heads: heads of this module; only for a model that the table does not know.
        described: the caller has a block size for a module of an unknown family.

    Returns:
        The slices that get a map. A projection without heads is one "head" as wide as its output.

    Raises:
        ValueError: for a family that the table does not know, or sizes that do not fit the module.
        TypeError: if the module is no linear projection.
    """
    module = base_of(model.get_submodule(path))
    _, features = feature_counts(module, path)
    family, model_type, config = owner_of(model, path)
    if family is None:
        if head_dim is not None or num_heads is not None:
            own = getattr(model.get_submodule(path.rpartition(".")[0]), "head_dim", None)
            if isinstance(own, int) and head_dim and own > head_dim and own % head_dim == 0 == features % own:
                raise ValueError(
                    f"{path}: expected heads of head_dim {head_dim}, found an attention with heads of {own}, which "
                    "would be split; adapt these layers with a config of their own (layers_to_transform), and split "
                    "heads with block_size"
                )
            return (TargetSlice("weight", "q", _by_override(path, features, head_dim, num_heads)),)
        if model_type is not None and not described and not wraps_known_models(model, path):
            raise ValueError(unknown_family_message(model_type, path))
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    if num_heads is not None:
        raise ValueError(
            f"{path}: num_heads describes models that the table of architectures does not know, but {model_type!r} is "
            "in it; leave num_heads out"
        )
    if (name := find_suffix(path, family.up)) is not None:
        parts = Layout.read(family.up[name]).parts
        size = features // len(parts)
        return (TargetSlice("weight", "up", HeadSlice.plain(1, size, start=size * parts.index("up"))),)
    if (name := find_suffix(path, family.projections)) is None:
        return (TargetSlice("weight", "linear", HeadSlice.plain(1, features)),)

    attention = AttentionBlock(model, path.removesuffix(name), family, config, head_dim)
    layout = attention.layout(path, name)
    adapted = [part for part in layout if part in ("k", "v")] or ["q"]
    slices = [target for part in adapted for target in attention.slices(part, layout[part])]
    return (replace(slices[0], name="weight"),) if len(slices) == 1 else tuple(slices)


def _by_override(path: str, features: int, head_dim: int | None, num_heads: int | None) -> HeadSlice:
    if head_dim is None:
        assert num_heads is not None
        dim = divide(path, features, num_heads, f"num_heads {num_heads}", "pass the num_heads of this module")
        return HeadSlice.plain(num_heads, dim)
    count = divide(path, features, head_dim, f"head_dim {head_dim}", "pass the head_dim of this module")
    if num_heads not in (None, count):
        raise ValueError(
            f"{path}: {features} output features make {count} heads of head_dim {head_dim}, but num_heads is "
            f"{num_heads}; pass only one of the two"
        )
    return HeadSlice.plain(count, head_dim)


def attention_block(model: nn.Module, path: str) -> AttentionBlock | None:
    """The attention block that the projection at `path` belongs to; None if the table has no such projection."""
    family, _, config = owner_of(model, path)
    name = None if family is None else find_suffix(path, family.projections)
    if family is None or name is None:
        return None
    return AttentionBlock(model, path.removesuffix(name), family, config)


def attention_blocks(model: nn.Module) -> dict[str, AttentionBlock]:
    """Path -> attention block, of all of a model's; a block that several layers share appears once."""
    blocks: dict[int, AttentionBlock] = {}
    for path in default_targets(model):
        if (block := attention_block(model, path)) is not None:
            blocks.setdefault(id(block.modules[0]), block)
    return {block.path: block for block in blocks.values()}
