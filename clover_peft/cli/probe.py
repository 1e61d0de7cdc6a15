"""Outputs of a model on fixed random inputs, whatever it reads: text, images or speech."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..io.adapters import embedding_of

_TOKENS, _SAMPLES = 32, 4000


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Float32 logits, or what the model has instead, flattened.

    A part that reads something else than the whole, such as the vision tower of a language model, is run by itself.

    Raises:
        ValueError: it is not known what the model reads.
    """
    model = (model.get_base_model() if hasattr(model, "get_base_model") else model).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(model, generator)
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__}: expected a model that reads text, images or speech, found one that reads "
            f"{model.main_input_name}; merge it in Python, with merge_and_unload"
        )
    outputs = [_run(model, inputs)]
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        of_part = None if part.main_input_name in (model.main_input_name, *inputs) else _inputs(part, generator)
        if of_part is not None:
            outputs.append(_run(part, of_part))
    return torch.cat([output.float().cpu().flatten() for output in outputs])


def _run(model: Any, inputs: dict[str, Tensor]) -> Any:
    kinds = {True: model.dtype}
    moved = {name: x.to(model.device, kinds.get(x.is_floating_point())) for name, x in inputs.items()}
    result = model(**moved)
    return result.logits if "logits" in result else result[0]


def _inputs(model: Any, generator: torch.Generator) -> dict[str, Tensor] | None:
    """Random keyword arguments of a model; None where it reads something else."""
    config, name = model.config, model.main_input_name
    parts = [config, *(getattr(config, part) for part in ("encoder", "vision_config") if hasattr(config, part))]
    found: dict[str, Tensor] = {}
    if name == "input_ids":
        embedding: Any = embedding_of(model, "input")  # may have grown
        rows = config.get_text_config().vocab_size if embedding is None else embedding.weight.shape[0]
        found[name] = _ids(rows, generator)
        if "pixel_values" in inspect.signature(model.forward).parameters and not model.can_generate():
            found["pixel_values"] = _image(getattr(config, "vision_config", config), generator)
    elif name == "pixel_values" and (sized := [part for part in parts if hasattr(part, "image_size")]):
        found[name] = _image(sized[0], generator)
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        found[name] = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    elif name == "input_values":
        found[name] = torch.randn(1, _SAMPLES, generator=generator)
    elif name == "inputs" and isinstance(encoder := getattr(model, "encoder", None), PreTrainedModel):  # of speech
        if (of_encoder := _inputs(encoder, generator)) is None:
            return None
        found = of_encoder
    else:
        return None
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = _ids(config.get_text_config(decoder=True).vocab_size, generator)
    return found


def _ids(vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, (1, _TOKENS), generator=generator)


def _image(config: PretrainedConfig, generator: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(1, config.num_channels, height, width, generator=generator)
