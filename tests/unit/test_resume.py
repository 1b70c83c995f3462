"""A changed run file: what each key means for a run that exists."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2dist.config import RunConfig
from gpt2dist.train import rundir
from gpt2dist.train.resume import EFFECTS, TABLE, WORDS, Change, changes, keys, order_id, refusal
from tests.conftest import tiny_run


def diff(before: RunConfig, after: RunConfig) -> list[Change]:
    return changes(before.model_dump(mode="json"), after, 0, "a" * 64, "a" * 64)


def test_every_key_has_one_class() -> None:
    """A new key of the run file needs a decision: add it to the table in train/resume.py."""
    assert set(EFFECTS) == {key for key, _ in keys()}
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert sum(len(names) for _, *names in rows) == len(EFFECTS)
    assert {effect for effect, *_ in rows} == set(WORDS)


def test_nothing_changed() -> None:
    assert diff(tiny_run(), tiny_run()) == []


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"optim__lr": 1e-3}, "optim.lr: 0.003 → 0.001"),
        ({"cluster__workers": [1, 3]}, "cluster.workers: 2 → [1, 3]"),
        ({"train__stop_at": 9}, "train.stop_at: unset → 9"),
        ({"train__precision": "bf16"}, 'train.precision: "fp32" → "bf16"'),
        ({"checkpoint__every_minutes": "auto"}, 'checkpoint.every_minutes: 0.0 → "auto"'),
    ],
)
def test_safe(changed: dict[str, Any], shown: str) -> None:
    (change,) = diff(tiny_run(), tiny_run(**changed))
    assert str(change) == shown
    assert change.effect == "safe"
    assert refusal([change], allow_changed=False) == ""


@pytest.mark.parametrize(
    "changed",
    [{"seed": 4}, {"data__shuffle_window": 2}, {"batch__micro_sequences": 4}, {"batch__warmup_steps": 9}],
)
def test_another_order_needs_the_flag(changed: dict[str, Any]) -> None:
    found = diff(tiny_run(), tiny_run(**changed))
    assert [change.effect for change in found] == ["order"]
    message = refusal(found, allow_changed=False)
    assert str(found[0]) in message
    assert message.endswith("--set data.allow_changed=true")
    assert refusal(found, allow_changed=True) == ""


def test_another_data_set_counts_wherever_it_lies() -> None:
    before, after = tiny_run(data__path="/a"), tiny_run(data__path="/b")
    assert [c.effect for c in diff(before, after)] == ["safe"]
    found = changes(before.model_dump(mode="json"), after, 0, "a" * 64, "b" * 64)
    assert [str(c) for c in found if c.effect == "order"] == [
        'content of data.path: "aaaaaaaaaaaaaaaa" → "bbbbbbbbbbbbbbbb"'
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model__n_head": 4}, "model.n_head: 2 → 4: the saved weights are of another model"),
        ({"model__n_embd": 64}, "model.n_embd: 32 → 64: the saved weights"),
        (
            {"data__seq_len": 8},
            "model.n_positions: 16 → 8 (unset: data.seq_len): the saved weights are of another model",
        ),
        (
            {"optim__name": "muon", "train__zero_stage": 0},
            'optim.name: "adamw" → "muon": the saved moments are of another kind',
        ),
    ],
)
def test_incompatible_whatever_the_flag(changed: dict[str, Any], message: str) -> None:
    found = diff(tiny_run(), tiny_run(**changed))
    for allowed in (False, True):
        assert refusal(found, allow_changed=allowed).startswith(message)
        assert "choose another name for a new run" in refusal(found, allow_changed=allowed)


def test_only_the_shape_of_a_model_counts() -> None:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 16}
    assert diff(tiny_run(model={"preset": "tiny"}), tiny_run(model=shape)) == []
    (change,) = diff(tiny_run(model=shape), tiny_run(model=shape, data__seq_len=8))
    assert (change.key, change.effect) == ("data.seq_len", "order")
    assert diff(tiny_run(model={"preset": "124M"}), tiny_run(model={"preset": "355M"}))[0].key == "model.n_layer"


def test_keys_that_the_checkpoint_does_not_know() -> None:
    """An older version saved: what it lacked had its default."""
    saved = tiny_run().model_dump(mode="json")
    del saved["checkpoint"]["retry_minutes"]
    assert changes(saved, tiny_run(), 0, "a", "a") == []
    (change,) = changes(saved, tiny_run(checkpoint__retry_minutes=1.0), 0, "a", "a")
    assert str(change) == "checkpoint.retry_minutes: 10.0 → 1.0"


def test_order_ids() -> None:
    def of(**changed: Any) -> str:
        return order_id(tiny_run(**changed).model_dump(mode="json"), "f")

    assert of() == of(optim__lr=1e-3, cluster__workers=1, data__path="/a", data__allow_changed=True)
    others = [of(seed=4), of(data__seq_len=8), of(data__shuffle_window=2), of(batch__micro_batches=2)]
    assert len({of(), *others}) == 5
    saved = tiny_run().model_dump(mode="json")
    assert order_id(saved, "f") != order_id(saved, "g")
    del saved["data"]["shuffle_window"]  # a key that this version did not have
    assert order_id(saved, "f") == of()


def test_samples_may_be_left_out_that_are_still_to_come() -> None:
    """The checkpoint is at position 40, and 8 samples had been left out before: what follows begins at 48."""
    saved = tiny_run(data__skip=[[8, 16]]).model_dump(mode="json")

    def of(skip: list[list[int]]) -> Change:
        (change,) = changes(saved, tiny_run(data__skip=skip), 40, "a", "a")
        return change

    assert of([[8, 16], [48, 56]]).effect == "safe"
    far = tiny_run(data__skip=[[8, 16], [1000, 2000]]).model_dump(mode="json")  # what is not reached yet moves nothing
    (change,) = changes(far, tiny_run(data__skip=[[8, 16], [48, 56], [1000, 2000]]), 40, "a", "a")
    assert change.effect == "safe"
    trained, left_out = of([[8, 16], [40, 56]]), of([])
    assert of([[100, 120]]).reason == left_out.reason
    assert refusal([trained], allow_changed=True).startswith(
        "data.skip: [[8, 16]] → [[8, 16], [40, 56]]: the samples from "
    )
    assert trained.reason == "the samples from position 40 on were trained on already"
    assert left_out.reason == "the samples from position 8 on were left out already"


def test_what_a_rewind_left_out_may_be_left_out_with_more_around_it() -> None:
    rewind = {"event": "rewind", "steps": [5, 7], "positions": [[20, 30], [30, 36]], "attempt": 1}
    for skip, expected in (
        ([], [(20, 30), (30, 36)]),
        ([[10, 40]], [(10, 40)]),
        ([[0, 8], [25, 31]], [(0, 8), (20, 36)]),
        ([[30, 36]], [(20, 30), (30, 36)]),
    ):
        run = rundir.with_rewinds(tiny_run(data__skip=skip), [rewind])
        assert run.data.skip == expected
        assert RunConfig.model_validate_json(run.model_dump_json()) == run
