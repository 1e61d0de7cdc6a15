"""Puts two adapters on one model, switches between them, adds them up, and merges one.

    python examples/switch_and_merge.py --adapters first-adapter second-adapter --out my-merged-model

Without --adapters it makes two that are random and small, in place of trained ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import clover_peft


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--adapters", nargs=2, metavar="FOLDER", help="two CLOVER adapters of the model")
    parser.add_argument("--out", default="my-merged-model", help="folder for the merged model")
    given = parser.parse_args(arguments)

    paths = given.adapters or [make_adapter(given.model, f"{given.out}-adapter-{seed}", seed) for seed in (1, 2)]
    base = AutoModelForCausalLM.from_pretrained(given.model)
    model = PeftModel.from_pretrained(base, paths[0], adapter_name="first")
    model.load_adapter(paths[1], adapter_name="second")
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8]])

    with torch.no_grad():
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        for name in ("first", "second"):
            model.set_adapter(name, inference_mode=True)
            print(f"{name}: logits move by {(model(input_ids=ids).logits - plain).abs().max():.3f}")
        mixed = model(input_ids=ids.repeat(3, 1), adapter_names=["first", "__base__", "second"]).logits
        print(f"one adapter a row: {tuple(mixed.shape)}")
        model.base_model.set_adapter(["first", "second"])
        print(f"both at once: logits move by {(model(input_ids=ids).logits - plain).abs().max():.3f}")

    model.set_adapter("first")
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(given.out)
    print(f"saved: {given.out}, an ordinary model")


def make_adapter(model: str, folder: str, seed: int) -> str:
    """Saves an adapter whose S is random and small, and returns its folder."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), clover_peft.CloverConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "clover_S" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
