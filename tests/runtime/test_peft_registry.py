"""Invariants of entering CLOVER in peft's closed enum and tables: as if peft had shipped it, once, and undisturbed."""

from __future__ import annotations

import copy
import glob
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftMixedModel, PeftType, get_peft_model, mapping

import clover_peft
from clover_peft import CloverConfig, CloverLayer, CloverModel
from clover_peft.runtime import peft_registry as registration
from tests.support.tiny import build, logits, perturb

ROOT = Path(clover_peft.__file__).parents[1]
MODULES = [
    *("runtime.peft_registry", "base_model.families", "linalg.decomposition", "tuner.block_spec", "tuner.layer"),
    *("tuner.layers", "tuner.bases", "tuner.adapter_file", "tuner.config", "tuner.model"),
]  # each imports only what stands before it
TABLES = ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"]


# Importing torch, transformers and peft takes seconds: one process does it, and every script runs in a fork of it.
_NURSERY = """
import json, os, sys, traceback
import peft, tests.support.tiny, torch, transformers.models.llama.modeling_llama
assert "clover_peft" not in sys.modules
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        status = 1
        try:
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(job[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv[1:] = job["args"]
            exec(compile(job["code"], "<script>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
Script = Callable[..., subprocess.CompletedProcess]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """Runs a script where peft is imported and clover_peft is not, nor ever was."""
    folder = tmp_path_factory.mktemp("scripts")
    with (folder / "nursery").open("w") as errors:
        nursery = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(),
        )
    assert nursery.stdout.readline() == "ready\n", (folder / "nursery").read_text()

    def run(code: str, *args: str) -> subprocess.CompletedProcess:
        streams = {stream: str(folder / stream) for stream in ("out", "err")}
        nursery.stdin.write(json.dumps({"code": textwrap.dedent(code), "args": args, **streams}) + "\n")
        nursery.stdin.flush()
        status = int(nursery.stdout.readline())
        out, err = (Path(path).read_text() for path in streams.values())
        return subprocess.CompletedProcess([code, *args], status, out, err)

    yield run
    nursery.stdin.close()
    nursery.wait(timeout=60)


def _succeeds(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


# ---------------------------------------------------------------------- the enum


def test_member_is_found_by_call_index_and_attribute() -> None:
    member = PeftType("CLOVER")
    assert member is PeftType["CLOVER"]
    assert member is PeftType.CLOVER
    assert member is PeftType(member)
    assert type(member) is PeftType
    assert isinstance(member, str)
    assert (member, member.name, member.value) == ("CLOVER", "CLOVER", "CLOVER")


def test_member_is_iterated_once_and_last() -> None:
    assert list(PeftType).count(PeftType.CLOVER) == 1
    assert list(PeftType)[-1] is PeftType.CLOVER
    assert next(reversed(PeftType)) is PeftType.CLOVER
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert PeftType.CLOVER in PeftType


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_survives_pickle(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(PeftType.CLOVER, protocol)) is PeftType.CLOVER


def test_member_survives_copy() -> None:
    assert copy.copy(PeftType.CLOVER) is PeftType.CLOVER
    assert copy.deepcopy({"type": PeftType.CLOVER})["type"] is PeftType.CLOVER


def test_member_is_a_string_in_json_and_as_a_key() -> None:
    assert json.loads(json.dumps({"type": PeftType.CLOVER})) == {"type": "CLOVER"}
    assert hash(PeftType.CLOVER) == hash(PeftType("CLOVER"))
    assert {PeftType.CLOVER: 1}["CLOVER"] == 1  # peft looks its tables up by the string of a config file
    assert {"CLOVER": 1}[PeftType.CLOVER] == 1


def test_other_members_and_unknown_values_are_as_before() -> None:
    assert PeftType("LORA") is PeftType.LORA is not PeftType.CLOVER
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")
    with pytest.raises(KeyError):
        PeftType["NO_SUCH_METHOD"]


@pytest.mark.parametrize("operation", ["pickle", "deepcopy"])
def test_config_survives_pickle_and_deepcopy(operation: str) -> None:
    config = CloverConfig(r=4, target_modules=["v_proj"], rank_pattern={"v_proj": 3})
    other = pickle.loads(pickle.dumps(config)) if operation == "pickle" else copy.deepcopy(config)
    assert other == config
    assert other.peft_type is PeftType.CLOVER


def test_tables_hold_our_classes() -> None:
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["CLOVER"] is CloverConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["CLOVER"] is CloverModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["CLOVER"] == "clover_"
    assert isinstance(mapping.get_peft_config({"peft_type": "CLOVER", "r": 3}), CloverConfig)


# ---------------------------------------------------------------------- imports


def test_registering_again_changes_nothing() -> None:
    members, tables = list(PeftType), {name: dict(getattr(mapping, name)) for name in TABLES}
    clover_peft.runtime.peft_registry.register(CloverConfig, CloverModel)
    assert registration._extend_peft_type() is PeftType.CLOVER
    assert list(PeftType) == members
    for name, table in tables.items():
        assert getattr(mapping, name) == table


_RELOAD = """
    import importlib, sys
    import torch
    from tests.support.tiny import build, logits, perturb
    import clover_peft
    from peft import PeftModel, PeftType, get_peft_model

    folder, *order = sys.argv[1:]
    member = PeftType.CLOVER
    old = get_peft_model(build("llama"), clover_peft.CloverConfig())
    perturb(old)
    before = logits(old, "llama")
    old.save_pretrained(folder)
    for name in order:
        importlib.reload(importlib.import_module("clover_peft" + name))
    assert PeftType.CLOVER is member
    assert list(PeftType).count(member) == 1
    assert torch.equal(logits(old, "llama"), before), "a model made before the reload changed"
    old.save_pretrained(folder)
    new = PeftModel.from_pretrained(build("llama"), folder)
    assert torch.equal(logits(new, "llama"), before), "an adapter saved before the reload loads differently"
    get_peft_model(build("llama"), clover_peft.CloverConfig(r=3, target_modules=["v_proj"]))
    print("fine")
