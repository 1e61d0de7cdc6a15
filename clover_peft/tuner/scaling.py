"""How strongly each adapter of a layer acts, as diffusers and peft set it."""

from __future__ import annotations


class Scaling:
    """The part of `CloverLayer` with peft's methods for scales: `y = z + scale * E dS C z`.

    The scale multiplies dS and the low-rank part. With `truncate=True`, scale 0 thus gives the truncated base; an
    adapter that was saved folded is scaled as a whole. Scales are not saved. Adapters that are merged keep the scale
    that they were merged with.

    Attributes:
        scaling: adapter -> scale, 1 for a new adapter.
    """

    scaling: dict[str, float]
    active_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter; a name that the layer does not have is ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None sets them back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
