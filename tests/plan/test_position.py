"""Positions as states: their form, and every state that must be refused."""

from __future__ import annotations

import json

import pytest

from fastload.errors import StateError
from fastload.plan import Place, Position
from tests.plan.cluster import shared

WORLD = shared((40,) * 6, (5,) * 6, seed=3, epoch=2, world_size=2, batch_size=4)

# Version 1, as written by the first release. States of this form must stay loadable.
STATE = {
    "version": 1,
    "epoch": 2,
    "batches": 2,
    "samples": 16,
    "places": [[2, 1]],
    "order": {
        "manifest": WORLD.manifest.fingerprint,
        "seed": 3,
        "shuffle": "window",
        "window_bytes": 100,
        "partitions": 1,
    },
    "world_size": 2,
    "batch_size": 4,
    "tail": "pad",
}


def test_the_form_of_a_state():
    run = WORLD.run()
    assert run.cursor.position(run.entries[1]).to_state() == STATE
    assert len(json.dumps(STATE)) < 400


def test_a_state_is_read_back_exactly():
    position = Position.from_state(json.loads(json.dumps(STATE)))
    assert position.sources[0].places == (Place(2, 1),)
    assert position.to_state() == STATE
    assert WORLD.run(start=position).samples == WORLD.run().samples[2:]


def test_a_field_that_a_later_version_adds_is_ignored():
    assert Position.from_state({**STATE, "later": 1}).to_state() == STATE


def test_the_start_of_an_epoch():
    cursor = WORLD.cursor()
    assert cursor.position(None) == cursor.start
    assert cursor.start.sources[0].places == (Place(0, 0),)
    after = Position.from_state(STATE).at_epoch(3)
    assert after == WORLD.with_(epoch=3).cursor().start
    assert WORLD.with_(epoch=3).run(start=after).samples == WORLD.with_(epoch=3).run().samples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "the state's version is 2, and this fastload reads version 1"),
        ({"version": True}, "the state's version is True"),
        ({"version": None}, "the state's version is None"),
        ({"epoch": "2"}, r"Expected `int`, got `str` - at `\$.epoch`"),
        ({"epoch": -1}, "a negative count"),
        ({"batch_size": 0}, "a negative count|batch_size"),
        ({"places": [[2, -1]]}, "a negative count"),
        ({"places": [[2]]}, "length"),
        ({"places": []}, "0 places for 1 partitions"),
        ({"order": {**STATE["order"], "shuffle": "maybe"}}, "shuffle='maybe'"),
        ({"order": {}}, "missing required field `manifest`"),
        ({"tail": "cut"}, "tail='cut'"),
    ],
)
def test_a_damaged_state_is_refused(changes, message):
    with pytest.raises(StateError, match=message):
        Position.from_state({**STATE, **changes})


@pytest.mark.parametrize("state", [None, [], "", {}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(StateError, match="version is None"):
        Position.from_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 5}, "saved with epoch 2, but this run has 5"),
        ({"seed": 4}, "saved with seed 3, but this run has 4"),
        ({"shuffle": "none"}, "saved with shuffle 'window', but this run has 'none'"),
        ({"window_bytes": 99}, "saved with shuffle_window 100, but this run has 99"),
        ({"tail": "drop"}, "saved with tail 'pad', but this run has 'drop'"),
        ({"sizes": (41,) * 6}, r"saved with manifest fingerprint '\w+', but this run has '\w+'"),
        (
            {"batch_size": 3},
            "after 16 samples with batch_size=4 × world_size=2, where no global batch of batch_size=3",
        ),
        ({"local": 5}, "resume with 4 × 2, or from a state saved at a multiple of 20 samples"),
    ],
)
def test_a_state_of_another_run_is_refused_naming_both(changes, message):
    with pytest.raises(StateError, match=message):
        WORLD.with_(**changes).cursor(start=Position.from_state(STATE))


@pytest.mark.parametrize("place", [[5, 0], [4, 1], [99, 0]])
def test_a_place_beyond_the_epoch_is_refused(place):
    with pytest.raises(StateError, match="this epoch has 4 windows"):
        WORLD.cursor(start=Position.from_state({**STATE, "places": [place]}))


def test_the_window_size_matters_only_where_windows_are_shuffled():
    world = WORLD.with_(shuffle="shards")
    run = world.run()
    position = run.cursor.position(run.entries[0])
    assert world.with_(window_bytes=7).run(start=position).samples == run.samples[1:]
