"""Trainers that know nothing of CLOVER train it: TRL's SFT, DPO, KTO, GRPO and Reward, transformers' own two."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from tests.support.tiny import VOCAB, build, logits, perturb
from tests.support.trainers import StopAfter, settings

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

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(4, VOCAB, (length,), generator=generator).tolist())


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every S by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".clover_S." in n}


def trained_matrices(model: nn.Module) -> dict[str, Tensor]:
    """`matrices` without those of a reference adapter."""
    return {n: s for n, s in matrices(model).items() if ".default." in n}


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


def test_cards_of_saved_adapters_show_the_import_before_trl_s_quick_start(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [sentence(i, 10) for i in range(6)]})
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=trl.SFTConfig(**settings(tmp_path, max_length=16, save_strategy="steps", save_steps=1)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=CloverConfig(),
    )
    trainer.train()
    trainer.save_model()  # beside the card that TRL writes with a checkpoint
    card = (tmp_path / "README.md").read_text()
    assert 0 < card.find("import clover_peft") < card.find("## Quick start")
    assert "import clover_peft" in (tmp_path / "checkpoint-1" / "README.md").read_text()


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


def test_dpo_trains_experts_against_a_reference_adapter(tokenizer, tmp_path):
    """Adapters of experts can be several: TRL's copy of a trained adapter is the reference."""
    options = dict(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(build("mixtral"), CloverConfig(**options, mlp_block_size=8))
    perturb(model)
    before = matrices(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path, max_length=16, bf16=False)),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert first["rewards/margins"] == 0
    assert last["rewards/margins"] != 0
    after = matrices(trainer.model)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    for name, value in before.items():
        assert torch.equal(after[name.replace(".default.", ".ref.")], value)
        assert not torch.equal(after[name], value)


# --- every trainer: three steps, a kill, a resume ---------------------------------------------------


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def texts() -> dict:
    return {"text": [sentence(i, 10) for i in range(8)]}


def questions() -> dict:
    return {
        "prompt": [sentence(i, 4) for i in range(8)],
        "completion": [" " + sentence(50 + i, 4 + i % 3) for i in range(8)],
    }


def talks() -> dict:
    roles = ("user", "assistant", "user", "assistant")
    return {
        "messages": [
            [{"role": role, "content": sentence(7 * i + k, 4)} for k, role in enumerate(roles)] for i in range(8)
        ]
    }


def judged() -> dict:
    return {**questions(), "label": [True, False] * 4}


def many_tokens(completion_ids: list[list[int]], **kwargs) -> list[float]:
    """A reward that hardly any two completions share."""
    return [sum(ids) % 17 / 17 for ids in completion_ids]


def sounds() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 8, 40, generator=generator)
    labels = torch.randint(3, VOCAB, (8, 6), generator=generator)
    return datasets.Dataset.from_dict({"input_features": features.tolist(), "labels": labels.tolist()})


