"""`CloverConfig`: the choices of a CLOVER adapter, checked at construction."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..io.user_warning import warn
from ..runtime.peft_registry import CLOVER
from .adapter_folder import check_weight_file, complete_model_card
from .lora_options import refuse_lora_options


@dataclass
class CloverConfig(PeftConfig):
    """Configuration of a [`CloverModel`]. Every field is optional.

    Args:
        r: Directions trained in each block, the leading ones by singular value. None trains the whole block.
        s_matrix: "full" trains an r x r matrix per block, "diagonal" its r diagonal entries.
        target_modules: Module names (suffixes), a regular expression, or "all-linear". None: the modules that compute
            key, value and up-projection, from the table of architectures.
        exclude_modules: Module names or a regular expression to leave out.
        cross_layer: Decompose value and output together and, without rotary embeddings, key and query together (the
            paper's cross-layer form). False decomposes every projection alone.
        block_size: Features per block of attention projections. None: one block per head. A divisor of the head size
            splits heads; a multiple joins heads, for intra-layer targets only.
        mlp_block_size: Features per block of the other projections. None: the largest divisor of the output features
            that is at most 64.
        basis: Basis of intra-layer targets, "qr" or "svd". None: "qr" for a full matrix over a whole block, otherwise
            "svd".
        truncate: Drop the directions beyond the leading r instead of keeping them unchanged: training starts from the
            truncated base (the paper's CLOVER-dagger without narrowing). Needs `r` or `rank_pattern`.
        low_rank: Rank of a trained part `B A x` that is added to the maps; B starts at zero. It can leave the row
            space of the weight, which a map of the projection's output cannot. 0 for none.
        clover_dropout: Dropout probability on the input of the map, and of the low-rank part.
        bias: "none", "all" or "clover_only": the biases of the base that are trained too.
        save_bases: True saves the bases with S (self-contained). False saves S alone; loading computes the bases again
            and checks them. "folded" saves one d x d map per block, for inference.
        init_weights: True starts as the base model, bit for bit. False starts visibly elsewhere (for tests).
        check_base: Refuse to load onto a base model if the norms of its weights' rows differ from the adapter's record
            by more than rounding.
        modules_to_save: Modules to train and save whole.
        trainable_token_indices: Token indices whose embeddings are trained, or a dict from embedding name to indices.
        ensure_weight_tying: Keep modules of `modules_to_save` and `trainable_token_indices` tied that the model ties,
            as embedding and head. It does not tie `target_modules`: an adapted head unties when it is merged.
        layers_to_transform: Layer index or indices to adapt; 0 is one.
        layers_pattern: Name of the module list that the indices refer to, if it is not a common one.
        rank_pattern: Module name or regular expression -> r for the modules it matches.
        head_dim: Output features of a head, for models that the table does not know.
        num_heads: Heads of each target, for models that the table does not know.
        folded: Set in the config of an adapter saved with `save_bases="folded"`; not for new adapters.
        from_activations: Set by `initialize_from_activations`; not for new adapters.
        balanced_updates: Set by `balance_updates`; not for new adapters.
        base_precision: Set when the adapter is made: the precision of the base weights, such as "bfloat16".

    Raises:
        ValueError: for values outside these choices and for combinations that have no meaning.
    """

    r: int | None = None
    s_matrix: Literal["full", "diagonal"] = "full"
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    cross_layer: bool = True
    block_size: int | None = None
    mlp_block_size: int | None = None
    basis: Literal["qr", "svd"] | None = None
    truncate: bool = False
    low_rank: int = 0
    clover_dropout: float = 0.0
    bias: Literal["none", "all", "clover_only"] = "none"
    save_bases: bool | Literal["folded"] = True
    init_weights: bool = True
    check_base: bool = True
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    head_dim: int | None = None
    num_heads: int | None = None
    folded: bool = False
    from_activations: bool = False
    balanced_updates: bool = False
    base_precision: str | None = None

    def __new__(cls, *_: Any, **options: Any) -> CloverConfig:  # the generated __init__ names no remedy
        refuse_lora_options(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Not a field, so no file has it: the folder that the config was read from, "" if the folder is not known, and
        # None for a config made here or whose weights are loaded. A config from a file has peft's version already.
        self.source: str | None = None if self.peft_version is None else ""
        super().__post_init__()
        self.peft_type = CLOVER
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def _check_choices(self) -> None:
        choices = {
            "s_matrix": ("full", "diagonal"),
            "basis": (None, "qr", "svd"),
            "bias": ("none", "all", "clover_only"),
            "save_bases": (True, False, "folded"),
            **{f.name: (True, False) for f in fields(self) if f.type == "bool"},
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
                raise ValueError(f"CloverConfig.{name}: expected one of {list(allowed)}, found {value!r}")

    def _check_numbers(self) -> None:
        for name in ("r", "block_size", "mlp_block_size", "head_dim", "num_heads"):
            _check_positive(name, getattr(self, name), optional=True)
        if self.low_rank != 0 or isinstance(self.low_rank, bool):
            _check_positive("low_rank", self.low_rank)
        if not isinstance(self.rank_pattern, dict):
            raise ValueError(
                f"CloverConfig.rank_pattern: expected a dict of names to ranks, found {self.rank_pattern!r}"
            )
        for pattern, rank in self.rank_pattern.items():
            _check_positive(f"rank_pattern[{pattern!r}]", rank)
        if isinstance(self.clover_dropout, bool) or not isinstance(self.clover_dropout, (int, float)):
            raise ValueError(f"CloverConfig.clover_dropout: expected a number, found {self.clover_dropout!r}")
        if not 0 <= self.clover_dropout < 1:
            raise ValueError(f"CloverConfig.clover_dropout: expected 0 <= p < 1, found {self.clover_dropout}")

    def _check_combinations(self) -> None:
        is_regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        layers = next((n for n in ("layers_to_transform", "layers_pattern") if getattr(self, n) is not None), None)
        refused = {
            "s_matrix='diagonal' has no meaning in the QR basis, whose matrix is triangular; use basis='svd' (or "
            "None) or s_matrix='full'": self.s_matrix == "diagonal" and self.basis == "qr",
            "truncate=True drops the directions beyond r; pass r=... or rank_pattern": (
                self.truncate and self.r is None and not self.rank_pattern
            ),
            "with truncate=True the map replaces a head's output, which clover_dropout would drop; use one of the "
            "two": self.truncate and self.clover_dropout > 0,
            "truncate=True needs leading directions, but the QR basis has no order; use basis='svd'": (
                self.truncate and self.basis == "qr"
            ),
            f"{layers} cannot be used with a regular expression in target_modules; put the layers into the "
            "expression, or pass a list of names": is_regex and layers is not None,
            "layers_pattern needs layers_to_transform; pass both or neither": (
                bool(self.layers_pattern) and self.layers_to_transform is None
            ),
            "save_bases=False computes the bases again from the weights, but these were made from activations; use "
            "save_bases=True or 'folded'": self.from_activations and self.save_bases is False,
            "save_bases=False computes the bases again from the weights, but balance_updates scaled these; use "
            "save_bases=True or 'folded'": self.balanced_updates and self.save_bases is False,
            "a folded adapter holds maps for inference and cannot be trained; load it with is_trainable=False, or "
            "train from an adapter saved with save_bases=True": self.folded and not self.inference_mode,
        }
        if message := next((message for message, holds in refused.items() if holds), None):
            raise ValueError(f"CloverConfig: {message}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and add the loading recipe to the model card beside it, if there is one.

        The config of an adapter that is saved folded describes the maps in its file, not the training.
        """
        config = self
        if self.save_bases == "folded" and not self.folded:
            if re.search(r"checkpoint-\d+$", os.path.normpath(save_directory)):  # a trainer's name
                warn(
                    f"{save_directory}: a checkpoint with save_bases='folded' has no bases to train with and can be "
                    "neither resumed nor loaded as the best; train with save_bases=True, and set "
                    "model.peft_config['default'].save_bases = 'folded' before the last save_pretrained",
                )
            # The file has whole maps, for which the options of training no longer matter.
            whole: dict[str, Any] = dict(r=None, rank_pattern={}, s_matrix="full", basis=None, truncate=False)
            whole |= dict(from_activations=False, balanced_updates=False, folded=True, inference_mode=True)
            config = replace(self, **whole)
        PeftConfig.save_pretrained(config, save_directory, **kwargs)
        complete_model_card(os.path.join(save_directory, "README.md"), self.base_model_name_or_path, self.task_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config, after a check of the weight file beside it if that is local or in the hub's cache.

        A damaged file is thus found before any model is changed.

        Raises:
            ValueError: if `adapter_model.safetensors` is truncated, corrupt or of another method.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        file = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isdir(pretrained_model_name_or_path):
            name = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME
            known = {key: kwargs[key] for key in ("cache_dir", "revision") if kwargs.get(key)}
            cached = try_to_load_from_cache(pretrained_model_name_or_path, name, **known)
            file = cached if isinstance(cached, str) else file
        check_weight_file(file)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.source = folder
        return config


def _describe_fields(config: type) -> None:
    """Set `metadata["help"]` of every field to its description in the class's docstring."""
    text = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    for entry in re.split(r"\n    (?=\w)", "\n" + text)[1:]:
        name, _, description = entry.partition(":")
        config.__dataclass_fields__[name].metadata = MappingProxyType({"help": " ".join(description.split())})  # type: ignore[attr-defined]


_describe_fields(CloverConfig)


def _check_positive(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"CloverConfig.{name}: expected a positive integer{' or None' if optional else ''}, found {value!r}"
        )
