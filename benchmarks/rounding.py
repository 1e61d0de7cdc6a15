"""How far a merged model is from the adapter it was merged from, by the limit of the bases' condition number.

    python benchmarks/rounding.py --model whisper       Whisper tiny.en in float32, whose Q-K pairs are ill-conditioned
    python benchmarks/rounding.py --model smollm2       SmolLM2-135M in bfloat16 (WikiText-2 from CLOVER_DATA)

CLOVER with each `max_condition` of `--limits`, and LoRA at a similar size, train for `--steps` steps of AdamW. Then
logits are compared on held-out data: the merged with the unmerged model, and, in low precision, the unmerged model
with the same model run in float32. Errors are relative to the adapter's effect on the logits. Whisper is trained to
write in capitals; the loss says whether the limit costs learning.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_models
import torch
from harness import finish, options, parser, rank_for, table, trainable
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import WhisperConfig, WhisperForConditionalGeneration

from clover_peft import CloverConfig
from clover_peft.io import run_record as records
from clover_peft.tuner.config_checks import MOST_CONDITION

DTYPES = {"whisper": torch.float32, "smollm2": torch.bfloat16}
LORA_TARGETS = {"whisper": ["q_proj", "k_proj", "v_proj", "fc1"], "smollm2": ["q_proj", "k_proj", "v_proj", "up_proj"]}
Batch = dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "rounding")
    command.add_argument("--model", choices=list(DTYPES), default="whisper")
    command.add_argument("--limits", type=float, nargs="+", default=[MOST_CONDITION, 1000.0, 100.0, 10.0])
    command.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    command.add_argument("--lora-rate", type=float, default=1e-3)
    command.add_argument("--steps", type=int, default=32)
    command.set_defaults(out=None)
    arguments = command.parse_args(argv)
    if arguments.fast:
        if arguments.model != "whisper":
            command.error(f"--fast: there is a tiny model for whisper alone, found --model {arguments.model}")
        arguments.steps, arguments.limits = 2, [MOST_CONDITION, 100.0]
    out = arguments.out or Path(__file__).parent / "results" / f"rounding_{arguments.model}.json"
    environment = records.environment()
    base, train, held_out = _load(arguments.model, arguments.fast)
    base.to(arguments.device)
    train, held_out = (
        [{name: t.to(arguments.device) for name, t in batch.items()} for batch in batches]
        for batches in (train, held_out)
    )
    targets = LORA_TARGETS[arguments.model]
    rank = rank_for(trainable(get_peft_model(copy.deepcopy(base), CloverConfig())), base, targets)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    trials: list[tuple[str, PeftConfig, float]] = [
        (f"clover, {limit:g}, rate {rate:g}", CloverConfig(max_condition=limit), rate)
        for rate, limit in itertools.product(arguments.rates, arguments.limits)
    ]
    trials.append((f"lora, rate {arguments.lora_rate:g}", lora, arguments.lora_rate))
    figures = {}
    for name, config, rate in tqdm(trials, desc="trials", unit="trial"):
        torch.manual_seed(arguments.seed)
        model = get_peft_model(copy.deepcopy(base), config)
        losses = _train(model, train, rate, arguments.steps)
        figures[name] = {"parameters": trainable(model), **_measure(model, held_out), "training_loss": losses}
    columns = ["held_out_loss", "merged_v_unmerged", "largest_difference", "unmerged_v_float32", "base_v_float32"]
    rows = [[name, *(f"{figure[column]:.2e}" for column in columns)] for name, figure in figures.items()]
    print(table([arguments.model, *columns], rows))
    record = {"benchmark": "rounding", "options": options(arguments), "environment": environment, "figures": figures}
    return finish(out, record)


def _train(model: PeftModel, batches: list[Batch], rate: float, steps: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5)
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _measure(model: PeftModel, batches: list[Batch]) -> dict[str, float]:
    """The loss on held-out batches, and errors of all their logits, relative to the adapter's effect.

    The adapter stays merged.
    """
    model.eval()

    def logits(model: PeftModel) -> Tensor:
        dtype = next(model.parameters()).dtype
        moved = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()} for batch in batches]
        return torch.cat([model(**batch).logits.double().flatten() for batch in moved])

    loss = sum(float(model(**batch).loss) for batch in batches) / len(batches)
    wide = copy.deepcopy(model).float()  # before the merge, after which LoRA does not restore every bit
    exact, unmerged = logits(wide), logits(model)
    with wide.disable_adapter(), model.disable_adapter():
        exact_base, base = logits(wide), logits(model)
    model.merge_adapter()
    merged = logits(model)
    effect = float((exact - exact_base).norm())
    return {
        "held_out_loss": loss,
        "merged_v_unmerged": float((merged - unmerged).norm()) / effect,
        "largest_difference": float((merged - unmerged).abs().max()),
        "unmerged_v_float32": float((unmerged - exact).norm()) / effect,
        "base_v_float32": float((base - exact_base).norm()) / effect,
    }


def _load(name: str, fast: bool) -> tuple[Any, list[Batch], list[Batch]]:
    """A model in its dtype, batches to train on and held-out ones."""
    if name == "whisper":
        return load_whisper(fast)
    model, tokenizer = real_models.smollm2()
    ids = torch.tensor(tokenizer("".join(real_models.wikitext2("train")[:2000]))["input_ids"])
    rows = ids[: 72 * 128].view(-1, 1, 128)
    batches = [{"input_ids": row, "labels": row} for row in rows]
    return model.to(DTYPES[name]), batches[:64], batches[64:]


def load_whisper(fast: bool) -> tuple[Any, list[Batch], list[Batch]]:
    """Whisper tiny.en in float32, and clips with their text in capitals: four to train on, and held-out ones."""
    if fast:
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_ffn_dim=48)
        torch.manual_seed(0)
        config = WhisperConfig(
            **sizes, decoder_attention_heads=2, encoder_ffn_dim=48, vocab_size=64, max_source_positions=20
        )
        for token, name_of_token in enumerate(["pad", "bos", "eos", "decoder_start"]):
            setattr(config, f"{name_of_token}_token_id", token)
        features, tokens = torch.randn(2, 1, 80, 40), torch.randint(3, 64, (2, 1, 9))
        batches = [
            {"input_features": f, "decoder_input_ids": t[:, :-1], "labels": t[:, 1:]}
            for f, t in zip(features, tokens, strict=True)
        ]
        return WhisperForConditionalGeneration(config), batches[:1], batches[1:]
    whisper, batches = real_models.whisper_tiny_en(), []
    for clip in real_models.speech().values():
        found = whisper.features(clip.audio, sampling_rate=real_models.SAMPLE_RATE, return_tensors="pt")
        written = whisper.tokenizer(f" {clip.text.upper()}", add_special_tokens=False)["input_ids"]
        text = [real_models.START, real_models.NO_TIMESTAMPS, *written, real_models.END]
        tokens = torch.tensor([text])
        batches.append(
            {"input_features": found.input_features, "decoder_input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
        )
    return whisper.model, batches[:4], batches[4:]


if __name__ == "__main__":
    main()