def tokens() -> datasets.Dataset:
    ids = torch.randint(3, VOCAB, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


GROUP = {"num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 2, "beta": 0.1}
TRAINERS = {  # name: (trainer, its arguments, data, their settings, tiny model)
    "sft": ("SFTTrainer", "SFTConfig", texts, {"max_length": 16}, "llama"),
    "sft packed": ("SFTTrainer", "SFTConfig", texts, {"max_length": 32, "packing": True}, "llama"),
    "sft completion-only": ("SFTTrainer", "SFTConfig", questions, {"completion_only_loss": True}, "llama"),
    "sft assistant-only": ("SFTTrainer", "SFTConfig", talks, {"assistant_only_loss": True}, "llama"),
    "dpo": ("DPOTrainer", "DPOConfig", lambda: preferences().to_dict(), {"max_length": 16}, "llama"),
    "kto": ("KTOTrainer", "KTOConfig", judged, {"max_length": 16, "per_device_train_batch_size": 2}, "llama"),
    "grpo": ("GRPOTrainer", "GRPOConfig", questions, GROUP, "llama"),
    "reward": ("RewardTrainer", "RewardConfig", lambda: preferences().to_dict(), {"max_length": 16}, "llama scores"),
    "transformers": ("Trainer", "TrainingArguments", tokens, {"lr_scheduler_type": "cosine"}, "llama"),
    "seq2seq": ("Seq2SeqTrainer", "Seq2SeqTrainingArguments", sounds, {}, "whisper"),
}
OWN = ("transformers", "seq2seq")  # they take no peft_config


def tiny_model(family: str) -> nn.Module:
    if family != "llama scores":
        return build(family)
    torch.manual_seed(0)
    scores = hf.LlamaForSequenceClassification(hf.LlamaConfig(**build("llama").config.to_dict() | {"num_labels": 1}))
    scores.model.load_state_dict(build("llama").model.state_dict())
    return scores


def make_trainer(kind: str, how: str, folder: Path, tokenizer, callbacks=(), **more) -> hf.Trainer:
    """The trainer `kind` around a model that the trainer wraps (`peft_config`, `string`) or that is wrapped."""
    name, arguments, data, own, family = TRAINERS[kind]
    config = CloverConfig(task_type="SEQ_CLS" if kind == "reward" else None)
    library = hf if kind in OWN else trl
    model: nn.Module | str = tiny_model(family)
    given: dict = {}
    if how == "wrapped":
        model = get_peft_model(model, config)
    else:
        given["peft_config"] = config
    if how == "string":
        model.save_pretrained(folder.parent / "base")
        tokenizer.save_pretrained(folder.parent / "base")
        model = str(folder.parent / "base")
    else:
        if kind not in OWN:
            given["processing_class"] = tokenizer
    if kind == "grpo":
        given["reward_funcs"] = many_tokens
    rows = data()
    return getattr(library, name)(
        model=model,
        args=getattr(library, arguments)(**settings(folder, **{**own, **more})),
        train_dataset=rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_dict(rows),
        callbacks=list(callbacks),
        **given,
    )


@pytest.fixture
def chatty(tokenizer) -> hf.PreTrainedTokenizerBase:
    tokenizer.chat_template = CHAT
    return tokenizer


WAYS = [(kind, how) for kind in TRAINERS for how in ("peft_config", "wrapped") if how == "wrapped" or kind not in OWN]


# With LoRA too, TRL then resumes with the policy as its own reference.
LOSES_REFERENCE = Version(trl.__version__) < Version("1.16")


@pytest.mark.parametrize(("kind", "how"), [*WAYS, ("sft", "string"), ("grpo", "string")])
def test_three_steps_a_kill_and_a_resume_bit_for_bit(kind, how, chatty, tmp_path):
    if LOSES_REFERENCE and how == "wrapped" and kind in ("dpo", "kto", "grpo"):
        pytest.skip(f"TRL {trl.__version__} resumes with another reference, with LoRA too")
    checkpoints = {"save_strategy": "steps", "save_steps": 2}

    def run(folder: str, stop: int | None = None, resume: bool = False) -> hf.Trainer:
        torch.manual_seed(11 if resume else 0)
        callbacks = [] if stop is None else [StopAfter(stop)]
        trainer = make_trainer(kind, how, tmp_path / folder, chatty, callbacks, **checkpoints)
        assert isinstance(trainer.model, PeftModel)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    assert whole.state.global_step == 3
    assert len(losses(whole)) == 3
    trained = trained_matrices(whole.model)
    assert trained
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert all(t.isfinite().all() for t in trained.values())
    assert all(t.any() for t in trained.values())
    family = TRAINERS[kind][-1]
    frozen = dict(tiny_model(family).named_parameters())
    names = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): n for n in whole.model.state_dict()}
    here = {n: whole.model.state_dict()[names[n]] for n in frozen if n in names}
    assert len(here) == len(frozen) - (kind == "reward")  # a trained head has a copy of its own
    assert all(torch.equal(here[n], frozen[n]) for n in here)

    killed = run("killed", stop=2)
    assert killed.state.global_step == 2
    resumed = run("killed", resume=True)
    assert resumed.state.global_step == 3
    assert losses(resumed) == losses(whole)
    again = trained_matrices(resumed.model)
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in trained)

    whole.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter")
    assert all(torch.equal(value, trained[name]) for name, value in trained_matrices(loaded).items())


