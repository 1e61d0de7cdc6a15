"""scripts/export.py: what stock transformers loads from its folder is the adapted model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from clover_peft import CloverConfig, CloverLayer
from tests.support.tiny import build, load_script, logits, perturb, relative

pytest.importorskip("trl", reason="borrows the tokenizer of the trainers' tests: pip install clover-peft[train]")
from tests.support.tiny_chat import CHATML, make_tokenizer

script = load_script("export")

IDS = torch.arange(3, 40).unsqueeze(0)
pytestmark = pytest.mark.usefixtures("one_thread")


def save_base(folder: Path, tied: bool, dtype: torch.dtype = torch.float32, **choices: Any) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 4,  # padded, as real vocabularies are
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            **choices,
        )
    ).to(dtype)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(base: Path, out: Path, config: CloverConfig, added: int = 0, scale: float = 0.05) -> torch.Tensor:
    """An adapter with random S, and embeddings changed where they are trained; its logits."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if added:
        tokenizer.add_tokens([f"<new{i}>" for i in range(added)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[-added:] = 0.3
    model = get_peft_model(model, config)
    perturb(model, scale)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "clover_S" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("choices", "added", "stays_tied"),
    [
        ({}, 0, True),
        ({}, 9, True),
        ({"trainable_token_indices": [5, 6]}, 0, True),
        ({"modules_to_save": ["embed_tokens"]}, 0, False),
        ({"modules_to_save": ["lm_head"]}, 0, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, 9, False),
    ],
    ids=["plain", "added tokens", "trained tokens", "trained embedding", "trained head", "added and trained"],
)
def test_embeddings_and_ties_survive(tmp_path, tied, choices, added, stays_tied):
    save_base(tmp_path / "base", tied)
    expected = train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM", **choices), added)
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out")
    assert report["difference"] < 1e-5
    assert report["changed"] == []
    assert report["rounding"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, expected) < 1e-5
    assert model.config.tie_word_embeddings == (tied and stays_tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (tied and stays_tied)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "base")) + added


def test_stock_transformers_loads_the_folder_without_this_package(tmp_path):
    save_base(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    expected = train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert script.main(arguments) == 0
    script.main([*arguments[:1], str(tmp_path / "wide"), "--dtype", "float32"])
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    code = (
        "import sys; sys.modules['clover_peft'] = None; sys.modules['peft'] = None\n"
        "import torch; from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "found = {}\n"
        "for name in ('out', 'wide'):\n"
        "    model = AutoModelForCausalLM.from_pretrained(name)\n"
        "    ids = load_file('ids.safetensors')['ids']\n"
        "    found[name] = model(input_ids=ids).logits.detach().clone()\n"
        "    assert model.generation_config.temperature == 0.7\n"
        "    assert AutoTokenizer.from_pretrained(name).chat_template == open('template').read()\n"
        "save_file(found, 'found.safetensors')\n"
    )
    (tmp_path / "template").write_text(CHATML)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    found = load_file(tmp_path / "found.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {"out": torch.bfloat16, "wide": torch.float32}
    assert relative(found["out"], expected) < 0.05  # bfloat16
    wide = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert relative(found["wide"], wide(input_ids=IDS).logits) < 1e-5


CONVERTER = (  # llama.cpp's own, out of a source distribution; nothing of it is built
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
CONVERTER_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


@pytest.mark.slow
def test_llama_cpp_converts_the_folder(tmp_path):
    """SmolLM2 with an adapter, merged, as GGUF in float32: the same logits."""
    for module in ("sentencepiece", "google.protobuf"):
        pytest.importorskip(module, reason="llama.cpp's converter needs it: pip install sentencepiece protobuf")
    from clover_peft.io.hub_models import find_model

    archive = tmp_path / "llama_cpp.tar.gz"
    urllib.request.urlretrieve(CONVERTER, archive)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == CONVERTER_SHA256
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)  # its hash is known
    converter = next(tmp_path.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))

    base = find_model(None).path
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), CloverConfig(task_type="CAUSAL_LM"))
    perturb(model, scale=0.02)
    model.save_pretrained(tmp_path / "adapter")
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out", base=base)
    assert report["difference"] < 1e-5
    command = [sys.executable, str(converter), str(tmp_path / "out"), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(tmp_path / "model.gguf")], check=True, capture_output=True)
    read = GgufConfig(dequantize=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", quantization_config=read)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=IDS).logits
        assert relative(back.float()(input_ids=IDS).logits, expected) < 1e-5


def test_loras_stand_in_for_the_adapter_at_a_known_loss(tmp_path, capsys):
    save_base(tmp_path / "base", tied=True)
    expected = train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--lora-rank", "4", "16", "32"]) == 0
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines()[:3]] == ["LoRA r=4", "LoRA r=16", "LoRA r=32"]
    errors = []
    for rank in (4, 16, 32):
        lora = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / f"out-lora-r{rank}"
        )
        assert lora.peft_config["default"].peft_type == "LORA"
        with torch.no_grad():
            errors.append(relative(lora(input_ids=IDS).logits, expected))
    assert errors[0] > errors[1] > errors[2]


