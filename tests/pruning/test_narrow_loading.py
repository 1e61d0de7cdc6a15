"""Pruned models are saved and loaded like any model: in other processes, by other classes, in parts."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.utils.prune
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import clover_peft
from clover_peft.pruning import find_pairs
from clover_peft.pruning.narrow.loading import install, read_record
from clover_peft.pruning.narrow.modules import narrow
from tests.support.pruning import NARROW, batches, prune, ratio, reload, shown, unchanged
from tests.support.tiny import build, inputs, logits, output, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ranks", ["global", "uniform"])
@pytest.mark.parametrize("family", NARROW)
def test_saved_and_loaded(family, ranks, tmp_path):
    model = build(family)
    prune(model, ratio(model, 0.4), ranks=ranks, calibration=batches(family) if ranks == "global" else None)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert read_record(loaded)["steps"] == read_record(model)["steps"]


def without_the_package(model, folder: Path) -> str:
    """What stock transformers says when it cannot load a saved model."""
    model.save_pretrained(folder)
    code = f"import transformers; transformers.{type(model).__name__}.from_pretrained({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def test_a_bias_alone_is_refused():
    """One head of each layer keeps all directions, the other does not: the widths stay, the constant needs a bias.

    Without this package the model would load, and compute something else for want of the bias.
    """
    model = build("qwen2")
    names = [pair.name for pair in find_pairs(model)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"o_proj: expected ranks that make the heads of some layer narrower.*a bias"):
        prune(model, ranks={name: [12, 6] for name in names})
    assert unchanged(model, before)
    assert read_record(model) is None
    prune(model, ranks={name: [12, 12] for name in names})  # nothing is lost, and no bias is needed
    assert all(layer.self_attn.o_proj.bias is None for layer in model.model.layers)
    with pytest.raises(ValueError, match=r"o_proj: expected ranks that make the heads of some layer narrower"):
        prune(model, ranks={name: [12, 6] for name in names})


@pytest.mark.parametrize("first", [False, True])
def test_a_bias_is_loaded_where_a_width_of_another_layer_changed(first, tmp_path):
    """By one pruning or two. The width lets stock transformers fail."""
    model = build("qwen2")
    names = [pair.name for pair in find_pairs(model)]
    if first:
        prune(model, ranks={names[1]: [6, 6]})
        prune(model, ranks={names[0]: [12, 6]})
    else:
        prune(model, ranks={names[0]: [12, 6], names[1]: [6, 6]})
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.bias is not None
    assert attention.v_proj.out_features == build("qwen2").model.layers[0].self_attn.v_proj.out_features
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded, "qwen2"), logits(model, "qwen2"))
    prune(loaded, ranks={names[0]: [12, 6]})  # narrow by its folder
    assert "size mismatch" in without_the_package(loaded, tmp_path)


def in_another_process(code: str) -> str:
    """What `code` prints where nothing but `import clover_peft` was done before it."""
    root = str(Path(__file__).parents[2])
    start = f"import sys; sys.path.insert(0, {root!r})\nimport json, torch, transformers, clover_peft\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_another_process_loads_and_generates(tmp_path):
    """Every family: the same tokens, and of those that generate none the same output."""
    expected = {}
    for family in NARROW:
        model = build(family)
        prune(model, ratio(model, 0.4), calibration=batches(family))
        model.save_pretrained(tmp_path / family)
        expected[family] = shown(model, family)
    code = f"""
