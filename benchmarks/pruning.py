"""What is left of trained models when directions of their heads are removed, by every method.

    python benchmarks/pruning.py --model whisper      # KL and word error rate of Whisper tiny.en, on speech
    python benchmarks/pruning.py --model minilm       # cosine between embeddings before and after, MiniLM-L6
    python benchmarks/pruning.py --model smollm2      # perplexity of SmolLM2-135M-Instruct, on WikiText-2

Settings are those of the targets, with --sweep also a grid of ratios, or with --ratio any others. For every setting
the model is loaded afresh and pruned, by one calibration for all, and then measured; an interrupted run goes on after
its last setting:

- Whisper: KL divergence from the unpruned model, in nats, mean over the tokens of the unpruned model's own transcripts
  (their end included), on unseen speech (`jfk_kl`) and on the five clips it was calibrated with (`clips_kl`); word
  error rate of its greedy transcript of the unseen speech, without regard to case and punctuation (`jfk_wer`).
- MiniLM: mean cosine with its standard error, and least cosine, over sentences of WikiText-2 test; calibrated on
  sentences of its training set.
- SmolLM2: perplexity on windows of 1024 tokens that do not overlap, rows joined by empty lines as is usual, the last
  incomplete window left out; calibrated on windows of the training set, drawn by the seed. The record has the loss of
  every window. On one CPU core a window takes 4 seconds and the whole test set 297 of them: --windows 16 for a look.

Targets are judged on test data: of SmolLM2 on the whole set, of MiniLM on 512 sentences or more.

Bytes of the key-value cache are those of the tensors in it after a forward pass. WikiText-2 is read from CLOVER_DATA.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Rows, clock, options, parser, table, tiny_language_model
from real_models import SAMPLE_RATE, embed, minilm, smollm2, speech, whisper_tiny_en, wikitext2
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import clover_peft
from clover_peft.cli.checks import figures as shares
from clover_peft.io import run_record as records
from clover_peft.pruning import Calibration
from clover_peft.pruning.directions import Method
from clover_peft.pruning.pairs import Kind
from clover_peft.pruning.rule import SPREADS, Rule

Batch = dict[str, Tensor]
SENTENCES = 512  # that MiniLM's targets are judged on, at least
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
SELF_ATTENTION = r".*self_attn.*"
# Options of all settings.
_SHARED = ("model", "split", "windows", "calibration_windows", "sentences", "seed", "fast", "device")


@dataclass(frozen=True)
class Setting:
    """How to prune; `qk` and `vo` are the shares of directions to remove, None where a kind is not asked for."""

    method: Method
    calibrated: bool
    qk: float | None = None
    vo: float | None = None
    ranks: Rule = "global"
    multiple: int = 1
    target_modules: str | None = None

    @property
    def ratio(self) -> dict[Kind, float]:
        shares: dict[Kind, float | None] = {"qk": self.qk, "vo": self.vo}
        return {kind: share for kind, share in shares.items() if share is not None}

    def __str__(self) -> str:
        parts = [self.method, "data" if self.calibrated else "weights", self.ranks]
        parts += [f"{kind} {share:.1%}" for kind, share in self.ratio.items()]
        parts += [f"multiple {self.multiple}"] if self.multiple > 1 else []
        return " ".join([*parts, *([self.target_modules] if self.target_modules else [])])


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached: the best that was measured, with ranks rounded or not.

    Attributes:
        setting: where.
        figure: of which.
        wanted: bound.
        above: the figure is to be at least (of baselines: shows how bad they are) instead of at most `wanted`.
        any_ranks: by whatever rank rule.
    """

    setting: Setting
    figure: str
    wanted: float
    above: bool = False
    any_ranks: bool = False

    def counts(self, setting: Setting) -> bool:
        ranks = self.setting.ranks if self.any_ranks else setting.ranks
        return replace(setting, multiple=1, ranks=ranks) == self.setting


