"""Writes docs/config.md: every key of a run file, from the sections' own descriptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gpt2dist.config import RunConfig

TARGET = Path(__file__).parent / "config.md"


def render() -> str:
    """The page as Markdown."""
    lines = [
        "# Keys of a run file",
        "",
        "Written by `make docs` from `gpt2dist/config.py`. Any key can be changed on the command line:",
        "`gpt2dist train RUN.toml --set section.key=value`.",
    ]
    top, sections = [], []
    for name, field in RunConfig.model_fields.items():
        target = sections if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else top
        target.append((name, field))
    lines += ["", "## Top level", "", *_table(top)]
    for name, field in sections:
        section: Any = field.annotation
        title = section.__doc__.partition("] ")[2]
        lines += ["", f"## [{name}]", "", f"{title[0].upper()}{title[1:]}", "", *_table(section.model_fields.items())]
    return "\n".join(lines) + "\n"


def _table(fields: Any) -> list[str]:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in fields:
        default = "required" if field.default is PydanticUndefined else f"`{_toml(field.default)}`"
        meaning = " ".join(field.description.split()).replace("|", "\\|")
        if get_origin(field.annotation) is Literal:
            meaning += f" One of {', '.join(f'`{_toml(choice)}`' for choice in get_args(field.annotation))}."
        rows.append(f"| `{name}` | {default if default != '`unset`' else 'unset'} | {meaning} |")
    return rows


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, (bool, str)):
        return json.dumps(value)
    return str(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
