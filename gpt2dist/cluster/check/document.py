"""A YAML file with its line numbers, and what was found in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from gpt2dist.config import UserError, read_file

Path = tuple["str | int", ...]
"""Keys and list positions from the top of a document."""
Severity = Literal["error", "warning"]
YAML_TAG = "tag:yaml.org,2002:"
YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
"""What PyYAML raises; the others for values such as 2024-13-45, which it takes for a date."""


@dataclass(frozen=True)
class Finding:
    """One mistake."""

    rule: str
    """Short name of what was looked at."""
    severity: Severity
    """`error`: it will not work, or it is not safe. `warning`: it works, but costs money or time."""
    file: str
    line: int | None
    key: str
    """Where in the file: keys joined by dots, positions in brackets."""
    what: str
    """What is wrong."""
    fix: str
    """What to do about it."""


@dataclass
class Document:
    """One document of a YAML file."""

    file: str
    value: Any
    lines: dict[Path, int]
    """Path → line on which its key stands."""
    text: list[str] = field(repr=False)
    """The lines of the file that belong to this document, and empty ones in place of the others."""
    findings: list[Finding] = field(default_factory=list)

    def error(self, rule: str, path: Path, what: str, fix: str) -> None:
        """Something that will not work, or is not safe."""
        self.findings.append(Finding(rule, "error", self.file, self.line(path), key_text(path), what, fix))

    def warning(self, rule: str, path: Path, what: str, fix: str) -> None:
        """Something that costs money or time."""
        self.findings.append(Finding(rule, "warning", self.file, self.line(path), key_text(path), what, fix))

    def line(self, path: Path) -> int | None:
        """The line of a key; of the nearest one above it where it is missing, if there is one."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None

    def distinct(self) -> list[Finding]:
        """The findings by line; what is used in several places by an alias is found once."""
        found = {(f.rule, f.line or f.key, f.key.rpartition(".")[2], f.what): f for f in reversed(self.findings)}
        return sorted(found.values(), key=lambda f: (f.severity, f.line or 0))

    def key_at(self, line: int) -> Path:
        """The key that a line belongs to."""
        before = [(n, len(path), path) for path, n in self.lines.items() if n <= line]
        return max(before, key=lambda entry: entry[:2])[2] if before else ()

    def at(self, *path: str | int) -> Any:
        """The value at a path, or None."""
        value = self.value
        for part in path:
            if isinstance(part, int):
                value = value[part] if isinstance(value, list) and part < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value

    def table(self, *path: str | int) -> dict[str, Any]:
        """The mapping at a path; empty where there is none."""
        value = self.at(*path)
        return value if isinstance(value, dict) else {}

    def items(self, *path: str | int) -> list[Any]:
        """The list at a path; empty where there is none."""
        value = self.at(*path)
        return value if isinstance(value, list) else []

    def strings(self, *path: str | int) -> list[str]:
        """The strings of the list at a path."""
        return [item for item in self.items(*path) if isinstance(item, str)]

    def number(self, *path: str | int) -> float | None:
        """The number at a path, or None."""
        value = self.at(*path)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def key_text(path: Path) -> str:
    """Keys joined by dots, positions in brackets."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """Advice for an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return otherwise or ("known: " + ", ".join(sorted(names)) if len(names) <= 30 else "remove it")


def read_documents(file: str) -> list[Document]:
    """The documents of a YAML file; the value of an empty one is None.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    data = read_file(file)
    found = []
    try:
        text = data.decode()
        lines = text.splitlines()
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            node = loader.get_node()
            start, end = node.start_mark.line, loader.peek_event().end_mark.line if loader.check_event() else len(lines)
            own = [line if start <= i < max(end, start + 1) else "" for i, line in enumerate(lines)]
            document = Document(file, None, {}, own)
            _check_keys(document, node, ())
            document.value = _with_text_keys(loader.construct_document(node))
            _note_lines(document, node, ())
            found.append(document)
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: cannot be read: {e}") from None
    except YAML_ERRORS as e:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(e).split())}") from None
    return found


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


def _check_keys(document: Document, node: Any, path: Path) -> None:
    """YAML takes the last of two equal keys and says nothing; a key may be a number, which Ray does not expect."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_keys(document, item, (*path, i))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)  # of a template in braces, a list
            if name in seen and name != "<<":
                document.lines[(*path, name)] = line
                document.error("duplicate-key", (*path, name), f"stands on line {seen[name]} too", "remove one of them")
            seen[name] = line
            if key.tag.startswith(YAML_TAG) and key.tag.removeprefix(YAML_TAG) not in ("str", "merge"):
                document.lines[(*path, name)] = line
                kind = key.tag.removeprefix(YAML_TAG)
                document.error("key-type", (*path, name), f"is of YAML's type {kind}, not text", "put it in quotes")
            _check_keys(document, value, (*path, name))


def _note_lines(document: Document, node: Any, path: Path) -> None:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(document, item, (*path, i))
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            document.lines[(*path, str(key.value))] = key.start_mark.line + 1
            _note_lines(document, value, (*path, str(key.value)))
