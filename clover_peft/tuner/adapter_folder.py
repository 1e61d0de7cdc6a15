"""The folder that an adapter is saved to: its weight file, and the model card beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..io.atomic import write_text

_CARD_HEADING = "## How to load"


def check_weight_file(path: str) -> None:
    """Check that an adapter's weight file, if it exists, can be read and is CLOVER's."""
    if not os.path.exists(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, found one that cannot be read ({error}); it was probably cut "
            "short or overwritten: copy or download it again"
        ) from error
    if not any(".clover_S." in key or key.startswith("clover_S.") for key in keys):
        raise ValueError(
            f"{path}: expected a CLOVER adapter (keys with clover_S), found {len(keys)} keys such as "
            f"{keys[0] if keys else 'none'!r}; load it with the method named in its own adapter_config.json"
        )


def check_folder(folder: str) -> None:
    """Refuse a local folder without weights; "" stands for an unknown one."""
    if os.path.isdir(folder):
        found = sorted(os.listdir(folder))
        if SAFETENSORS_WEIGHTS_NAME not in found:
            pickled = f" but {WEIGHTS_NAME}, a pickle, which is never read" if WEIGHTS_NAME in found else ""
            raise ValueError(
                f"{folder}: expected the adapter's weights, {SAFETENSORS_WEIGHTS_NAME}, found no such file"
                f"{pickled}; copy the whole folder that save_pretrained wrote, with safe_serialization left on"
            )


def complete_model_card(path: str, base: str | None, task_type: str | None) -> None:
    """Add the loading recipe to the model card that peft wrote, once: before its first section or code."""
    if not os.path.isfile(path):
        # The card of an adapter that is not named "default" is one folder up.
        path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if os.path.exists(os.path.join(os.path.dirname(path), SAFETENSORS_WEIGHTS_NAME)):
            return  # another adapter's card
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if _CARD_HEADING in text or "library_name: peft" not in text:
        return
    of_task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(task_type, "value", task_type)), PeftModel)
    auto = f"Auto{of_task.__name__}"
    recipe = (
        f"{_CARD_HEADING}\n\nThis is a CLOVER adapter (arXiv 2411.17426). Install clover_peft with "
        "`pip install .` in a clone of its repository, and import it before loading, or peft will not know the "
        "method:\n\n```python\nimport clover_peft  # registers CLOVER\n"
        f"from peft import {auto}\n\n"
        f'model = {auto}.from_pretrained("<this adapter>")  # base: {base or "<base model>"}\n```\n'
    )
    first = re.search(r"^(##+ |```)", text, flags=re.M)
    above, below = (text[: first.start()], "\n" + text[first.start() :]) if first else (text, "")
    write_text(Path(path), f"{above.rstrip()}\n\n{recipe}{below}")
