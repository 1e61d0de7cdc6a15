"""Answers to the suite's questions, generated or chosen by likelihood, and their accuracy."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...base_model.own_text import generate_plainly
from ...io import run_record as records
from ...io.atomic import write_json, write_text
from ...io.rows import Row, parse_row, read_lines
from ...io.tables import markdown_table
from . import prepare, sources
from .protocols import Protocol, prompt_tokens
from .tasks import TASKS, extract, options

Prediction = dict[str, Any]
Predict = Callable[[list[Row]], list[Prediction]]
_KEPT = ("id", "task", "answer")  # fields of a row that its prediction repeats
_NORMAL = 1.959964  # quantile of the normal distribution for a two-sided 95 % interval


def read_questions(folder: Path, split: str, tasks: list[str], per_task: int | None, seed: int) -> list[Row]:
    """Read the rows to be asked, each with `task` and `id`.

    Args:
        folder: a folder from `prepare.write`, or one with `test/<task>.jsonl[.gz]` alone.
        split: "test" or "validation".
        tasks: names of tasks; repeated names count once.
        per_task: how many rows to draw of each task, the same for the same seed; None = all.
        seed: the seed of the draw.

    Raises:
        ValueError: a file is missing, lacks rows of a task, or has rows that are no questions of it.
    """
    tasks = list(dict.fromkeys(tasks))
    if split == "test":
        rows = sources.from_folder(folder, "test", tasks)
    else:
        path = folder / "validation.jsonl.gz"
        if not path.is_file():
            raise ValueError(
                f"{path}: expected validation rows, found none; prepare_data.py --validation N makes them"
            )
        rows = sources.by_task(sources.read_rows(path))
    if not all(_is_numbered(row, name) for name in tasks for row in rows[name]):
        rows = prepare.number(rows, split)
    chosen = []
    for name in tasks:
        if not (part := rows[name]):
            raise ValueError(f"{folder}: expected {split} questions of {name}, found none; leave the task out")
        for row in part:
            prepare.check_question(row, name, folder)
        if per_task is not None and per_task < len(part):
            drawn = random.Random(f"{seed} evaluated {name}").sample(range(len(part)), per_task)
            part = [part[i] for i in sorted(drawn)]
        chosen += part
    return chosen


def _is_numbered(row: Row, task: str) -> bool:
    return row.get("task") == task and re.fullmatch(rf"{task}/(train|test)/\d+", str(row.get("id"))) is not None


def ask(row: Row, protocol: Protocol | None, tokenizer: Any) -> str:
    """Return a row's prompt as text; without a protocol, from the chat template, with its special tokens."""
    if protocol is not None:
        return protocol.question(row["instruction"], training=False)
    messages = [{"role": "user", "content": row["instruction"]}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def scorer(model: Any, tokenizer: Any, protocol: Protocol | None) -> Predict:
    """Chooses the option of which the model says "the correct answer is <option>" with the highest probability.

    No text has to be parsed. Where a probability is not finite, no option is chosen. The tokens that the options of a
    question share are computed once: if the options differ in their last token only, a question is one sequence.

    Returns:
        A function from rows to predictions: `id`, `task`, `answer`, `predicted` and `log_probabilities` by option. If
        no option is chosen, `predicted` is None and `log_probabilities` is missing.
    """

    def predict(rows: list[Row]) -> list[Prediction]:
        encoded = [_encode_options(row, tokenizer, protocol) for row in rows]
        starts = [_common_start(list(choices.values())) - 1 for choices in encoded]
        first: dict[tuple[int, ...], int] = {}  # sequence -> the position that predicts the first token of an option
        for choices, start in zip(encoded, starts, strict=True):
            for ids in choices.values():
                first[tuple(ids[:-1])] = min(start, first.get(tuple(ids[:-1]), start))
        found = _log_probabilities(model, first)
        predictions = []
        for row, choices, start in zip(rows, encoded, starts, strict=True):
            scores = {}
            for word, ids in choices.items():
                of_sequence, begin = found[tuple(ids[:-1])], first[tuple(ids[:-1])]
                scores[word] = sum(float(of_sequence[at - begin, ids[at + 1]]) for at in range(start, len(ids) - 1))
            if all(map(math.isfinite, scores.values())):
                best = max(scores, key=scores.__getitem__)
                predictions.append(_prediction(row, best, {"log_probabilities": scores}))
            else:
                predictions += unanswered([row])
        return predictions

    return predict


def unanswered(rows: list[Row]) -> list[Prediction]:
    """Return the predictions of a model that cannot answer because its weights are not finite."""
    return [_prediction(row, None, {}) for row in rows]


def generator(model: Any, tokenizer: Any, protocol: Protocol | None, beams: int, new_tokens: int) -> Predict:
    """Generate an answer, greedily or by beam search, and look for the task's words in it (`tasks.extract`).

    Returns:
        A function from rows to predictions: `id`, `task`, `answer`, `predicted` (None: no such word), and `text`.
    """

    def predict(rows: list[Row]) -> list[Prediction]:
        prompts = [prompt_tokens(tokenizer, ask(row, protocol, tokenizer), protocol is not None) for row in rows]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad():
            ids = generate_plainly(
                model,
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                num_beams=beams,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_parsed(row, text) for row, text in zip(rows, texts, strict=True)]

    return predict


def vllm_generator(
    model: str, tokenizer: Any, protocol: Protocol | None, beams: int, new_tokens: int, dtype: str
) -> Predict:
    """Make a `generator` that uses vLLM, for a folder with an ordinary model (such as a merged one).

    Raises:
        ValueError: vLLM is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            "--vllm: expected vllm, found it not installed; pip install vllm, or leave --vllm out"
        ) from error
    engine = vllm.LLM(model=model, dtype=dtype)

    def predict(rows: list[Row]) -> list[Prediction]:
        prompts = [
            {"prompt_token_ids": prompt_tokens(tokenizer, ask(row, protocol, tokenizer), protocol is not None)}
            for row in rows
        ]
        if beams > 1:
            outputs = engine.beam_search(prompts, vllm.sampling_params.BeamSearchParams(beams, new_tokens))
            whole = [output.sequences[0].tokens for output in outputs]
            ids = [t[len(p["prompt_token_ids"]) :] for t, p in zip(whole, prompts, strict=True)]
        else:
            outputs = engine.generate(prompts, vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens))
            ids = [list(output.outputs[0].token_ids) for output in outputs]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [_parsed(row, text) for row, text in zip(rows, texts, strict=True)]

    return predict


def digest(rows: list[Row]) -> str:
    """Return the sha256 of questions with their right answers; their order does not matter."""
    rows = _in_order(rows)
    text = json.dumps([[row[key] for key in ("id", "instruction", "answer")] for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _in_order(rows: list[Row]) -> list[Row]:
    """Sort long rows first: too large a batch fails at once, and the remaining time is not underestimated."""
    return sorted(rows, key=lambda row: (-len(row["instruction"]), row["id"]))


def evaluate(
    rows: list[Row], predict: Predict, batch_size: int, out: Path, settings: dict[str, Any]
) -> list[Prediction]:
    """Ask all rows, long ones first, and write the predictions to `out/predictions.jsonl`, batch by batch.

    An evaluation that was interrupted resumes where it stopped, in the same batches.

    Args:
        rows: from `read_questions`.
        predict: from `scorer` or `generator`.
        batch_size: rows in a batch.
        out: a folder that is empty, or has the same evaluation unfinished.
        settings: everything beside the rows that determines the predictions.

    Raises:
        ValueError: `out` has an evaluation with other rows or settings, or is damaged.
    """
    rows = _in_order(rows)
    more = {"batch_size": batch_size, "rows": len(rows), "questions": digest(rows)}
    settings = json.loads(json.dumps({**settings, **more}, default=str))
    out.mkdir(parents=True, exist_ok=True)
    kept, asked = out / "predictions.jsonl", out / "settings.json"
    if asked.is_file():
        found = records.read_json(asked, f"delete {out} and evaluate again")
        known = {key: settings.get(key) for key in found}  # Earlier versions wrote fewer.
        records.check_same(found, known, str(out), "choose another folder, or delete this one to evaluate again")
    elif any(out.iterdir()):
        raise ValueError(f"{out}: expected a new or empty folder, found files; choose another")
    else:
        write_json(asked, settings)
    done = list(_complete(kept)) if kept.is_file() else []
    if [[each[key] for key in _KEPT] for each in done] != [[row[key] for key in _KEPT] for row in rows[: len(done)]]:
        raise ValueError(f"{kept}: expected answers to these questions, found others; delete it to ask all again")
    done = done[: len(done) if len(done) == len(rows) else len(done) // batch_size * batch_size]
    write_text(kept, "".join(json.dumps(prediction) + "\n" for prediction in done))
    with kept.open("a", encoding="utf-8") as file, tqdm(total=len(rows), initial=len(done), unit="question") as bar:
        for start in range(len(done), len(rows), batch_size):
            predictions = predict(rows[start : start + batch_size])
            file.write("".join(json.dumps(prediction) + "\n" for prediction in predictions))
            file.flush()
            done += predictions
            bar.update(len(predictions))
    return done


def summarise(predictions: list[Prediction]) -> dict[str, Any]:
    """Compute accuracies with 95 % intervals, as shares of 1.

    Returns:
        `tasks`: name -> `questions`, `correct`, `unparsed`, `accuracy`, `interval` (by Wilson's formula), `chosen`
        (answer -> how often it was given) and `right` ("1" or "0" for every question, in the order of their numbers);
        `mean`: the unweighted mean accuracy of these tasks;
        `interval`: its interval, from those of the tasks by the method of variance estimates recovery (Zou and Donner,
        2008); and, where options were scored, `loss`, also for each task: the negative log-probability of the right
        option among the question's options, in nats. It tells models apart with far fewer questions than the accuracy.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for name in TASKS:
        part = [prediction for prediction in predictions if prediction["task"] == name]
        if part:
            part.sort(key=lambda prediction: int(prediction["id"].rpartition("/")[2]))
            right = [prediction["predicted"] == prediction["answer"] for prediction in part]
            correct = sum(right)
            tasks[name] = {
                "questions": len(part),
                "correct": correct,
                "unparsed": sum(prediction["predicted"] is None for prediction in part),
                "accuracy": correct / len(part),
                "interval": wilson(correct, len(part)),
                "chosen": dict(sorted(Counter(prediction["predicted"] or "" for prediction in part).items())),
                "right": "".join(str(int(is_right)) for is_right in right),
            }
            if all("log_probabilities" in prediction for prediction in part):
                tasks[name]["loss"] = sum(map(_loss, part)) / len(part)
    mean = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    below, above = (
        math.sqrt(sum((t["accuracy"] - t["interval"][side]) ** 2 for t in tasks.values())) / len(tasks)
        for side in (0, 1)
    )
    summary = {"tasks": tasks, "mean": mean, "interval": [mean - below, mean + above]}
    if all("loss" in task for task in tasks.values()):
        summary["loss"] = sum(task["loss"] for task in tasks.values()) / len(tasks)
    return summary


def _loss(prediction: Prediction) -> float:
    scores = prediction["log_probabilities"]
    return float(torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0) - scores[prediction["answer"]])


def wilson(correct: int, questions: int) -> list[float]:
    """Return Wilson's 95 % interval of a share."""
    share, z = correct / questions, _NORMAL**2 / questions
    centre = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def show(summary: dict[str, Any]) -> str:
    """Format a summary as a Markdown table, in per cent."""

    def interval(low: float, high: float) -> str:
        return f"{low:.1%} to {high:.1%}"

    rows = [
        [name, f"{t['questions']:,}", f"{t['accuracy']:.1%}", interval(*t["interval"]), t["unparsed"], _shown(t)]
        for name, t in summary["tasks"].items()
    ]
    rows.append(["mean", "", f"{summary['mean']:.1%}", interval(*summary["interval"]), "", _shown(summary)])
    return markdown_table(["task", "questions", "accuracy", "95 %", "unparsed", "loss"], rows)


def _shown(scored: dict[str, Any]) -> str:
    return f"{scored['loss']:.4f}" if "loss" in scored else "-"


def _encode_options(row: Row, tokenizer: Any, protocol: Protocol | None) -> dict[str, list[int]]:
    """Encode a row's prompt with each of its options: option -> token ids."""
    texts = {word: _answered(row, f"the correct answer is {word}", protocol, tokenizer) for word in options(row)}
    encoded = tokenizer(list(texts.values()), add_special_tokens=protocol is not None)["input_ids"]
    return dict(zip(texts, encoded, strict=True))


def _answered(row: Row, answer: str, protocol: Protocol | None, tokenizer: Any) -> str:
    """Join a row's prompt and an answer as in training; a chat template may put more text between them."""
    if protocol is not None:
        return ask(row, protocol, tokenizer) + protocol.before_answer + answer
    messages = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": answer}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text[: text.rindex(answer) + len(answer)]


def _common_start(sequences: list[list[int]]) -> int:
    """Return how many tokens at the start all sequences share, leaving each at least one of its own."""
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))
    return min(same, min(map(len, sequences)) - 1)


