"""Saves the result of a run: adapter or model, the merged model, their cards, and the probe for `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from .arguments import Settings
from .card import write_card
from .trainer import Trainer

_INITIAL = "initial_adapter"


def keep_start(out: Path, settings: Settings, model: Any) -> None:
    """Save the initial adapter, if the trained one is saved as the difference from it.

    PiSSA with a randomised SVD needs this: it changes the base weights in a way that loading would not repeat.
    """
    if _needs_conversion(settings.peft):
        model.save_pretrained(out / _INITIAL)


def save(
    trainer: Trainer, model: Any, settings: Settings, record: dict[str, Any], probe: dict[str, torch.Tensor]
) -> None:
    """Save into `output_dir`, but for the merged model; all processes call this, as they gather sharded tensors.

    Args:
        trainer: the trainer, after training.
        model: the trainer's model, unwrapped.
        settings: the run's settings.
        record: the run's record, for the cards; `adapter_bytes` is set in it.
        probe: from `Questions.probe`; saved as `probe.safetensors`.
    """
    out = Path(settings.sft.output_dir)
    tokenizer = trainer.processing_class
    kind = "model" if settings.peft is None else "adapter"
    if trainer.is_fsdp_enabled:
        # Transformers would gather the whole base first, or with SHARDED_STATE_DICT save nothing here.
        state = _whole_state(model, trained_only=kind == "adapter")
        if trainer.is_world_process_zero():
            model.save_pretrained(out / kind, state_dict=state)
            tokenizer.save_pretrained(out / kind)
    else:
        trainer.save_model(str(out / kind))
    if not trainer.is_world_process_zero():
        return
    if _needs_conversion(settings.peft):
        model.save_pretrained(out / kind, path_initial_model_for_weight_conversion=str(out / _INITIAL))
    (out / kind / "training_args.bin").unlink(missing_ok=True)  # It is a pickle, and the record has the same.
    write_card(out / kind, kind, record)
    if kind == "adapter":
        record["adapter_bytes"] = (out / kind / "adapter_model.safetensors").stat().st_size
    if probe:
        save_file(probe, out / "probe.safetensors")
    print(f"saved {out / kind}")


def merge(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path, record: dict[str, Any]) -> None:
    """Merge the adapter and save the model into `out/merged`.

    Raises:
        ValueError: it cannot be merged, such as after a training that diverged.
    """
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"merge=true: expected weights that can be merged, found: {' '.join(str(error).split())}; the adapter and "
            f"the record are in {out}"
        ) from error
    merged.save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    write_card(out / "merged", "model", record)
    print(f"saved {out / 'merged'}")


def _whole_state(model: torch.nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    """Gather the tensors of a model that FSDP2 has sharded, whole and on the CPU; all processes call this."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not trained_only or tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[name] = whole.detach().cpu()
    return state


def _needs_conversion(config: peft.PeftConfig | None) -> bool:
    return str(getattr(config, "init_lora_weights", None)).startswith("pissa_niter")
