"""Learning rates by part, and Muon for every head."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from safetensors.torch import load_file

from clover_peft.experiments.training.optimizer import Muon, orthogonalize
from clover_peft.experiments.training.run import run


def test_parts_learn_at_their_own_rates(settings, tmp_path):
    plain = run(settings(out="plain"))
    ones = run(settings(out="ones", **{"peft.learning_rate_factors": {"v_proj": 1, "S": 1.0}}))
    assert [e["loss"] for e in ones["loss"]["log"]] == [e["loss"] for e in plain["loss"]["log"]]
    run(settings(out="scaled", **{"peft.learning_rate_factors": {"v_proj": 0, "k_proj": 2}, "max_steps": 1}))
    run(settings(out="one step", max_steps=1))
    scaled, one = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("scaled", "one step")
    )
    moved = {name: scaled[name].abs().max() / one[name].abs().max() for name in one if "clover_S." in name}
    assert {re.search(r"(\w+)\.clover_S", name)[1]: round(float(ratio), 3) for name, ratio in moved.items()} == {
        "k_proj": 2.0, "v_proj": 0.0, "up_proj": 1.0,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"learning_rate_factors: zzz: 1: expected .* trained parameter's name, as in"
    ):
        run(settings(out="none", **{"peft.learning_rate_factors": {"zzz": 1}}))
    assert not any((tmp_path / "none").iterdir())


def test_the_record_names_the_optimizer_that_ran(settings):
    for out, options, ran in (("a", {"peft.optimizer": "muon"}, "muon"), ("b", {"optim": "sgd"}, "sgd")):
        assert run(settings(out=out, max_steps=1, **options))["training"]["optim"] == ran


def test_muon_is_torchs_for_every_head():
    torch.manual_seed(0)
    for shape in ((3, 6, 6), (2, 4, 8), (2, 8, 4)):
        stack = torch.nn.Parameter(torch.randn(shape))
        singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
        ours = Muon([stack], lr=0.1, weight_decay=0.1)
        theirs = torch.optim.Muon(singles, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            stack.grad = torch.randn(shape)
            for matrix, gradient in zip(singles, stack.grad, strict=True):
                matrix.grad = gradient.clone()
            ours.step()
            theirs.step()
        moved = torch.stack([matrix.detach() for matrix in singles])
        assert float((stack.detach() - moved).norm() / moved.norm()) < 1e-2  # torch iterates in bfloat16
    values = torch.linalg.svdvals(orthogonalize(torch.randn(5, 16, 16)))
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert not orthogonalize(torch.zeros(2, 3, 3)).any()
    with pytest.raises(ValueError, match=r"Muon: expected matrices to train, found a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