def _log_probabilities(model: Any, first: dict[tuple[int, ...], int]) -> dict[tuple[int, ...], Tensor]:
    """Compute sequence -> log-probabilities of the next token, (positions, vocabulary), from position `first` on."""
    sequences, longest, earliest = sorted(first), max(map(len, first)), min(first.values())
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)], mask[i, : len(sequence)] = torch.tensor(sequence), 1
    batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            logits = model(**batch, logits_to_keep=longest - earliest).logits
        else:
            logits = model(**batch).logits[:, earliest:]
        wanted = [
            of_sequence[first[sequence] - earliest : len(sequence) - earliest]
            for sequence, of_sequence in zip(sequences, logits, strict=True)
        ]
        flat = torch.cat(wanted).to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
    return dict(zip(sequences, flat.split([len(part) for part in wanted]), strict=True))


def _prediction(row: Row, predicted: str | None, more: dict[str, Any]) -> Prediction:
    return {"id": row["id"], "task": row["task"], "answer": row["answer"], "predicted": predicted, **more}


def _parsed(row: Row, text: str) -> Prediction:
    return _prediction(row, extract(TASKS[row["task"]], text), {"text": text})


def _complete(path: Path) -> Iterator[Prediction]:
    """Yield the predictions of a file whose last line may be cut off."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.endswith(b"\n"):
            return
        prediction, _ = parse_row(line)
        if not isinstance(prediction, dict) or not prediction.keys() >= {*_KEPT, "predicted"}:
            found = line[:40].decode(errors="replace")
            raise ValueError(
                f"{path}: expected a prediction in line {number}, found {found!r}; delete it to ask all again"
            )
        yield prediction
