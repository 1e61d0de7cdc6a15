"""The experiments for peft's method comparison are as described, and peft's own script runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from clover_peft import CloverConfig
from clover_peft.io.hub_models import find_model
from tests.support import peft_comparison
from tests.support.peft_comparison import PLACE, prepare
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "benchmarks" / "method_comparison" / "experiments"
PARAMETERS = {
    "llama-3.2-3B-k-vo": 7_340_032,
    "llama-3.2-3B-k-vo-up16": 11_010_048,
    "llama-3.2-3B-vo-up16": 7_340_032,
    "llama-3.2-3B-v-up-down-low-rank8": 19_726_336,
}
LORA = "lora/llama-3.2-3B-rank32"


def read(name: str) -> CloverConfig:
    return PeftConfig.from_pretrained(str(EXPERIMENTS / "clover" / name))


def test_every_experiment_is_tested():
    assert {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.glob("*/*")} == {
        f"clover/{name}" for name in PARAMETERS
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_experiment_trains_the_described_number_of_parameters(name):
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        assert model.num_parameters() == 3_212_749_824  # as in peft's record of full fine-tuning
        model = get_peft_model(model, read(name))
    assert model.get_nb_trainable_parameters()[0] == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_experiment_makes_the_adapter_that_its_options_make_here(name):
    """A config without weights could stand for an earlier file's, whose bases differ from a new adapter's."""
    config = read(name)
    chosen = {key: getattr(config, key) for key in ("target_modules", "mlp_block_size", "low_rank")}
    states = []
    for each in (config, CloverConfig(task_type="CAUSAL_LM", **chosen)):
        torch.manual_seed(0)
        model = build("llama", hidden_size=128, intermediate_size=128, head_dim=32)
        torch.manual_seed(1)
        model = get_peft_model(model, each)
        assert each.max_condition == 100
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_parameters_change_the_optimizer_alone(name):
    parameters = json.loads((EXPERIMENTS / "clover" / name / "training_params.json").read_text())
    assert parameters.keys() == {"optimizer_kwargs"}
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], **parameters["optimizer_kwargs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clover/llama-3.2-3B-k-vo", "clover/llama-3.2-3B-v-up-down-low-rank8", LORA])
def test_peft_s_script_runs_an_experiment(name, tmp_path):
    if "PEFT_CHECKOUT" not in os.environ:
        pytest.skip("PEFT_CHECKOUT does not name a checkout of github.com/huggingface/peft")
    pytest.importorskip("bitsandbytes", reason="peft's script imports it: pip install clover-peft[quant]")
    checkout = Path(os.environ["PEFT_CHECKOUT"]).resolve()
    source = (checkout / PLACE / "experiments" if name == LORA else EXPERIMENTS) / name
    prepare(checkout, tmp_path, find_model(None).path, {name: source})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"GIT_DIR": str(checkout / ".git"), "GIT_WORK_TREE": str(checkout)}
    command = [sys.executable, peft_comparison.__file__, "script/run.py", "-v", "--clean", f"experiments/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    [path] = [
        path for place in ("results", "temporary_results") for path in (tmp_path / "script" / place).glob("*.json")
    ]
    record = json.loads(path.read_text())
    assert record["train_info"]["status"] == "success", record["run_info"]["error_msg"]
    assert record["run_info"]["experiment_name"] == name
    assert record["run_info"]["peft_config"]["peft_type"] == name.partition("/")[0].upper()
    metrics = record["train_info"]["metrics"]
    assert [each["step"] for each in metrics] == [2, 4, 4]
    assert {"test accuracy", "forgetting"} <= metrics[-1].keys()
    assert metrics[-1]["forgetting"] != 0
    # 99,999,999 stands for a checkpoint that could not be saved.
    assert 4 * record["train_info"]["num_trainable_params"] < record["train_info"]["file_size"] != 99_999_999
