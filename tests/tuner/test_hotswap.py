"""An adapter is replaced by a file of the same structure, in place."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from clover_peft import CloverConfig, hotswap_adapter
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

SMALL = dict(vocab_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)

pytestmark = pytest.mark.usefixtures("one_thread")


def _saved(folder, seed: int, **options) -> str:
    model = get_peft_model(build("llama"), CloverConfig(**options))
    perturb(model, seed=seed)
    model.save_pretrained(folder)
    return str(folder)


def test_a_hotswap_changes_the_numbers_in_place(tmp_path):
    one, two = _saved(tmp_path / "one", 1), _saved(tmp_path / "two", 2)
    model = PeftModel.from_pretrained(build("llama"), one)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(build("llama"), two), "llama"))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    hotswap_adapter(model, one)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(build("llama"), one), "llama"))


def test_folded_adapters_are_swapped_and_stay_as_they_are(tmp_path):
    one, two = _saved(tmp_path / "one", 1, save_bases="folded"), _saved(tmp_path / "two", 2, save_bases="folded")
    model = PeftModel.from_pretrained(build("llama"), one)
    model.load_adapter(one, "second")
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "llama"), logits(PeftModel.from_pretrained(build("llama"), two), "llama"))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


@pytest.mark.parametrize(
    ("task_type", "auto"),
    [
        ("SEQ_CLS", hf.AutoModelForSequenceClassification),
        ("TOKEN_CLS", hf.AutoModelForTokenClassification),
        ("QUESTION_ANS", hf.AutoModelForQuestionAnswering),
    ],
)
def test_the_head_of_a_task_is_swapped_too(tmp_path, task_type, auto):
    """Peft adds the head's names to `modules_to_save` again whenever it loads such an adapter."""

    def base():
        torch.manual_seed(0)
        return auto.from_config(hf.AutoConfig.for_model("bert", **SMALL)).eval()

    def run(model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(4, 16).view(2, 6))[0]

    for seed in (1, 2):
        model = get_peft_model(base(), CloverConfig(task_type=task_type))
        perturb(model, seed=seed)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / str(seed))
    one, two = (PeftModel.from_pretrained(base(), tmp_path / name) for name in ("1", "2"))
    assert relative(run(one), run(two)) > 1e-3
    hotswap_adapter(one, str(tmp_path / "2"))
    assert torch.equal(run(one), run(two))


@pytest.mark.parametrize("save_bases", [True, False])
def test_what_the_file_says_of_its_bases_is_swapped_too(tmp_path, save_bases):
    one = _saved(tmp_path / "one", 1)
    dtype = torch.bfloat16 if save_bases else torch.float32  # bases of other weights cannot be computed again
    other = get_peft_model(build("llama", dtype), CloverConfig(max_condition=1e4, save_bases=save_bases))
    perturb(other, seed=2)
    other.save_pretrained(tmp_path / "two")
    model = PeftModel.from_pretrained(build("llama"), one)
    before = logits(model, "llama")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_bytes((tmp_path / "two" / "adapter_config.json").read_bytes())
    with pytest.raises(Exception, match=r"\S"):
        hotswap_adapter(model, str(tmp_path / "broken"))
    assert (model.peft_config["default"].base_precision, model.peft_config["default"].max_condition) == (
        "float32",
        100,
    )
    assert torch.equal(logits(model, "llama"), before)
    hotswap_adapter(model, str(tmp_path / "two"))
    config = model.peft_config["default"]
    assert (config.base_precision, config.max_condition) == (str(dtype).removeprefix("torch."), 1e4)
    config.save_bases = save_bases
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    assert relative(logits(again, "llama"), logits(model, "llama")) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4},
        {"r": 4, "truncate": True},
        {"s_matrix": "diagonal"},
        {"target_modules": ["v_proj"]},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
    ],
    ids=str,
)
def test_an_adapter_of_another_structure_is_not_swapped_in(tmp_path, options):
    model = PeftModel.from_pretrained(build("llama"), _saved(tmp_path / "one", 1))
    expected = logits(model, "llama")
    with pytest.raises(ValueError, match="expected"):
        hotswap_adapter(model, _saved(tmp_path / "two", 2, **options))
    assert torch.equal(logits(model, "llama"), expected)
    assert list(model.peft_config) == ["default"]


def test_only_a_loaded_unmerged_clover_adapter_is_swapped(tmp_path):
    one = _saved(tmp_path / "one", 1)
    model = PeftModel.from_pretrained(build("llama"), one)
    with pytest.raises(
        ValueError, match=r"expected a loaded CLOVER adapter, found none; pass the name of one of \['default'\]"
    ):
        hotswap_adapter(model, one, "other")
    get_peft_model(build("llama"), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="expected a CLOVER adapter, found LoraConfig; load it under a name"):
        hotswap_adapter(model, str(tmp_path / "lora"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, one)


@pytest.mark.slow
def test_a_hotswap_compiles_nothing_again(tmp_path):
    one, two = _saved(tmp_path / "one", 1), _saved(tmp_path / "two", 2)
    model = PeftModel.from_pretrained(build("llama"), one)
    compiled = torch.compile(model)
    batch = inputs("llama")
    with torch.no_grad():
        first = compiled(**batch).logits
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, two)
            second = compiled(**batch).logits
    assert relative(first, second) > 1e-3
    expected = logits(PeftModel.from_pretrained(build("llama"), two), "llama")
    assert relative(second, expected) < TOLERANCE[torch.float32]
