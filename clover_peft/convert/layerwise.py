"""The stock model, made one layer at a time: a layer takes memory only while it has work.

All layers start on the meta device. `fill` gives one its weights, with a latent of full rank, and `empty` takes them
away, so that the layers of full rank are never all there at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from ..base_model.activations import OF_LOGITS, TokenReader
from .deepseek import EPS, attention_weights, make_config
from .rotary import Components
from .structure import Source


class Layerwise:
    """A stock model in evaluation mode, and what its layers are made of; it shares no memory with the original.

    Where the original's norms have another epsilon e than `EPS`, its residual stream is scaled by c = sqrt(EPS / e):
    `c x / sqrt(mean(c^2 x^2) + EPS)` is what it was.

    Attributes:
        model: `DeepseekV3ForCausalLM`, with the weights that stand outside its layers.
        layers: its decoder layers.
        original_layers: those of the original.
        layer_numbers: numbers in the weights of a layer with a latent of full rank.
        scale: c.
        device: of the original.
    """

    def __init__(self, source: Source, found: Sequence[Components], rotated: Tensor, sizes: Sequence[float]) -> None:
        """Make everything but the layers.

        Args:
            source: the original.
            found: for each layer the components of its keys.
            rotated: (pairs,) int64, the components that keep their rotation.
            sizes: for each layer the root mean square of a number in the latent of full rank.
        """
        self._source, self._found, self._rotated, self._sizes = source, found, rotated, sizes
        self.device, self._dtype = source.model.device, source.model.dtype
        self.scale = math.sqrt(EPS / source.eps)
        config = make_config(source, rotated)
        with torch.device("meta"):
            self.model = DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
        self.layers: list[Any] = list(self.model.model.layers)
        self.original_layers = source.layers
        self.layer_numbers = sum(parameter.numel() for parameter in self.layers[0].parameters())
        state = source.model.state_dict()
        outside = {name for name in state if not name.startswith(_LAYERS)}
        _load(self.model, {name: self._scaled(name, state[name]) for name in outside}, "")
        # Buffers of a model on the meta device have no numbers.
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config=config).to(self.device)
        self.model.generation_config = copy.deepcopy(source.model.generation_config)
        self._readers = {id(model): TokenReader(model) for model in (self.model, source.model)}

    def fill(self, i: int) -> Any:
        """Give layer i its weights, with a latent of full rank, and return it; none of them takes a gradient.

        Raises:
            ValueError: the original's layer has weights or buffers for which the stock class has no place.
        """
        original, path = self._source.layers[i], f"{_LAYERS}{i}."
        state = {
            name: self._scaled(name, tensor)
            for name, tensor in original.state_dict().items()
            if not name.startswith("self_attn.")
        }
        chosen = (self._found[i], self._rotated, self._sizes[i])
        for name, tensor in attention_weights(self._source, original.self_attn, *chosen).items():
            tensor = tensor * self.scale if name.startswith("o_proj") else tensor
            state[f"self_attn.{name}"] = tensor.to(self.device, self._dtype)
        _load(self.layers[i], state, path)
        return self.layers[i]

    def empty(self, i: int) -> None:
        """Take layer i's weights away."""
        self.layers[i].to("meta")

    def release_original(self, i: int) -> None:
        """Give up the weights of the original's layer i, and with the last layer those outside."""
        trunk, last = self._source.model.model, i == len(self.layers) - 1
        outside = (trunk.embed_tokens, trunk.norm, self._source.model.lm_head) if last else ()
        for module in (self.original_layers[i], *outside):
            module.to("meta")

    @torch.no_grad()
    def start(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], Tensor]:
        """What the first layer is called with, and the real tokens.

        Args:
            batch: keyword arguments of the model, rows of B texts.

        Returns:
            Hidden states (B, T, D), the keyword arguments that all layers share, and (B, T) bool.
        """
        return *self._start(self.model, batch), self.mask(batch)

    def mask(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, T) bool: the real tokens."""
        values, masks = self._readers[id(self.model)].start(batch)
        return masks.get("attention_mask", torch.ones_like(values["input_ids"], dtype=torch.bool))

    @torch.no_grad()
    def start_original(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the original's first layer is called with."""
        return self._start(self._source.model, batch)

    def _start(self, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        values, _ = self._readers[id(model)].start(batch)
        first, trunk = _First(), copy.copy(model.model)  # the model keeps its layers
        trunk._modules = trunk._modules | {"layers": nn.ModuleList([first])}
        trunk(**{name: value for name, value in values.items() if name not in OF_LOGITS})
        return first.seen

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of an original weight outside attention, for the scaled residual stream."""
        shrinks = name.endswith(("embed_tokens.weight", "mlp.down_proj.weight"))
        if not shrinks or self.scale == 1:
            return tensor.clone()
        result = torch.empty_like(tensor)
        for old, new in zip(tensor.split(_ROWS), result.split(_ROWS), strict=True):
            new.copy_(old.double() * self.scale)
        return result


_LAYERS = "model.layers."
_ROWS = 1024  # in float64 at once: an embedding may be larger than everything else


class _First(nn.Module):
    """Stands in for all layers, and keeps what it is called with."""

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        self.seen = hidden, options
        return hidden


def _load(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Put tensors in the place of a module's own, all of them but those of layers below it."""
    found = module.load_state_dict(state, strict=False, assign=True)
    missing = {name for name in found.missing_keys if not name.startswith(_LAYERS)}
    if odd := sorted({*found.unexpected_keys, *missing}):
        raise ValueError(
            f"{path}{odd[0]}: expected the weights of DeepseekV3ForCausalLM and no others, found {len(odd)} missing "
            "or unexpected; remove buffers and parameters that the model's class does not have"
        )
