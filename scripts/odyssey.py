"""What a user does with a model, in a user's order: each step on the result of the one before.

It needs the installed package alone. Every step is a command or a few lines in a new process; `log.md` in the output
folder lists them with their seconds. The first step that fails ends the run.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ADAPTERS = """
import sys, torch, clover_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, first, second = sys.argv[1:]
ids = torch.arange(10, 30).view(2, 10)
def run(model):
    with torch.no_grad():
        return model(input_ids=ids).logits
alone = [run(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)) for path in (first, second)]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name="a")
model.load_adapter(second, adapter_name="b")
for name, expected in (("a", alone[0]), ("b", alone[1]), ("a", alone[0])):
    model.set_adapter(name)
    assert torch.equal(run(model), expected), name
mixed = model.eval()
with torch.no_grad():
    both = mixed(input_ids=ids, adapter_names=["a", "b"]).logits
assert torch.allclose(both, torch.stack([alone[0][0], alone[1][1]]), atol=1e-3, rtol=1e-3)
model.delete_adapter("b")
clover_peft.hotswap_adapter(model, second, adapter_name="a")
assert torch.allclose(run(model), alone[1], atol=1e-4, rtol=1e-4)
assert not torch.equal(alone[0], alone[1])
"""
FAMILY = """
import sys, tempfile, torch, transformers as hf, clover_peft
from peft import PeftModel, get_peft_model
torch.manual_seed(0)
ids = torch.randint(9, 90, (2, 12))
sizes = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=96)
words = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
if sys.argv[1] == "whisper":
    config = hf.WhisperConfig(
        **words, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=20, decoder_start_token_id=1,
    )
    make, batch = hf.WhisperForConditionalGeneration, {"input_features": torch.randn(2, 8, 40), "labels": ids}
elif sys.argv[1] == "encoder":
    make, config = hf.BertForSequenceClassification, hf.BertConfig(vocab_size=96, **sizes)
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
else:
    text = dict(model_type="llama", **words, **sizes, num_key_value_heads=2)
    vision = dict(model_type="clip_vision_model", **sizes, image_size=8, patch_size=4)
    make = hf.LlavaForConditionalGeneration
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5, vision_feature_layer=-1)
    ids[:, 1:5] = 5
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": ids}
folder = tempfile.mkdtemp()
make(config).save_pretrained(folder + "/base")
load = lambda where: make.from_pretrained(where).eval()
def run(model):
    with torch.no_grad():
        return model.eval()(**batch).logits
model = load(folder + "/base")
plain = run(model)
model = get_peft_model(model, clover_peft.CloverConfig())
assert torch.equal(run(model), plain)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
losses = []
for _ in range(8):
    losses.append(float(loss := model(**batch).loss))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0], losses
trained = run(model)
model.save_pretrained(folder + "/adapter")
again = PeftModel.from_pretrained(load(folder + "/base"), folder + "/adapter")
assert torch.allclose(run(again), trained, atol=1e-5)
merged = again.merge_and_unload(safe_merge=True)
assert torch.allclose(run(merged), trained, atol=1e-4)
merged.save_pretrained(folder + "/merged")
whole = load(folder + "/merged")
data = {name: value for name, value in batch.items() if name != "labels"}
if sys.argv[1] == "whisper":
    data["decoder_input_ids"] = ids