"""


@pytest.mark.parametrize("order", ["up", "down", "package"])
def test_reloading_is_harmless(fresh: Script, order: str, tmp_path: Path) -> None:
    modules = [f".{name}" for name in MODULES]
    names = {"up": [*modules, ""], "down": ["", *reversed(modules)], "package": ["", ""]}[order]
    assert "fine" in _succeeds(fresh(_RELOAD, str(tmp_path), *names))


def test_import_needs_no_training_or_quantisation_package(fresh: Script) -> None:
    code = """
        import sys
        for name in ("trl", "datasets", "bitsandbytes", "matplotlib", "gguf"):
            sys.modules[name] = None  # importing it raises ImportError
        import clover_peft
        print(clover_peft.CloverConfig().peft_type.value)
    """
    assert _succeeds(fresh(code)).strip() == "CLOVER"


def test_pickled_config_brings_its_registration_along(fresh: Script, tmp_path: Path) -> None:
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps({"config": CloverConfig(r=5)}))
    code = """
        import pickle, sys
        from peft import PeftType, mapping
        assert not hasattr(PeftType, "CLOVER")
        with open(sys.argv[1], "rb") as file:
            config = pickle.load(file)["config"]
        assert config.peft_type is PeftType.CLOVER
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["CLOVER"] is type(config)
        print(config.r)
    """
    assert _succeeds(fresh(code, str(path))).strip() == "5"


def test_adapter_cannot_be_loaded_without_the_import(fresh: Script, tmp_path: Path) -> None:
    """Why the model card and the README say `import clover_peft`: peft has no hook that would find it."""
    model = get_peft_model(build("llama"), CloverConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    code = """
        import sys
        {}
        from peft import PeftModel
        from tests.support.tiny import build
        PeftModel.from_pretrained(build("llama"), sys.argv[1])
        print("loaded")
    """
    without = fresh(code.format("pass"), str(tmp_path))
    assert without.returncode != 0
    assert "KeyError: 'CLOVER'" in without.stderr
    assert "loaded" in _succeeds(fresh(code.format("import clover_peft"), str(tmp_path)))


# ---------------------------------------------------------------------- a CLOVER of peft's own


@pytest.mark.parametrize("table", TABLES[:2])
def test_foreign_method_of_the_same_name_is_refused_and_kept(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = type("CloverThing", (), {"__module__": "peft.tuners.clover"})
    for name in TABLES:
        monkeypatch.setattr(mapping, name, dict(getattr(mapping, name)))
    for name in TABLES:
        getattr(mapping, name).pop("CLOVER")
    getattr(mapping, table)["CLOVER"] = foreign
    with pytest.raises(ImportError, match=r"peft already has a method CLOVER, peft\.tuners\.clover\.CloverThing"):
        registration.register(CloverConfig, CloverModel)
    assert getattr(mapping, table)["CLOVER"] is foreign
    assert all("CLOVER" not in getattr(mapping, name) for name in TABLES if name != table)


def test_import_is_refused_beside_a_peft_that_ships_its_own(fresh: Script) -> None:
    code = """
        import importlib.util, sys
        from peft import PeftType, mapping
        spec = importlib.util.spec_from_file_location("peft.tuners.clover", sys.argv[1])
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)  # the enum as it would be in that peft
        config = type("CloverConfig", (), {"__module__": "peft.tuners.clover.config"})
        model = type("CloverModel", (), {"__module__": "peft.tuners.clover.model", "prefix": "clover_"})
        native.register(config, model)
        try:
            import clover_peft
        except ImportError as error:
            print(error)
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["CLOVER"] is model
        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["CLOVER"] is config
    """
    message = _succeeds(fresh(code, registration.__file__))
    assert "peft already has a method CLOVER, peft.tuners.clover." in message
    assert "older peft" in message


# ---------------------------------------------------------------------- other Pythons

_STUB = '''
import copy, enum, importlib.util, json, pickle, sys, types

class PeftType(str, enum.Enum):
    """As in peft."""
    LORA = "LORA"
    OFT = "OFT"

mapping = types.ModuleType("peft.mapping")
for name in ("CONFIG", "TUNER", "PREFIX"):
    setattr(mapping, "PEFT_TYPE_TO_%s_MAPPING" % name, {})

def register_peft_method(*, name, config_cls, model_cls):
    if name.upper() not in list(PeftType):
        raise ValueError(name)
    peft_type = getattr(PeftType, name.upper())
    if peft_type in mapping.PEFT_TYPE_TO_CONFIG_MAPPING or name + "_" in mapping.PEFT_TYPE_TO_PREFIX_MAPPING:
        raise KeyError(name)
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = name + "_"

peft, utils = types.ModuleType("peft"), types.ModuleType("peft.utils")
peft.mapping, peft.utils = mapping, utils
utils.PeftType, utils.register_peft_method = PeftType, register_peft_method
sys.modules.update({"peft": peft, "peft.mapping": mapping, "peft.utils": utils})

def load():
    spec = importlib.util.spec_from_file_location("clover_peft.registration", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

class Config: pass
class Model: pass
Config.__module__ = Model.__module__ = "clover_peft.model"

first = load()
member = first.CLOVER
first.register(Config, Model)
second = load()
second.register(Config, Model)
assert second.CLOVER is member, "a second import made a second member"

assert type(member) is PeftType and isinstance(member, str)
assert PeftType("CLOVER") is member and PeftType["CLOVER"] is member and PeftType.CLOVER is member
assert PeftType(member) is member
assert (member.name, member.value, member) == ("CLOVER", "CLOVER", "CLOVER")
assert list(PeftType) == [PeftType.LORA, PeftType.OFT, member] and len(PeftType) == 3
assert list(reversed(PeftType))[0] is member
assert list(PeftType.__members__) == ["LORA", "OFT", "CLOVER"]
assert member in PeftType and PeftType.LORA in PeftType
if sys.version_info >= (3, 12):  # before, a string is not looked for among the values
    assert "CLOVER" in PeftType and "NO_SUCH_METHOD" not in PeftType
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member, protocol
assert copy.copy(member) is member and copy.deepcopy([member])[0] is member
assert json.loads(json.dumps({"type": member})) == {"type": "CLOVER"}
assert hash(member) == hash(PeftType("CLOVER")) and {member: 1}["CLOVER"] == 1 and {"CLOVER": 1}[member] == 1
assert repr(member) == repr(PeftType.LORA).replace("LORA", "CLOVER")
assert str(member) == str(PeftType.LORA).replace("LORA", "CLOVER")
assert "%s {}".format(member) % member == ("%s {}".format(PeftType.LORA) % PeftType.LORA).replace("LORA", "CLOVER")
assert PeftType("LORA") is PeftType.LORA != member
assert member.__objclass__ is PeftType
assert "CLOVER" in dir(PeftType)
for wrong in ("NO_SUCH_METHOD", "clover", 3):
    try:
        PeftType(wrong)
    except ValueError:
        continue
    raise AssertionError(wrong)
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["CLOVER"] is Model
print("fine on %d.%d" % sys.version_info[:2])
'''


def _python(version: str) -> str | None:
    """A working interpreter of `version`, from PATH or pyenv; a pyenv shim may name one that it cannot run."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = [*sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python")), shutil.which(f"python{version}")]
    for candidate in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        if found.returncode == 0 and found.stdout.strip() == version:
            return candidate
    return None


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_enum_is_extended_alike_on_every_python(version: str) -> None:
    current = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = sys.executable if version == current else _python(version)
    if python is None:
        pytest.skip(f"no working python{version} on PATH or in pyenv")
    result = subprocess.run(
        [python, "-c", _STUB, registration.__file__], capture_output=True, text=True, timeout=60, check=False
    )
    assert _succeeds(result).strip() == f"fine on {version}"