def test_packed_sentences_do_not_see_each_other(chatty, tmp_path):
    """Several share a row, none is lost, and each row's positions start again with every sentence."""
    packed = make_trainer("sft packed", "peft_config", tmp_path / "packed", chatty)
    plain = make_trainer("sft", "peft_config", tmp_path / "plain", chatty)
    rows = packed.train_dataset["input_ids"]
    assert len(rows) < len(plain.train_dataset)
    assert sorted(chain(*rows)) == sorted(chain(*plain.train_dataset["input_ids"]))
    assert (next(iter(packed.get_train_dataloader()))["position_ids"] == 0).sum() > 1


@pytest.mark.parametrize(
    ("kind", "trained"),
    [("sft completion-only", [4, 6]), ("sft assistant-only", [8])],
    ids=["completion", "assistant"],
)
def test_only_what_is_answered_is_trained_on(kind, trained, chatty, tmp_path):
    """The words of the answers, and the token that ends each."""
    trainer = make_trainer(kind, "peft_config", tmp_path, chatty)
    counts = [int((batch["labels"] != -100).sum()) for batch in trainer.get_train_dataloader()]
    ends = 2 if kind == "sft assistant-only" else 1
    assert {min(counts), max(counts)} == {count + ends for count in trained}


# --- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kto", "grpo"])
@pytest.mark.parametrize("pretrained", [False, True], ids=["new adapter", "trained adapter"])
def test_the_policy_starts_at_its_reference_and_leaves_it(kind, pretrained, chatty, tmp_path):
    """With a new adapter the reference is the base; with a trained one a copy that TRL makes of its parameters."""
    how = "wrapped" if pretrained else "peft_config"
    trainer = make_trainer(kind, how, tmp_path, chatty, bf16=False, learning_rate=5e-2)
    if pretrained:
        # TRL copied the adapter when the trainer was made; both are given the values of one that was trained.
        assert sorted(trainer.model.peft_config) == ["default", "ref"]
        perturb(trainer.model)
        with torch.no_grad():
            for name, value in list(trainer.model.named_parameters()):
                if ".clover_S.default." in name:
                    trainer.model.get_parameter(name.replace(".default.", ".ref.")).copy_(value)
    before = matrices(trainer.model)
    trainer.train()
    # The first forward of KTO's references and policies is the same; GRPO's estimate of KL is exactly zero then.
    measured = [entry for entry in trainer.state.log_history if "kl" in entry]
    names = ["kl"] if kind == "grpo" else ["rewards/chosen", "rewards/rejected"]
    for name in names:
        values = [entry[name] for entry in measured if name in entry]
        assert values[0] == 0
        assert values[-1] != 0
    after = matrices(trainer.model)
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert {name.split(".clover_S.")[1].split(".")[0] for name in moved} == {"default"}
    assert len(moved) == 6


def test_synchronising_with_a_server_leaves_no_drift(tmp_path):
    """What TRL does for GRPO before every generation: merge, read the weights by the base's names, unmerge."""
    model = get_peft_model(build("llama", torch.bfloat16), CloverConfig())
    perturb(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = dict(build("llama", torch.bfloat16).named_parameters())
    first: dict[str, Tensor] = {}
    for _ in range(100):
        model.merge_adapter()
        sent = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
            for name, value in model.named_parameters()
            if model.prefix not in name
        }
        model.unmerge_adapter()
        first = first or sent
        assert sent.keys() == expected.keys()
        assert all(torch.equal(sent[name], first[name]) for name in sent)
    changed = {name.split(".")[-2] for name in first if not torch.equal(first[name], expected[name])}
    assert changed == {"k_proj", "v_proj", "up_proj"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [{}, {"s_matrix": "diagonal", "clover_dropout": 0.2}, {"r": 4, "save_bases": False}],
    ids=["full", "diagonal with dropout", "leading, bases not saved"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, tmp_path):
    def run(folder: str, stop: int | None = None, resume: bool = False) -> hf.Trainer:
        torch.manual_seed(11 if resume else 0)
        trainer = hf.Trainer(
            model=get_peft_model(build("llama"), CloverConfig(**config)),
            args=hf.TrainingArguments(
                **settings(tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=2),
                lr_scheduler_type="cosine",
            ),
            train_dataset=tokens(),
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
