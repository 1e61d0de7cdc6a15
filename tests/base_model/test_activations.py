"""Which tokens count in the moments of a model's activations, and that running it leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clover_peft.base_model.activations import Probe, collect_moments
from clover_peft.base_model.slices import HeadSlice
from tests.support.tiny import VOCAB, build, inputs


def batches(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, VOCAB, (2, 24), generator=generator)} for _ in range(count)]


class TwoProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, attention_mask=None):
        return self.two(self.one(x))


def test_moments_are_those_of_the_tokens_that_count():
    torch.manual_seed(0)
    model = TwoProjections().double().train()
    model.two.eval()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    data = [{"x": torch.randn(2, 3, 6).double(), "attention_mask": mask}, {"x": torch.randn(1, 5, 6).double()}]
    heads = HeadSlice.plain(2, 4)
    probes = {"out": Probe(model.one, False, heads, 4), "in": Probe(model.two, True, heads, 2)}
    found = collect_moments(model, probes, data)

    rows = torch.cat([model.one(data[0]["x"])[mask.bool()], model.one(data[1]["x"])[0]]).detach()
    for name, size in (("out", 4), ("in", 2)):
        z = rows.unflatten(-1, (-1, size))
        assert found[name].tokens == 8
        torch.testing.assert_close(found[name].second, torch.einsum("nhi,nhj->hij", z, z) / 8)
        centred = z - z.mean(0)
        torch.testing.assert_close(found[name].covariance, torch.einsum("nhi,nhj->hij", centred, centred) / 8)
    assert (model.training, model.one.training, model.two.training) == (True, True, False)
    assert not model.one._forward_hooks
    assert not model.two._forward_pre_hooks


def test_the_mask_of_a_text_is_not_that_of_an_image_of_its_length():
    model = build("clip").eval()
    batch = inputs("clip")
    patches = model.vision_model.embeddings.num_positions
    ids = torch.randint(3, VOCAB, (len(batch["pixel_values"]), patches))
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    towers = {"image": model.vision_model.encoder, "text": model.text_model.encoder}
    probes = {
        name: Probe(tower.layers[0].self_attn.k_proj, False, HeadSlice.plain(4, 1), 1)
        for name, tower in towers.items()
    }
    found = collect_moments(model, probes, [{**batch, "input_ids": ids, "attention_mask": mask}])
    assert found["image"].tokens == ids.numel()
    assert found["text"].tokens == ids.numel() - 2 * len(ids)


def test_nobody_keeps_keys_and_values():
    model, kept = build("llama").eval(), []
    hook = model.register_forward_hook(lambda module, inputs, output: kept.append(output.past_key_values))
    probes = {"k": Probe(model.model.layers[0].self_attn.k_proj, False, HeadSlice.plain(2, 12), 12)}
    collect_moments(model, probes, batches())
    hook.remove()
    assert kept == [None] * len(batches())


def test_an_encoder_and_a_decoder_have_masks_of_their_own(one_thread):
    model = build("t5").eval()
    ids = inputs("t5", batch=2, length=6)["input_ids"]
    here, there = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    here[0, 4:], there[1, 5:] = 0, 0
    blocks = {
        "in": model.encoder.block[0].layer[0].SelfAttention,
        "out": model.decoder.block[0].layer[0].SelfAttention,
    }
    probes = {name: Probe(block.k, False, HeadSlice.plain(block.n_heads, 1), 1) for name, block in blocks.items()}
    batch = {"input_ids": ids, "attention_mask": here, "decoder_input_ids": ids}
    assert {k: m.tokens for k, m in collect_moments(model, probes, [batch]).items()} == {"in": 10, "out": 12}
    found = collect_moments(model, probes, [{**batch, "decoder_attention_mask": there}])
    assert {k: m.tokens for k, m in found.items()} == {"in": 10, "out": 11}


def test_hooks_come_off_when_the_model_fails():
    model = TwoProjections()
    probes = {"out": Probe(model.one, False, HeadSlice.plain(2, 4), 4)}
    with pytest.raises(RuntimeError):
        collect_moments(model, probes, [{"x": torch.randn(2, 3, 5)}])
    assert not model.one._forward_hooks
    assert model.training
    with pytest.raises(ValueError, match="expected batches to run the model on, found none"):
        collect_moments(model, probes, [])
    with pytest.raises(ValueError, match="out: expected finite activations"):
        collect_moments(model, probes, [{"x": torch.full((1, 2, 6), float("nan"))}])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_second_batch_is_also_collected_alone(count):
    model = build("llama").eval()
    rows = torch.randint(3, 60, (count, 1, 16), generator=torch.Generator().manual_seed(0))
    o = model.model.layers[0].self_attn.o_proj
    batches = [{"input_ids": ids} for ids in rows]

    def collect(data: list, parts: int):
        probe = Probe(o, True, HeadSlice.plain(1, o.in_features), o.in_features, parts)
        return collect_moments(model, {"o": probe}, data, tokens_per_feature=0)["o"]

    found = collect(batches, 4)
    torch.testing.assert_close(found.scatter, collect(batches, 1).scatter)
    assert (found.half is None) == (count == 1)
    if count > 1:
        torch.testing.assert_close(found.half.scatter, collect(batches[1::2], 1).scatter)
        assert found.half.tokens == 16 * (count // 2)
