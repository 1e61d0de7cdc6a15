"""Text for calibration, from a file or a data set on the hub, cut into windows of tokens without padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .rows import find_text, read_lines, read_rows

DEFAULT_ROWS, DEFAULT_LENGTH, DEFAULT_BATCH = 64, 512, 8
# Fields of a row that hold its text; the first entry is used whose first field the row has,
# and that has text.
_FIELDS = (("text",), ("content",), ("messages",), ("prompt", "completion"), ("instruction", "input", "output"))
_CHARACTERS = 16  # characters read for each token that is needed, about four times as many as it has


def text_batches(
    source: str | Path,
    tokenizer: Any,
    *,
    rows: int = DEFAULT_ROWS,
    max_length: int = DEFAULT_LENGTH,
    batch_size: int = DEFAULT_BATCH,
) -> list[dict[str, Tensor]]:
    """Cut a text into windows, each full of tokens, so that no window is padded.

    About four times as much text as needed is read from the beginning, and the windows are spread evenly over it. Each
    window has the special tokens that the tokenizer puts around a text.

    Args:
        source: a `.txt` file, or a `.jsonl` file whose rows have a field `text`, `content` or `messages`, or fields
            `prompt` and `completion`, or `instruction`, `input` and `output`; both also with `.gz`. Or the name of a
            data set on the hub with such rows, `name:configuration` where it has several; its split "train" is read.
        tokenizer: the model's tokenizer.
        rows: the largest number of windows.
        max_length: tokens in a window.
        batch_size: windows in a batch.

    Returns:
        Batches of `{"input_ids": (windows, max_length) int64}`.

    Raises:
        ValueError: the file or the data set does not exist, is damaged or has too little text.
    """
    for name, figure in {"rows": rows, "max_length": max_length, "batch_size": batch_size}.items():
        if figure < 1:
            raise ValueError(f"{name}={figure}: expected at least 1")
    windows = cut(_beginning(_texts(str(source)), _CHARACTERS * rows * max_length), tokenizer, max_length, source)
    count = min(rows, len(windows))
    chosen = torch.tensor([windows[i * len(windows) // count] for i in range(count)])
    return [{"input_ids": batch} for batch in chosen.split(batch_size)]


def cut(text: str, tokenizer: Any, max_length: int, source: str | Path) -> list[list[int]]:
    """Cut a text into windows, each full of tokens, with the special tokens that the tokenizer puts around a text.

    Args:
        text: the text.
        tokenizer: the model's tokenizer.
        max_length: tokens in a window.
        source: where the text comes from, for errors.

    Returns:
        The token ids of all windows, in the text's order; a rest that does not fill a window is left out.

    Raises:
        ValueError: the text does not fill one window.
    """
    before, after = _special_tokens(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"max_length={max_length}: expected room beside {len(before + after)} special tokens")
    if not text.strip():
        raise ValueError(f"{source}: expected text, found none")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < room:
        raise ValueError(
            f"{source}: expected at least {room} tokens, for one window of {max_length}, found {len(tokens)}; pass "
            "more text, or a smaller max_length"
        )
    starts = range(0, len(tokens) - room + 1, room)
    return [[*before, *tokens[start : start + room], *after] for start in starts]


def read_text(path: Path) -> str:
    """Read a file of plain text.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    return "".join(_texts(str(path)))


