"""What a user does with a model, in a user's order: each step on the result of the one before.

It needs the installed package, and beside it `odyssey_steps.py` and `real_models.py`. Every step is a command or a few
lines in a new process; `log.md` in the output folder lists them with their seconds, and a file for each step holds
what it printed. The first step that fails ends the way of its model; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

KINDS = {
    "whisper": "Whisper tiny.en",
    "vision-language": "random LLaVA",
    "encoder": "MiniLM-L6",
    "decoder": "SmolLM2-135M",
}
CLOVER = [str(Path(sys.executable).with_name("clover"))]
STEPS = [sys.executable, str(Path(__file__).with_name("odyssey_steps.py"))]


class Failed(Exception):
    """A step has failed."""


class Odyssey:
    """The steps so far, and where they write.

    Args:
        out: a new folder.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=False)
        self.out, self.lines, self.start = out, list[str](), time.perf_counter()

    def step(self, kind: str, name: str, command: list[object], kill_after: Path | None = None) -> None:
        """Run a command in a new process.

        Args:
            kind: of the model.
            name: of the step.
            command: program and arguments.
            kill_after: kill the process (SIGKILL) as soon as this file is there; to end before is to fail.

        Raises:
            Failed: it fails.
        """
        start, used, log = time.perf_counter(), _cpu_seconds(), self.out / f"{len(self.lines):02}-{kind}.log"
        with log.open("w", encoding="utf-8") as file:
            file.write(f"{' '.join(map(str, command))}\n")
            file.flush()
            process = subprocess.Popen([str(each) for each in command], stdout=file, stderr=file)
            if kill_after is not None:
                while process.poll() is None and not kill_after.exists():
                    time.sleep(0.1)
                time.sleep(0.1)  # for the file's last byte
                process.send_signal(signal.SIGKILL)
            status = process.wait()
        seconds = (time.perf_counter() - start, _cpu_seconds() - used)
        self.note(kind, name, status == (0 if kill_after is None else -signal.SIGKILL), seconds)

    def note(self, kind: str, name: str, passed: bool, seconds: tuple[float, float] = (0, 0)) -> None:
        """Add a line to the log, with the seconds that went by and those of the processor.

        Raises:
            Failed: the step did not pass.
        """
        line = f"| {name} | {KINDS[kind]} | {'passed' if passed else 'FAILED'} | {seconds[0]:.0f} | {seconds[1]:.0f} |"
        self.lines.append(line)
        print(line, flush=True)
        packages = ", ".join(f"{each} {version(each)}" for each in ("torch", "transformers", "peft", "trl"))
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        about = f"Python {platform.python_version()}, {packages}; threads: {threads}; {self.minutes()}."
        table = ["| step | model | outcome | seconds | CPU |", "| --- | --- | --- | ---: | ---: |", *self.lines]
        (self.out / "log.md").write_text("\n".join([about, "", *table, ""]), encoding="utf-8")
        if not passed:
            raise Failed(name)

    def minutes(self) -> str:
        return f"{(time.perf_counter() - self.start) / 60:.0f} minutes, {_cpu_seconds() / 60:.0f} of the processor"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def travel(trip: Odyssey, kind: str, model: str) -> None:
    """All steps of one model.

    Args:
        trip: the log.
        kind: of the model.
        model: folder or hub name of the decoder; the others make theirs.

    Raises:
        Failed: a step has failed; those after it were not taken.
    """
    here, decoder = trip.out / kind, kind == "decoder"
    count = {"vision-language": 16, "whisper": 4}.get(kind, 8)  # steps of training, each time; a multiple of 4
    sft = [*CLOVER, "sft", "--config", "clover_full", f"data={here / 'base' / 'rows.jsonl'}", "rows=48"]
    sft += ["held_out_rows=8", f"max_steps={count}", "per_device_train_batch_size=2", "gradient_accumulation_steps=1"]
    sft += ["save_strategy=steps", f"save_steps={count // 4}", "save_total_limit=4"]  # no checkpoint is taken away
    sft += ["warmup_steps=0"]  # as the other kinds: within a warm-up, adapters of two seeds would hardly differ

    def own(step: str, *arguments: object) -> list[object]:
        return [*STEPS, step, kind, *arguments]

    def train(base: object, name: str, seed: int = 0, resume: bool = False) -> list[object]:
        if decoder:
            resumed = ["resume=true"] if resume else []
            return [*sft, f"model={base}", f"output_dir={here / name}", f"seed={seed}", *resumed]
        resumed = ["--resume"] if resume else []
        return own("train", base, here / name, "--seed", seed, "--steps", count, *resumed)

    base: object = model if decoder else here / "base"
    trip.step(kind, "write the base and its data", own("make", here / "base"))
    checkpoint = here / "first" / f"checkpoint-{count // 4}" / "trainer_state.json"
    trip.step(kind, "fine-tune, killed after the first checkpoint", train(base, "first"), kill_after=checkpoint)
    written = checkpoint.stat().st_mtime_ns
    trip.step(kind, "resume", train(base, "first", resume=True))
    trip.note(kind, "the resumed run left its checkpoint as it was", checkpoint.stat().st_mtime_ns == written)
    trip.step(kind, "fine-tune without a break", train(base, "whole"))
    first, second, whole = (here / name / "adapter" for name in ("first", "second", "whole"))
    same = len({(path / "adapter_model.safetensors").read_bytes() for path in (first, whole)}) == 1
    trip.note(kind, "the resumed adapter is that one, bit for bit", same)
    trip.step(kind, "fine-tune a second adapter", train(base, "second", seed=1))
    if decoder:
        base = json.loads((first / "adapter_config.json").read_text())["base_model_name_or_path"]
        suite = ["--data", here / "base", "--tasks", "boolq", "--new-tokens", 4, "--out", here / "evaluation"]
        trip.step(kind, "evaluate", [*CLOVER, "evaluate", "--model", base, "--adapter", first, *suite])
    else:
        trip.step(kind, "evaluate", own("evaluate", base, first))
    trip.step(kind, "load two adapters, switch, mix, hotswap", own("switch", base, first, second))
    loras = ["--lora-rank", 8] if decoder else []
    trip.step(kind, "merge and export", [*CLOVER, "export", first, here / "merged", *loras])
    trip.step(kind, "serve the merged model", own("serve", here / "merged"))
    if kind in ("decoder", "encoder"):
        windows = ["--calibration", here / "text.txt", "--rows", 16, "--max-length", 128]
        pruning = [*CLOVER, "prune", here / "merged", "--ratio", "vo=0.25", *windows, "--out", here / "pruned"]
        trip.step(kind, "prune", pruning)
    else:
        trip.step(kind, "prune", own("prune", here / "merged", here / "pruned"))
    trip.step(kind, "heal: train the pruned model", train(here / "pruned", "healed"))
    healed = [*CLOVER, "export", here / "healed" / "adapter", here / "final"]
    trip.step(kind, "merge and export the healed model", healed)
    trip.step(kind, "serve the healed model", own("serve", here / "final", "--narrow"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="decoder: folder or hub name")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    trip, failed = Odyssey(given.out), []
    for kind in given.kinds:
        try:
            travel(trip, kind, given.model)
        except (Failed, OSError) as step:  # or a step has not written what it should
            last = given.out / f"{len(trip.lines) - 1:02}-{kind}.log"
            print(last.read_text(encoding="utf-8")[-3000:] if last.exists() else "", file=sys.stderr)
            failed.append(f"{KINDS[kind]}: {step}")
    print(f"{len(trip.lines)} steps in {trip.minutes()}: {given.out / 'log.md'}")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
