"""The class of transformers that a model is loaded in, for every command.

An Auto class of the wrong kind loads a part of a model without an error: as a causal language model, Whisper is its
decoder alone.
"""

from __future__ import annotations

from typing import Any

import transformers
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)

_TASKS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


def find_class(config: PretrainedConfig, adapter: PeftConfig | None = None, name: str | None = None) -> Any:
    """Choose the class: the one named, else by the adapter's task, else the one that the model was saved in.

    Args:
        config: of the model.
        adapter: of an adapter. Its task counts where transformers has a class for this model and task. An adapter
            without a task counts by the class that peft noted.
        name: `--model-class`, a class of transformers, or None.

    Returns:
        A class of transformers, or an Auto class.

    Raises:
        ValueError: no class is named, or transformers has none of that name for this model.
    """
    if name is not None:
        kind = getattr(transformers, name, None)
        if kind is None or not _fits(kind, config):
            raise ValueError(
                f"--model-class {name}: expected a class of transformers for models of type {config.model_type}, such "
                "as the one that the weights were saved in, found no such class"
            )
        return kind
    if adapter is not None:
        task = adapter.task_type
        by_task = _TASKS.get(str(getattr(task, "value", task)))
        if by_task is AutoModel and _is_text_encoder(config):
            by_task = AutoModelForTextEncoding
        if by_task is not None and type(config) in by_task._model_mapping:
            return by_task
        noted = getattr(transformers, str((adapter.auto_mapping or {}).get("base_model_class")), None)
        if task is None and noted is not None and _fits(noted, config):
            return noted
    saved = (config.architectures or ["none"])[0]
    kind = getattr(transformers, saved, None)
    if kind is None or not _fits(kind, config):
        raise ValueError(
            f"{config.name_or_path or config.model_type}: expected a class in `architectures` of config.json, found "
            f"{saved if saved == 'none' else f'{saved}, which transformers does not have for such models'}; pass "
            "--model-class with the class that the weights were saved in"
        )
    return kind


def _is_text_encoder(config: PretrainedConfig) -> bool:
    """Whether the model was saved as the encoder alone of a model that has a decoder too, as T5's."""
    encoders = AutoModelForTextEncoding._model_mapping
    return type(config) in encoders and encoders[type(config)].__name__ in (config.architectures or ())


def class_of(config: PretrainedConfig, adapter: PeftConfig, name: str | None = None) -> Any:
    """As `find_class`; a configuration made by hand, which names no class, is one of a causal language model."""
    by_hand = not (name or adapter.task_type or config.architectures or config.is_encoder_decoder)
    if by_hand and type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return find_class(config, adapter, name)


def find_language_model_class(config: PretrainedConfig) -> Any:
    """The class of a causal language model.

    Raises:
        ValueError: the model is an encoder-decoder, of which this class would be the decoder alone.
    """
    if config.is_encoder_decoder:
        found = (config.architectures or [config.model_type])[0]
        raise ValueError(f"{config.name_or_path}: expected a causal language model, found {found}; choose another")
    return AutoModelForCausalLM


def read_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model in a folder or on the hub."""
    return AutoConfig.from_pretrained(path, revision=revision or "main")


def _fits(kind: Any, config: PretrainedConfig) -> bool:
    """Whether a class makes models of this configuration, or of a part of it, such as its text model."""
    if hasattr(kind, "_model_mapping"):
        return type(config) in kind._model_mapping
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        return False
    return any(_is_of(part, kind) for part in _parts(config))


def _is_of(config: Any, kind: Any) -> bool:
    return isinstance(config, kind.config_class or ())


def _parts(config: PretrainedConfig) -> list[Any]:
    return [config, *(getattr(config, name, None) for name in config.sub_configs)]


def make_empty(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights, in float32: make it on the meta device.

    Args:
        kind: from `find_class`.
        config: of the model.
    """
    if hasattr(kind, "_model_mapping"):
        return kind.from_config(config, dtype="float32")
    part = next(part for part in _parts(config) if _is_of(part, kind))
    return kind._from_config(part, dtype="float32")
