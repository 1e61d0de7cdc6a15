"""What can be done with a converted model."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import clover_peft
from clover_peft.convert import convert_to_mla
from tests.support.tiny import VOCAB, build, relative

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*tokens for .* are few"),
    pytest.mark.filterwarnings("ignore:qk. not pruned"),
    pytest.mark.filterwarnings("ignore:.*ranks are rounded to multiples"),
]
BATCHES = [{"input_ids": torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))}]


@pytest.mark.parametrize("rope_dims", [24, 12])
def test_a_converted_model_is_pruned_and_adapted(rope_dims):
    """With all pairs rotated, heads have no part of the key without rotation, which is then left alone."""
    model, _ = convert_to_mla(build("llama"), BATCHES, rope_dims=rope_dims, kv_lora_rank=24)
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = get_peft_model(model, clover_peft.CloverConfig())
        assert torch.equal(adapted(input_ids=ids).logits, before)
        model = adapted.unload()
        report = clover_peft.prune(model, 0.0, ranks="uniform", calibration=BATCHES)
        assert relative(model(input_ids=ids).logits, before) < 1e-5
    kinds = {pair.kind for pair in report.pairs.values()}
    assert kinds == ({"vo"} if rope_dims == 24 else {"qk", "vo"})


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("rank", [3, 6])
def test_uniform_ranks_keep_the_stock_class_where_heads_have_fewer_directions(rank, multiple):
    """A narrow latent leaves some heads fewer directions than the rank: these are padded, not made narrower."""
    model, _ = convert_to_mla(build("llama"), BATCHES, rope_dims=6, kv_lora_rank=rank)
    report = clover_peft.prune(model, 0.5, ranks="uniform", multiple=multiple, calibration=BATCHES)
    assert len({tuple(layer.self_attn.kv_b_proj.weight.shape) for layer in model.model.layers}) == 1
    assert not model.config.clover_pruning["blocks"]
    widths = {(pair.kind, pair.width) for pair in report.pairs.values()}
    assert widths == {("qk", model.config.qk_nope_head_dim), ("vo", model.config.v_head_dim)}
    assert all(width % multiple == 0 for _, width in widths)
    assert torch.isfinite(model(input_ids=BATCHES[0]["input_ids"]).logits).all()