# ---------------------------------------------------------------------- mixed models


@pytest.mark.parametrize("way", ["get_peft_model", "PeftMixedModel"])
def test_mixed_model_is_refused_with_a_reason(way: str) -> None:
    model = build("llama")
    before = logits(model, "llama")
    wrap = {"get_peft_model": partial(get_peft_model, mixed=True), "PeftMixedModel": PeftMixedModel}[way]
    with pytest.raises(ValueError, match="'CLOVER' is not compatible with the `PeftMixedModel`"):
        wrap(model, CloverConfig())
    assert not any(isinstance(module, CloverLayer) for module in model.modules())
    assert torch.equal(logits(model, "llama"), before)


def test_config_file_finds_the_class_through_peft(tmp_path: Path) -> None:
    CloverConfig(r=5, s_matrix="diagonal").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CLOVER"
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is CloverConfig
    assert (config.r, config.s_matrix, config.peft_type) == (5, "diagonal", PeftType.CLOVER)


def test_adapters_of_another_method_are_as_before() -> None:
    from peft import LoraConfig

    model = get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    inside = logits(model, "llama")
    assert not any(isinstance(module, CloverLayer) for module in model.modules())
    clover = get_peft_model(build("llama"), CloverConfig())
    perturb(clover)
    assert torch.equal(logits(model, "llama"), inside)
    assert not torch.equal(logits(clover, "llama"), inside)
