"""peft's own tests with CLOVER's configs: fetches peft's source distribution, builds tiny models, runs pytest.

As a script it prepares and starts pytest with itself as a plugin (`-p peft_conformance`). As a plugin it puts CLOVER's
configs in place of the other methods' in the parametrised tests, and leaves out what is not parametrised by method.

What cannot hold for CLOVER is in `EXPECTED`, with the reason, and is printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from clover_peft import CloverConfig
from clover_peft.io.downloads import cache_root

FILES = [
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_torch_compile",
]
# The variants that every kind of test runs with.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "diagonal": {"s_matrix": "diagonal"},
    "s-alone": {"save_bases": False},
    "blocks": {"block_size": 2, "mlp_block_size": 2},
}


@dataclass
class Unchecked(CloverConfig):
    """For tests that load an adapter onto other random weights than it was made on, which is refused otherwise."""

    check_base: bool = False


# Test -> why it cannot hold, reported as an expected failure.
EXPECTED = {
    "test_save_pretrained_pickle": "adapters are never unpickled",
    "test_save_pretrained_selected_adapters_pickle": "adapters are never unpickled",
}
# Test -> why it says nothing about CLOVER, reported as skipped.
SKIPPED = {
    "test_from_pretrained_cache_dir": "downloads from the hub",
    "test_prompt_learning_with_gradient_checkpointing": "of prompt learning methods",
}
CUSTOM: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP with LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"]}),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
]
_TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}

# ---------------------------------------------------------------------- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all variants on every test")


def pytest_configure(config: pytest.Config) -> None:
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression"):
        config.addinivalue_line("markers", f"{name}: peft's own")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put CLOVER's configs in place of those of the other methods."""
    definition = metafunc.definition
    for i, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize":
            continue
        names = mark.args[0] if isinstance(mark.args[0], str) else ",".join(mark.args[0])
        cases = _cases(names.replace(" ", ""), mark, metafunc)
        if cases is not None:
            definition.own_markers[i] = pytest.mark.parametrize(names, cases).mark


def _cases(names: str, mark: pytest.Mark, metafunc: pytest.Metafunc) -> list | None:
    """CLOVER's values for a parametrisation by method; None for any other."""
    file = metafunc.module.__name__.rpartition(".")[2]
    everything = metafunc.config.getoption("--full") or file in ("test_custom_models", "test_decoder_models")
    variants = VARIANTS if everything else {"full": VARIANTS["full"]}
    if names == "config_class,mandatory_kwargs":
        return [pytest.param(CloverConfig, {}, id="clover")]
    if names == "config_cls" and len(mark.args[1]) > 5:  # shorter lists name the methods that they mean
        return [pytest.param(Unchecked, id="clover")]
    if names == "test_name,model_id,config_cls,config_kwargs":
        return [
            pytest.param(name, model, CloverConfig, {**kwargs, **_without_heads(variant)}, id=f"{name} {label}")
            for label, variant in variants.items()
            for name, model, kwargs in CUSTOM
            if not (label == "blocks" and model == "EmbConv1D")  # it has a single feature
        ]
    if names == "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2":
        one, other = ({"target_modules": [name], "init_weights": False} for name in ("lin0", "lin1"))
        return [
            pytest.param("CLOVER Same", "clover", CloverConfig, one, one, id="same"),
            pytest.param("CLOVER Different", "clover", CloverConfig, one, other, id="other"),
        ]
    if names == "config_cls,config_kwargs":
        task = _TASKS.get(file) or ("TOKEN_CLS" if "Token" in metafunc.cls.__name__ else "QUESTION_ANS")
        return [pytest.param(CloverConfig, {"task_type": task, **kw}, id=label) for label, kw in variants.items()]
    if names == "settings":
        return [pytest.param((CloverConfig(task_type="CAUSAL_LM"), {}), id="clover")]
    return None


def _without_heads(variant: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in variant.items() if key != "block_size"}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what runs with CLOVER."""
    replacements: dict[str, dict[str, Any]] = {
        "tests.testing_utils": {"_HUB_MODEL_ACCESSES": _Accessed()},  # no first access that asks the hub
        "tests.test_torch_compile": {"load_dataset_english_quotes": _quotes},
    }
    for name, attributes in replacements.items():
        if name in sys.modules:
            vars(sys.modules[name]).update(attributes)
    chosen = [item for item in items if _runs_clover(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
    for item in items:
        for name, reason in EXPECTED.items():
            if name in item.name:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        for name, reason in SKIPPED.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


class _Accessed(dict):
    """Says of every model that it has been fetched before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


def _quotes() -> Any:
    """Sentences in place of the data set that the compile tests would fetch."""
    import datasets

    rows = [{"quote": "the quick brown fox jumps over the lazy dog", "author": "none", "tags": "none"}] * 32
    return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})


