"""What an adapter's own files say about the base that they fit: its tokenizer, its vocabulary and its labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from .locate import in_cache
from .model_class import make_empty

_WEIGHTS = "adapter_model.safetensors"


def load_own_tokenizer(adapter: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that was saved with an adapter, in its folder or on the hub; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        name = "tokenizer_config.json"
        file = Path(adapter, name)
        if not file.parent.is_dir():  # Without the hub, transformers does not see that an adapter has no config.json.
            if not in_cache(str(adapter), name):
                return None
            file = Path(hf_hub_download(str(adapter), name, local_files_only=True))
        if not file.is_file():
            return None
        return AutoTokenizer.from_pretrained(file.parent, trust_remote_code=trust_remote_code)  # or says what is wrong


def saved_shapes(adapter: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an adapter's file, by their names in the base; empty where it has no such file.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(adapter, _WEIGHTS)
    if not Path(adapter).is_dir():
        try:
            file = Path(hf_hub_download(str(adapter), _WEIGHTS))
        except (OSError, ValueError):
            return {}
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected an adapter's tensors, found a damaged file ({error}); take a copy that is whole"
        ) from error
    return {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}


def label_options(base: PretrainedConfig, kind: Any, config: PeftConfig, adapter: str | Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which a classifier gets as many labels as its adapter's head has.

    A base that is no classifier says nothing of labels, and transformers assumes two.

    Args:
        base: the base's configuration.
        kind: the class that the base is loaded in.
        config: the adapter's configuration.
        adapter: its folder or name.
    """
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    shapes = saved_shapes(adapter)
    one, two = (_parameter_shapes(kind, base, labels) for labels in (1, 2))
    found = {shapes[name][0] for name in one.keys() & shapes.keys() if one[name] != two[name]}
    if len(found) != 1 or found == {base.num_labels}:
        return {}
    return {"num_labels": found.pop(), "ignore_mismatched_sizes": True}  # the adapter brings the head


def _parameter_shapes(kind: Any, base: PretrainedConfig, labels: int) -> dict[str, tuple[int, ...]]:
    config = copy.deepcopy(base)
    config.num_labels = labels
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in make_empty(kind, config).named_parameters()}


def grow_embeddings(model: Any, adapter: str | Path, tokenizer: Any) -> bool:
    """Give the embeddings the rows that they had in training: as many as were saved, else as its tokenizer needs.

    Args:
        model: the base, which is changed in place.
        adapter: the adapter's folder or name.
        tokenizer: from `load_own_tokenizer`.

    Returns:
        Whether the adapter brings embeddings of its own.
    """
    embedding = embedding_of(model, "input")
    if not isinstance(embedding, nn.Embedding):  # such as patches of an image
        return False
    path = next(name for name, module in model.named_modules() if module is embedding)
    there = embedding.weight.shape[0]
    saved = saved_shapes(adapter).get(f"{path}.weight", (None,))[0]
    rows = saved or max(len(tokenizer) if tokenizer is not None else 0, there)
    if rows != there:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return saved is not None or rows != there


def embedding_of(model: nn.Module, side: str) -> nn.Module | None:
    """The "input" or "output" embedding of a model; None if it has none."""
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        return None if get is None else get()
    except NotImplementedError:  # raised by models of transformers that have no embeddings
        return None
