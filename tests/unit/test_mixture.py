"""Several data sets mixed by weight: exact shares, own epochs, a pure function of the position."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.blocks import local_blocks, split_blocks
from gpt2dist.data.mixture import SHARES, Component, MixedSplit, Mixture, _shares
from gpt2dist.data.order import PADDING, Ids, SampleOrder, eval_ids, mixture_pattern, permutation
from gpt2dist.data.shards import Manifest, Shard
from gpt2dist.train.preflight import preflight
from tests.conftest import tiny_run


def order_of(sizes: list[int], weights: list[float]) -> SampleOrder:
    """One shard a data set, of `sizes` samples of 16 tokens."""
    shards = [
        Shard(file=f"t-{i}.npy", tokens=16 * n + 1, documents=1, bytes=1, sha256="0" * 64) for i, n in enumerate(sizes)
    ]
    manifests = [Manifest(request={"i": i}, documents={}, splits={"train": [s]}) for i, s in enumerate(shards)]
    data = Mixture([Component(str(i), m, n) for i, (m, n) in enumerate(zip(manifests, _shares(weights), strict=True))])
    return SampleOrder(tiny_run(), data)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=5),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    cuts=st.lists(st.integers(0, 3 * SHARES), min_size=1, max_size=4),
)
def test_shares_are_exact_and_each_data_set_has_its_epochs(
    sizes: list[int], weights: list[float], cuts: list[int]
) -> None:
    order = order_of(sizes, weights[: len(sizes)])
    assert order.shares.sum() == SHARES
    assert order.shares.min() >= 1
    n = 3 * SHARES
    ids = order.samples(0, n)
    source = np.searchsorted(order.offsets, ids, side="right") - 1
    for start in range(0, n, SHARES):
        assert np.array_equal(np.bincount(source[start : start + SHARES], minlength=len(sizes)), order.shares)
    for k, size in enumerate(order.sizes):  # every sample of a data set once before any of it twice
        mine = ids[source == k]
        epoch = np.arange(len(mine)) // size
        assert len(np.unique(np.stack([epoch, mine]), axis=1)[0]) == len(mine)
    bounds = sorted({0, n, *cuts})  # any cut of positions gives the same sequence
    assert np.array_equal(np.concatenate([order.samples(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]), ids)
    for at in cuts:
        seen = np.bincount(source[:at], minlength=len(sizes))
        assert order.epochs(at) == pytest.approx((seen / order.sizes).tolist())


def test_weights_are_kept_to_a_sixteen_thousandth() -> None:
    weights = [0.7, 0.2, 0.0999, 0.0001]
    assert abs(np.array(_shares(weights)) / SHARES - weights).max() < 2 / SHARES


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9))
def test_shares_of_ordinary_weights_are_as_ever(weights: list[float]) -> None:
    exact = np.array(weights) / sum(weights) * (SHARES - len(weights))
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: SHARES - len(weights) - shares.sum()]] += 1
    assert _shares(weights) == (shares + 1).tolist()


@pytest.mark.parametrize("weights", [[1e308, 1e308], [1.7e308] * 3, [5e-324] * 4, [1e308, 5e-324]])
def test_shares_of_the_largest_and_smallest_weights(weights: list[float]) -> None:
    shares = _shares(weights)
    assert sum(shares) == SHARES
    if len(set(weights)) == 1:
        assert max(shares) - min(shares) <= 1
    else:
        assert shares == [SHARES - 1, 1]


@pytest.fixture
def mixed(make_data: Callable[..., str]) -> RunConfig:
    paths = {make_data([700, 45], name="a"): 3.0, make_data([900], name="b"): 1, make_data([400, 80], name="c"): 1}
    return tiny_run(data__path=paths, train__steps=60)


@pytest.mark.parametrize("world_size", [1, 3])
def test_blocks_bring_the_tokens_of_the_right_data_set(mixed: RunConfig, world_size: int) -> None:
    data = Mixture.open(mixed)
    order = SampleOrder(mixed, data)
    streams = [
        np.concatenate([np.load(f"{c.path}/{s.file}") for s in c.manifest.splits["train"]]) for c in data.components
    ]
    for rank in range(world_size):
        for step, batch in enumerate(
            split_blocks(local_blocks(mixed, rank, world_size, 0), mixed, rank, world_size, 0)
        ):
            assert np.array_equal(batch.ids, order.rank_step(step, rank, world_size))
            for i, row in zip(batch.ids.reshape(-1), batch.tokens.reshape(-1, 17), strict=True):
                if i != PADDING:
                    k = int(np.searchsorted(order.offsets, i, side="right")) - 1
                    at = 16 * int(i - order.offsets[k])
                    assert np.array_equal(row, streams[k][at : at + 17])


def test_order_and_fingerprint_do_not_depend_on_the_table(mixed: RunConfig) -> None:
    assert isinstance(mixed.data.path, dict)
    turned = tiny_run(data__path=dict(reversed(mixed.data.path.items())), train__steps=60)
    doubled = tiny_run(data__path={path: 2 * weight for path, weight in mixed.data.path.items()}, train__steps=60)
    for other in (turned, doubled):
        assert Mixture.open(other).fingerprint == Mixture.open(mixed).fingerprint
        a, b = (SampleOrder(run, Mixture.open(run)) for run in (mixed, other))
        assert np.array_equal(a.samples(0, 500), b.samples(0, 500))
    heavier = tiny_run(data__path={path: i + 1.0 for i, path in enumerate(mixed.data.path)})
    assert Mixture.open(heavier).fingerprint != Mixture.open(mixed).fingerprint
    names = list(mixed.data.path)  # equal weights that do not divide the shares
    equal = [dict.fromkeys(turn, 1.0) for turn in itertools.permutations(names)]
    assert SHARES % len(names) != 0
    assert len({Mixture.of(weights).fingerprint for weights in equal}) == 1


def test_evaluation_reads_every_data_set_and_no_sample_twice(mixed: RunConfig) -> None:
    data = Mixture.open(mixed)
    run = mixed.model_copy(update={"eval": mixed.eval.model_copy(update={"batches": 40})})
    ids = eval_ids(run, data).reshape(-1)
    split = MixedSplit(data, "val", 16)
    assert len(np.unique(ids)) == len(ids) == 80
    share = np.bincount(np.searchsorted(split.offsets, ids, side="right") - 1, minlength=3) / 80
    weight = np.array([c.share for c in data.components]) / SHARES
    assert abs(share - weight).max() < 0.15


@pytest.mark.parametrize(("batches", "micro"), [(1500, 12), (3000, 8)])
def test_an_evaluation_may_be_longer_than_a_round_of_the_mixture(batches: int, micro: int) -> None:
    assert batches * micro > SHARES
    shards = [Shard(file=f"v{i}.npy", tokens=16 * 20_000 + 1, documents=1, bytes=1, sha256="0" * 64) for i in range(2)]
    manifests = [Manifest(request={"i": i}, documents={}, splits={"val": [s]}) for i, s in enumerate(shards)]
    shares = _shares([1.0, 3.0])
    data = Mixture([Component(str(i), m, n) for i, (m, n) in enumerate(zip(manifests, shares, strict=True))])
    run = tiny_run(eval__batches=batches, batch__micro_sequences=micro)
    ids = eval_ids(run, data)
    assert ids.shape == (batches, micro)
    assert len(np.unique(ids)) == ids.size
    first = eval_ids(tiny_run(eval__batches=100, batch__micro_sequences=micro), data)
    assert np.array_equal(ids[:100], first)


def _count_by_steps(component: Ids, count: int, micro: int, sizes: Ids) -> int:
    """The plain way: a micro-batch less until no data set is asked for more than it has."""
    while np.any(np.bincount(component[: count * micro], minlength=len(sizes)) > sizes):
        count -= 1
    return count


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=5),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    micro=st.integers(1, 9),
    batches=st.integers(1, 200),
)
def test_the_length_of_an_evaluation(sizes: list[int], weights: list[float], micro: int, batches: int) -> None:
    rows = [
        Shard(file=f"v{i}.npy", tokens=16 * n + 1, documents=1, bytes=1, sha256="0" * 64) for i, n in enumerate(sizes)
    ]
    manifests = [Manifest(request={"i": i}, documents={}, splits={"val": [row]}) for i, row in enumerate(rows)]
    shares = _shares(weights[: len(sizes)])
    data = Mixture([Component(str(i), m, n) for i, (m, n) in enumerate(zip(manifests, shares, strict=True))])
    ids = eval_ids(tiny_run(eval__batches=batches, batch__micro_sequences=micro), data)
    split = MixedSplit(data, "val", 16)
    component = mixture_pattern(np.array([c.share for c in data.components]), 0, 0)
    count = _count_by_steps(component, min(batches, sum(sizes) // micro), micro, split.sizes)
    assert ids.shape == (count, micro)
    assert np.array_equal(np.searchsorted(split.offsets, ids.ravel(), side="right") - 1, component[: count * micro])
    assert len(np.unique(ids)) == ids.size


def test_a_long_evaluation_is_found_quickly() -> None:
    """A data set is at its end soon, the other one has much."""
    rows = [
        Shard(file=f"v{i}.npy", tokens=16 * n + 1, documents=1, bytes=1, sha256="0" * 64)
        for i, n in enumerate((10, 10**6))
    ]
    manifests = [Manifest(request={"i": i}, documents={}, splits={"val": [row]}) for i, row in enumerate(rows)]
    data = Mixture([Component(str(i), m, SHARES // 2) for i, m in enumerate(manifests)])
    before = time.process_time()
    assert 0 < len(eval_ids(tiny_run(eval__batches=60_000, batch__micro_sequences=8), data)) < 10
    assert time.process_time() - before < 5


def test_many_data_sets_are_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not anew in every step because the others were needed meanwhile."""
    order, calls = order_of([5000] * 7, [1.0] * 7), 0

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        return permutation(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("gpt2dist.data.order.permutation", counted)
    for step in range(50):
        order.step(step)
    assert calls <= 1 + 2 * 7  # the mixture; shards and samples of each


def test_run_file_round_trips_and_resume_needs_the_same_mixture(mixed: RunConfig, tmp_path: Path) -> None:
    from gpt2dist.config import parse_toml

    run = mixed.model_copy(update={"storage": str(tmp_path / "runs")})
    assert parse_toml(run.absolute().to_toml().encode(), "run.toml") == run.absolute()
    assert not preflight(run, "run.toml").finished


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"a": 0.5, "b": 0}, "data.path: the weight of b must be a number above 0, got 0"),
        ({"a": "much"}, 'data.path: the weight of a must be a number above 0, got "much"'),
        (3, "data.path: a path, or a table"),
        ({}, "data.path: a path, or a table"),
    ],
)
def test_wrong_weights_are_named(path: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_run(data__path=path)


def test_the_same_data_twice_and_data_too_short_are_refused(make_data: Callable[..., str], tmp_path: Path) -> None:
    a, b = make_data([500], name="a"), make_data([500], name="b")
    with pytest.raises(UserError, match="a and .*b are the same data set"):
        Mixture.open(tiny_run(data__path={a: 1, b: 1}))
    short = make_data([10], name="short")
    with pytest.raises(UserError, match=r"short: shorter than one sample of data.seq_len = 16"):
        preflight(tiny_run(data__path={a: 1, short: 1}, storage=str(tmp_path / "runs")), "run.toml")
    no_val = make_data([700], val=0, name="no_val")
    with pytest.raises(UserError, match=r"no_val: 0.*eval.every_steps = 0"):
        preflight(tiny_run(data__path={a: 1, no_val: 1}, storage=str(tmp_path / "runs")), "run.toml")


def test_an_evaluation_of_fewer_batches_is_told(make_data: Callable[..., str], tmp_path: Path) -> None:
    """The small data set of a mixture has no more validation samples, and none is read twice."""
    large, small = make_data([5000], val=5000, name="large"), make_data([500], val=60, name="small")
    run = tiny_run(data__path={large: 1, small: 1}, storage=str(tmp_path / "runs"), eval__batches=20)
    told = preflight(run, "run.toml").short_validation
    batches = len(eval_ids(run, Mixture.open(run)))
    assert 0 < batches < 20
    assert told.startswith(f"an evaluation reads {batches} of the 20 micro-batches of 2 samples (eval.batches): ")
    assert f"{small}: 3" in told
    alone = run.model_copy(update={"data": run.data.model_copy(update={"path": large})})
    assert preflight(alone, "run.toml").short_validation == ""


def test_single_data_set_has_its_own_fingerprint(make_data: Callable[..., str]) -> None:
    path = make_data([500])
    manifest = Manifest.model_validate(json.loads(Path(path, "manifest.json").read_text()))
    assert Mixture.open(tiny_run(data__path=path)).fingerprint == manifest.fingerprint
    assert Mixture.open(tiny_run(data__path={path: 0.3})).fingerprint == manifest.fingerprint
