"""One row of the race: starts the processes, ends them at a limit, and reads what they have written down."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torchft_environment import ENVIRONMENT

from race.cases import Case, Contestant, choose, samples_per_second, timing
from race.links import gigabits, inside, two_regions
from race.task import BATCH, REGIONS, VALIDATION_WINDOWS, WORKERS, RaceData, RaceGPT
from tests.star.network import Place

_START_LIMIT = 300.0  # seconds until the first batch, in which the first model crosses the slow link
_LIGHTHOUSE_PORT, _MASTER_PORT = 29510, 29500
_MODELS = 20  # of a run that are evaluated, at most

Result = dict[str, Any]


def run(case: Case, contestant: Contestant, steps: int, pace: float, limit: float, folder: Path) -> Result:
    """Runs a row.

    Args:
        case: The network and the workers.
        contestant: The way to train.
        steps: Global steps.
        pace: Seconds per batch of a worker that is not slow.
        limit: Seconds from the first batch until the run is ended.
        folder: An empty folder for models and logs.

    Raises:
        RuntimeError: If a process fails, or none begins to train in time.
    """
    with two_regions(case.mbit) as regions:
        between = gigabits(*regions, case.mbit / 1e3)
        durations = timing(case, contestant, pace, between)
        settings, predicted = choose(case, contestant, durations, steps, pace)
        with _processes(regions, contestant, settings, folder) as processes:
            start = _wait_for_start(processes, folder)
            _wait(processes, start + limit, folder)
    loads = os.getloadavg()
    result = {
        "case": case.name,
        "contestant": contestant.name,
        "settings": settings,
        "link_gigabits": round(between, 4),
        "limit": limit,
        "load_average": round(loads[0], 1),
        "predicted_samples_per_second": samples_per_second(predicted),
        **_steps(start, folder),
    }
    result["curve"] = _curve(start, folder)
    result["is_ended"] = result["curve"][-1][0] < steps
    if contestant.software != "halos":  # all steps before a new model are finished at once, so that none is in between
        last_step, last_time, _ = result["curve"][-1]
        result["samples_per_second"] = last_step * WORKERS * BATCH / last_time if last_step else 0.0
    return result


@contextlib.contextmanager
def _processes(
    regions: Sequence[Place], contestant: Contestant, settings: dict[str, Any], folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of a run's workers, by rank. All processes have ended afterwards."""
    module, python, variables = "race.lightning_worker", sys.executable, {}
    started = []
    try:
        if contestant.software == "torchft":
            module, python = "race.torchft_worker", str(ENVIRONMENT / "bin" / "python")
            address = f"{regions[0].ipv4}:{_LIGHTHOUSE_PORT}"
            lighthouse = [str(ENVIRONMENT / "bin" / "torchft_lighthouse"), "--bind", address]
            started.append(_start(regions[0], [*lighthouse, "--min_replicas", str(WORKERS)], {}, folder / "server.log"))
            variables = {"TORCHFT_LIGHTHOUSE": f"http://{address}"}
        per_region = WORKERS // REGIONS
        workers = []
        for rank in range(WORKERS):
            region, local_rank = divmod(rank, per_region)
            place = regions[region]
            own = {
                **variables,
                "ADDRESS": place.ipv4,
                "GLOO_SOCKET_IFNAME": "eth0",
                "GROUP_RANK": str(region),
                "GROUP_WORLD_SIZE": str(REGIONS),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(per_region),
                "MASTER_ADDR": regions[0].ipv4,
                "MASTER_PORT": str(_MASTER_PORT),
                "RANK": str(rank),
                "TORCHELASTIC_RUN_ID": "race",
                "WORLD_SIZE": str(WORKERS),
            }
            command = [python, "-m", module, str(folder), json.dumps(settings)]
            workers.append(_start(place, command, own, folder / f"{rank}.log"))
        started += workers
        yield workers
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _start(place: Place, command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            inside(place, *command),
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def _wait_for_start(processes: list[subprocess.Popen[bytes]], folder: Path) -> float:
    """Waits for the first batch. Returns when it began."""
    deadline = time.time() + _START_LIMIT
    while not (folder / "start").exists():
        if _wait(processes, time.time() + 0.2, folder) or time.time() > deadline:
            raise RuntimeError(f"No worker began to train within {_START_LIMIT:.0f} s.\n{_logs(folder)}")
    return float((folder / "start").read_text())


def _wait(processes: list[subprocess.Popen[bytes]], until: float, folder: Path) -> bool:
    """Waits for all processes until a time. Returns whether they have ended."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            raise RuntimeError(f"A worker failed; the exit codes are {codes}.\n{_logs(folder)}")
        if all(code == 0 for code in codes):
            return True
        if time.time() > until:
            return False
        time.sleep(0.1)


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))


def _steps(start: float, folder: Path) -> Result:
    """What the workers wrote down: samples per second until the last step of all, and the seconds of computing."""
    lines = [line.split() for path in folder.glob("*.steps") for line in path.read_text().splitlines()]
    seconds = max(float(at) for at, _ in lines) - start if lines else 0.0
    return {
        "samples": len(lines) * BATCH,
        "samples_per_second": len(lines) * BATCH / seconds if lines else 0.0,
        "computed_seconds": round(statistics.median(float(computed) for _, computed in lines), 3) if lines else None,
    }


def _curve(start: float, folder: Path) -> list[tuple[int, float, float]]:
    """The global step, the seconds since the start, and the loss, of the first model and of some that were written."""
    torch.manual_seed(0)
    data, model = RaceData(), RaceGPT().eval()
    data.setup("validate")
    batch = data.val[:VALIDATION_WINDOWS]
    paths = sorted(folder.glob("*.pt"))
    every = -(-len(paths) // _MODELS) if paths else 1
    chosen = sorted({*paths[::-1][::every]})  # the last one is always among them
    curve = []
    with torch.inference_mode():
        curve.append((0, 0.0, round(float(model.loss(batch)), 4)))
        for path in chosen:
            content = torch.load(path, weights_only=True)
            model.load_state_dict(content["model"])
            loss = round(float(model.loss(batch)), 4)
            curve.append((content["global_step"], round(content["time"] - start, 2), loss))
    return curve
