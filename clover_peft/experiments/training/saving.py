"""What a run saves: adapter or model, the merged model, their cards, and a probe of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from .arguments import Settings
from .card import write_card
from .trainer import Trainer

_INITIAL = "initial_adapter"


def keep_start(out: Path, settings: Settings, model: Any) -> None:
    """Saves the adapter as it starts, where the one that is trained is saved as the difference from it.

    PiSSA's randomised SVD changes the base weights in a way that loading the adapter would not repeat.
    """
    if _needs_conversion(settings.peft):
        model.save_pretrained(out / _INITIAL)


def save(
    trainer: Trainer, model: Any, settings: Settings, record: dict[str, Any], probe: dict[str, torch.Tensor]
) -> None:
    """Saves into `output_dir`; in all processes, since they gather what is sharded together.

    Args:
        trainer: after training.
        model: the trainer's, unwrapped; merged if the job says so.
        settings: the run's.
        record: for the cards; is given `adapter_bytes`.
        probe: from `Questions.probe`, kept beside what is saved.
    """
    out = Path(settings.sft.output_dir)
    tokenizer = trainer.processing_class
    kind = "model" if settings.peft is None else "adapter"
    if trainer.is_fsdp_enabled:
        # Transformers' own gathers the whole base first, or with SHARDED_STATE_DICT saves nothing here.
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
    (out / kind / "training_args.bin").unlink(missing_ok=True)  # a pickle of what the record says
    write_card(out / kind, kind, record)
    if kind == "adapter":
        record["adapter_bytes"] = (out / kind / "adapter_model.safetensors").stat().st_size
    if probe:
        save_file(probe, out / "probe.safetensors")
    print(f"saved {out / kind}")
    if settings.job.merge:
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
        write_card(out / "merged", "model", record)
        print(f"saved {out / 'merged'}")


def _whole_state(model: torch.nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
    """The tensors of a model that FSDP2 has sharded, whole and on the CPU; all processes gather them together."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not trained_only or tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[name] = whole.detach().cpu()
    return state


def _needs_conversion(config: peft.PeftConfig | None) -> bool:
    return str(getattr(config, "init_lora_weights", None)).startswith("pissa_niter")