def _runs_clover(item: pytest.Item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    return any(
        value in (CloverConfig, Unchecked) or (isinstance(value, tuple) and isinstance(value[0], CloverConfig))
        for value in values
        if isinstance(value, (type, tuple))
    )


# ---------------------------------------------------------------------- the tiny models

_SIZE = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BART = dict(
    vocab_size=1024,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    decoder_start_token_id=2,
)
# Id on the hub, of the models that the tests name -> auto class, model type, settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "AutoModelForCausalLM",
        "opt",
        dict(**{k: v for k, v in _SIZE.items() if k != "intermediate_size"}, ffn_dim=40, word_embed_proj_dim=32),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "AutoModelForCausalLM",
        "gpt2",
        dict(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_inner=40, **_TOKENS),
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "AutoModelForCausalLM",
        "gptj",
        dict(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_inner=40, rotary_dim=4, **_TOKENS),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("AutoModelForCausalLM", "llama", {**_SIZE, **_TOKENS}),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "AutoModelForCausalLM",
        "qwen2",
        {**_SIZE, **_TOKENS, "num_key_value_heads": 2},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "AutoModelForCausalLM",
        "gemma3_text",
        {**_SIZE, **_TOKENS, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "AutoModelForSeq2SeqLM",
        "t5",
        dict(vocab_size=1024, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("AutoModelForSeq2SeqLM", "bart", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModel", "bert", _SIZE),
    "peft-internal-testing/tiny-random-RobertaModel": ("AutoModel", "roberta", {**_SIZE, **_TOKENS}),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "AutoModel",
        "deberta",
        {**_SIZE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "AutoModel",
        "deberta-v2",
        {**_SIZE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "bert",
        _SIZE,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "roberta",
        {**_SIZE, **_TOKENS},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "AutoModelForSequenceClassification",
        "llama",
        {**_SIZE, **_TOKENS},
    ),
}


def build_hub(folder: Path) -> None:
    """Write the models into `folder`, laid out as a hub cache."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    for name, (auto, model_type, settings) in MODELS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **settings)
        model = getattr(transformers, auto).from_config(config)
        with torch.no_grad():  # the usual start is so small that outputs hardly depend on what an adapter does
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        snapshot = _snapshot(folder, name)
        model.save_pretrained(snapshot)
        fast.save_pretrained(snapshot)
    LoraConfig().save_pretrained(str(_snapshot(folder, "peft-internal-testing/tiny-opt-lora-revision", "test")))


def _snapshot(folder: Path, name: str, revision: str = "main") -> Path:
    root, commit = folder / f"models--{name.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return root / "snapshots" / commit


# ---------------------------------------------------------------------- the script


def fetch_tests(version: str) -> Path:
    """The folder of peft's source distribution with its tests; downloaded once."""
    folder = cache_root() / "peft" / f"peft-{version}"
    if not (folder / "tests").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            print(f"peft {version}: downloading its source distribution")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--dest", temporary, f"peft=={version}"], check=True)
            [archive] = Path(temporary).glob("*.tar.gz")
            unpack(archive, Path(temporary))
            (Path(temporary) / folder.name / "tests" / "__init__.py").touch()
            os.replace(Path(temporary) / folder.name, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Writes the regular files of a tar archive, where they belong inside the folder; links and others are left out.

    Not with `tarfile`'s own "data" filter, which the first releases of Python 3.10 and 3.11 are without.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            target = (folder / member.name).resolve()
            if member.isfile() and target.is_relative_to(folder.resolve()):
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                target.write_bytes(content.read())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    _, options = parser.parse_known_args()
    version = importlib.metadata.version("peft")
    here = Path(__file__).resolve().parent
    folder = fetch_tests(version)
    files = [f"tests/{name}.py" for name in FILES if (folder / "tests" / f"{name}.py").is_file()]
    workers = str(min(4, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as home:
        build_hub(Path(home) / "hub")
        environment = {
            **os.environ,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "1",
            "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(here), str(here.parent)]
            ),
        }
        command = [sys.executable, "-m", "pytest", "-p", "peft_conformance", "-p", "no:cacheprovider", "-q", "-rsxXfE"]
        command += ["-n", workers, "--dist", "worksteal", "-c", os.devnull, "--rootdir", str(folder)]
        command += ["-W", "ignore", "--tb=line"]
        print(f"peft {version}: {' '.join(FILES)}")
        chosen = [option for option in options if option.startswith("tests/")]
        options = [option for option in options if option not in chosen]
        return subprocess.run(
            [*command, *options, *(chosen or files)], cwd=folder, env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
