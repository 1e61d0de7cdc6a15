"""Models that the table of families does not know work once they are described."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from clover_peft import CloverConfig
from tests.support.adapters import layers_by_name, only_spec, untouched
from tests.support.tiny import TOLERANCE, perturb, relative


class _StrangeConfig(PretrainedConfig):
    model_type = "strange_for_clover"

    def __init__(self, hidden_size: int = 24, **kwargs) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class _Strange(PreTrainedModel):
    """Two layers that name their projections as nobody else does."""

    config_class = _StrangeConfig

    def __init__(self, config: _StrangeConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(width, width), "grow": nn.Linear(width, 2 * width)}) for _ in range(2)
        )
        self.back = nn.Linear(2 * width, width)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.back(torch.tanh(block["grow"](block["mix"](x))))
        return x


def _strange() -> _Strange:
    torch.manual_seed(0)
    model = _Strange(_StrangeConfig()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def _call(model: nn.Module) -> Tensor:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("choices", "where"),
    [(dict(), "target_modules"), (dict(target_modules=["grow"]), r"blocks\.0\.grow"), (dict(head_dim=6), "")],
    ids=str,
)
def test_unknown_family_is_told_how_to_be_described(choices: dict, where: str) -> None:
    model = _strange()
    message = f"{where}.*strange_for_clover.*target_modules=.*head_dim=.*num_heads=.*known: .*llama.*whisper"
    with untouched(model, _call), pytest.raises(ValueError, match=f"(?s){message}"):
        get_peft_model(model, CloverConfig(**choices))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(head_dim=7), "mix: 24 features are not a multiple of head_dim 7"),
        (dict(num_heads=5), "mix: 24 features are not a multiple of num_heads 5"),
        (dict(head_dim=6, num_heads=3), "24 output features make 4 heads of head_dim 6, but num_heads is 3"),
        (
            dict(mlp_block_size=7),
            "mlp_block_size=7 does not divide the projection's 24 features; choose a divisor of 24, such as 24",
        ),
        (dict(head_dim=6, r=7), "r=7 is larger than a block of 6"),
    ],
    ids=str,
)
def test_description_that_does_not_fit_an_unknown_model_changes_nothing(choices: dict, message: str) -> None:
    model = _strange()
    with untouched(model, _call), pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(target_modules=["mix"], **choices))


@pytest.mark.parametrize(
    ("choices", "shape"),
    [
        (dict(head_dim=6), (4, 6, 6)),
        (dict(num_heads=3), (3, 8, 8)),
        (dict(head_dim=6, num_heads=4), (4, 6, 6)),
        (dict(mlp_block_size=12), (2, 12, 12)),
        (dict(head_dim=6, block_size=3), (8, 3, 3)),
        (dict(head_dim=6, r=2, s_matrix="diagonal"), (4, 2)),
    ],
    ids=str,
)
def test_unknown_model_works_once_it_is_described(choices: dict, shape: tuple[int, ...]) -> None:
    model = _strange()
    before = _call(model)
    model = get_peft_model(model, CloverConfig(target_modules=["mix"], **choices))
    layers = layers_by_name(model)
    assert set(layers) == {"blocks.0.mix", "blocks.1.mix"}
    assert {tuple(layer.clover_S["default"].weight.shape) for layer in layers.values()} == {shape}
    assert torch.equal(_call(model), before)
    perturb(model)
    after = _call(model)
    assert relative(after, before) > TOLERANCE[torch.float32]
    model.merge_adapter()
    assert relative(_call(model), after) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(_call(model), before)


@pytest.mark.parametrize("targets", [["0", "2"], "all-linear", r"[02]"], ids=str)
def test_plain_module_without_a_config_needs_target_modules_only(targets: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 10)).eval()
    before = _call(model)
    model = get_peft_model(model, CloverConfig(target_modules=targets))
    shapes = {name: only_spec(layer).s_shape for name, layer in layers_by_name(model).items()}
    assert shapes == {"0": (1, 48, 48), "2": (1, 10, 10)}
    assert torch.equal(_call(model), before)
    perturb(model)
    after = _call(model)
    assert relative(after, before) > TOLERANCE[torch.float32]
    assert relative(_call(model.merge_and_unload(safe_merge=True)), after) < TOLERANCE[torch.float32]


def test_plain_module_without_target_modules_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 10)).eval()
    with untouched(model, _call), pytest.raises(ValueError, match=r"target_modules=\[\.\.\.\]"):
        get_peft_model(model, CloverConfig())


def test_one_head_dim_does_not_split_the_wider_heads_of_another_layer() -> None:
    """As in Gemma 4, whose layers with global attention have wider heads."""
    model = _strange()
    first, second = model.blocks
    first.head_dim, second.head_dim = 6, 12
    message = r"blocks\.1\.mix: expected heads of head_dim 6, found an attention with heads of 12"
    with untouched(model, _call), pytest.raises(ValueError, match=message):
        get_peft_model(model, CloverConfig(target_modules=["mix"], head_dim=6))
    get_peft_model(model, CloverConfig(target_modules=["blocks.0.mix"], head_dim=6))
