"""Ray and Python: the ones that are pinned, and those of an image."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path as FilePath

from gpt2dist.cluster.check.document import Document, Path


@dataclass(frozen=True)
class Pins:
    """What runs on every node."""

    ray: str
    python: str
    source: str
    """Where that is written."""


def pins(near: str) -> Pins:
    """Those of the constraints.txt beside a file or above it; else of what is installed here."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for directory in FilePath(near).absolute().parents:
        file = directory / "constraints.txt"
        if file.is_file() and (ray := re.search(r"^ray==(\S+)", file.read_text(), re.M)):
            python = re.search(r"^# Python (\d+\.\d+)", file.read_text(), re.M)
            return Pins(ray[1], python[1] if python else here, "constraints.txt")
    return Pins(version("ray"), here, "the installed Ray")


def check_image(document: Document, path: Path, image: str, wanted: Pins) -> None:
    """An image's tag must name the pinned Ray and Python: another one does not join, or fails in the first task."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    python = wanted.python.replace(".", "")
    like = f"{name.removesuffix(':' + tag)}:{wanted.ray}-py{python}"
    if not tag and digest:
        return
    if tag in ("", "latest", "nightly"):
        document.error("image-pinned", path, f"{image} is another image every few weeks", f"pin it: {like}")
        return
    found = re.search(r"(?<![\d.])(\d+\.\d+\.\d+)(?![\d.])", tag)
    if not found:
        document.warning("ray-version", path, f"the tag {tag} does not say which Ray is in it", f"tag it like {like}")
    elif found[1] != wanted.ray:
        document.error("ray-version", path, f"Ray {found[1]}, but {wanted.source} has {wanted.ray}", f"take {like}")
    found = re.search(r"py(\d)(\d+)", tag)
    if not found:
        document.warning("python-version", path, f"the tag {tag} does not say which Python is in it", f"take {like}")
    elif f"{found[1]}.{found[2]}" != wanted.python:
        what = f"Python {found[1]}.{found[2]}, but {wanted.source} is for {wanted.python}"
        document.error("python-version", path, what, f"take {like}")
