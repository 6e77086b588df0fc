import dataclasses
import math
import pickle

import msgspec
import pytest
import torch

from lightning_halos.core import messages
from lightning_halos.transport import wire

VECTOR = torch.arange(3.0)
DESCRIPTION = messages.RunDescription(
    "model",
    "float32",
    ["weight"],
    [[2]],
    [("mean", [1])],
    "HALoS",
    {"local_steps": 8, "merge_weight": 0.25, "has_momentum": True, "accumulate_updates": None, "mode": "a"},
    {"lr": 0.3, "momentum": 0.0, "delay": 2, "activation": 0.0},
    "tokens",
    1000,
    2,
    None,
)
STATUS = messages.Status(1000, 4.25, True, 24, 1, [(0, 1.5)], {"val_loss": 0.5}, 7, 3, 1, True)
MESSAGES = [
    messages.Push(3, 17, 8, 7, 1.5, 0.25, True, True, VECTOR, 12, [(3, 5)]),
    messages.Push(0, 0, 0, 0, 0.0),
    messages.Pull(17, 8, 40, True, [(0, 1.5), (1, -2.0)], {"val_loss": 0.5}, VECTOR),
    messages.Pull(0, 1, 0, False),
    messages.RegionUpdate(2, 5, 256, True, True, VECTOR, 3),
    messages.RegionModel(0, 64, True, VECTOR),
    messages.GlobalModel(6, True, True, 100, VECTOR, 3),
    messages.Progress(1, 4, 2, 8, 2.5, 0.5, 3.5, staleness=3, stop=True, data=[(0, 3), (7, 9)]),
    STATUS,
    messages.LeaseRequest(12),
    messages.LeaseGrant(1, 40, 12),
    messages.Enrol("0a1b", 4),
    messages.Enrolled(16, 4),
    messages.Join("0a1b", 4, DESCRIPTION, [(3, 5), (9, 12)], 2, 17, 1, True, "a run"),
    messages.Welcome(2, 16, STATUS, True, False, 3, 20, 1, 4, [(3, 5)], "callbacks", "a run"),
    messages.Refusal("learning_rate differs", for_good=False),
    messages.InitialModel(VECTOR),
    messages.ModelRequest(4),
    messages.ModelCopy(17, 256, 4, VECTOR),
    messages.Publish(2, [(0, 1.5)], {"val_loss": math.inf}, "callbacks"),
    messages.Decide("callbacks"),
    messages.StatusRequest(),
    messages.StatusReply("{}"),
    messages.Marker("0a1b", "/checkpoints/last/0a1b"),
    messages.MarkerReply("0a1b", 1, 7),
    messages.ShardWritten("0a1b", "worker-3.pt", 17, 255, "no space left"),
    messages.Turn(1, 3),
    messages.Inspected(0, 2, "it has NaN", math.inf, [0, 3], 5, 7),
    messages.Ordered(1, 2, "publish", b"\x81", True, (None, 2.5, [1]), 5, 7),
    messages.Preempted(),
    messages.Failure("rank 3 (region eu)", 'Traceback:\n  "naïve" ✗'),
]


def over_the_wire(message):
    return wire.decode(wire.encode(message), wire.vector_of(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives(message):
    received = over_the_wire(message)
    assert type(received) is type(message)
    assert wire.vector_of(received) is wire.vector_of(message)  # sent beside the fields, untouched
    for field in dataclasses.fields(message):
        if field.name != "vector":
            assert getattr(received, field.name) == getattr(message, field.name), field.name


def test_no_kind_of_message_is_left_out():
    assert {type(message) for message in MESSAGES} == set(messages.Message.__args__)


def test_the_vector_is_not_among_the_fields():
    fields = msgspec.msgpack.decode(wire.encode(MESSAGES[0]))
    assert fields.pop("type") == "Push"
    assert set(fields) == {f.name for f in dataclasses.fields(messages.Push)} - {"vector"}


def test_metrics_may_be_nan_or_infinite():
    pull = messages.Pull(0, 1, 0, False, metrics={"val_loss": math.nan, "best": math.inf})
    metrics = over_the_wire(pull).metrics
    assert math.isnan(metrics["val_loss"])
    assert metrics["best"] == math.inf


def packed(kind, **fields):
    return msgspec.msgpack.encode({"type": kind, **fields})


# What names the fault is checked, not msgspec's sentence about it, which may change with any of its versions.
@pytest.mark.parametrize(
    ("data", "names"),
    [
        (packed("Hello"), "Hello"),
        (packed("Preempted", reason="none"), "reason"),
        (packed("LeaseGrant", epoch=1, first=2), "steps"),
        (packed("LeaseRequest", steps=-1, number=1), r"\$.steps"),
        (packed("LeaseRequest", steps=1.5, number=1), r"\$.steps"),
        (packed("LeaseRequest", steps="1", number=1), r"\$.steps"),
        (packed("Failure", origin="rank 1", reason="x" * 2**21), "1048576"),
        (
            wire.encode(messages.Join("a", 1, dataclasses.replace(DESCRIPTION, steps_per_epoch=-1))),
            r"description.steps",
        ),
        (wire.encode(messages.Join("a", 1, DESCRIPTION, [(-1, 5)])), r"\$.held\[0\]\[0\]"),
        (pickle.dumps(MESSAGES[1]), ""),
        (wire.encode(MESSAGES[0])[:-1], ""),
        (packed("LeaseRequest", steps=2**63, number=1), "9223372036854775807"),
        (b"\x81\xa4type\xa3\xd4\x00\x00", ""),
        (b"\x81\xa1x" + b"\x91" * 10**6, ""),
        (wire.encode(MESSAGES[0]) + b"\0", ""),
    ],
    ids=[
        "kind",
        "more fields",
        "fewer fields",
        "negative",
        "fraction",
        "text",
        "too long",
        "nested",
        "in a list",
        "pickle",
        "half",
        "too large",
        "no text",
        "too deep",
        "more",
    ],
)
def test_what_is_no_message_is_refused_and_says_what_to_check(data, names):
    with pytest.raises(ValueError, match=f"Not a message: .*do all processes run the same version.*{names}"):
        wire.decode(data, None)


@pytest.mark.parametrize("field", ["data", "metrics", "shapes", "global_optimizer"])
def test_lists_and_dicts_that_are_too_long_are_refused_before_they_take_memory(field):
    many = 2**20 + 1
    lists, dicts = b"\xdd" + many.to_bytes(4, "big"), b"\xdf" + many.to_bytes(4, "big")
    announced = {  # the items are missing, so nothing has looked at them
        "data": b"\x82\xa4type\xa8Progress\xa4data" + lists,
        "metrics": b"\x82\xa4type\xa7Publish\xa7metrics" + dicts,
        "shapes": b"\x82\xa4type\xa4Join\xabdescription\x81\xa6shapes" + lists,
        "global_optimizer": b"\x82\xa4type\xa4Join\xabdescription\x81\xb0global_optimizer" + dicts,
    }[field]
    with pytest.raises(ValueError, match="1048576"):
        wire.decode(announced, None)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -0.5])
def test_durations_are_numbers_and_not_negative(seconds):
    with pytest.raises(ValueError, match=r"\$.seconds"):
        over_the_wire(messages.Push(0, 0, 0, 0, seconds))


def test_a_vector_of_a_message_that_has_none_is_refused():
    with pytest.raises(ValueError, match="Not a message"):
        wire.decode(wire.encode(messages.Preempted()), VECTOR)
