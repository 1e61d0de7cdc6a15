"""What an adapter's own files say about its base: tokenizer, vocabulary, labels. No network."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from clover_peft import CloverConfig
from clover_peft.io import hub_models
from tests.support.tiny import load_script, perturb, relative

pytest.importorskip("trl", reason="borrows the tokenizer of the trainers' tests: pip install clover-peft[train]")
from tests.support.tiny_chat import save_chat_model

export_script, analyze_script = load_script("export"), load_script("analyze")
IDS = torch.arange(3, 40).unsqueeze(0)
pytestmark = pytest.mark.usefixtures("one_thread")


def _adapter_with_tokens(folder: Path, config: LoraConfig | CloverConfig) -> torch.Tensor:
    """Saves a base, and an adapter that was trained with nine tokens more; its logits."""
    save_chat_model(folder / "base")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(model, config)
    perturb(model)
    model.eval().save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return model(input_ids=IDS).logits


CONFIGS = {
    "clover": lambda: CloverConfig(task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_with_added_tokens_is_loaded(tmp_path, method, merge):
    expected = _adapter_with_tokens(tmp_path, CONFIGS[method]())
    source = hub_models.find_model(str(tmp_path / "base"))
    model, tokenizer = hub_models.load_trained(source, tmp_path / "adapter", merge=merge)
    assert len(tokenizer) == expected.shape[-1]
    with torch.no_grad():
        assert relative(model(input_ids=IDS.to(model.device)).logits.cpu(), expected) < 1e-5


def test_an_adapter_with_added_tokens_is_analysed(tmp_path):
    _adapter_with_tokens(tmp_path, CONFIGS["lora"]())
    command = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--no-pictures"]
    assert analyze_script.main([*command, "--out", str(tmp_path / "out")]) == 0


def test_the_tokenizer_of_an_adapter_on_the_hub_is_its_own(tmp_path, monkeypatch):
    """From the hub's cache, as after a download."""
    expected = _adapter_with_tokens(tmp_path, CONFIGS["lora"]())
    cached = tmp_path / "hub" / "models--some--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (tmp_path / "adapter").rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = hub_models.find_model(str(tmp_path / "base"))
    model, tokenizer = hub_models.load_trained(source, "some/adapter")
    assert len(tokenizer) == len(hf.AutoTokenizer.from_pretrained(tmp_path / "base")) + 9
    with torch.no_grad():
        assert relative(model(input_ids=IDS.to(model.device)).logits.cpu(), expected) < 1e-5


def test_a_tokenizer_that_cannot_be_read_is_not_replaced_by_the_bases(tmp_path):
    _adapter_with_tokens(tmp_path, CONFIGS["lora"]())
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{")
    with pytest.raises((OSError, ValueError)):
        hub_models.load_tokenizer(hub_models.find_model(str(tmp_path / "base")), tmp_path / "adapter")


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifier_on_a_causal_base_has_the_labels_of_its_adapter(tmp_path, labels, method, capsys):
    save_chat_model(tmp_path / "base")
    kind = hf.AutoModelForSequenceClassification
    config = CONFIGS[method]()
    config.task_type = "SEQ_CLS"
    model = get_peft_model(kind.from_pretrained(tmp_path / "base", num_labels=labels), config)
    perturb(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    report = export_script.export(str(tmp_path / "adapter"), tmp_path / "out")
    assert report["changed"] == []
    exported = kind.from_pretrained(tmp_path / "out")
    assert exported.config.num_labels == labels
    with torch.no_grad():
        assert relative(exported(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-5
    command = ["--adapter", str(tmp_path / "adapter"), "--no-pictures", "--out", str(tmp_path / "analysis")]
    assert analyze_script.main(command) == 0, capsys.readouterr().err
    [modules] = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["modules"].values()
    assert modules
