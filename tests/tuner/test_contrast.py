"""The low-rank part's start from two sets of data: against the plain formula, exact identity, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from clover_peft import CloverConfig, initialize_from_activations, initialize_from_contrast
from clover_peft.tuner import contrast
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import VOCAB, build, inputs, logits, perturb

pytestmark = [pytest.mark.filterwarnings("ignore:.*tokens for blocks of"), pytest.mark.usefixtures("one_thread")]


def batches(family: str, seed: int, count: int = 3) -> list[dict]:
    """Tokens of one half of the vocabulary for even seeds, of the other half for odd ones."""
    generator = torch.Generator().manual_seed(seed)
    half = VOCAB // 2
    low, high = (3, half) if seed % 2 == 0 else (half, VOCAB)
    start = inputs(family, batch=2, length=24)
    drawn = []
    for _ in range(count):
        ids = torch.randint(low, high, (2, 24), generator=generator)
        drawn.append({key: ids.clone() if "input_ids" in key else value for key, value in start.items()})
    return drawn


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return get_peft_model(build(family, dtype), CloverConfig(**{"low_rank": 2, **options})).eval()


def rows_of_a(model) -> dict[str, torch.Tensor]:
    return {path: contrast._a_of(layer, "default").detach().clone() for path, layer in clover_layers(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "deepseek_v3"])
def test_a_changes_and_the_function_stays_bit_for_bit(family, dtype):
    model, base = adapted(family, dtype), build(family, dtype).eval()
    before = rows_of_a(model)
    initialize_from_contrast(model, batches(family, 0), batches(family, 1))
    after = rows_of_a(model)
    assert all(not torch.equal(before[path], after[path]) for path in before)
    assert all(a.dtype == torch.float32 and torch.isfinite(a).all() for a in after.values())
    assert torch.equal(logits(model, family), logits(base, family))
    perturb(model)
    assert not torch.equal(logits(model, family), logits(base, family))


def test_the_rows_are_leading_quotients_of_energy_by_the_plain_formula():
    model = adapted(dtype=torch.float64, target_modules=["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    plain = build("llama", torch.float64).eval()
    data = {
        name: [{"input_ids": b["input_ids"]} for b in batches("llama", i)] for i, name in enumerate(("new", "known"))
    }
    path = "model.layers.1.mlp.down_proj"
    moments = {}
    for name, rows in data.items():
        seen: list[torch.Tensor] = []
        hook = plain.get_submodule(path).register_forward_pre_hook(lambda m, i, seen=seen: seen.append(i[0].detach()))
        for batch in rows:
            plain(**batch)
        hook.remove()
        x = torch.cat(seen).flatten(0, -2)
        moments[name] = x.T @ x / len(x)
    known = moments["known"] + 10 * moments["known"].diagonal().median() * torch.eye(len(moments["known"]))
    best = torch.linalg.eigvals(torch.linalg.solve(known, moments["new"])).real.sort(descending=True).values[:2]
    initialize_from_contrast(model, data["new"], data["known"])
    a = rows_of_a(model.base_model.model)[path]
    energy = ((a @ moments["new"]) * a).sum(1)
    assert torch.allclose(energy, (4 * moments["new"].trace() / (3 * a.shape[1])).expand(2), rtol=1e-4)
    assert torch.allclose(energy / ((a @ known) * a).sum(1), best, rtol=1e-3)


def test_what_reads_one_tensor_reads_it_alike_and_groups_do_not_matter(monkeypatch):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = []
    for limit in (contrast._BYTES, 1):  # all at once, and one module at a time
        monkeypatch.setattr(contrast, "_BYTES", limit)
        torch.manual_seed(0)
        model = adapted(target_modules=targets)
        initialize_from_contrast(model, batches("llama", 0), batches("llama", 1))
        found.append(rows_of_a(model.base_model.model))
    for path, a in found[0].items():
        assert torch.equal(a, found[1][path])
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(path.rpartition(".")[2])
        if shared:
            assert torch.equal(a, found[0][f"{path.rpartition('.')[0]}.{shared}"])
    assert len({tuple(a.flatten().tolist()) for a in found[0].values()}) == 2 * 4  # two layers, four inputs each


def test_a_batch_may_have_labels():
    rows = [[{**batch, "labels": batch["input_ids"]} for batch in batches("t5", seed)] for seed in (0, 1)]
    rows = [[{key: b[key] for key in ("input_ids", "labels")} for b in batch] for batch in rows]
    initialize_from_contrast(adapted("t5"), *rows)


def test_a_module_that_is_called_twice_shares_nothing():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x):
            return self.once(x) + self.twice(x) + self.twice(x @ x.mT @ x)

    def made(targets):
        config = CloverConfig(target_modules=targets, low_rank=2, mlp_block_size=4)
        model = get_peft_model(Twice(), config)
        x = torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(0))
        initialize_from_contrast(model, [{"x": x}], [{"x": x.flip(-1)}])
        return {path.rpartition(".")[2]: a for path, a in rows_of_a(model).items()}

    together = made(["once", "twice"])
    for name in ("once", "twice"):
        assert torch.allclose(together[name], made([name])[name])
    assert not torch.allclose(together["once"], together["twice"])


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["k_proj", "o_proj", "up_proj", "down_proj"]),
        ("deepseek_v3", ["kv_b_proj", "o_proj"]),
        ("qwen2_moe", ["v_proj", "shared_expert.up_proj", "shared_expert.down_proj"]),
    ],
)
def test_padding_does_not_matter(family, targets):
    """Also where a module joins rows and tokens, or has a further dimension of one."""
    found = []
    for padding in (1, 2):
        torch.manual_seed(0)
        model = get_peft_model(build(family), CloverConfig(target_modules=targets, low_rank=2, mlp_block_size=4))
        data = batches(family, 0), batches(family, 1)
        for batch in (*data[0], *data[1]):
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -5:] = 0
            batch["input_ids"] = batch["input_ids"].clone()
            batch["input_ids"][0, -5:] = padding
        initialize_from_contrast(model.eval(), *data)
        found.append(rows_of_a(model))
    assert len(found[0]) >= 2
    for path, a in found[0].items():
        assert torch.allclose(a, found[1][path], atol=1e-4), path


def test_the_order_with_bases_from_data_does_not_matter():
    first, second = adapted(), adapted()
    new, known = batches("llama", 0), batches("llama", 1)
    initialize_from_contrast(first, new, known)
    initialize_from_activations(first, known)
    initialize_from_activations(second, known)
    initialize_from_contrast(second, new, known)
    for path, a in rows_of_a(first).items():
        assert torch.equal(a, rows_of_a(second)[path])


def test_it_is_saved_with_the_adapter(tmp_path):
    model = adapted()
    initialize_from_contrast(model, batches("llama", 0), batches("llama", 1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    for path, a in rows_of_a(model).items():
        assert torch.equal(a, rows_of_a(loaded)[path])


def test_bad_input_changes_nothing():
    new, known = batches("llama", 0), batches("llama", 1)
    with pytest.raises(ValueError, match=r"k_proj: expected a low-rank part, .* set CloverConfig\(low_rank="):
        initialize_from_contrast(adapted(low_rank=0), new, known)
    model = adapted(low_rank=40)
    before = rows_of_a(model)
    several = get_peft_model(build("t5"), CloverConfig(low_rank=44, target_modules=["q", "o"])).eval()  # o reads 40
    start = rows_of_a(several)
    with pytest.raises(ValueError, match=r"\.o: expected data with 44 directions, found fewer"):
        initialize_from_contrast(several, batches("t5", 0, 40), batches("t5", 1))
    assert all(torch.equal(a, start[path]) for path, a in rows_of_a(several).items())
    one_token = [{"input_ids": torch.full((1, 3), 7)}]
    with pytest.raises(ValueError, match=r"layers.0.*: expected data with 40 directions, found fewer"):
        initialize_from_contrast(model, one_token, known)
    with pytest.raises(ValueError, match="new: expected batches to run the model on, found none"):
        initialize_from_contrast(model, [], known)
    with pytest.raises(TypeError, match="known: expected batches, found one batch; pass a list of them"):
        initialize_from_contrast(model, new, known[0])
    with pytest.raises(ValueError, match="adapter 'other': expected a model with this CLOVER adapter"):
        initialize_from_contrast(model, new, known, "other")
    model.add_adapter("other", CloverConfig(low_rank=2))
    with pytest.raises(ValueError, match=r"adapter 'other': expected no other active .* call set_adapter\('other'\)"):
        initialize_from_contrast(model, new, known, "other")
    model.set_adapter("other")
    initialize_from_contrast(model, new, known, "other")
    model.set_adapter("default")
    for path, a in rows_of_a(model).items():
        assert torch.equal(a, before[path])
    perturb(model)
    with pytest.raises(ValueError, match="expected a new adapter that is not merged, found one that is trained"):
        initialize_from_contrast(model, new, known)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="found one that is merged"):
        initialize_from_contrast(merged, new, known)


@pytest.mark.parametrize("targets", [["k_proj"], ["lm_head"]])
def test_no_cache_and_no_logits_are_made_that_nobody_reads(targets):
    """A vocabulary is the largest of all outputs. The head itself reads every token where it is adapted."""
    base, seen, read = build("llama"), [], []
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    base.lm_head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    model = get_peft_model(base, CloverConfig(target_modules=targets, low_rank=2, mlp_block_size=4)).eval()
    initialize_from_contrast(model, batches("llama", 0), batches("llama", 1))
    assert {kwargs["use_cache"] for kwargs in seen} == {False}
    assert set(read[1:]) == ({24} if targets == ["lm_head"] else {1})  # the first pass only compares inputs
