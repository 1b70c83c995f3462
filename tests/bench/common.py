"""What the benchmarks share: interleaved pairs, rows of the table, a corpus of real text."""

from __future__ import annotations

import json
import random
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAIRS = 5


@dataclass(frozen=True)
class Row:
    """One line of build/bench.json."""

    name: str
    ratios: list[float]
    bar: float
    unit: str
    at_most: bool = False
    """The bar is an upper bound."""

    @property
    def met(self) -> bool:
        """Whether the median meets the bar."""
        ratio = statistics.median(self.ratios)
        return ratio <= self.bar if self.at_most else ratio >= self.bar

    def to_json(self) -> dict[str, str | float]:
        """{name, ratio, low, high, bar, unit}: median, least and largest of the pairs."""
        low, high = min(self.ratios), max(self.ratios)
        return {
            "name": self.name,
            "ratio": statistics.median(self.ratios),
            "low": low,
            "high": high,
            "bar": self.bar,
            "unit": f"{self.unit}, at {'most' if self.at_most else 'least'}",
        }


def interleaved(a: Callable[[], float], b: Callable[[], float], pairs: int = PAIRS) -> list[float]:
    """Run A B A B … after one of each that does not count; a/b of each pair."""
    a(), b()
    ratios = []
    for pair in range(pairs):
        ratios.append(a() / b())
        print(f"  pair {pair + 1} of {pairs}: {ratios[-1]:.3f}", file=sys.stderr, flush=True)
    return ratios


def documents(seed: int = 1) -> Iterator[str]:
    """Endless documents of 1 to 30 paragraphs out of the standard library's sources."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = [path.read_text("utf-8", "ignore") for path in sources if "site-packages" not in path.parts]
    paragraphs = [part for text in texts for part in text.split("\n\n") if 20 < len(part) < 4000]
    rng = random.Random(seed)
    while True:
        yield "\n\n".join(rng.choices(paragraphs, k=rng.randint(1, 30)))


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """Write JSON lines of about that size, in MB of 10^6 bytes; returns the texts."""
    texts: list[str] = []
    size = 0
    with open(path, "w") as f:
        for text in documents():
            if size >= megabytes * 1e6:
                return texts
            size += f.write(json.dumps({"text": text}) + "\n")
            texts.append(text)
    raise AssertionError
