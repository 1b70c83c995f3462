"""The data of a run: one prepared data set, or several mixed by weight.

The samples of all of them are numbered through, in the order of the data sets' fingerprints: neither where they
lie nor how the run file lists them changes a number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.shards import Manifest, Split, TokenSplit, read_manifest

SHARES = 1 << 14
"""Of this many consecutive positions, each data set has its exact share: weights count in units of 1/16384."""


@dataclass(frozen=True)
class Component:
    """One prepared data set of a run."""

    path: str
    manifest: Manifest
    share: int = SHARES
    """Positions that are its own among each `SHARES` consecutive ones."""


class Mixture:
    """The data sets of a run."""

    def __init__(self, components: list[Component]) -> None:
        self.components = sorted(components, key=lambda c: c.manifest.fingerprint)

    @classmethod
    def open(cls, run: RunConfig) -> Mixture:
        """Read the manifests of `data.path`. Raises `UserError`."""
        if not run.data_paths:
            raise UserError("data.path: required, but missing (or set prepare.output)")
        return cls.of(run.data_paths)

    @classmethod
    def of(cls, weights: dict[str, float]) -> Mixture:
        """The data sets at the keys, with their weights. Raises `UserError`."""
        manifests = {path: read_manifest(path) for path in weights}
        seen: dict[str, str] = {}
        for path, manifest in manifests.items():
            if (other := seen.setdefault(manifest.fingerprint, path)) != path:
                raise UserError(f"data.path: {other} and {path} are the same data set")
        paths = sorted(weights, key=lambda path: manifests[path].fingerprint)  # of equal weights, too, some get more
        shares = _shares([weights[path] for path in paths])
        return cls([Component(path, manifests[path], n) for path, n in zip(paths, shares, strict=True)])

    @property
    def fingerprint(self) -> str:
        """Hash that names the exact content, and the shares where there are several data sets."""
        if len(self.components) == 1:
            return self.components[0].manifest.fingerprint
        parts = [[c.manifest.fingerprint, c.share] for c in self.components]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __str__(self) -> str:
        return ", ".join(component.path for component in self.components)


class MixedSplit:
    """Random access to one split of all data sets of a run."""

    def __init__(self, data: Mixture, split: Split, seq_len: int, cache_gb: float = 20.0) -> None:
        """`seq_len`: T, a sample holding T+1 ids; `cache_gb`: see `TokenSplit`."""
        self.seq_len = seq_len
        self.parts = [TokenSplit(c.path, c.manifest, split, cache_gb) for c in data.components]
        self.sizes = np.array([part.num_samples(seq_len) for part in self.parts], dtype=np.int64)
        """Samples of each data set: int64 [data sets]."""
        self.offsets = np.cumsum([0, *self.sizes], dtype=np.int64)
        """Number of the first sample of each, and of all of them: int64 [data sets + 1]."""

    @property
    def num_samples(self) -> int:
        """Samples of all data sets together."""
        return int(self.offsets[-1])

    def samples(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """Token ids of samples `ids`: uint16 [len(ids), seq_len + 1]."""
        out = np.empty((len(ids), self.seq_len + 1), dtype=np.uint16)
        component = np.searchsorted(self.offsets, ids, side="right") - 1
        for k in np.unique(component):
            mine = component == k
            out[mine] = self.parts[k].samples(ids[mine] - self.offsets[k], self.seq_len)
        return out

    def check_sizes(self) -> None:
        """Raises `UserError` that names a shard which is missing or not as long as its manifest says."""
        for part in self.parts:
            part.check_sizes()


def _shares(weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights, each at least 1, with the sum `SHARES` (largest remainders)."""
    # By a power of two, which changes no digit: the sum of the largest numbers would be infinite.
    weights = np.ldexp(weights, -int(np.frexp(max(weights))[1])).tolist()
    exact = np.array(weights) / sum(weights) * (SHARES - len(weights))
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: SHARES - len(weights) - shares.sum()]] += 1
    return [int(n) for n in shares + 1]