_HALF_AND_QUARTER = Setting("clover", True, qk=0.5, vo=0.25)
TARGETS = {
    "whisper": [
        Target(_HALF_AND_QUARTER, "jfk_wer", 0.0),
        Target(_HALF_AND_QUARTER, "jfk_kl", 0.06),
        Target(replace(_HALF_AND_QUARTER, method="vanilla"), "jfk_kl", 1.0, above=True),
        Target(Setting("clover", True, qk=0.75, target_modules=SELF_ATTENTION), "jfk_kl", 0.1),
        Target(Setting("clover", False, qk=0.125), "jfk_kl", 0.005),
    ],
    "minilm": [
        Target(Setting("clover", True, qk=0.75), "cosine", 0.96, above=True),
        Target(Setting("clover", True, qk=0.5, vo=0.5, ranks="gradient"), "cosine", 0.95, above=True, any_ranks=True),
    ],
    "smollm2": [
        Target(Setting("clover", True, vo=0.125, ranks="gradient"), "v_base", 1.10, any_ranks=True),
        Target(Setting("clover", True, vo=0.25, ranks="gradient"), "v_base", 1.25, any_ranks=True),
        Target(Setting("clover", True, vo=0.375, ranks="gradient"), "v_base", 1.55, any_ranks=True),
        Target(Setting("vanilla", False, vo=0.125, ranks="uniform"), "v_base", 1000.0, above=True, any_ranks=True),
    ],
}


