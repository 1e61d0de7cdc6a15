"""What a fine-tuning on a 4-bit base is worth on other weights: CLOVER's effect and LoRA's, in every way out.

    python benchmarks/quantised.py

Each adapter is trained by `scripts/sft.py` on the base in NF4 with double quantisation, saved, and then

    merged (4 bits)     merged into the NF4 weights, which are quantised again;
    dequantised         loaded onto NF4, dequantised (`clover_peft.dequantize`) and merged;
    dense update        added to the original weights as it is (`clover_peft.merge_onto`), before they are stored;
    plain reload        loaded onto the original weights.

Errors are shares of the adapter's effect, `|found - expected| / |expected - base|`, on the logits of fixed random
tokens: in the first two on the NF4 base, in the last on the original weights, where the dense update is what is
expected. The dense update itself is compared with the trained one, weight by weight. What LoRA adds to a weight does
not depend on it, so that neither of the last two applies to LoRA.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import finish, options, parser, table
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from clover_peft import dequantize, merge_onto
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.run import run
from clover_peft.io import run_record as records

CONFIGS = Path(__file__).parents[1] / "configs"
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
TARGET = 0.01  # of the effect, through dequantised weights and as a dense update
HEADER = ("method", "merged (4 bits)", "dequantised", "dense update", "plain reload")


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("clover_full", "lora"):
            result[name] = _measure(name, Path(folder) / name, arguments)
    print(table(HEADER, [[name, *(_percent(errors[way]) for way in HEADER[1:])] for name, errors in result.items()]))
    clover = result["clover_full"]
    print("The dense update is compared by weights, the others by logits.")
    print(f"CLOVER's plain reload by weights: {_percent(clover['weights']['plain reload'])}")
    met = max(clover["dequantised"], clover["dense update"]) <= TARGET
    print(f"target, CLOVER dequantised and dense <= {TARGET:.0%} of the effect: {'met' if met else 'MISSED'}")
    record = {"benchmark": "quantised", "options": options(arguments), "errors": result, "target_met": met}
    return finish(arguments.out, {**record, "environment": environment})


def _measure(name: str, out: Path, arguments: Any) -> dict[str, Any]:
    """Train one adapter and take every way out."""
    chosen = {
        "output_dir": out,
        "seed": arguments.seed,
        "use_cpu": str(arguments.device == "cpu").lower(),
        "model_init_kwargs.quantization_config": NF4,
        **dict(pair.split("=", 1) for pair in arguments.set),
    }
    record = run(parse(CONFIGS / f"{name}.yaml", [f"{key}={value}" for key, value in chosen.items()]))
    adapter = out / "adapter"
    path = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path

    model: Any = PeftModel.from_pretrained(_load(path, arguments.device, NF4), adapter)
    expected = _logits(model)
    with model.disable_adapter():
        base = _logits(model)
    update = dict(_updates(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that little is left of it is what is measured
        model.merge_adapter()
    errors: dict[str, Any] = {"merged (4 bits)": _share(_logits(model), expected, base)}
    model.unmerge_adapter()

    quantised = _load(path, arguments.device, NF4)
    if name == "lora":  # has no map of the weights: it is loaded onto what it is to be merged into
        merged = PeftModel.from_pretrained(dequantize(quantised, torch.float32), adapter).merge_and_unload()
    else:
        merged = dequantize(PeftModel.from_pretrained(quantised, adapter), torch.float32).merge_and_unload()
    errors["dequantised"] = _share(_logits(merged), expected, base)
    trained = {"loss": record["loss"], "trainable": record["parameters"]["trainable"]}
    if name == "lora":
        return {**errors, "dense update": None, "plain reload": None, "weights": {}, **trained}

    original = _load(path, arguments.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same error that is measured here
        reloaded = PeftModel.from_pretrained(_load(path, arguments.device), adapter)
    weights = {"plain reload": _total(dict(_updates(reloaded)), update)}
    dense = merge_onto(model, _load(path, arguments.device))
    found = {key: dense.get_submodule(key).weight - original.get_submodule(key).weight for key in update}
    errors["dense update"] = weights["dense update"] = _total(found, update)
    errors["plain reload"] = _share(_logits(reloaded), _logits(dense), _logits(original))
    return {**errors, "weights": weights, **trained}


def _load(path: str, device: str, quantization: dict | None = None) -> Any:
    more = {} if quantization is None else {"quantization_config": dict(quantization)}
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": device}, **more)
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see `clover_peft.runtime.bitsandbytes`
            module.support_avx512bf16_for_cpu = False
    return model


def _updates(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Path in the base model -> what the adapter adds to this projection's weight."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            with torch.no_grad():
                yield name, module.get_delta_weight("default").float()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    ids = torch.randint(3, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids.to(model.device)).logits.float()


def _share(found: Tensor, expected: Tensor, base: Tensor) -> float:
    return float((found - expected).norm() / (expected - base).norm())


def _total(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = sum(float((found[key] - value).square().sum()) for key, value in expected.items())
    return (errors / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:.2%}"


def _arguments(argv: Sequence[str] | None) -> Any:
    result = parser(__doc__ or "", "quantised")
    result.add_argument(
        "--set",
        nargs="*",
        metavar="key=value",
        default=["max_steps=20", "per_device_train_batch_size=2", "rows=200", "held_out_rows=8", "questions=1"],
        help="settings of scripts/sft.py",
    )
    arguments = result.parse_args(argv)
    if arguments.fast:
        result.error("--fast: there is no tiny model here; name one with --set model=FOLDER")
    return arguments


if __name__ == "__main__":
    main()
