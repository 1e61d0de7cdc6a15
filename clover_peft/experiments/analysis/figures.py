"""Pictures of the measures of `measures.measure`, for several fine-tunings side by side."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from ...io.figures import canvas

Found = dict[str, list[dict[str, Any]]]  # label -> measures, module by module


def draw(found: Found, folder: Path) -> list[Path]:
    """Draw the paper's figures.

    These are `update.png` (figure 5), `intruders.png` and `similarities.png` (figure 6), `share.png` (figure 4, if
    inputs were measured) and `singular_values.png` (figure 2).

    Returns:
        The files drawn.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    pyplot, save, made = canvas(folder)
    kinds = sorted({_kind(module) for modules in found.values() for module in modules})
    figure, grid = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.5), squeeze=False)
    for axes, kind in zip(grid[0], kinds, strict=True):
        for i, (label, modules) in enumerate(found.items()):
            for k, module in enumerate(m for m in modules if _kind(m) == kind and m["update"]["rank"]):
                values = module["update"]["singular_values"]
                places = [j / max(1, len(values) - 1) for j in range(len(values))]
                relative = [max(value / values[0], 1e-6) for value in values]
                axes.plot(places, relative, color=f"C{i}", alpha=0.3, label=label if k == 0 else None)
        axes.set(title=kind, xlabel="place among the singular values", yscale="log")
        _legend(axes)
    grid[0][0].set_ylabel("size, of the largest")
    save("update", figure)

    figure, axes = pyplot.subplots()
    for i, (label, modules) in enumerate(found.items()):
        layers = sorted({_layer(module) for module in modules})
        counts = [sum(m["intruders"]["count"] for m in modules if _layer(m) == layer) for layer in layers]
        axes.plot(layers, counts, "o-", color=f"C{i}", label=f"{label} ({sum(counts)} in all)")
    axes.set(xlabel="layer", ylabel="intruder dimensions")
    _legend(axes)
    save("intruders", figure)

    figure, grid = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.5), squeeze=False)
    for axes, (label, modules) in zip(grid[0], found.items(), strict=True):
        worst = min(modules, key=lambda module: min(module["intruders"]["similarities"]))
        axes.imshow(worst["intruders"]["matrix"], vmin=0, vmax=1)
        axes.set(title=f"{label}\n{worst['name']}", xlabel="singular vector before", ylabel="after")
    save("similarities", figure)

    if all("share" in module for modules in found.values() for module in modules):
        figure, axes = pyplot.subplots()
        for i, (label, modules) in enumerate(found.items()):
            layers = sorted({_layer(module) for module in modules})
            for key, style in (("trained", "o-"), ("chance", "--")):
                means = [statistics.mean(m["share"][key] for m in modules if _layer(m) == at) for at in layers]
                shown = label if key == "trained" else f"{label}, random directions"
                axes.plot(layers, means, style, color=f"C{i}", label=shown)
        axes.set(xlabel="layer", ylabel="share of the input on trained directions", ylim=(0, 1.05))
        _legend(axes)
        save("share", figure)

    figure, grid = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.5), squeeze=False)
    for axes, kind in zip(grid[0], kinds, strict=True):
        for i, (label, modules) in enumerate(found.items()):
            of_kind = sorted((module for module in modules if _kind(module) == kind), key=_layer)
            if of_kind:
                middle = of_kind[len(of_kind) // 2]
                name = f"{label}, layer {_layer(middle)}"
                axes.plot(middle["before"]["singular_values"], "--", color=f"C{i}", label=f"{name}, before")
                axes.plot(middle["after"]["singular_values"], color=f"C{i}", label=f"{name}, after")
        axes.set(title=kind, xlabel="singular value", yscale="log")
        _legend(axes)
    save("singular_values", figure)
    return made


def _legend(axes: Any) -> None:
    """Draw the legend below the axes, where it hides no curves."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize="small")


def _kind(module: dict[str, Any]) -> str:
    return str(module["name"].rpartition(".")[2])


def _layer(module: dict[str, Any]) -> int:
    number = re.search(r"\.(\d+)\.", f".{module['name']}.")
    return int(number[1]) if number else 0
