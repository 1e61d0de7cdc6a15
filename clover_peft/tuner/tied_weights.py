"""What a tuner does about modules that share a weight, such as an embedding and the head."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from .config import CloverConfig


class TiedWeights(BaseTuner):
    """The part of `CloverModel` that concerns tied weights.

    Each adapted module has maps of its own. A merge therefore gives the module a weight of its own
    (`BaseWeight.write`), and the modules that shared it keep theirs. Trained modules and tokens can stay tied.
    """

    def _check_tied_modules(self, model: nn.Module, peft_config: CloverConfig) -> None:
        # Peft warns of an adapter on a tied head, but here merging unties the head.
        if peft_config.modules_to_save or peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)

    def _check_merge_allowed(self) -> None:
        """As in peft, but without its warning of tied weights: a merge leaves the other modules' weights alone."""

    def _add_modules_to_save_to_tie(self, peft_config: CloverConfig, tied_weight_keys: list[str]) -> None:
        """Have the embedding trained, and the modules tied to it share its copy: peft reads `modules_to_tie` for that.

        In `modules_to_save`, their names give way to the embedding's path, which `tied_weight_keys` lacks.
        """
        paths = {module: path for path, module in self.model.named_modules()}
        embedding = paths[self.model.get_input_embeddings()]
        saved = peft_config.modules_to_save or []
        others = [name for name in saved if not any(f".{key}".endswith(f".{name}") for key in tied_weight_keys)]
        peft_config.modules_to_save = list(dict.fromkeys([*others, embedding]))
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: CloverConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"{', '.join(tied_weight_keys)}: expected ensure_weight_tying to tie modules in modules_to_save or "
            "trainable_token_indices, found target_modules, which cannot include the embedding (CLOVER adapts linear "
            "projections); leave ensure_weight_tying out, or name the embedding in modules_to_save"
        )


def untie_config(model: nn.Module) -> None:
    """Where the head has a weight of its own now, say so in the config, so that a load does not tie it again."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False
        untie_whole(model)


def untie_whole(model: nn.Module) -> None:
    """Give every weight that a model's config no longer ties a copy of its own, so that all of them are saved.

    Transformers has one switch, `tie_word_embeddings`, for all ties of a model. A merge into the head turns it off. Of
    weights that still are one, as those of Zamba's attention blocks, only one would be saved, and the others would be
    random after a load.
    """
    if not isinstance(model, PreTrainedModel):
        return
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen and f"{path}.{name}".removeprefix(".") not in tied:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(parameter)
