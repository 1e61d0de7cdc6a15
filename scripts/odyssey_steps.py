"""The steps of `odyssey.py` that no command of the package takes: each is what a user would write, in a new process.

The models are Whisper tiny.en, MiniLM with a head that classifies sentences, and a random LLaVA. `make` writes a base
and its data; every other step reads these from the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

CLASSES = {
    "decoder": hf.AutoModelForCausalLM,
    "whisper": hf.WhisperForConditionalGeneration,
    "encoder": hf.AutoModelForSequenceClassification,
    "vision-language": hf.LlavaForConditionalGeneration,
}
TASKS = {"encoder": "SEQ_CLS", "vision-language": "CAUSAL_LM"}
RATES = {"whisper": 3e-4, "encoder": 5e-3, "vision-language": 2e-2}
EXACT, MIXED = 1e-5, 1e-4  # relative distances of float32 outputs: in the same order, and batched in another
ANIMALS = ["cat", "dog", "horse", "cow", "sheep", "goat", "lion", "tiger", "rabbit", "mouse", "wolf", "bear"]
VEHICLES = ["car", "bus", "truck", "train", "tram", "boat", "ship", "plane", "lorry", "taxi", "ferry", "van"]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)


# ---------------------------------------------------------------------- data


def make(kind: str, base: Path) -> None:
    """Write a model with its processor, and beside it `train.pt` (rows) and `held_out.pt` (one batch)."""
    base.mkdir(parents=True)
    train, held_out = {"decoder": _text, "whisper": _speech, "encoder": _sentences, "vision-language": _squares}[kind](
        base
    )
    torch.save(train, base.parent / "train.pt")
    torch.save(held_out, base.parent / "held_out.pt")


def _text(base: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """The decoder's data are the files that the commands read; its model is one that they find."""
    rows = [{"instruction": f"Is {n} more than {n % 7}?", "output": f"the answer is {n > n % 7}"} for n in range(64)]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = [{"question": f"is {n} more than {n % 5}", "passage": "Numbers.", "answer": True} for n in range(8)]
    (base / "test").mkdir()
    (base / "test" / "boolq.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    text = "\n".join(f"{row['instruction']} {row['output']}." for row in rows * 20)
    (base.parent / "text.txt").write_text(text, encoding="utf-8")
    return rows, {"input_ids": torch.arange(10, 30).view(2, 10)}


def _speech(base: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """Whisper tiny.en learns to write one reader's sentences in small letters; a speech of Kennedy's is held out."""
    import real_models

    found = real_models.whisper_tiny_en()
    processor = hf.WhisperProcessor(found.features, found.tokenizer)
    for each in (found.model, processor):
        each.save_pretrained(base)
    rows = {}
    for name, clip in real_models.speech().items():
        features = found.features(clip.audio, sampling_rate=real_models.SAMPLE_RATE, return_tensors="pt")
        text = " " + "".join(x for x in clip.text.lower() if x.isalpha() or x == " ")
        rows[name] = {"input_features": features.input_features[0], "labels": found.tokenizer(text).input_ids[1:]}
    held_out = rows.pop("jfk")
    return list(rows.values()), collate("whisper", base, [held_out, held_out])


def _sentences(base: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """MiniLM learns to tell animals from vehicles by eight of each; four of each are held out."""
    import real_models

    for each in real_models.minilm():
        each.save_pretrained(base)
    rows: list[dict[str, Any]] = [
        {"text": f"{start} {word}.", "labels": label}
        for start in ("I see a", "There is no", "This is my old")
        for pair in zip(ANIMALS, VEHICLES, strict=True)
        for label, word in enumerate(pair)
    ]
    (base.parent / "text.txt").write_text("\n".join(row["text"] for row in rows * 8), encoding="utf-8")
    held_out = [row for row in rows if any(word in row["text"] for word in ANIMALS[8:] + VEHICLES[8:])]
    return [row for row in rows if row not in held_out], collate("encoder", base, held_out)


def _squares(base: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """A random LLaVA, whose tokenizer is that of SmolLM2, learns to name the colour of a square."""
    from PIL import Image

    from clover_peft.io.hub_models import DEFAULT_MODEL, find_model

    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(find_model(DEFAULT_MODEL).path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=128)
    config = hf.LlavaConfig(
        text_config=dict(
            model_type="llama", vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
        ),
        vision_config=dict(model_type="clip_vision_model", image_size=32, patch_size=8, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    for each in (hf.LlavaForConditionalGeneration(config), processor):
        each.save_pretrained(base)
    rows = [
        {
            "images": [Image.new("RGB", (32, 32), tuple(min(255, part + shade) for part in colour))],
            "prompt": [{"role": "user", "content": "Which colour? "}],
            "completion": [{"role": "assistant", "content": name}],
        }
        for shade in range(10)
        for name, colour in COLOURS.items()
    ]
    return rows[:-8], collate("vision-language", base, rows[-8:])


def collate(kind: str, base: Path, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows, with labels."""
    processor = hf.AutoProcessor.from_pretrained(base)
    if kind == "vision-language":
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        return dict(DataCollatorForVisionLanguageModeling(processor)(rows))
    if kind == "encoder":
        batch = processor([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_features": torch.stack([row["input_features"] for row in rows]),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }


# ---------------------------------------------------------------------- steps


def train(kind: str, base: Path, out: Path, seed: int, steps: int, resume: bool) -> None:
    """Fine-tune with TRL's trainer for images and transformers' for the others, and save the adapter."""
    from datasets import Dataset
    from peft import get_peft_model
    from trl import SFTConfig, SFTTrainer

    import clover_peft

    hf.set_seed(seed)
    model, rows = CLASSES[kind].from_pretrained(base), _saved(base, "train")
    config = clover_peft.CloverConfig(task_type=TASKS.get(kind))
    settings = dict(
        output_dir=str(out), seed=seed, max_steps=steps, save_steps=steps // 4, logging_steps=steps // 4,
        learning_rate=RATES[kind], per_device_train_batch_size=2 if kind == "whisper" else 4, use_cpu=True,
        remove_unused_columns=False, report_to="none",
    )  # fmt: skip
    if kind == "vision-language":
        trainer = SFTTrainer(
            model, SFTConfig(**settings, max_length=None, bf16=False), train_dataset=Dataset.from_list(rows),
            processing_class=hf.AutoProcessor.from_pretrained(base), peft_config=config,
        )  # fmt: skip
    else:
        model, arguments = get_peft_model(model, config), hf.TrainingArguments(**settings, label_names=["labels"])
        trainer = hf.Trainer(model, arguments, lambda rows: collate(kind, base, rows), rows)
    # The kill may have come while the next checkpoint was written, which transformers would take.
    whole = sorted(out.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(whole[-1].parent) if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _expect(losses[-1] < losses[0], f"losses: {losses}")
    trainer.save_model(out / "adapter")


def evaluate(kind: str, base: Path, adapter: Path) -> None:
    """Compare the loss on held-out rows without and with the adapter, loaded under another seed."""
    from peft import PeftModel

    import clover_peft  # noqa: F401

    batch, losses = _saved(base, "held_out"), []
    torch.manual_seed(5)
    model = CLASSES[kind].from_pretrained(base).eval()
    for each in (lambda: model, lambda: PeftModel.from_pretrained(model, adapter)):
        with torch.no_grad():
            losses.append(float(each().eval()(**batch).loss))
    _expect(losses[1] < losses[0], f"loss on held-out rows: {losses[0]:.3f}, with the adapter {losses[1]:.3f}")


@torch.no_grad()
def switch(kind: str, base: Path, first: Path, second: Path) -> None:
    """Load two adapters, switch between them, mix them in a batch, and put one in the other's place."""
    from peft import PeftModel

    import clover_peft

    batch = _saved(first.parent, "held_out")
    inputs = {name: value[:2] for name, value in batch.items()}  # one row for each adapter

    def load(adapter: Path, name: str = "default") -> Any:
        torch.manual_seed(3)  # for a head that the base does not have
        return PeftModel.from_pretrained(CLASSES[kind].from_pretrained(base), adapter, adapter_name=name).eval()

    alone = [load(path)(**inputs).logits for path in (first, second)]
    _expect(_distance(*alone) > 100 * MIXED, f"the adapters differ by {_distance(*alone):.1e}")
    model = load(first, "a")
    model.load_adapter(second, adapter_name="b")
    for name, expected in (("a", alone[0]), ("b", alone[1]), ("a", alone[0])):
        model.set_adapter(name)
        _expect(torch.equal(model(**inputs).logits, expected), f"switched to {name}: the same bits as alone")
    both = model(**inputs, adapter_names=["a", "b"]).logits
    error = _distance(both, torch.stack([alone[0][0], alone[1][1]]))
    _expect(error < MIXED, f"mixed in a batch: off by {error:.1e}")
    model.delete_adapter("b")
    clover_peft.hotswap_adapter(model, str(second), adapter_name="a")
    error = _distance(model(**inputs).logits, alone[1])
    _expect(error < EXACT, f"hotswapped: off by {error:.1e}")


def prune(kind: str, merged: Path, out: Path) -> None:
    """Take a quarter of V-O away, by training rows, and read the saved model back."""
    import clover_peft

    base = merged.parent / "base"
    model, batch = CLASSES[kind].from_pretrained(merged).eval(), _saved(base, "held_out")
    report = clover_peft.prune(model, {"vo": 0.25}, calibration=[collate(kind, base, _saved(base, "train")[:4])])
    _expect(report.parameters[1] < report.parameters[0], f"parameters: {report.parameters}")
    model.save_pretrained(out)
    hf.AutoProcessor.from_pretrained(base).save_pretrained(out)
    with torch.no_grad():
        error = _distance(CLASSES[kind].from_pretrained(out).eval()(**batch).logits, model(**batch).logits)
    _expect(error < EXACT, f"read back: off by {error:.1e}")


@torch.no_grad()
def serve(kind: str, folder: Path, narrow: bool) -> None:
    """Use a folder as a server does: without `clover_peft`, unless heads are narrower."""
    if kind == "decoder":
        return _serve_by_http(folder, narrow)
    if narrow:
        import clover_peft  # noqa: F401
    batch = _saved(folder, "held_out")
    model, processor = CLASSES[kind].from_pretrained(folder).eval(), hf.AutoProcessor.from_pretrained(folder)
    if kind == "encoder":
        right = (model(**batch).logits.argmax(-1) == batch["labels"]).double().mean()
        _expect(right > 0.8, f"held-out sentences told apart: {right:.0%}")
    elif kind == "whisper":
        text = processor.batch_decode(model.generate(batch["input_features"][:1]), skip_special_tokens=True)[0]
        _expect(narrow or "what you can do for your country" in text, f"it hears: {text}")
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        text = processor.batch_decode(model.generate(**inputs, max_new_tokens=2, do_sample=False))[0]
        _expect(bool(text), f"a random model's answer: {text[-40:]!r}")
    _expect(narrow or "clover_peft" not in sys.modules, "served without clover_peft" if not narrow else "served")
    return None


def _serve_by_http(folder: Path, narrow: bool, port: int = 8765) -> None:
    """`transformers serve` answers as the model does in this process."""
    program = ["-m", *(["clover_peft", "run", "-m"] if narrow else []), "transformers.cli.transformers"]
    server = subprocess.Popen([sys.executable, *program, "serve", str(folder), "--port", str(port), "--device", "cpu"])
    messages = [{"role": "user", "content": "Is 5 more than 3?"}]
    request = {"model": str(folder), "messages": messages, "max_tokens": 8, "temperature": 0.0, "stream": False}
    try:
        for _ in range(120):
            time.sleep(1)
            if server.poll() is not None:
                raise SystemExit("the server ended")
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").close()
                break
            except OSError:
                continue
        address = f"http://localhost:{port}/v1/chat/completions"
        posted = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(posted) as answer:
            found = json.load(answer)["choices"][0]["message"]["content"]
    finally:
        server.kill()
        server.wait()
    if narrow:
        import clover_peft  # noqa: F401
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = CLASSES["decoder"].from_pretrained(folder).eval()
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    _expect(found.strip() == expected.strip(), f"served {found!r}, expected {expected!r}")


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _expect(holds: Any, what: str) -> None:
    print(what, flush=True)
    if not holds:
        raise SystemExit(f"not as expected: {what}")


def _saved(folder: Path, name: str) -> Any:
    """What `make` has written beside the folder of a model."""
    return torch.load(folder.parent / f"{name}.pt", weights_only=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "train", "evaluate", "switch", "prune", "serve"])
    parser.add_argument("kind", choices=list(CLASSES))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--narrow", action="store_true", help="the model is pruned, so import clover_peft")
    given = parser.parse_args()
    step = globals()[given.step]
    more = {
        "train": {"seed": given.seed, "steps": given.steps, "resume": given.resume},
        "serve": {"narrow": given.narrow},
    }.get(given.step, {})
    step(given.kind, *given.folders, **more)


if __name__ == "__main__":
    main()