report = clover_peft.prune(whole, {"vo": 0.25}, calibration=[data] * 2)
assert report.parameters[1] < report.parameters[0]
whole.save_pretrained(folder + "/pruned")
assert torch.allclose(run(load(folder + "/pruned")), run(whole), atol=1e-5)
"""


class Odyssey:
    """The steps so far, and where they write.

    Args:
        out: a new folder.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=False)
        self.out, self.lines = out, list[str]()

    def step(self, name: str, *arguments: object, code: str | None = None) -> None:
        """Run a subcommand of `clover`, or code, in a new process.

        Raises:
            SystemExit: if it fails; its output is shown.
        """
        start = time.perf_counter()
        how = ["-c", textwrap.dedent(code)] if code else ["-m", "clover_peft"]
        done = subprocess.run([sys.executable, *how, *map(str, arguments)], capture_output=True, text=True)
        self.note(name, time.perf_counter() - start, done.returncode == 0)
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}")

    def killed(self, name: str, file: Path, *arguments: object) -> None:
        """Start a subcommand, and kill it (SIGKILL) as soon as a file is there."""
        start = time.perf_counter()
        with (self.out / "killed.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "clover_peft", *map(str, arguments)], stdout=log, stderr=log
            )
            while process.poll() is None and not file.exists():
                time.sleep(0.2)
            there = file.exists() and process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.note(name, time.perf_counter() - start, there)
        if not there:
            raise SystemExit(f"{name}: it ended before {file}: {(self.out / 'killed.log').read_text()[-3000:]}")

    def note(self, name: str, seconds: float, passed: bool) -> None:
        """Add a line to the log."""
        self.lines.append(f"| {name} | {'passed' if passed else 'FAILED'} | {seconds:.0f} |")
        print(self.lines[-1], flush=True)
        table = "\n".join(["| step | outcome | seconds |", "| --- | --- | ---: |", *self.lines])
        (self.out / "log.md").write_text(table + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=12, help="of training, each time; a multiple of 4")
    given = parser.parse_args()
    trip, out = Odyssey(given.out), given.out

    rows = [{"instruction": f"Is {n} more than {n % 7}?", "output": f"the answer is {n > n % 7}"} for n in range(64)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = [{"question": f"is {n} more than {n % 5}", "passage": "Numbers.", "answer": True} for n in range(8)]
    (out / "data" / "test").mkdir(parents=True)
    (out / "data" / "test" / "boolq.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    text = "\n".join(f"{row['instruction']} {row['output']}." for row in rows * 20)
    (out / "text.txt").write_text(text, encoding="utf-8")

    sft = ["sft", "--config", "clover_full", f"data={out / 'rows.jsonl'}", "rows=48", "held_out_rows=8"]
    sft += [f"max_steps={given.steps}", "per_device_train_batch_size=2", "gradient_accumulation_steps=1"]
    saving = ["save_strategy=steps", f"save_steps={given.steps // 4}"]
    first = [*sft, *saving, f"model={given.model}", f"output_dir={out / 'first'}"]
    state = out / "first" / f"checkpoint-{given.steps // 4}" / "trainer_state.json"
    trip.killed("fine-tune with TRL, killed after the first checkpoint", state, *first)
    trip.step("resume", *first, "resume=true")
    second = [*sft, f"model={given.model}", f"output_dir={out / 'second'}", "seed=1", "save_strategy=no"]
    trip.step("fine-tune a second adapter", *second)
    adapters = [out / name / "adapter" for name in ("first", "second")]
    source = json.loads((adapters[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    suite = ["--data", out / "data", "--tasks", "boolq", "--new-tokens", 4]
    trip.step("evaluate", "evaluate", "--model", source, "--adapter", adapters[0], *suite, "--out", out / "evaluation")
    trip.step("merge and export", "export", adapters[0], out / "merged", "--lora-rank", 8)
    windows = ["--calibration", out / "text.txt", "--rows", 16, "--max-length", 128]
    trip.step("prune", "prune", out / "merged", "--ratio", "vo=0.25", *windows, "--out", out / "pruned")
    healing = [*sft, f"model={out / 'pruned'}", f"output_dir={out / 'healed'}", "save_strategy=no", "merge=true"]
    trip.step("heal: train the pruned model", *healing)
    trip.step("load two adapters, switch, mix, hotswap", source, *adapters, code=ADAPTERS)
    for name in ("whisper", "encoder", "vision-language"):
        trip.step(f"tiny {name} model: train, save, merge, prune", name, code=FAMILY)
    print(f"{len(trip.lines)} steps passed: {out / 'log.md'}")


if __name__ == "__main__":
    main()
