"""An experiment as its file describes it: domains, methods with their rates, seeds, training and measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_config

import clover_peft  # noqa: F401  registers CLOVER

from ...io.configs import find_config
from ...io.overrides import apply_override, load_yaml
from ..settings import check_factors, check_value, fill
from .domains import SPLITS
from .lora_starts import FROM_DATA
from .zeroshot import SETS

DTYPES = ("float32", "bfloat16", "float16", "float64")
BASE = "base"  # the model that is not adapted
OWN = "own text"  # beside the domains in records and tables: text that the model wrote before it was adapted
TINY = "tiny"  # a small random model with a byte tokenizer, for tests
IN_TURN = "+"  # between domains that are trained on in turn
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")  # those that need no arguments of their own
FULL = "full"  # the `peft` of an arm that trains all but embeddings and head


@dataclass(frozen=True)
class Training:
    """How every arm is trained.

    Attributes:
        steps: of the optimizer.
        length: tokens of a window.
        batch_size: windows a step.
        warmup_steps: at the start.
        schedule: of the learning rate, one of `SCHEDULES` (transformers' names).
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped at it; 0 does not clip.
        checkpoint_steps: a killed trial goes on from a multiple of it.
    """

    steps: int = 120
    length: int = 256
    batch_size: int = 1
    warmup_steps: int = 10
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_steps: int = 20


@dataclass(frozen=True)
class Evaluation:
    """What is measured.

    Attributes:
        split: "validation" for a search; "test" once, at the end.
        documents: of every domain; a window of each.
        length: tokens of a window.
        batch_size: windows at a time.
        vocabulary: "domain" restricts the head to the tokens that occur in the domain, "full" does not.
        zeroshot: questions that are scored, over all sets; 0 for none.
        own_text: windows of text that the model writes before it is adapted; 0 for none.
    """

    split: str = "validation"
    documents: int = 80
    length: int = 256
    batch_size: int = 1
    vocabulary: str = "domain"
    zeroshot: int = 0
    own_text: int = 0


@dataclass(frozen=True)
class Arm:
    """A method with its learning rates.

    Attributes:
        name: as shown.
        peft: an adapter's config as a block with `peft_type`, or "full".
        rates: those tried.
        rate_factors: see `optimizer.scale_learning_rates`.
        initialize_from_activations: batches by which the bases of CLOVER are computed, or the start of a LoRA with
            `init_lora_weights` "corda" or "eva"; 0 for none.
        activations_on: the text of these batches: "domain" (that is trained on; of several in turn the first),
            "others" (training windows of the other domains, in turn) or "own" (`own_text`).
        contrast: batches of the (first) domain, and as many of `own_text`, by which A of CLOVER's low-rank part or of
            a LoRA starts; 0 for none.
        balance_updates: batches of the (first) domain by which CLOVER or a LoRA is balanced; 0 for none.
        optimizer: "adamw" or "muon".
    """

    name: str
    peft: dict[str, Any] | str
    rates: tuple[float, ...]
    rate_factors: dict[str, float] = field(default_factory=dict)
    initialize_from_activations: int = 0
    activations_on: str = "domain"
    contrast: int = 0
    balance_updates: int = 0
    optimizer: str = "adamw"

    def config(self) -> PeftConfig | None:
        """A new config of the adapter; None for full fine-tuning."""
        if isinstance(self.peft, str):
            return None
        block = {"task_type": "CAUSAL_LM", **self.peft}
        try:
            return get_peft_config({**block, "peft_type": str(block.get("peft_type")).upper()})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"arms.{self.name}.peft: {' '.join(str(error).split())}") from error


def stages_of(task: str) -> list[str]:
    """The domains of an entry of `adapt_to`, such as "wikitext+french": first the one, then the other."""
    return task.split(IN_TURN)


@dataclass(frozen=True)
class Trial:
    """One record: an arm at a rate and a seed, adapted to a task; or the base model.

    Attributes:
        domain: the task, an entry of `adapt_to`: a domain, or several in turn with + between them.
        arm: the arm's name.
        rate: one of its rates.
        seed: of the adapter's start and of the order of windows.
    """

    domain: str
    arm: str
    rate: float
    seed: int

    @property
    def stages(self) -> list[str]:
        """The domains that are trained on, in turn."""
        return stages_of(self.domain)

    @property
    def name(self) -> str:
        return BASE if self.arm == BASE else f"{self.domain}-{self.arm}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
        model: folder or hub name; None for SmolLM2-135M-Instruct; "tiny".
        dtype: of the base weights; trained numbers are float32.
        domains: name -> source, see `domains.read_domain`.
        adapt_to: the domains that are trained on; each is measured on all. "wikitext+french" trains one adapter on
            WikiText-2 and then on French, each with a schedule and an optimizer of its own; one domain must be left.
        arms: the methods; the first is what the others are compared with.
        seeds: of the adapters' start and of the order of windows.
        curve_seeds: so many of the seeds, from the first on, are trained at all rates, the others at each arm's first
            rate alone; None for all.
        training: how is trained.
        evaluation: what is measured.
    """

    model: str | None
    dtype: str
    domains: dict[str, str]
    adapt_to: list[str]
    arms: list[Arm]
    seeds: list[int]
    training: Training
    evaluation: Evaluation
    curve_seeds: int | None = None

    def trials(self) -> list[Trial]:
        """The base model, then rate by rate, so that arms can soon be compared."""
        most = max(len(arm.rates) for arm in self.arms)
        return [Trial("", BASE, 0.0, 0)] + [
            Trial(domain, arm.name, arm.rates[i], seed)
            for number, seed in enumerate(self.seeds)
            for domain in self.adapt_to
            for i in range(most if self.curve_seeds is None or number < self.curve_seeds else 1)
            for arm in self.arms
            if i < len(arm.rates)
        ]

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """What determines a trial's record: a trial of other settings is another trial."""
        training = {k: v for k, v in asdict(self.training).items() if k != "checkpoint_steps"}
        evaluation = asdict(self.evaluation)
        if not evaluation["own_text"]:  # earlier records do not have it
            del evaluation["own_text"]
        shared = {"model": self.model, "dtype": self.dtype, "evaluation": evaluation}
        if trial.arm == BASE:
            return shared
        arm = {key: value for key, value in asdict(self.arm(trial.arm)).items() if key != "rates"}
        for key in ("initialize_from_activations", "activations_on", "contrast"):  # earlier records do not have them
            if arm[key] == getattr(Arm, key):
                del arm[key]
        return {**shared, "training": training, "arm": arm}


def is_experiment(path: str | Path) -> bool:
    """Whether a file describes an experiment of this kind: no other has domains.

    Args:
        path: a YAML file, or the name of a shipped one.

    Raises:
        ValueError: there is no such file, or it is no YAML.
    """
    path = find_config(path, "grid")
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    return isinstance(values, dict) and "domains" in values


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment's file.

    Args:
        path: a YAML file, or the name of a shipped one.
        overrides: `key=value`, with dots into blocks.

    Raises:
        ValueError: naming the key, what was expected and what was found.
    """
    path = find_config(path, "grid")
    values = load_yaml(path.read_text(encoding="utf-8"), str(path))
    known = [part.name for part in fields(Experiment)]
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the keys {', '.join(known)}, found {values!r}")
    for change in overrides:
        apply_override(values, change)
    values.setdefault("model", None)
    values.setdefault("dtype", "bfloat16")
    values.setdefault("seeds", [0])
    values.setdefault("curve_seeds", None)
    if set(values) != set(known):
        raise ValueError(f"{path}: expected the keys {', '.join(known)}, found {', '.join(map(str, values))}")
    if not isinstance(values["arms"], dict) or not values["arms"] or BASE in values["arms"]:
        raise ValueError(f"{path}: arms: expected blocks by name, none called {BASE}, found {values['arms']!r}")
    arms = [_arm(str(name), block) for name, block in values["arms"].items()]
    training = fill(Training, values["training"] or {}, "training")
    evaluation = fill(Evaluation, values["evaluation"] or {}, "evaluation")
    experiment = Experiment(**{**values, "arms": arms, "training": training, "evaluation": evaluation})
    _check(experiment)
    return experiment


def _arm(name: str, block: Any) -> Arm:
    known = [part.name for part in fields(Arm) if part.name != "name"]
    if not isinstance(block, dict) or set(block) - set(known) or not {"peft", "rates"} <= set(block):
        raise ValueError(
            f"arms.{name}: expected a block with peft and rates, and {', '.join(known[2:])}, found {block!r}"
        )
    if Path(name).name != name or name.startswith(("-", ".")):
        raise ValueError(f"arms.{name}: expected a name that can be that of a file, without - or . in front")
    rates = block["rates"]
    numbers = isinstance(rates, list) and rates and all(type(r) in (int, float) and 0 < r < math.inf for r in rates)
    if not numbers or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ValueError(f"arms.{name}.rates: expected different positive numbers, found {rates!r}")
    arm = Arm(**{**block, "name": name, "rates": tuple(float(rate) for rate in rates)})
    if arm.peft != FULL and not (isinstance(arm.peft, dict) and "peft_type" in arm.peft):
        raise ValueError(f"arms.{name}.peft: expected a block with peft_type, or {FULL}, found {arm.peft!r}")
    check_factors(arm.rate_factors)
    if arm.optimizer not in ("adamw", "muon"):
        raise ValueError(f"arms.{name}.optimizer: expected adamw or muon, found {arm.optimizer!r}")
    config = arm.config()
    kind, start = getattr(config, "peft_type", None), getattr(config, "init_lora_weights", None)
    is_plain_lora = kind == "LORA" and start in (True, "gaussian")
    has_one_rank = getattr(config, "low_rank", 0) or (is_plain_lora and not getattr(config, "rank_pattern", None))
    from_data = kind == "LORA" and start in FROM_DATA
    for key in ("initialize_from_activations", "contrast", "balance_updates"):
        if type(value := getattr(arm, key)) is not int or value < 0:
            raise ValueError(f"arms.{name}.{key}: expected a number of batches from 0 on, found {value!r}")
    if arm.initialize_from_activations and kind != "CLOVER" and not from_data:
        raise ValueError(
            f"arms.{name}.initialize_from_activations: expected peft_type: CLOVER, or a LORA with init_lora_weights: "
            f"{' or '.join(FROM_DATA)}, found {arm.peft!r}"
        )
    if from_data and not arm.initialize_from_activations:
        raise ValueError(
            f"arms.{name}.initialize_from_activations: expected a number of batches for init_lora_weights: {start}, "
            "found 0"
        )
    if start == "corda" and isinstance(arm.peft, dict):
        # peft's CorDA knows no "all-linear", its two methods are opposites, and its files would replace the batches.
        method, named = arm.peft.get("corda_config"), isinstance(arm.peft.get("target_modules"), list)
        if not named or method not in ({"corda_method": "kpm"}, {"corda_method": "ipm"}):
            raise ValueError(
                f"arms.{name}.peft: expected target_modules as a list and corda_config: {{corda_method: kpm or ipm}} "
                f"for init_lora_weights: corda, found {arm.peft!r}"
            )
    if arm.contrast and not has_one_rank:
        raise ValueError(
            f"arms.{name}.contrast: expected peft_type: CLOVER with low_rank, or a LORA with init_lora_weights: "
            f"true or gaussian and one rank, found {arm.peft!r}"
        )
    if arm.activations_on not in ("domain", "others", "own"):
        raise ValueError(f"arms.{name}.activations_on: expected domain, others or own, found {arm.activations_on!r}")
    if arm.activations_on != "domain" and not arm.initialize_from_activations:
        raise ValueError(
            f"arms.{name}.activations_on: expected initialize_from_activations beside it, with the number of batches"
        )
    if arm.balance_updates and kind != "CLOVER" and not is_plain_lora:
        raise ValueError(
            f"arms.{name}.balance_updates: expected peft_type: CLOVER, or a LORA with init_lora_weights: true or "
            f"gaussian, found {arm.peft!r}"
        )
    return arm


def _check(experiment: Experiment) -> None:
    training, evaluation = experiment.training, experiment.evaluation
    domains, adapt_to, seeds = experiment.domains, experiment.adapt_to, experiment.seeds
    several = (
        isinstance(domains, dict) and len(domains) > 1 and not any(n == OWN or IN_TURN in str(n) for n in domains)
    )
    check_value(several, "domains", f"at least two, each name: source, none called {OWN} or with a {IN_TURN}", domains)
    named = isinstance(adapt_to, list) and adapt_to and all(isinstance(entry, str) for entry in adapt_to)
    inside = named and all(set(stages) <= set(domains) for stages in map(stages_of, adapt_to))
    once = inside and len(set(adapt_to)) == len(adapt_to)
    once = once and all(len(set(stages)) == len(stages) < len(domains) for stages in map(stages_of, adapt_to))
    expected = f"some of {', '.join(domains)}, or different ones (not all) in turn with {IN_TURN} between them"
    check_value(bool(once), "adapt_to", expected, adapt_to)
    whole = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    check_value(bool(whole) and len(set(seeds)) == len(seeds), "seeds", "different whole numbers from 0 on", seeds)
    count = experiment.curve_seeds
    check_value(count is None or (type(count) is int and count >= 0), "curve_seeds", "a number of seeds", count)
    check_value(evaluation.split in [*SPLITS][1:], "evaluation.split", "validation or test", evaluation.split)
    check_value(
        evaluation.vocabulary in ("domain", "full"), "evaluation.vocabulary", "domain or full", evaluation.vocabulary
    )
    check_value(
        training.schedule in SCHEDULES, "training.schedule", f"one of {', '.join(SCHEDULES)}", training.schedule
    )
    check_value(experiment.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", experiment.dtype)
    check_value(all(isinstance(source, str) for source in domains.values()), "domains", "names of sources", domains)
    least = {
        "training": {"steps": 1, "length": 2, "batch_size": 1, "checkpoint_steps": 1, "warmup_steps": 0},
        "evaluation": {"documents": 1, "length": 2, "batch_size": 1, "zeroshot": 0, "own_text": 0},
    }
    for block, of_block in least.items():
        for name, smallest in of_block.items():
            value = getattr(getattr(experiment, block), name)
            good = type(value) is int and value >= smallest
            check_value(good, f"{block}.{name}", f"a whole number from {smallest} on", value)
    good = type(training.max_grad_norm) in (int, float) and training.max_grad_norm >= 0
    check_value(good, "training.max_grad_norm", "a number from 0 on, which does not clip", training.max_grad_norm)
    asked = evaluation.zeroshot
    check_value(
        asked == 0 or asked >= len(SETS),
        "evaluation.zeroshot",
        f"0, or at least one of each of {len(SETS)} sets",
        asked,
    )
