"""Model cards: the README.md beside a saved model or adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .tables import markdown_table


def write_card(
    folder: Path,
    *,
    title: str,
    base: str,
    library: str,
    tags: Sequence[str],
    code: str,
    facts: Mapping[str, str],
    text: str = "",
    ending: str,
) -> None:
    """Write `folder/README.md`, over one that is there.

    Args:
        folder: where the model or the adapter was saved.
        title: the heading.
        base: name of the base model, for the card's metadata.
        library: name of the library that loads it, for the metadata.
        tags: for the metadata.
        code: Python that loads it.
        facts: the rows of a table below, by name.
        text: Markdown between the code and the table.
        ending: Markdown below the table.
    """
    # The name of a folder is no name on the hub, or there it is another model's.
    data = ModelCardData(base_model=base if "/" in base else None, library_name=library, tags=list(tags))
    table = markdown_table(["", ""], facts.items(), left=2)
    parts = [f"# {title}", f"```python\n{code}\n```", *([text] if text else []), table, ending]
    ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")