from tests.support.pruning import load_all
print(json.dumps(load_all({str(tmp_path)!r}, {list(NARROW)!r})))
"""
    assert json.loads(in_another_process(code)) == expected


def test_other_heads_and_pipelines_load_it(tmp_path):
    model = build("llama")
    prune(model, {"vo": 0.5}, calibration=batches("llama"))
    model.save_pretrained(tmp_path)
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    code = f"""
folder = {str(tmp_path)!r}
from tests.support.tiny import inputs
trunk = transformers.AutoModel.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
head = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
widths = [m.layers[1].self_attn.v_proj.out_features for m in (model.model, trunk, head.model)]
assert len(set(widths)) == 1, widths
assert torch.equal(trunk(**inputs("llama")).last_hidden_state, model.model(**inputs("llama")).last_hidden_state)
pipe = transformers.pipeline("text-generation", folder)
ids = pipe("one two", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
print(json.dumps([int(i) for i in ids]))
"""
    found = json.loads(in_another_process(code))
    ids = torch.tensor([[words["one"], words["two"]]])
    assert found == model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0].tolist()


def test_a_pruned_model_is_quantised_when_loaded(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    model = build("llama")
    prune(model, {"vo": 0.5}, calibration=batches("llama"))
    model.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(quantised.model.layers[0].self_attn.v_proj).__name__ == "Linear8bitLt"
    before = logits(quantised, "llama")
    assert relative(before, logits(model, "llama")) < 0.05
    adapted = peft.get_peft_model(quantised, clover_peft.CloverConfig())
    assert torch.equal(logits(adapted, "llama"), before)


def test_a_tower_of_a_shared_config(tmp_path):
    model = build("whisper")
    prune(model.get_encoder(), {"vo": 0.5})
    assert torch.equal(logits(reload(model, tmp_path), "whisper"), logits(model, "whisper"))


def test_a_pruned_encoder_alone(tmp_path):
    model = build("t5")
    prune(model, 0.5)
    model.save_pretrained(tmp_path)
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    ids = inputs("t5")["input_ids"]
    assert relative(alone(input_ids=ids).last_hidden_state, model.encoder(input_ids=ids).last_hidden_state) < 1e-6


def test_diffusers_does_not_say_that_it_ignores_the_record(tmp_path, caplog):
    diffusers = pytest.importorskip("diffusers", reason="needs the dev extra")
    model = build("unet")
    prune(model, 0.5)
    diffusers.utils.logging.enable_propagation()
    try:
        twice = reload(reload(model, tmp_path), tmp_path / "again")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not [record for record in caplog.records if "clover_pruning" in record.getMessage()]
    assert read_record(twice) == read_record(model)
    assert torch.equal(logits(twice, "unet"), logits(model, "unet"))


def test_the_name_of_the_base_is_taken_back(tmp_path):
    """Or an adapter would be loaded onto the base as it was before."""
    build("opt").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prune(model, 0.5)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Exception, match="pruned: save it"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("wrapped", ["first", "ours"])
def test_loading_is_installed_once_and_for_all(wrapped, monkeypatch):
    post_init = transformers.PreTrainedModel.post_init
    if wrapped == "first":

        @functools.wraps(lambda self: None)
        def theirs(self):
            post_init.__wrapped__(self)

        monkeypatch.setattr(transformers.PreTrainedModel, "post_init", theirs)
    else:
        monkeypatch.setattr(transformers.PreTrainedModel, "post_init", post_init)
    before = transformers.PreTrainedModel.post_init
    install()
    assert transformers.PreTrainedModel.post_init.clover
    assert (transformers.PreTrainedModel.post_init is before) == (wrapped == "ours")


def test_records_of_other_versions_are_refused(tmp_path):
    model = build("opt")
    prune(model, 0.5)
    record = copy.deepcopy(model.config.clover_pruning)
    path = next(iter(record["blocks"]))
    for wrong, message in (
        ({**record, "version": 99}, "expected version 1, found 99"),
        ("yes", "expected version 1, found 'yes'"),
        ({**record, "blocks": None}, "expected blocks and steps"),
        ({**record, "blocks": {path: [12, -3, False]}}, "expected two widths"),
        ({**record, "blocks": {path: ["12", 6, False]}}, "expected two widths"),
        ({**record, "blocks": {path: None}}, "expected two widths"),
    ):
        model.config.clover_pruning = wrong
        with pytest.raises(ValueError, match=f"clover_pruning in the config: .*{message}"):
            reload(model, tmp_path)
        with pytest.raises(ValueError, match=f"clover_pruning in the config: .*{message}"):
            prune(model, 0.5)


def test_latent_attention_without_unrotated_keys_is_saved(tmp_path):
    config = build("deepseek_v3").config
    config.qk_nope_head_dim, config.qk_head_dim = 0, config.qk_rope_head_dim
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    pair = find_pairs(model)[0]
    prune(model, ranks={pair.name: [4] * pair.heads.count})
    assert list(read_record(model)["blocks"].values()) == [[0, 4, False]]
    assert relative(logits(reload(model, tmp_path), "deepseek_v3"), logits(model, "deepseek_v3")) < 1e-6


def test_records_that_say_sequential_still_load(tmp_path):
    """Earlier versions wrote `sequential`, which is no option any more, into every step of the record."""
    model = build("opt")
    prune(model, {"vo": 0.5}, ranks="uniform")
    expected = logits(model, "opt")
    for step in model.config.clover_pruning["steps"]:
        step["sequential"] = True
    again = reload(model, tmp_path)
    assert torch.equal(logits(again, "opt"), expected)
    prune(again, {"qk": 0.5})
    assert [step.get("sequential") for step in again.config.clover_pruning["steps"]] == [True, None]


def test_figures_of_other_libraries_are_saved(tmp_path):
    model = build("opt")
    prune(model, {"vo": np.float32(0.5)}, multiple=np.int64(4))
    prune(model, threshold=torch.tensor(0.1))
    assert torch.equal(logits(reload(model, tmp_path), "opt"), logits(model, "opt"))


def test_what_has_no_config_of_its_own():
    for part in (torch.nn.Sequential(build("opt")), build("llama").model.layers[0], build("bert").bert.encoder):
        before = {name: p.clone() for name, p in part.named_parameters()}
        with pytest.raises(ValueError, match="expected a model of transformers or diffusers"):
            prune(part, 0.5)
        assert unchanged(part, before)


@pytest.mark.parametrize("family", ["opt", "bert", "deepseek_v3", "unet"])
def test_a_failure_half_way_can_still_be_saved(family, monkeypatch, tmp_path):
    """Inside a block, whose projections are new and empty by then: it is as it was."""
    from clover_peft.pruning.narrow import rewriting as module

    model, calls = build(family), []
    before = {name: p.clone() for name, p in model.named_parameters()}

    def failing(*arguments):
        narrow(*arguments)
        calls.append(arguments[0].path)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module, "narrow", failing)
    with pytest.raises(torch.OutOfMemoryError):
        prune(model, {"vo": 0.5}, ranks="uniform")
    assert set(read_record(model)["blocks"]) == {calls[0].removeprefix("model.").removeprefix("bert.")}
    now = dict(model.named_parameters())
    changed = {name for name in before if now[name].shape != before[name].shape}
    assert changed
    assert all(name.startswith(calls[0].rpartition(".")[0]) for name in changed)
    block = calls[0].removesuffix(".self") + "."
    assert all(torch.equal(now[name], before[name]) for name in before if not name.startswith(block))
    assert torch.isfinite(output(model, family)).all()
    if family != "unet":
        assert torch.equal(logits(reload(model, tmp_path), family), logits(model, family))


def test_the_base_of_any_name_is_taken_back():
    model = build("opt")
    model.name_or_path = model.config._name_or_path = "base (v2)"
    for _ in range(2):
        prune(model, 0.25)
        assert model.name_or_path == "base (v2) (pruned: save it, and load it from there)"
