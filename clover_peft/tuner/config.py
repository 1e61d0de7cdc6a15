"""`CloverConfig`: the choices of a CLOVER adapter, checked at construction."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..runtime.peft_registry import CLOVER
from .adapter_folder import check_weight_file, complete_model_card


@dataclass
class CloverConfig(PeftConfig):
    """Configuration of a [`CloverModel`]. Every field is optional.

    Args:
        r: Directions trained in each block, the leading ones by singular value. None trains the whole block.
        s_matrix: "full" trains an r x r matrix per block, "diagonal" its r diagonal entries.
        target_modules: Module names (suffixes), a regular expression, or "all-linear". None: the modules that compute
            key, value and up-projection, by the table of architectures.
        exclude_modules: Module names or a regular expression to leave out.
        cross_layer: Pair value with output and, where no rotary embedding stands between, key with query (the paper's
            cross-layer form). False decomposes every projection alone.
        block_size: Features per block of attention projections. None: one block a head. A divisor of the head splits
            it; a multiple spans several heads, for intra-layer targets only.
        mlp_block_size: Features per block of the other projections. None: the largest divisor of the output features
            that is at most 64.
        basis: Basis of intra-layer targets, "qr" or "svd". None: "qr" for a full matrix over a whole block, otherwise
            "svd".
        truncate: Drop the directions beyond the leading r instead of leaving them as they are: the initial function is
            that of the truncated base (the paper's CLOVER-dagger without narrowing). Needs `r` or `rank_pattern`.
        low_rank: Rank of a part `B A x` beside the maps, which can leave the row space of the weight, as a map of the
            projection's output cannot; B starts at zero. 0 for none.
        clover_dropout: Dropout probability on the input of the map, and of the low-rank part.
        bias: "none", "all" or "clover_only": which biases of the base are trained too.
        save_bases: True saves the bases with S (self-contained). False saves S alone; the bases are recomputed at load
            and checked. "folded" saves one d x d map per block, for inference.
        init_weights: True starts as the base model, bit for bit. False starts visibly elsewhere (for tests).
        check_base: Refuse to load onto a base model whose weights have rows of other norms than those recorded in the
            adapter, beyond what rounding explains.
        modules_to_save: Modules to train and save whole.
        trainable_token_indices: Token indices whose embeddings are trained, or a dict from embedding name to indices.
        layers_to_transform: Layer index or indices to adapt; 0 is one.
        layers_pattern: Name of the module list that the indices count, if it is not a common one.
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

    r: int | None = field(default=None, metadata={"help": "Leading directions trained per block; None for all."})
    s_matrix: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "Train the full r x r matrix of each block, or its diagonal."}
    )
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regex or 'all-linear'; None: key, value and up-projection."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex to leave out."}
    )
    cross_layer: bool = field(default=True, metadata={"help": "Pair V with O, and Q with K where positions allow."})
    block_size: int | None = field(default=None, metadata={"help": "Features per block of attention projections."})
    mlp_block_size: int | None = field(default=None, metadata={"help": "Features per block of other projections."})
    basis: Literal["qr", "svd"] | None = field(default=None, metadata={"help": "Basis of intra-layer targets."})
    truncate: bool = field(default=False, metadata={"help": "Drop the directions beyond r instead of keeping them."})
    low_rank: int = field(default=0, metadata={"help": "Rank of a part B A x beside the maps; 0 for none."})
    clover_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the map."})
    bias: Literal["none", "all", "clover_only"] = field(
        default="none", metadata={"help": "Biases of the base to train: 'none', 'all' or 'clover_only'."}
    )
    save_bases: bool | Literal["folded"] = field(
        default=True, metadata={"help": "Save bases with S (True), S alone (False) or one folded map ('folded')."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the base model; False starts elsewhere, for tests."}
    )
    check_base: bool = field(default=True, metadata={"help": "Refuse to load onto a different base model."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token indices whose embeddings are trained."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name or regex -> r."})
    head_dim: int | None = field(default=None, metadata={"help": "Features of a head, for unknown models."})
    num_heads: int | None = field(default=None, metadata={"help": "Heads of each target, for unknown models."})
    folded: bool = field(default=False, metadata={"help": "Set by save_bases='folded'; not for new adapters."})
    from_activations: bool = field(
        default=False, metadata={"help": "Set by initialize_from_activations; not for new adapters."}
    )
    balanced_updates: bool = field(default=False, metadata={"help": "Set by balance_updates; not for new adapters."})
    base_precision: str | None = field(default=None, metadata={"help": "Set when made: precision of the base."})

    def __post_init__(self) -> None:
        # No field: the folder of the weights that are loaded next, "" where it is not known, None for an adapter of
        # one's own. An adapter that is to be loaded keeps the file's facts, and is taken out if the file does not fit.
        # Only a config that was read from a file has peft's version already.
        self.source: str | None = None if self.peft_version is None else ""
        super().__post_init__()
        self.peft_type = CLOVER
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
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
        if self.s_matrix == "diagonal" and self.basis == "qr":
            raise ValueError(
                "CloverConfig: s_matrix='diagonal' has no meaning in the QR basis, whose matrix is triangular; use "
                "basis='svd' (or None) or s_matrix='full'"
            )
        if self.truncate and self.r is None and not self.rank_pattern:
            raise ValueError("CloverConfig: truncate=True drops the directions beyond r; pass r=... or rank_pattern")
        if self.truncate and self.clover_dropout:
            raise ValueError(
                "CloverConfig: with truncate=True the map replaces a head's output, which clover_dropout would drop; "
                "use one of the two"
            )
        if self.truncate and self.basis == "qr":
            raise ValueError(
                "CloverConfig: truncate=True needs leading directions, which the QR basis has not; use basis='svd'"
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"CloverConfig: {name} cannot be used with a regular expression in target_modules; "
                        "put the layers into the expression, or pass a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("CloverConfig: layers_pattern needs layers_to_transform; pass both or neither")
        if self.from_activations and self.save_bases is False:
            raise ValueError(
                "CloverConfig: save_bases=False computes the bases again from the weights, but these were made from "
                "activations; use save_bases=True or 'folded'"
            )
        if self.balanced_updates and self.save_bases is False:
            raise ValueError(
                "CloverConfig: save_bases=False computes the bases again from the weights, but these were scaled by "
                "balance_updates; use save_bases=True or 'folded'"
            )
        if self.folded and not self.inference_mode:
            raise ValueError(
                "CloverConfig: a folded adapter holds maps for inference and cannot be trained; load it with "
                "is_trainable=False, or train from an adapter saved with save_bases=True"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; an adapter saved folded is described as what its file holds.

        The model card beside it, if there is one, is told that `import clover_peft` comes first.
        """
        config = self
        if self.save_bases == "folded" and not self.folded:
            if re.search(
                r"checkpoint-\d+$", os.path.normpath(save_directory)
            ):  # as transformers' trainers name theirs
                warnings.warn(
                    f"{save_directory}: save_bases='folded' leaves out of a checkpoint what training needs, it can be "
                    "neither resumed nor loaded as the best; train with save_bases=True, and set "
                    "model.peft_config['default'].save_bases = 'folded' before the last save_pretrained",
                    stacklevel=2,
                )
            # The file holds whole maps: how they were trained (rank, basis, truncation) no longer matters.
            state = {f.name: getattr(self, f.name) for f in fields(self)}
            state.update(
                r=None, rank_pattern={}, s_matrix="full", basis=None, truncate=False, folded=True, inference_mode=True
            )
            state.update(from_activations=False, balanced_updates=False)
            config = type(self)(**state)
        PeftConfig.save_pretrained(config, save_directory, **kwargs)
        complete_model_card(os.path.join(save_directory, "README.md"), self.base_model_name_or_path, self.task_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config; the weight file beside it, where it is local or in the hub's cache, is checked first, so that
        a broken one changes no model.

        Raises:
            ValueError: if `adapter_model.safetensors` beside the config is truncated, corrupt or of another method.
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


def _check_positive(name: str, value: object, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"CloverConfig.{name}: expected a positive integer{' or None' if optional else ''}, found {value!r}"
        )
