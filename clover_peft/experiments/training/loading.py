"""Loads the base model and the tokenizer of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ...io.hub_models import ModelSource
from ...io.model_class import find_language_model_class, read_config


def load_tokenizer(source: ModelSource, sft: SFTConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chat template of `sft.chat_template_path` where that is set.

    Raises:
        ValueError: there is no end token, without which a model cannot learn to end its answers; or the template is
            not a file.
    """
    revision = (sft.model_init_kwargs or {}).get("revision")
    tokenizer = AutoTokenizer.from_pretrained(
        source.path, revision=revision or "main", trust_remote_code=sft.trust_remote_code
    )
    tokenizer.eos_token = sft.eos_token or tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise ValueError(f"{source.name}: expected a tokenizer with an end token, found none; set eos_token=...")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if sft.chat_template_path:
        template = Path(sft.chat_template_path).expanduser()
        # TRL also copies templates from other models; an adapter would leave their new tokens untrained.
        if not template.is_file() or template.suffix not in {".jinja", ".j2"}:
            raise ValueError(f"chat_template_path={template}: expected a .jinja file, found no such file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def load_model(source: ModelSource, init_kwargs: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model.

    Args:
        source: where it is.
        init_kwargs: arguments of `from_pretrained`; `dtype` is float32 unless given, also by its old name
            `torch_dtype`.
        trust_remote_code: run code that the model brings with it.

    Raises:
        ValueError: the model is an encoder-decoder, which TRL does not train; or the dtype is given by both names.
    """
    if {"dtype", "torch_dtype"} <= init_kwargs.keys():
        raise ValueError("model_init_kwargs: expected dtype or torch_dtype, found both; leave torch_dtype out")
    init_kwargs = {"dtype": init_kwargs.get("torch_dtype", "float32"), **init_kwargs}
    init_kwargs.pop("torch_dtype", None)
    kind = AutoModelForCausalLM
    if not trust_remote_code:
        kind = find_language_model_class(read_config(source.path, init_kwargs.get("revision")))
    model = kind.from_pretrained(source.path, trust_remote_code=trust_remote_code, **init_kwargs)
    for module in model.modules():
        # Otherwise bitsandbytes repacks 4-bit weights for the CPU in the first evaluation, and they no longer train.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