class Subject(ABC):
    """A model, what it is calibrated with, and what is measured of it.

    Attributes:
        columns: the figures to print.
        calibration: batches, keyword arguments of the model.
        about: for the record.
    """

    columns: tuple[str, ...]
    calibration: list[Batch]
    about: dict[str, Any]

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.fast, self.seed = arguments.device, arguments.fast, arguments.seed

    @abstractmethod
    def load(self) -> Any:
        """A new copy of the unpruned model, in evaluation mode."""

    @abstractmethod
    def measure(self, model: Any) -> dict[str, Any]:
        """Its figures."""


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    subjects: dict[str, type[Subject]] = {"whisper": Whisper, "minilm": MiniLM, "smollm2": SmolLM2}
    subject = subjects[arguments.model](arguments)
    before = subject.load()
    base = _figures(subject, before)
    settings = _settings(arguments)
    kept = Rows(arguments.out, {name: getattr(arguments, name) for name in _SHARED})
    missing = [setting for setting in settings if kept.find(setting=asdict(setting)) is None]
    measured, calibration_seconds = _calibrated(before, missing, subject, arguments.device)
    del before
    header = ("setting", *subject.columns, "parameters", "KV bytes", "s")

    def cells(name: str, figures: Mapping[str, Any], seconds: object) -> list[object]:
        size = [f"{n:,}" if n is not None else "-" for n in (figures["parameters"], figures["kv_bytes"])]
        return [name, *(_short(figures[column]) for column in subject.columns), *size, seconds]

    def measure(setting: Setting) -> dict[str, Any]:
        model = subject.load()
        report, seconds = _prune(model, setting, measured if setting.calibrated else None, arguments.device)
        figures = _figures(subject, model)
        if isinstance(subject, SmolLM2):
            figures["v_base"] = figures["perplexity"] / base["perplexity"]
            figures["kv_bytes_reported"] = report["cache_bytes"][1] * subject.about["window"]
        return {"figures": figures, "seconds": seconds, "report": report}

    rows, printed = [], [cells("unpruned", base, "")]
    for setting in tqdm(settings, desc="settings", unit="setting"):
        rows.append(kept.get(partial(measure, setting), setting=asdict(setting)))
        printed.append(cells(str(setting), rows[-1]["figures"], f"{rows[-1]['seconds']:.1f}"))
        tqdm.write("  ".join(str(cell) for cell in printed[-1]))
    print(table(header, printed))
    targets = _judge(arguments, rows)
    for name, target in targets.items():
        verdict = {True: "met", False: "MISSED", None: "not judged"}[target["met"]]
        print(f"target {name} {target['bound']} {target['wanted']}: {target['reached']} ({verdict})")
    return kept.finish(
        {
            "benchmark": "pruning",
            "options": options(arguments),
            "environment": environment,
            "data": subject.about,
            "calibration_seconds": calibration_seconds,
            "unpruned": base,
            "pruned": rows,
            "targets": targets,
        },
        arguments.out,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser(__doc__.splitlines()[0] if __doc__ else "", "pruning")
    command.set_defaults(out=None)  # its name has the model's
    command.add_argument("--model", required=True, choices=list(TARGETS))
    command.add_argument("--ratio", nargs="+", metavar="qk=0.5,vo=0.25", help="shares to remove, instead of targets'")
    command.add_argument("--sweep", action="store_true", help="targets, and 12.5 to 75 %% of Q-K, of V-O and of both")
    command.add_argument("--method", nargs="+", default=["clover", "vanilla"], choices=["clover", "vanilla"])
    command.add_argument("--calibration", nargs="+", default=["with", "without"], choices=["with", "without"])
    command.add_argument("--ranks", nargs="+", default=["global"], choices=SPREADS)
    command.add_argument("--multiple", type=int, default=1, help="round ranks to multiples")
    command.add_argument("--target-modules", help="pattern of modules to prune, for --ratio and --sweep")
    command.add_argument(
        "--split", default="test", choices=["validation", "test"], help="of WikiText-2, to measure on"
    )
    command.add_argument("--windows", type=int, default=0, help="SmolLM2: measured windows; 0: the whole split")
    command.add_argument("--calibration-windows", type=int, default=32, help="SmolLM2")
    command.add_argument(
        "--sentences", type=int, default=SENTENCES, help="MiniLM: measured, and as many to calibrate with"
    )
    arguments = command.parse_args(argv)
    arguments.out = arguments.out or RESULTS / f"pruning_{arguments.model}.json"
    if arguments.windows < 0 or arguments.calibration_windows < 1 or arguments.sentences < 1:
        command.error("--windows must not be negative, --calibration-windows and --sentences must be positive")
    try:
        _settings(arguments)
    except ValueError as error:
        command.error(str(error))
    return arguments


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    """What to measure, each once, in order."""
    kinds: list[tuple[Kind, ...]] = [("vo",)] if arguments.model == "smollm2" else [("qk",), ("vo",), ("qk", "vo")]
    ratios: list[dict[Kind, float]] = [_parse_ratio(text) for text in arguments.ratio or ()]
    if arguments.model == "smollm2" and any("qk" in ratio for ratio in ratios):
        given = " ".join(arguments.ratio)
        raise ValueError(f"--ratio {given}: expected vo alone, because smollm2 rotates queries and keys, found qk")
    if arguments.sweep:
        ratios += [dict.fromkeys(kind, share) for kind in kinds for share in SHARES]
    pattern = arguments.target_modules
    chosen = itertools.product(arguments.method, arguments.calibration, arguments.ranks, ratios)
    found = [] if arguments.ratio else [target.setting for target in TARGETS[arguments.model]]
    found += [
        Setting(method, data == "with", ratio.get("qk"), ratio.get("vo"), ranks, target_modules=pattern)
        for method, data, ranks, ratio in chosen
        if data == "with" or ranks != "gradient"  # which needs data
    ]
    return list(dict.fromkeys(replace(setting, multiple=arguments.multiple) for setting in found))


def _parse_ratio(text: str) -> dict[Kind, float]:
    """The shares in "qk=0.5,vo=0.25", of which one may be missing."""
    found = shares("--ratio", text)
    if not isinstance(found, Mapping):
        raise ValueError(f"--ratio {text}: expected one for each kind as qk=0.5,vo=0.25, found one for all")
    return dict(found)


def _calibrated(
    model: Any, settings: Sequence[Setting], subject: Subject, device: str
) -> tuple[Calibration | None, float | None]:
    """The calibration of all settings that want one, and the seconds it took."""
    found: list[Calibration] = []
    wanted = [setting for setting in settings if setting.calibrated]
    if not wanted:
        return None, None
    gradients = any(setting.ranks == "gradient" for setting in wanted)
    seconds = clock(
        lambda: found.append(clover_peft.calibrate(model, subject.calibration, gradients=gradients)), device
    )
    return found[0], seconds


def _prune(model: Any, setting: Setting, calibration: Calibration | None, device: str) -> tuple[dict[str, Any], float]:
    """The report, and the seconds that pruning took, without calibration."""
    reports: list[Any] = []

    def prune() -> None:
        report = clover_peft.prune(
            model,
            ratio=setting.ratio,
            method=setting.method,
            calibration=calibration,
            ranks=setting.ranks,
            multiple=setting.multiple,
            target_modules=setting.target_modules,
        )
        reports.append(report)

    seconds = clock(prune, device)
    return reports[0].to_dict(), seconds


def _figures(subject: Subject, model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        figures = subject.measure(model.eval())
    return {"kv_bytes": None, **figures, "parameters": sum(p.numel() for p in model.parameters())}


def _judge(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every target with the best that was reached; not judged where it was not measured, or on a part of the data."""
    enough = {"smollm2": arguments.windows == 0, "minilm": arguments.sentences >= SENTENCES}
    whole = arguments.model == "whisper" or (arguments.split == "test" and enough[arguments.model])
    result = {}
    for target in TARGETS[arguments.model]:
        values = [row["figures"][target.figure] for row in rows if target.counts(Setting(**row["setting"]))]
        best = (max if target.above else min)(values, default=None)
        met = None
        if best is not None and whole and not arguments.fast:
            met = best >= target.wanted if target.above else best <= target.wanted
        result[f"{target.figure} of {target.setting}"] = {
            "bound": "at least" if target.above else "at most",
            "wanted": target.wanted,
            "reached": best,
            "met": met,
        }
    return result


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a model's key-value cache, of an encoder-decoder in both of its caches."""
    if hasattr(cache, "cross_attention_cache"):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ---------------------------------------------------------------------- Whisper


class Whisper(Subject):
    """Whisper tiny.en, calibrated on five clips with its own transcripts of them.

    For calibration a clip is repeated until it fills the 30 seconds that the encoder reads. The silence that would
    otherwise be most of them makes the divergence on unseen speech several times larger.
    """

    columns = ("jfk_kl", "clips_kl", "jfk_wer")

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.inputs: dict[str, Tensor] = {}  # (1, mels, frames)
        windows: dict[str, tuple[Tensor, int]] = {}  # the same of a full window, and how often it has the clip
        if self.fast:
            generator = torch.Generator().manual_seed(self.seed)
            self.decode: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids))
            for name in ("jfk", "one", "two"):
                self.inputs[name] = torch.randn(1, 8, 64, generator=generator).to(self.device)
                windows[name] = (self.inputs[name], 1)
        else:
            whisper, clips = whisper_tiny_en(), speech()
            self.decode = whisper.tokenizer.decode
            for name, clip in clips.items():
                times = SAMPLE_RATE * 30 // len(clip.audio)
                read = partial(whisper.features, sampling_rate=SAMPLE_RATE, return_tensors="pt")
                self.inputs[name] = read(clip.audio).input_features.to(self.device)
                filled = read(np.tile(clip.audio, times)).input_features.to(self.device)
                windows[name] = (filled, times)
        model = self.load()
        settings = model.generation_config
        self.prompt = [settings.decoder_start_token_id, settings.no_timestamps_token_id]
        self.tokens = {name: self._transcribe(model, name) for name in self.inputs}
        self.expected = {name: self._log_probabilities(model, name) for name in self.inputs}
        self.text = self.decode(self.tokens["jfk"]) if self.fast else clips["jfk"].text
        del windows["jfk"]
        self.calibration = [
            self._batch(features, self.tokens[name] * times) for name, (features, times) in windows.items()
        ]
        self.about = {
            "transcripts": {name: self.decode(tokens) for name, tokens in self.tokens.items()},
            "calibration_tokens": {
                "encoder": len(windows) * model.config.max_source_positions,
                "decoder": sum(batch["decoder_input_ids"].numel() for batch in self.calibration),
            },
        }

    def load(self) -> WhisperForConditionalGeneration:
        if self.fast:
            torch.manual_seed(self.seed)
            return _tiny_whisper().to(self.device)
        return whisper_tiny_en().model.to(self.device)

    def measure(self, model: WhisperForConditionalGeneration) -> dict[str, Any]:
        import jiwer
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        plain = BasicTextNormalizer()  # lower case, no punctuation
        losses = {name: self._divergence(model, name) for name in self.inputs}  # (tokens,) each
        text = self.decode(self._transcribe(model, "jfk"))
        cache = model(**self._batch(self.inputs["jfk"], self.tokens["jfk"]), use_cache=True).past_key_values
        return {
            "jfk_kl": float(losses.pop("jfk").mean()),
            "clips_kl": float(torch.cat(list(losses.values())).mean()),
            "jfk_wer": float(jiwer.wer(plain(self.text), plain(text))),
            "jfk_text": text,
            "kv_bytes": cache_bytes(cache),
        }

    def _batch(self, features: Tensor, tokens: list[int]) -> Batch:
        ids = torch.tensor([self.prompt + tokens], device=self.device)
        return {"input_features": features, "decoder_input_ids": ids}

    @torch.no_grad()
    def _transcribe(self, model: WhisperForConditionalGeneration, name: str) -> list[int]:
        found = model.generate(self.inputs[name], do_sample=False, num_beams=1, max_length=100)[0].tolist()
        return [token for token in found if token not in (*self.prompt, model.generation_config.eos_token_id)]

    @torch.no_grad()
    def _log_probabilities(self, model: WhisperForConditionalGeneration, name: str) -> Tensor:
        """(tokens + 1, vocabulary) float32, of each token of the unpruned model's transcript and its end."""
        logits = model(**self._batch(self.inputs[name], self.tokens[name])).logits[0]
        return logits[len(self.prompt) - 1 :].float().log_softmax(-1)

    def _divergence(self, model: WhisperForConditionalGeneration, name: str) -> Tensor:
        """(tokens + 1,) float64, KL divergence of the model from the unpruned one."""
        p, q = self.expected[name].double(), self._log_probabilities(model, name).double()
        return (p.exp() * (p - q)).sum(-1)


def _tiny_whisper() -> WhisperForConditionalGeneration:
    tokens = {"bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _TINY_SIDE.items()}
    config = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=48, max_source_positions=32, max_target_positions=128, **sides, **tokens
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(is_multilingual=False, no_timestamps_token_id=63, **tokens)
    return model


_TINY_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


# ---------------------------------------------------------------------- MiniLM


class MiniLM(Subject):
    """MiniLM-L6, on sentences of WikiText-2."""

    columns = ("cosine", "least_cosine")

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        count = 32 if self.fast else arguments.sentences
        if self.fast:
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(3, 64, (2, count, 24), generator=generator)
            batches = [[{"input_ids": i, "attention_mask": torch.ones_like(i)}] for i in ids]
        else:
            _, tokenizer = minilm()
            batches = [
                [
                    dict(tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt"))
                    for part in _parts(_sentences(split, count, self.seed), 32)
                ]
                for split in ("train", arguments.split)
            ]
        self.calibration, self.held_out = batches
        self.expected = self._embed(self.load())
        self.about = {"sentences": count, "tokens": sum(int(b["attention_mask"].sum()) for b in self.calibration)}

    def load(self) -> BertModel:
        if self.fast:
            torch.manual_seed(self.seed)
            shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            return BertModel(BertConfig(vocab_size=64, hidden_size=48, **shape)).to(self.device).eval()
        return minilm()[0].to(self.device)

    def measure(self, model: BertModel) -> dict[str, Any]:
        cosines = (self._embed(model).double() * self.expected.double()).sum(-1)
        error = float(cosines.std()) / math.sqrt(len(cosines))
        return {"cosine": float(cosines.mean()), "cosine_error": error, "least_cosine": float(cosines.min())}

    def _embed(self, model: BertModel) -> Tensor:
        """(sentences, hidden size), of length 1."""
        moved = ({key: value.to(self.device) for key, value in batch.items()} for batch in self.held_out)
        return torch.cat([embed(model, batch) for batch in moved])


def _sentences(split: str, count: int, seed: int) -> list[str]:
    """Sentences of 8 to 64 words, drawn from a split of WikiText-2."""
    paragraphs = (row.strip() for row in wikitext2(split) if row and not row.startswith(" = "))
    found = [part.strip(" .") + " ." for paragraph in paragraphs for part in paragraph.split(" . ")]
    long = [sentence for sentence in found if 8 <= len(sentence.split()) <= 64]
    return random.Random(seed).sample(long, count)


def _parts(items: Sequence[str], size: int) -> Iterator[list[str]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


# ---------------------------------------------------------------------- SmolLM2


class SmolLM2(Subject):
    """SmolLM2-135M-Instruct, on windows of WikiText-2."""

    columns = ("perplexity", "v_base")

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        generator = torch.Generator().manual_seed(self.seed)
        if self.fast:
            train, self.windows = torch.randint(3, 64, (2, 4, 64), generator=generator)
        else:
            train, self.windows = windows_of("train"), windows_of(arguments.split)  # (windows, 1024)
            train = train[torch.randperm(len(train), generator=generator)[: arguments.calibration_windows]]
            self.windows = self.windows[: arguments.windows or None]
        self.calibration = [{"input_ids": window.unsqueeze(0)} for window in train]
        self.about = {"windows": len(self.windows), "window": self.windows.shape[1], "calibration_windows": len(train)}

    def load(self) -> LlamaForCausalLM:
        if self.fast:
            return tiny_language_model(self.seed, self.device)
        return smollm2()[0].to(self.device)

    def measure(self, model: LlamaForCausalLM) -> dict[str, Any]:
        losses = []
        for window in tqdm(self.windows, desc="perplexity", unit="window", leave=False):
            ids = window.unsqueeze(0).to(self.device)
            output = model(input_ids=ids, labels=ids, use_cache=True)
            losses.append(float(output.loss))
        return {
            "perplexity": math.exp(sum(losses) / len(losses)),
            "v_base": 1.0,
            "losses": losses,  # of each window, so that two settings can be compared window by window
            "kv_bytes": cache_bytes(output.past_key_values),
        }


def windows_of(split: str, size: int = 1024) -> Tensor:
    """(windows, size) int64: the tokens of a split, its last incomplete window left out."""
    _, tokenizer = smollm2()
    ids = tokenizer("\n\n".join(wikitext2(split)), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // size * size].view(-1, size)


if __name__ == "__main__":
    main()
