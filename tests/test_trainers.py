"""Trainers that know nothing of CLOVER train it: TRL's SFT and DPO, transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from tests.tiny import VOCAB, build, logits, perturb

trl = pytest.importorskip("trl", reason="the trainers' tests need the train extra: pip install clover-peft[train]")
datasets = pytest.importorskip("datasets", reason="the trainers' tests need the train extra")


@pytest.fixture(autouse=True)
def quiet_progress_bars():
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerBase:
    """One word, one token: "w7" is token 7 and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (length,), generator=generator).tolist())


def settings(folder: Path, **more) -> dict:
    """What all trainers here share."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every S by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".clover_S." in n}


def check_only_s_moved(model: nn.Module, base: nn.Module) -> None:
    """Every S was trained, in float32; the base has its own bits."""
    trained = matrices(model)
    assert len(trained) == 6
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert all(float(t.abs().max()) > 0 for t in trained.values())
    assert all(torch.isfinite(t).all() for t in trained.values())
    frozen = dict(base.named_parameters())
    names = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): n for n in model.state_dict()}
    assert all(torch.equal(model.state_dict()[names[n]], p) for n, p in frozen.items())


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precision", [{"bf16": False}, {}], ids=["float32", "trl's default"])
def test_sft_with_peft_config_trains_s_and_saves_a_loadable_adapter(precision, tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [sentence(i, 10) for i in range(6)]})
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=trl.SFTConfig(**settings(tmp_path, max_length=16, **precision)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=CloverConfig(),
    )
    assert trainer.args.bf16 is precision.get("bf16", True)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert len(losses(trainer)) == 3
    assert all(loss == loss and loss < 20 for loss in losses(trainer))
    check_only_s_moved(trainer.model, build("llama"))

    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert torch.equal(logits(loaded, "llama"), logits(trained, "llama"))


def preferences() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i, 4) for i in range(4)],
            "chosen": [" " + sentence(10 + i, 5) for i in range(4)],
            "rejected": [" " + sentence(20 + i, 6) for i in range(4)],
        }
    )


@pytest.mark.parametrize("precision", [{"bf16": False}, {}], ids=["float32", "trl's default"])
@pytest.mark.parametrize("pretrained", [False, True], ids=["new adapter", "trained adapter"])
def test_dpo_starts_at_its_reference_and_leaves_it(pretrained, precision, tokenizer, tmp_path):
    """With a new adapter the reference is the base; with a trained one a copy that TRL makes of its parameters."""
    model, config = build("llama"), CloverConfig()
    if pretrained:
        model, config = get_peft_model(model, config), None
        perturb(model)
        before = matrices(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, max_length=16, **precision)),
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first[name] == 0
        assert last[name] != 0
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    if not pretrained:
        check_only_s_moved(trainer.model, build("llama"))
        return
    after = matrices(trainer.model)
    for name, value in before.items():
        assert torch.equal(after[name.replace(".default.", ".ref.")], value)
        assert not torch.equal(after[name], value)


def test_dpo_policy_and_reference_have_the_same_log_probabilities_at_the_start(tokenizer, tmp_path):
    model = get_peft_model(build("llama"), CloverConfig(s_matrix="diagonal"))
    perturb(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, max_length=16, bf16=False)),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    trainer.model.eval()
    policy = logits(trainer.model, "llama")
    trainer.model.set_adapter("ref")
    assert torch.equal(logits(trainer.model, "llama"), policy)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".clover_S.default." in name:
                parameter.zero_()
    assert torch.equal(logits(trainer.model, "llama"), policy)


class StopAfter(hf.TrainerCallback):
    """A kill that comes at a known step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


@pytest.mark.parametrize(
    "config",
    [{}, {"s_matrix": "diagonal", "clover_dropout": 0.2}, {"r": 4, "save_bases": False}],
    ids=["full", "diagonal with dropout", "leading, bases not saved"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, tmp_path):
    ids = torch.randint(3, VOCAB, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})

    def run(folder: str, stop: int | None = None, resume: bool = False) -> hf.Trainer:
        torch.manual_seed(11 if resume else 0)
        trainer = hf.Trainer(
            model=get_peft_model(build("llama"), CloverConfig(**config)),
            args=hf.TrainingArguments(
                **settings(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=2),
                lr_scheduler_type="cosine",
            ),
            train_dataset=rows,
            callbacks=[] if stop is None else [StopAfter(stop)],
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    killed = run("killed", stop=3)
    assert killed.state.global_step == 3
    # The checkpoint of step 3 is what a kill would not have written.
    for checkpoint in (tmp_path / "killed").glob("checkpoint-3"):
        checkpoint.rename(tmp_path / "unused")
    resumed = run("killed", resume=True)
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(whole)
    expected = matrices(whole.model)
    assert len(expected) == 6
    assert all(torch.equal(value, expected[name]) for name, value in matrices(resumed.model).items())
    assert all(not module.merged for module in resumed.model.modules() if isinstance(module, CloverLayer))