def batches_for(
    model: Any,
    tokenizer: Any,
    source: str | Path,
    *,
    rows: int = DEFAULT_ROWS,
    max_length: int | None = None,
    batch_size: int = DEFAULT_BATCH,
) -> list[dict[str, Any]]:
    """Make `text_batches` and add the other arguments that a model needs.

    The decoder of an encoder-decoder gets each window too, shifted by one token. Caches and logits are switched off
    where the model allows that, since calibration does not use them.

    Args:
        model: a model of transformers.
        tokenizer: the model's tokenizer; None if it has none.
        source: see `text_batches`.
        rows: the largest number of windows.
        max_length: tokens in a window; None: 512, or the model's limit if that is lower.
        batch_size: windows in a batch.

    Returns:
        Keyword arguments of the model, batch by batch.

    Raises:
        ValueError: see `text_batches`; or the model does not read text, or its limit is below `max_length`.
    """
    if tokenizer is None or model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__}: expected a model that reads text and has a tokenizer; calibrate others in "
            "Python, with clover_peft.prune(model, calibration=<batches of their inputs>)"
        )
    most = longest_window(model, tokenizer)
    if max_length is not None and most is not None and max_length > most:
        raise ValueError(f"max_length={max_length}: expected at most {most}, which {type(model).__name__} takes")
    length = min(DEFAULT_LENGTH, most or DEFAULT_LENGTH) if max_length is None else max_length
    more = without_outputs(model)
    batches: list[dict[str, Any]] = []
    for batch in text_batches(source, tokenizer, rows=rows, max_length=length, batch_size=batch_size):
        ids = batch["input_ids"]
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            first = ids[:, :1] if start is None else torch.full_like(ids[:, :1], start)
            more["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        batches.append({"input_ids": ids, **more})
    return batches


def without_outputs(model: Any) -> dict[str, Any]:
    """The arguments that switch off what calibration does not use, cache and logits, where a model takes them."""
    parameters = inspect.signature(model.forward).parameters
    return {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in parameters}


def longest_window(model: Any, tokenizer: Any) -> int | None:
    """The most tokens of a window that the model and the tokenizer declare; None if they declare no limit."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    table = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    if isinstance(positions, int) and (unused := getattr(table, "padding_idx", None)) is not None:
        positions -= unused + 1  # RoBERTa counts positions from behind the padding's.
    limits = (positions, getattr(tokenizer, "model_max_length", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and behind a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if start is None:
        return [], []
    return whole[:start], whole[start + len(bare) :]


def _beginning(texts: Iterable[str], characters: int) -> str:
    """Join the first texts until they have this many characters."""
    kept: list[str] = []
    read = 0
    for text in texts:
        kept.append(text)
        read += len(text)
        if read >= characters:
            break
    return "".join(kept)


def _texts(source: str) -> Iterator[str]:
    """Yield the text of a file or a data set piece by piece; the pieces only have to be joined."""
    path, kind = find_text(source)
    if kind is None:
        yield from (_row_text(source, row) for row in _hub_rows(source))
        return
    if kind == ".jsonl":
        for where, row, problem in read_rows(path):
            if problem:
                raise ValueError(f"{where}: {problem}")
            yield _row_text(where, row)
        return
    for line in read_lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: expected text in UTF-8, found damage: {error}") from error


def _hub_rows(source: str) -> Iterable[Any]:
    from .downloads import hub_reachable

    if not hub_reachable():
        raise ValueError(
            f"{source}: expected a .txt or .jsonl file, with .gz or without, or the name of a data set on the hub, "
            "found no such file, and the hub cannot be reached"
        )
    import datasets

    name, _, configuration = source.partition(":")
    return datasets.load_dataset(name, configuration or None, split="train", streaming=True)


def _row_text(where: str, row: Any) -> str:
    """Return the text of a row, followed by an empty line."""
    if isinstance(row, Mapping) and (there := [fields for fields in _FIELDS if fields[0] in row]):
        return next(filter(None, (_plain([row.get(f) for f in fields]) for fields in there)), "") + "\n\n"
    raise ValueError(
        f"{where}: expected a row with {', '.join(' and '.join(fields) for fields in _FIELDS)}, found "
        + (f"the fields {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__)
    )


def _plain(value: Any) -> str:
    """Return text unchanged, the texts of chat messages and of their parts, and nothing for any other value."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_plain, value)))
    if isinstance(value, Mapping):
        return _plain(value.get("content") or value.get("text"))
    return value if isinstance(value, str) else ""
