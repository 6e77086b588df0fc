"""The golden files: where they are, and what they hold.

Rules of this room: a file that holds recorded events is read leniently, since their exact form is not known to us, and
is the truth. The files that the project was given hold a name and a configuration only; then the record is that of
`reference.py`.
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lightning_halos.core.optim import DelayedNesterov

from . import reference

SHIPPED = Path(__file__).parent.parent / "golden"
FOLDER = Path(os.environ.get("HALOS_GOLDEN_DIR", SHIPPED))
FILES = sorted(FOLDER.glob("*.json"))

PARAMETERS, MILLISECONDS = 1e-9, 1e-6  # tolerances


def load(path):
    return json.loads(Path(path).read_text())


def record_of(data):
    """The events of a file, those of the reference if it holds none, and the vectors that may be the final ones."""
    times, vectors, finals = read(data)
    record = reference.record(data["config"], at_least=len(times))
    if times:
        name = data.get("name")
        assert len(times) == len(record), f"{name} holds {len(times)} events, but the rules give {len(record)}"
        for number, (event, time) in enumerate(zip(record, times, strict=True)):
            assert abs(event.time - time) < MILLISECONDS, f"event {number} is at {time} ms, but by the rules: {event}"
        record = [dataclasses.replace(e, parameters=np.array(v)) for e, v in zip(record, vectors, strict=True)]
    return record, finals


def read(data):
    """Times, parameters of every event, and the vectors that may be the final ones; empty if nothing was recorded.

    A time is the latest number under a key that contains "time", "t" or "ms"; the parameters of an event are the one
    list of 6 numbers somewhere in it; final ones are under a top-level key that contains "final".
    """
    times, parameters = [], []
    for number, event in enumerate(data.get("events", [])):
        moments = [value for key, value in event.items() if is_time(key) and is_number(value)]
        found = list(vectors_in(event))
        assert moments, f"event {number} of the record has no time: {event}"
        assert len(found) == 1, f"event {number} of the record does not have exactly one list of 6 numbers: {event}"
        times.append(max(moments))
        parameters.append(found[0])
    finals = [vector for key, value in data.items() if "final" in key.lower() for vector in vectors_in(value)]
    return times, parameters, finals


def is_time(key):
    return "time" in key.lower() or not {"t", "ms"}.isdisjoint(key.lower().split("_"))


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def vectors_in(value):
    if isinstance(value, list) and len(value) == 6 and all(map(is_number, value)):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from vectors_in(part)


def optimizer(config):
    config = dict(config)
    if config.pop("opt_type") == "sgd":
        return partial(torch.optim.SGD, **config)
    delay = config.get("buffer_size", 1)
    return partial(
        DelayedNesterov,
        lr=config["lr"] / delay,
        momentum=config["beta"],
        delay=delay,
        activation=config.get("c", 0.0),
    )
