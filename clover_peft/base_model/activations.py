"""Runs a model over data and collects the moments of its activations, block by block."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..io.user_warning import warn
from ..linalg.moments import Moments, SecondMoment, check_finite
from ..runtime.bitsandbytes import keep_unpacked
from .slices import HeadSlice
from .weight import base_of

# With fewer tokens for each feature of a block, a moment is mostly noise.
TOKENS_PER_FEATURE = 10
TEXT = "input_ids"  # the main input of models of text
MomentsT = TypeVar("MomentsT", Moments, SecondMoment)
OF_LOGITS = ("labels", "logits_to_keep")  # keywords that a model's head takes, and its trunk does not
_NONE = "expected batches to run the model on, found none (a generator that was used up?)"


def refuse_one_batch(calibration: Any, name: str = "calibration") -> None:
    """Check that data are several batches."""
    if isinstance(calibration, Mapping):
        raise TypeError(f"{name}: expected batches, found one batch; pass a list of them")
    if not isinstance(calibration, Iterable):
        raise TypeError(f"{name}: expected a list of batches, found {type(calibration).__name__}")


def read_batches(calibration: Iterable[Mapping[str, Any]], name: str = "calibration") -> list[Mapping[str, Any]]:
    """All batches of data, one at least, for what runs over them more than once; the name is that of the argument."""
    refuse_one_batch(calibration, name)
    batches = list(calibration)
    if not batches:
        raise ValueError(f"{name}: {_NONE}")
    return batches


def warn_if_few(name: str, tokens: int, size: int, what: str, tokens_per_feature: int = TOKENS_PER_FEATURE) -> None:
    """Warn where there are too few tokens for a moment of `size` rows; `what` is the size in words."""
    if tokens < (wanted := tokens_per_feature * size):
        warn(f"{name}: {tokens} tokens for {what} are few; pass at least {wanted}")


@dataclass(frozen=True)
class Probe:
    """A hook's place: activations whose moments are collected.

    Attributes:
        module: a module.
        reads: True for the module's input, False for its output.
        heads: the features of interest.
        size: features of a block, d.
        parts: equal parts of a block whose moments are used with those between them, such as the heads that an output
            projection reads. Then tokens are counted for a part, and every second batch is collected alone too.
    """

    module: nn.Module
    reads: bool
    heads: HeadSlice
    size: int
    parts: int = 1


class TokenReader:
    """Takes the blocks of real tokens out of a model's activations.

    `attention_mask`, or in a decoder with an encoder `decoder_attention_mask`, leaves out padding. The decoder's mask
    is also used for encoder outputs that a decoder reads, if both sequences have the same length: pad them to
    different lengths, or not at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device
        # A cache of keys and values costs memory, and nothing here reads it.
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        known = inspect.signature(inner.forward).parameters
        self.defaults: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
        self.one_logit: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        # BERT also calls its layers an "encoder", and its labels are not a decoder's.
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder")
        encoder: Any = model.get_encoder() if both else None  # type: ignore[operator]
        self.encoding = set(encoder.modules()) if encoder is not None and encoder is not model else set()
        # The text's mask does not apply to a tower of another modality, whose sequence may have the same length.
        others = (m for m in model.modules() if m is not model and getattr(m, "main_input_name", TEXT) != TEXT)
        self.unmasked = {module for tower in others for module in tower.modules()} - self.encoding

    def read(
        self, batches: Iterable[Mapping[str, Any]], masks: dict[str, Tensor], what: str, with_logits: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Every batch on the model's device, as keyword arguments of the model, with a progress bar.

        Args:
            batches: the data.
            masks: gets the masks of the batch by name, in place of those of the batch before.
            what: the progress bar's name for the work.
            with_logits: False where nobody reads logits or loss, see `start_without_logits`.

        Raises:
            ValueError: if there is no batch.
        """
        start, is_empty = self.start if with_logits else self.start_without_logits, True
        for batch in tqdm(batches, desc=f"CLOVER {what}", unit=" batches", delay=3, leave=False):
            values, of_batch = start(batch)
            masks.clear()
            masks |= of_batch
            is_empty = False
            yield values
        if is_empty:
            raise ValueError(_NONE)

    def start(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A batch on the model's device, and its masks by name."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                "expected a list of batches, each of a model's keyword arguments, such as {'input_ids': <tensor>}, "
                f"found {type(batch).__name__} for one"
            )
        moved = {k: v.detach().to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        values = self.defaults | moved
        ids = values.get("input_ids")
        if "input_ids" in values and not (isinstance(ids, Tensor) and ids.ndim == 2):
            found = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(
                f"input_ids: expected a tensor of (rows, tokens), found {found}; with a tokenizer, pass "
                "return_tensors='pt'"
            )
        masks = {k: v.bool() for k, v in values.items() if k.endswith("attention_mask") and isinstance(v, Tensor)}
        if self.encoding and "decoder_attention_mask" not in masks:
            if (decoded := values.get("decoder_input_ids")) is not None:
                masks["decoder_attention_mask"] = torch.ones_like(decoded, dtype=torch.bool)
            elif (labels := values.get("labels")) is not None:  # The decoder reads them one place later.
                real = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1) != -100
                masks["decoder_attention_mask"] = real
        return values, masks

    def start_without_logits(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As `start`, where nobody reads logits or loss: no labels, and one logit a row if the model can.

        The labels of a model with encoder and decoder are what its decoder reads, and stay.
        """
        values, masks = self.start(batch)
        if self.encoding:
            return values, masks
        return {k: v for k, v in values.items() if k not in OF_LOGITS} | self.one_logit, masks

    def blocks(self, probe: Probe, x: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """(tokens, H, d): a probe's blocks of the activations (..., features), without padding."""
        blocks = probe.heads.blocks(x, probe.size)
        in_decoder = self.encoding and probe.module not in self.encoding
        kinds = ["decoder_attention_mask", "attention_mask"] if in_decoder else ["attention_mask"]
        places = blocks.shape[:-2]
        fitting = (masks[kind] for kind in kinds if kind in masks and _fits(masks[kind], places))
        if probe.module not in self.unmasked and (mask := next(fitting, None)) is not None:
            blocks = blocks[mask.reshape(places)]
        return blocks.reshape(-1, *blocks.shape[-2:])


def _fits(mask: Tensor, places: torch.Size) -> bool:
    """Whether activations at these places are those of a mask's tokens: in its shape, joined, or with further ones."""
    return places == (mask.numel(),) or [n for n in places if n != 1] == [n for n in mask.shape if n != 1]


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    probes: Mapping[str, Probe],
    batches: Iterable[Mapping[str, Any]],
    kind: type[MomentsT] = Moments,  # type: ignore[assignment]
    tokens_per_feature: int = TOKENS_PER_FEATURE,
) -> dict[str, MomentsT]:
    """Run a model once over data, in evaluation mode and with its active adapters, and collect moments.

    Args:
        model: the model to call.
        probes: the activations to collect, by any name.
        batches: keyword arguments of the model; tensors are moved to its device.
        kind: what is collected.
        tokens_per_feature: fewer tokens for each feature of a block, or of its parts, cause a warning.

    Returns:
        Name -> moments, on the device of the activations.

    Raises:
        ValueError: if there is no batch, a module did not run, or an activation is not finite.
    """
    found: dict[str, MomentsT] = {}
    masks: dict[str, Tensor] = {}
    reader = TokenReader(model)
    count = 0

    def observe(name: str, probe: Probe, module: nn.Module, inputs: Any, output: Any = None) -> None:
        blocks = reader.blocks(probe, inputs[0] if probe.reads else output, masks)
        if name not in found:
            # A device without float64 leaves the sums to the CPU.
            at = torch.device("cpu") if blocks.device.type == "mps" else blocks.device
            found[name] = kind.empty(blocks.shape[1:], at)
        moments: Any = found[name]
        if probe.parts > 1:
            moments.split(blocks, second=count % 2 == 1)
        else:
            moments.add(blocks)

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    reads_head = any(base_of(probe.module) is base_of(head) for probe in probes.values() if head is not None)
    with evaluating(model), ExitStack() as hooked:
        for name, probe in probes.items():
            module = probe.module
            register: Any = module.register_forward_pre_hook if probe.reads else module.register_forward_hook
            hooked.enter_context(register(partial(observe, name, probe)))
        for values in reader.read(batches, masks, "moments", with_logits=reads_head):
            model(**values)
            count += 1
    if missing := [name for name in probes if name not in found or not found[name].tokens]:
        raise ValueError(f"{missing[0]}: expected activations, found none; pass batches of tokens that reach it")
    for name, moments in found.items():
        check_finite(moments.sums, name)
    sizes = {name: probe.size // probe.parts for name, probe in probes.items()}
    few = {name: m.tokens for name, m in found.items() if m.tokens < tokens_per_feature * sizes[name]}
    if few:
        name = min(few, key=few.__getitem__)
        size = sizes[name]
        warn_if_few(name, few[name], size, f"blocks of {size} features", tokens_per_feature)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode for the duration of the context; 4-bit weights are not repacked in it."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        keep_unpacked(model)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
