"""The description of a geo-distributed cluster: plain numbers that a user writes.

They are checked here, with errors that name the field, its value and the allowed values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_halos.core.checks import MOST_COUNT, check_count, check_switch, is_number, is_positive
from lightning_halos.yaml_files import read_yaml

AllReduce = Literal["star", "ring"]

_LEAST, _MOST = 1e-12, 1e12
_RANGE = f"from {_LEAST:g} to {_MOST:g}"
"""Of numbers in a description, so that no duration on a cluster is 0 or infinite."""


@dataclass(frozen=True)
class SimulatedCluster:
    """Regions, the links between them, and the workers in them.

    Attributes:
        bandwidths: Gbit/s from each region (row) to each region (column); on the diagonal, inside the region.
        worker_speeds: The speeds of each region's workers, on any scale, because only ratios count.
        step_ms: Milliseconds per local step of the fastest worker.
        message_bytes: Size of a message that contains a model. Default: the size of the trained model. Another value
            lets a small model stand for a large one.
        global_region: Index of the global server's region.
        names: Names of the regions. Default: ``"0"``, ``"1"``, ...
        all_reduce: How DiLoCo and synchronous SGD average over all workers. ``"star"``: each region's first worker
            collects the models of its region, and the first worker of the global region those of the other regions, as
            real runs do. ``"ring"``: in a ring of all workers, as in the simulator of the HALoS paper and under DDP.
        record_parameters: Whether the history keeps the server's model after every event; for small models only.
        devices_per_worker: Devices of each worker, whose speed is that of all of them together, and which share its
            links: each sends its slice of a model at the same time. Default: as many as the strategy has processes per
            worker.
        server_gigabytes_per_second: Speed of a server: bytes of a model, divided by the time in which it takes a push,
            applies it and fills the answer; ``benchmarks/server.py`` measures it. Default: servers take no time.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has an invalid value.
    """

    bandwidths: Sequence[Sequence[float]]
    worker_speeds: Sequence[Sequence[float]]
    step_ms: float
    message_bytes: int | None = None
    global_region: int = 0
    names: Sequence[str] = ()
    all_reduce: AllReduce = "star"
    record_parameters: bool = False
    devices_per_worker: int | None = None
    server_gigabytes_per_second: float | None = None

    def __post_init__(self) -> None:
        rows = _table("worker_speeds", self.worker_speeds)
        for region, speeds in enumerate(rows):
            if not speeds:
                raise ValueError(f"worker_speeds: region {region} has no workers. Give it a speed or leave it out.")
        regions = len(rows)
        table = _table("bandwidths", self.bandwidths)
        if [len(row) for row in table] != [regions] * regions:
            raise ValueError(
                f"bandwidths has rows of {[len(row) for row in table]} numbers, but worker_speeds has {regions}"
                f" region(s): bandwidths must be {regions} rows of {regions} numbers, in Gbit/s from region to region."
            )
        if not _is_usable(self.step_ms):
            raise ValueError(f"step_ms={self.step_ms!r} must be a positive number of milliseconds, {_RANGE}.")
        if not _is_sequence(self.names):
            raise TypeError(f"names={self.names!r} must be a list of names, one for each region.")
        size, home = self.message_bytes, self.global_region
        if size is not None and (not isinstance(size, int) or not is_positive(size) or size > MOST_COUNT):
            raise ValueError(f"message_bytes={size!r} must be a positive whole number, or None for the model's size.")
        if not isinstance(home, int) or not is_number(home) or not 0 <= home < regions:
            raise ValueError(f"global_region={home!r} must be the index of a region, from 0 to {regions - 1}.")
        if (devices := self.devices_per_worker) is not None:
            check_count("devices_per_worker", devices)
        speed = self.server_gigabytes_per_second
        if speed is not None and not _is_usable(speed):
            raise ValueError(
                f"server_gigabytes_per_second={speed!r} must be a positive number of GB/s, {_RANGE}, or None for"
                " servers that take no time."
            )
        check_switch("record_parameters", self.record_parameters)
        if self.all_reduce not in get_args(AllReduce):
            raise ValueError(f"all_reduce={self.all_reduce!r} must be one of {get_args(AllReduce)}.")
        names = tuple(self.names) or tuple(map(str, range(regions)))
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(
                f"names={self.names!r} must be texts, but {wrong[0]!r} is none. In YAML, quotes make a text of any"
                ' name: "no", "1".'
            )
        if len(names) != regions or not all(names):
            raise ValueError(f"names={self.names!r} must have one name for each of the {regions} region(s).")
        if len(set(names)) < regions:
            raise ValueError(f"names={self.names!r} must all be different.")
        object.__setattr__(self, "bandwidths", table)
        object.__setattr__(self, "worker_speeds", rows)
        object.__setattr__(self, "names", names)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SimulatedCluster:
        """Reads a description from a file whose keys are the attributes of this class.

        Args:
            path: The file. Its ``global_region`` may be the name of a region, and ``5e8`` is a whole number. A key
                without a value counts as left out.

        Raises:
            FileNotFoundError: If the file does not exist.
            TypeError: If a field has the wrong type.
            ValueError: If the file is not YAML, a key is unknown or missing, or a value is invalid.
        """
        data = read_yaml(Path(path), "describes the cluster")
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict):
            raise ValueError(f"{path} must be a YAML mapping with the keys {', '.join(known)}.")
        if unknown := sorted(map(str, set(data) - set(known))):
            raise ValueError(f"{path} has the unknown key(s) {', '.join(unknown)}. Known are {', '.join(known)}.")
        data = {key: value for key, value in data.items() if value is not None}
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in data]:
            raise ValueError(f"{path} lacks the key(s) {', '.join(missing)}.")
        home, names = data.get("global_region"), data.get("names", ())
        if isinstance(home, str) and _is_sequence(names):
            if home not in names:
                raise ValueError(f"{path}: global_region={home!r} is none of the names {list(names)}.")
            data["global_region"] = list(names).index(home)
        for key in ("message_bytes", "global_region", "devices_per_worker"):
            if isinstance(value := data.get(key), float) and value.is_integer():  # as 5e8 is
                data[key] = int(value)
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    @property
    def regions(self) -> list[list[int]]:
        """Global ranks of the workers of each region."""
        ranks = iter(range(self.num_workers))
        return [[next(ranks) for _ in speeds] for speeds in self.worker_speeds]

    @property
    def num_workers(self) -> int:
        """Number of workers in all regions."""
        return sum(map(len, self.worker_speeds))

    @property
    def region_of(self) -> list[int]:
        """Index of each worker's region, by rank."""
        return [region for region, speeds in enumerate(self.worker_speeds) for _ in speeds]

    @property
    def relative_speeds(self) -> list[float]:
        """Speed of each worker, by rank, relative to the fastest worker."""
        speeds = [speed for region in self.worker_speeds for speed in region]
        fastest = max(speeds)
        return [speed / fastest for speed in speeds]


def _table(name: str, value: Any) -> tuple[tuple[float, ...], ...]:
    if not _is_sequence(value) or not all(_is_sequence(row) for row in value):
        raise TypeError(f"{name}={value!r} must be a list of lists of numbers, one list for each region.")
    if not value:
        raise ValueError(f"{name}=[] must have a list for at least one region.")
    for region, row in enumerate(value):
        for entry in row:
            if not _is_usable(entry):
                raise ValueError(
                    f"{name}: region {region} has {entry!r}; every entry must be a positive number, {_RANGE}."
                )
    return tuple(tuple(float(entry) for entry in row) for row in value)


def _is_usable(value: Any) -> bool:
    return is_number(value) and _LEAST <= value <= _MOST


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
