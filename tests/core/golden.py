"""The golden recordings: runs of the published simulator of HALoS and its baselines, event by event.

Each file says in `recorded_with` how it was made, and in `fields` what each field means. A file is read exactly: one
that lacks a field, or has one that is not known here, is an error. `HALOS_GOLDEN_DIR` names another folder.

A recording holds until its global server has counted `total_local_steps`. The published program ends there and drops
what its local servers have accumulated; this package flushes, so that no step is lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_halos.core.delayed_nesterov import DelayedNesterov

from .reference import Config, Event

SHIPPED = Path(__file__).parent.parent / "golden"
FOLDER = Path(os.environ.get("HALOS_GOLDEN_DIR", SHIPPED))
FILES = sorted(FOLDER.glob("*.json"))

PARAMETERS, MILLISECONDS = 1e-9, 1e-6  # tolerances

_TOP = {"name", "config", "recorded_with", "fields", "initial_parameters", "events", "final_parameters",
        "final_version", "final_steps"}  # fmt: skip
_ALWAYS = {"index", "virtual_time_ms", "kind", "server", "lps", "worker", "version", "steps", "parameters"}
_DATA = {"local_steps", "first_sample", "end_sample", "lr_position"}
_FIELDS = {
    ("halos", "push"): _ALWAYS | _DATA | {"start_time_ms", "merged_version", "sends_update"},
    ("halos", "update"): _ALWAYS | {"local_steps"},
    ("halos", "merge"): _ALWAYS | {"merged_version"},
    ("async_local_sgd", "push"): _ALWAYS | _DATA | {"start_time_ms"},
    ("diloco", "round"): _ALWAYS | _DATA,
}


@dataclass(frozen=True)
class Recording:
    """What a file holds."""

    name: str
    config: Config
    events: list[Event]


def load(path: Path) -> Recording:
    """Reads a recording.

    Raises:
        ValueError: If it has no events, or they are not those of a complete recording. The error names the file.
    """
    try:
        return _recording(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete recording: {error}") from error


def assert_equal(got: Sequence[Event], wanted: Sequence[Event]) -> None:
    """Fails at the first event that is not equal: times within 1e-6 ms, parameters within 1e-9, the rest exactly."""
    for number, (mine, theirs) in enumerate(zip(got, wanted, strict=False)):
        for field in dataclasses.fields(Event):
            name, have, want = field.name, getattr(mine, field.name), getattr(theirs, field.name)
            if name == "parameters":
                distance = float(np.abs(have - want).max())
                is_equal = distance < PARAMETERS
            elif name in ("time", "start") and have is not None and want is not None:
                is_equal = abs(have - want) < MILLISECONDS
            else:
                is_equal = have == want
            assert is_equal, f"event {number} of {theirs.kind}: {name} is {have}, but the record has {want}"
    assert len(got) == len(wanted), f"there are {len(got)} events, but the record has {len(wanted)}"


def optimizer(config: Config) -> Callable[..., torch.optim.Optimizer]:
    """Makes this package's optimizer of a configuration."""
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


def _recording(data: dict[str, Any]) -> Recording:
    _check_fields("the file", data.keys(), _TOP)
    config = data["config"]
    if not data["events"]:
        raise ValueError("it has no events")
    events = [_event(config["algorithm"], number, event) for number, event in enumerate(data["events"])]
    last, before = events[-1], max((event.steps for event in events[:-1]), default=0)
    if not before < config["total_local_steps"] <= last.steps:
        raise ValueError(
            f"it ends at {last.steps} steps, and has {before} before; {config['total_local_steps']} end it"
        )
    final = data["final_version"], data["final_steps"], data["final_parameters"]
    if final != (last.version, last.steps, last.parameters.tolist()):
        raise ValueError("its final version, steps and parameters are not those of its last event")
    if np.abs(np.array(data["initial_parameters"]) - np.linspace(-1.0, 1.0, 6)).max() >= PARAMETERS:
        raise ValueError(f"its initial parameters are {data['initial_parameters']}, not those of the toy problem")
    return Recording(data["name"], config, events)


def _event(algorithm: str, number: int, event: dict[str, Any]) -> Event:
    lps, kind = event["lps"], event["kind"]
    _check_fields(f"event {number}", event.keys(), _FIELDS[algorithm, kind])
    if event["index"] != number:
        raise ValueError(f"event {number} has the index {event['index']}")
    server = "server" if algorithm != "halos" else "gps" if kind == "update" else f"lps{lps}"
    if event["server"] != server:
        raise ValueError(f"event {number}, a {kind} of lps {lps}, is at {event['server']}, not at {server}")
    position = event.get("lr_position")
    if isinstance(position, dict):
        position = tuple(position[f"worker{worker}"] for worker in range(len(position)))
    return Event(
        time=event["virtual_time_ms"],
        kind=kind,
        lps=lps,
        worker=event["worker"],
        version=event["version"],
        steps=event["steps"],
        parameters=np.array(event["parameters"]),
        local_steps=event.get("local_steps"),
        start=event.get("start_time_ms"),
        samples=(event["first_sample"], event["end_sample"]) if "first_sample" in event else None,
        position=position,
        merged_version=event.get("merged_version"),
        sends_update=event.get("sends_update"),
    )


def _check_fields(place: str, found: Any, wanted: set[str]) -> None:
    if found != wanted:
        missing, unknown = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(f"{place} lacks the fields {missing}, and has the unknown fields {unknown}")
