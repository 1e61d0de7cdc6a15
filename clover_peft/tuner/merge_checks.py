"""The checks of a whole model around a merge: before it, and of what rounding lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..io.user_warning import warn
from .layers import clover_layers
from .merging import check_merge

# Merging warns if rounding changes more than this share of the update.
MUCH_ROUNDED = 0.1


def check_merges(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse adapters that cannot be merged. With `safe_merge`, compute every result, as a trial.

    The trial costs one more merge, and the memory of one layer's result. The merge itself checks again, because it
    also reaches layers of other tuners, such as trained tokens.

    Args:
        model: the bare model.
        adapter_names: the adapters; None for those that are active.
        safe_merge: refuse results that are not finite.

    Raises:
        ValueError: naming the first module where a merge is impossible. Nothing is merged.
    """
    for _, layer in clover_layers(model):
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        names = list(dict.fromkeys([*layer.merged_adapters, *(name for name in wanted if name in layer.specs)]))
        if not names:
            continue
        check_merge(layer, names)
        if safe_merge:
            with layer.base_weight.whole():
                layer.merged_tensors(names, safe_merge=True)


@contextmanager
def warning_of_rounding(model: nn.Module) -> Iterator[None]:
    """Warn once if the merges of this context, into quantised weights, have lost much of the update to rounding."""
    layers = {path: layer for path, layer in clover_layers(model) if layer.quantization_backend is not None}
    for layer in layers.values():
        layer.base_weight.rounding = (0.0, 0.0)
    yield
    roundings = {path: layer.base_weight.rounding for path, layer in layers.items()}
    merged = {path: rounding for path, rounding in roundings.items() if rounding[0] > 0}
    if not merged:
        return
    changes, errors = (sum(column) for column in zip(*merged.values(), strict=True))
    if (lost := (errors / changes) ** 0.5) > MUCH_ROUNDED:
        worst = max(merged, key=lambda path: merged[path][1] / merged[path][0])
        warn(
            f"merged into {layers[worst].base_weight.precision} weights, whose rounding is {lost:.0%} of the "
            f"update (worst: {worst}, {(merged[worst][1] / merged[worst][0]) ** 0.5:.0%}); unmerge, call "
            "clover_peft.dequantize(model) and merge then, to lose nothing",
        )
