"""`CloverConfig`: the choices of a CLOVER adapter, checked at construction."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import PretrainedConfig

from ..io.atomic import write_text
from ..io.user_warning import warn
from ..runtime.peft_registry import CLOVER
from . import config_checks
from .adapter_folder import check_weight_file, complete_model_card
from .from_lora import options_like


@dataclass
class CloverConfig(PeftConfig):
    """Configuration of a [`CloverModel`]. Every field is optional.

    Args:
        r: Directions trained in each block, the leading ones by singular value. None trains the whole block.
        s_matrix: "full" trains an r x r matrix per block, "diagonal" its r diagonal entries.
        target_modules: Module names (suffixes), a regular expression, or "all-linear". None: the modules that compute
            key, value and up-projection, from the table of architectures.
        target_parameters: Names (suffixes) of stacks of experts' weights to adapt, such as "experts.gate_up_proj": the
            routed experts of mixture-of-experts models are parameters, not modules. None for none.
        exclude_modules: Module names or a regular expression to leave out.
        cross_layer: Decompose value and output together and, without rotary embeddings, key and query together (the
            paper's cross-layer form). False decomposes every projection alone.
        block_size: Features per block of attention projections. None: one block per head. A divisor of the head size
            splits heads; a multiple joins heads, for intra-layer targets only.
        mlp_block_size: Features per block where there are no heads, as in an MLP; fewer features are one block. None:
            the largest divisor of the features that is at most 64. A number also admits projections of models that
            the table does not know.
        basis: Basis of intra-layer targets, "qr" or "svd". None: "qr" for a full matrix over a whole block, otherwise
            "svd".
        truncate: Drop the directions beyond the leading r instead of keeping them unchanged: training starts from the
            truncated base (the paper's CLOVER-dagger without narrowing). Needs `r` or `rank_pattern`.
        low_rank: Rank of a trained part `B A x` that is added to the maps; B starts at zero. It can leave the row
            space of the weight, which a map of the projection's output cannot. 0 for none.
        clover_dropout: Dropout probability on the input of the map, and of the low-rank part.
        bias: "none", "all" or "clover_only": the biases of the base that are trained too.
        save_bases: True saves the bases with S (self-contained). False saves S alone; loading computes the bases again
            and checks them. "folded" saves one d x d map per block; loading to
            train computes bases and solves for S.
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
        max_condition: Largest condition number of the bases of blocks that are trained whole, above 1 and at most
            10,000; the bases amplify rounding by up to this factor. Where it would be larger, a multiple of the
            identity is added to the block's Gram matrix. None means 100 in a new config, and in files of earlier
            versions no limit.

    Raises:
        ValueError: for values outside these choices and for combinations that have no meaning.
    """

    r: int | None = None
    s_matrix: Literal["full", "diagonal"] = "full"
    target_modules: set[str] | list[str] | str | None = None
    target_parameters: list[str] | None = None
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
    max_condition: float | None = None

    def __new__(cls, *_: Any, **options: Any) -> CloverConfig:  # the generated __init__ names no remedy
        config_checks.refuse_unknown(options, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # These three are not fields, so no file has them. Only a config that was read from a file has peft's version
        # here: it waits for the weights beside it.
        self.awaits_weights = self.peft_version is not None
        self.folder = ""  # the folder that it was read from, if that is known
        # What the file says of its bases, while the adapter has bases that were computed from this model's weights.
        self.recorded: dict[str, Any] = {}
        if self.peft_version is None and self.max_condition is None:
            self.max_condition = config_checks.MAX_CONDITION
        super().__post_init__()
        self.peft_type = CLOVER
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Check the fields, which may have been set since: `ValueError` for values that do not fit together."""
        config_checks.check({each.name: getattr(self, each.name) for each in fields(self)})

    def set_record_aside(self) -> None:
        """Hide the fields that describe a file's bases, while the adapter has bases of this model's weights."""
        names = ("from_activations", "balanced_updates", "base_precision")
        self.recorded = self.recorded or {name: getattr(self, name) for name in names}
        self.from_activations = self.balanced_updates = False
        self.base_precision = None

    def take_record_back(self) -> None:
        """Describe the file's bases again, if they were set aside."""
        self.__dict__.update(self.recorded)
        self.recorded = {}

    @property
    def unfolds(self) -> bool:
        """Whether the adapter was saved folded and is loaded to be trained on: S is then solved for, in new bases."""
        return self.folded and not self.inference_mode

    @classmethod
    def from_lora(cls, lora_config: LoraConfig, model: nn.Module | PretrainedConfig | None = None) -> CloverConfig:
        """The config that adapts the modules of a LoRA and trains about as many numbers.

        Args:
            lora_config: The config of the LoRA.
            model: The base model or its config, with which parameters are counted. It is not changed. None leaves
                the sizes of blocks at their defaults.

        Returns:
            The config. Sizes and both counts are logged at level INFO; a warning says so instead if options have no
            counterpart, the counts differ by more than 10 %, or no model is given.

        Raises:
            ValueError: for options that change what a LoRA computes, and for modules that cannot be found.
            TypeError: for a module that is no linear projection, such as an embedding.
        """
        return cls(**options_like(lora_config, model))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and add the loading recipe to the model card beside it, if there is one.

        The config of an adapter that is saved folded describes the maps in its file, not the training.

        Raises:
            ValueError: if the weights beside it were written as a pickle.
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
            whole: dict[str, Any] = dict(r=None, rank_pattern={}, s_matrix="full", basis=None)
            whole |= dict(from_activations=False, balanced_updates=False, folded=True, inference_mode=True)
            config = replace(self, **whole)
        names = (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)
        written = {path.name: path.stat().st_mtime_ns for n in names if (path := Path(save_directory, n)).is_file()}
        # Peft writes the weights before the config.
        if WEIGHTS_NAME in written and max(written, key=written.__getitem__) == WEIGHTS_NAME:
            raise ValueError(
                f"{save_directory}: expected new weights in {SAFETENSORS_WEIGHTS_NAME}, found them in {WEIGHTS_NAME}, "
                "a pickle, which is never read; delete it, and save with safe_serialization left on"
            )
        with tempfile.TemporaryDirectory() as folder:
            PeftConfig.save_pretrained(config, folder, **kwargs)
            text = Path(folder, CONFIG_NAME).read_text(encoding="utf-8")
        os.makedirs(save_directory, exist_ok=True)
        write_text(Path(save_directory, CONFIG_NAME), text)
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
        config.folder = folder
        return config


def _describe_fields(config: type) -> None:
    """Set `metadata["help"]` of every field to its description in the class's docstring."""
    text = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    for entry in re.split(r"\n    (?=\w)", "\n" + text)[1:]:
        name, _, description = entry.partition(":")
        config.__dataclass_fields__[name].metadata = MappingProxyType({"help": " ".join(description.split())})  # type: ignore[attr-defined]


_describe_fields(CloverConfig)
# `help` and editors read the fields here; `__new__` itself takes anything.
CloverConfig.__new__.__signature__ = inspect.signature(CloverConfig.__init__)  # type: ignore[attr-defined]