def test_a_lora_after_added_tokens_has_their_rows(tmp_path):
    save_base(tmp_path / "base", tied=True)
    expected = train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"), added=9)
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out", lora_ranks=[4, 32])
    assert report["lora"][32]["logits"] < report["lora"][4]["logits"]
    folder = tmp_path / "out-lora-r32"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "base")) + 9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora = PeftModel.from_pretrained(model, folder)
    assert torch.all(lora.get_input_embeddings().weight[-9:] == 0.3)
    with torch.no_grad():
        assert relative(lora(input_ids=IDS).logits, expected) < report["lora"][4]["logits"]


@pytest.mark.parametrize("rank", ["0", "33"])
def test_ranks_are_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys, rank):
    save_base(tmp_path / "base", tied=True)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    monkeypatch.setattr(script, "lora_errors", lambda *_: pytest.fail("computed"))
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--lora-rank", "4", rank]) == 2
    assert f"--lora-rank {rank}: expected 1 to 32" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_bias_is_named_where_a_lora_is_asked_for(tmp_path, capsys):
    save_base(tmp_path / "base", tied=True, attention_bias=True)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert script.main([*arguments, "--lora-rank", "4"]) == 2
    message = capsys.readouterr().err
    assert "error: model.layers.0.self_attn." in message
    assert "whose bias the adapter changes too" in message
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert script.main(arguments) == 0
    config = CloverConfig(task_type="CAUSAL_LM", bias="all")
    train(tmp_path / "base", tmp_path / "trained biases", config)
    arguments = [str(tmp_path / "trained biases"), str(tmp_path / "other")]
    assert script.main([*arguments, "--lora-rank", "4"]) == 2
    assert "bias cannot be part of a LoRA made of it" in capsys.readouterr().err
    assert script.main(arguments) == 0


