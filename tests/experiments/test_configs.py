"""configs/: protocols and models combine into runs, and every method trains as many numbers as CLOVER."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.ablation.grid import Trial, read_grid, settings_of
from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.run import count_parameters

CONFIGS = Path(__file__).parents[2] / "configs"
PROTOCOLS = {path.stem: path for path in (CONFIGS / "protocols").glob("*.yaml")}
MODELS = {path.stem: path for path in (CONFIGS / "models").glob("*.yaml")}
METHODS = ["clover", "clover_diagonal", "lora", "rslora", "dora", "pissa", "hira", "oft", "psoft", "full"]
# (hidden, intermediate, layers, heads, kv heads, head size): the models' config.json, of which a test needs no copy.
SHAPES = {
    "smollm2_135m": (LlamaConfig, 576, 1536, 30, 9, 3, 64),
    "llama2_7b": (LlamaConfig, 4096, 11008, 32, 32, 32, 128),
    "llama3_8b": (LlamaConfig, 4096, 14336, 32, 32, 8, 128),
    "qwen3_8b": (Qwen3Config, 4096, 12288, 36, 32, 8, 128),
}
CLOVER = {"smollm2_135m": 3_686_400, "llama2_7b": 56_098_816, "llama3_8b": 37_748_736, "qwen3_8b": 37_748_736}


def on_meta(model: str) -> torch.nn.Module:
    """The model with a small vocabulary, on the meta device; no method adapts the embeddings."""
    kind, hidden, intermediate, layers, heads, kv_heads, head_dim = SHAPES[model]
    config = kind(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_the_files_are_complete():
    assert PROTOCOLS.keys() == {"clover", "llm_adapters"}
    assert MODELS.keys() == SHAPES.keys()
    for path in MODELS.values():
        assert list(yaml.safe_load(path.read_text())["methods"]) == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", sorted(SHAPES))
def test_every_method_trains_as_many_numbers_as_clover(model, method):
    settings = parse(MODELS[model], [f"method={method}"])
    if method == "full":
        assert settings.peft is None
        return
    if hasattr(settings.peft, "init_lora_weights"):
        settings.peft.init_lora_weights = False  # PiSSA's start needs weights; its tensors are LoRA's
    adapted = peft.get_peft_model(on_meta(model), settings.peft, low_cpu_mem_usage=True)
    trainable, _ = count_parameters(adapted)
    if method == "clover_diagonal":
        assert 0 < trainable < CLOVER[model] / 50  # there are no more directions than that
    elif method == "clover":
        assert trainable == CLOVER[model]
    else:
        assert abs(trainable / CLOVER[model] - 1) < 0.01


def test_every_variant_of_the_search_trains_as_many_too():
    grid = read_grid(CONFIGS / "ablations" / "smollm2_search.yaml", ["settings.use_cpu=true"])
    families = ["clover", "lora", "dora", "pissa", "hira"]
    counts = {family: sum(method.name.split("_")[0] == family for method in grid.methods) for family in families}
    assert set(counts.values()) == {7}
    assert len(grid.methods) == 35
    for method in grid.methods:
        trial = Trial(method.name, method.learning_rates[0], 0)
        settings = parse(grid.base, settings_of(grid, method, trial, Path("runs")))
        if hasattr(settings.peft, "init_lora_weights"):
            settings.peft.init_lora_weights = False
        adapted = peft.get_peft_model(on_meta("smollm2_135m"), settings.peft, low_cpu_mem_usage=True)
        trainable, _ = count_parameters(adapted)
        assert abs(trainable / CLOVER["smollm2_135m"] - 1) < 0.01, method.name
        factors = settings.learning_rate_factors
        assert all(any(part in name for name, p in adapted.named_parameters() if p.requires_grad) for part in factors)


@pytest.mark.parametrize(
    ("protocol", "prompt", "cutoff", "on_prompt"),
    [("clover", "clover", 1024, None), ("llm_adapters", "llm_adapters", 256, False)],
)
def test_protocols_are_as_published(protocol, prompt, cutoff, on_prompt, monkeypatch):
    # bf16 is refused where neither CPU nor GPU is said to have it
    settings = parse([PROTOCOLS[protocol], MODELS["llama2_7b"]], ["method=dora", "use_cpu=true"])
    sft = settings.sft
    assert (settings.job.prompt, sft.max_length, sft.completion_only_loss) == (prompt, cutoff, on_prompt)
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 16
    assert (sft.lr_scheduler_type, sft.warmup_steps, sft.num_train_epochs, sft.bf16) == ("linear", 100, 3, True)
    assert settings.job.rows is None
    assert settings.peft.use_dora
    assert sft.output_dir == "runs/llama2_7b-dora"
    assert settings.job.model == "meta-llama/Llama-2-7b-hf"
    assert "methods" not in settings.values


def test_a_method_is_chosen_and_changed():
    model = MODELS["smollm2_135m"]
    assert parse(model, ["peft.r=4", "method=hira"]).peft.r == 4
    assert parse(model, ["method=lora", "methods.lora.r=5"]).peft.r == 5
    with pytest.raises(ValueError, match="method=zzz: expected one of clover, clover_diagonal, lora"):
        parse(model, ["method=zzz"])
    with pytest.raises(ValueError, match=r"method: expected one of clover, .* found none; pass method=<name>"):
        parse(model)
    with pytest.raises(ValueError, match="methods: expected a block of peft blocks by name, found None"):
        parse(CONFIGS / "lora.yaml", ["method=lora"])
    with pytest.raises(ValueError, match=r"methods\.lora\.r\.x=5: expected a block r, found 18"):
        parse(model, ["method=lora", "methods.lora.r.x=5"])
    with pytest.raises(ValueError, match="methods: expected a block"):
        parse(model, ["methods.lora=3", "method=lora"])


def test_later_files_replace_keys_of_earlier_ones(tmp_path):
    (tmp_path / "more.yaml").write_text("max_length: 77\nmethod: clover\n")
    settings = parse([PROTOCOLS["clover"], MODELS["smollm2_135m"], tmp_path / "more.yaml"], ["use_cpu=true"])
    assert (settings.sft.max_length, settings.sft.num_train_epochs) == (77, 3)
    assert settings.sft.output_dir == "runs/more-clover"


def test_a_grid_of_ones_own_lies_anywhere_and_has_any_method_of_peft(tmp_path):
    grid = {
        "base": ["protocols/clover.yaml", "models/smollm2_135m.yaml"],
        "settings": {"use_cpu": True},
        "data": {"validation": 5},
        "methods": {
            "clover": [1e-3],
            "vera": {"method": "vera", "learning_rates": [1e-3], "methods.vera": {"peft_type": "VERA", "r": 256}},
        },
        "seeds": [0],
        "evaluation": {"mode": "score"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(grid))
    found = read_grid(tmp_path / "mine.yaml")
    method = found.methods[1]
    settings = parse(found.base, settings_of(found, method, Trial("vera", 1e-3, 0), tmp_path))
    assert (settings.peft.peft_type, settings.peft.r) == ("VERA", 256)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**grid, "base": ["none.yaml"]}))
    with pytest.raises(ValueError, match=r"mine.yaml: base: expected a file in .*, found no none.yaml"):
        read_grid(tmp_path / "mine.yaml")