def test_only_clover_becomes_a_lora(tmp_path, capsys):
    save_base(tmp_path / "base", tied=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["v_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert script.main([*arguments, "--lora-rank", "4"]) == 2
    assert "expected a CLOVER adapter, found PeftType.LORA" in capsys.readouterr().err
    assert script.main(arguments) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_that_is_lost_is_found_out(tmp_path, monkeypatch, capsys, dtype):
    """Also in bfloat16, and where the adapter does less than rounding all weights."""
    save_base(tmp_path / "base", tied=True)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"), scale=1e-3)
    adapter, arguments = str(tmp_path / "adapter"), ["--dtype", dtype]
    assert script.main([adapter, str(tmp_path / "good"), *arguments]) == 0
    monkeypatch.setattr(CloverLayer, "merge", lambda *args, **kwargs: None)
    assert script.main([adapter, str(tmp_path / "lost"), *arguments]) == 1
    assert "FAILED: the export is not the adapted model: expected logits within" in capsys.readouterr().err


def test_a_tensor_that_is_saved_wrong_is_found_out(tmp_path, monkeypatch, capsys):
    save_base(tmp_path / "base", tied=False)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    monkeypatch.setattr(script, "_settle_ties", lambda model: model.lm_head.weight.data[7].mul_(1.01))
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 1
    assert "FAILED: lm_head.weight: expected the merged tensor in the folder" in capsys.readouterr().err


@pytest.mark.parametrize(("own", "dtype"), [("bfloat16", None), ("float16", None), ("float32", "bfloat16")])
def test_a_narrow_folder_is_the_float32_merge_rounded_once(tmp_path, own, dtype):
    save_base(tmp_path / "base", tied=True, dtype=getattr(torch, own))
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    chosen = getattr(torch, dtype or own)
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out", dtype=dtype and chosen)
    assert report["changed"] == []
    assert report["difference"] < 1e-5
    assert 0 < report["rounding"] < 0.1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        assert tensor.dtype == chosen
        assert torch.equal(tensor, merged[name].to(chosen))


def _composite(kind: Any, config: Any, encoder: str) -> PreTrainedModel:
    """A model of an encoder and a GPT-2 decoder, which are tiny."""
    decoder = build("gpt2").config
    torch.manual_seed(0)
    made = kind(config.from_encoder_decoder_configs(build(encoder).config, decoder))
    made.config.decoder_start_token_id = made.config.pad_token_id = 0
    return made.eval()


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: build("bert"),
    "clip": lambda: build("clip"),  # embeddings in its towers alone
    "wav2vec2": lambda: build("wav2vec2"),  # no embeddings
    "text encoder and decoder": lambda: _composite(hf.EncoderDecoderModel, hf.EncoderDecoderConfig, "bert"),
    "vision encoder and decoder": lambda: _composite(
        hf.VisionEncoderDecoderModel, hf.VisionEncoderDecoderConfig, "vit"
    ),
    "speech encoder and decoder": lambda: _composite(
        hf.SpeechEncoderDecoderModel, hf.SpeechEncoderDecoderConfig, "wav2vec2"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_models_are_exported(kind, tmp_path):
    KINDS[kind]().save_pretrained(tmp_path / "base")
    model = get_peft_model(KINDS[kind](), CloverConfig())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out")
    assert report["difference"] < 1e-5
    assert report["changed"] == []
    merged = model.merge_and_unload()
    found = type(merged).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_an_encoder_is_not_taken_for_the_whole_model(task, tmp_path):
    def encoder() -> PreTrainedModel:
        torch.manual_seed(0)
        return hf.T5EncoderModel(build("t5").config).eval()

    encoder().save_pretrained(tmp_path / "base")
    model = get_peft_model(encoder(), CloverConfig(task_type=task))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]


@pytest.mark.parametrize("saved", [False, True])
def test_parameters_that_no_file_has_are_named(saved, tmp_path):
    """A classifier on a language model's checkpoint draws its pooler at random, and peft saves the head alone."""
    build("bert").save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    more = {"modules_to_save": ["pooler", "classifier"]} if saved else {}
    model = get_peft_model(classifier, CloverConfig(task_type="SEQ_CLS", **more)).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.export(str(tmp_path / "adapter"), tmp_path / "out")
    named = [str(each.message) for each in caught if "initialises them anew" in str(each.message)]
    assert bool(named) != saved
    assert all("bert.pooler.dense.bias, bert.pooler.dense.weight" in each for each in named)
    exported = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert (relative(logits(exported, "bert"), logits(model, "bert")) < 1e-5) == saved


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_a_model_computes_in_its_dtype_while_it_loads_is_no_difference(tmp_path, dtype):
    """Gemma's scale of the embeddings is rounded to the dtype that it is loaded in, and not saved."""
    build("gemma", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = CloverConfig(task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    chosen = ["--dtype", dtype] if dtype else []
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), *chosen]) == 0


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype", "end"),
    [("deepseek_v3", torch.bfloat16, "e_score_correction_bias"), ("t5", torch.float16, ".wo.weight")],
)
def test_what_a_class_keeps_in_float32_is_not_rounded(tmp_path, family, dtype, end, chosen):
    model = build(family)
    for name, tensor in model.state_dict().items():
        if name.endswith(end):  # no value that rounding would leave as it is
            tensor.copy_(torch.linspace(0.1, 0.3, tensor.numel()).view_as(tensor))
        elif not chosen and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    model.save_pretrained(tmp_path / "base")
    if not chosen:  # the base itself is saved in its dtype
        type(model).from_pretrained(tmp_path / "base", dtype=dtype).save_pretrained(tmp_path / "base")
    model = get_peft_model(type(model).from_pretrained(tmp_path / "base", dtype=torch.float32), CloverConfig())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out", dtype=dtype if chosen else None)
    assert report["dtype"] == str(dtype)
    assert report["changed"] == []
    assert report["difference"] < 1e-4
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    loaded = type(build(family)).from_pretrained(tmp_path / "base", dtype=dtype).state_dict()
    kept = {name for name in before if name in loaded and loaded[name].dtype != dtype}  # more in transformers 5.24
    assert kept >= {name for name in before if name.endswith(end)}
    assert {name for name, tensor in after.items() if tensor.dtype != dtype} == kept
    assert all(torch.equal(after[name], before[name]) for name in kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", "4"], "trainable_token_indices cannot be part of a LoRA"),
        (["--base", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path, arguments, message, capsys):
    save_base(tmp_path / "base", tied=True)
    config = CloverConfig(task_type="CAUSAL_LM", trainable_token_indices=[3])
    train(tmp_path / "base", tmp_path / "adapter", config)
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "base")]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_a_rank_that_is_given_twice_is_written_once(tmp_path):
    save_base(tmp_path / "base", tied=True)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    report = script.export(str(tmp_path / "adapter"), tmp_path / "out", lora_ranks=[4, 4])
    assert report["lora"].keys() == {4}


def test_the_working_directory_has_its_loras_beside_it(tmp_path, monkeypatch):
    save_base(tmp_path / "base", tied=True)
    train(tmp_path / "base", tmp_path / "adapter", CloverConfig(task_type="CAUSAL_LM"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script.export(str(tmp_path / "adapter"), Path("."), lora_ranks=[4])
    assert (tmp_path / "here" / "config.json").is_file()
    assert (tmp_path / "here-lora-r4" / "adapter_config.json").is_file()


def test_prompts_are_refused_in_a_sentence(tmp_path, capsys):
    save_base(tmp_path / "base", tied=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "expected an adapter of weights, found PROMPT_TUNING" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["base", "../base", "runs/some/base"])
def test_a_base_that_is_elsewhere_is_asked_for(tmp_path, monkeypatch, capsys, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_base(tmp_path / "base", tied=True)
    config = CloverConfig(task_type="CAUSAL_LM", base_model_name_or_path=named)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.peft_config["default"].base_model_name_or_path = named
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if named != "../base" else tmp_path)
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # behind progress bars
    assert f"expected its base model {named} in that folder" in message
    assert "pass --base" in message
    assert script.main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]) == 0
