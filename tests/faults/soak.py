"""Trains for minutes with a server and 3 region jobs of 2 workers, while a seeded hand strikes any of them.

Usage::

    python -m tests.faults.soak --minutes 10 --seed 1
    python -m tests.faults.soak --minutes 10 --seed 1 --without without.json   # keeps the run without faults

Every 5 to 15 seconds the hand kills, stops, terminates, cuts off or restarts one of them. At the end the ordered steps
must be done, every epoch's samples used, and used once apart from what ``docs/faults.md`` says of rounds in flight; all
regions must hold one model, as good as that of a run without faults, and no process may be left. Prints the goodput:
useful local steps per second with faults, over those without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tests.integration.harness import free_port
from tests.star.evidence import Evidence
from tests.star.hand import (
    CUT,
    EXCEPTION,
    KILL,
    KINDS,
    NEEDS_NETWORK,
    RESTART,
    STOP,
    TERMINATE,
    UNPLUG,
    Fault,
    Hand,
    described,
    plan,
)
from tests.star.network import Place, inhabitants, internet, missing
from tests.star.processes import Party, Starter, starting
from tests.star.roles import Task, loss_of
from tests.star.star import WORKERS, Star

REGIONS = ("one", "two", "three")
SERVER = "server"
LIVENESS = 5.0  # seconds, so that some faults last longer and some do not
PATIENCE = 30.0  # seconds beyond the strategy's `timeout` in which a party must have ended after a fault
LAST_WORDS = 5.0  # seconds in which a job that fails prints why, or one that is back trains on what it had in hand
RECONNECT = 5.0  # seconds in which a region that tries again is connected, if the server's log does not say when
IN_FLIGHT = 3.0  # seconds that a batch takes at most until the global server has it
PORT = 29600


@dataclass(frozen=True)
class Report:
    """What a soak came to.

    Attributes:
        faults: That struck.
        seconds: From the first batch to the last.
        steps: Useful local steps: of batches that were trained on for the first time.
        repeated: Batches that were trained on again.
        loss: Of the model at the end.
        evidence: What the workers wrote.
        hand: That struck.
    """

    faults: list[Fault]
    seconds: float
    steps: int
    repeated: int
    loss: float
    evidence: Evidence
    hand: Hand

    @property
    def rate(self) -> float:
        """Useful local steps per second."""
        return self.steps / self.seconds


@contextlib.contextmanager
def distant(*names: str) -> Iterator[dict[str, Place]]:
    """A place for each name, where this machine allows it; else nothing."""
    if missing():
        yield {}
        return
    with internet() as network:
        yield {name: network.place(name) for name in names}


def three_regions(
    starter: Starter, folder: Path, task: Task, places: Mapping[str, Place]
) -> tuple[Star, dict[str, Party]]:
    """A server and three region jobs, not started yet."""
    host, port = (places[SERVER].ipv4, PORT) if places else ("127.0.0.1", free_port())
    star = Star(starter, folder, task, [host], list(REGIONS))
    options = ["--workers", str(WORKERS * len(REGIONS)), "--liveness", f"{LIVENESS:g}", "--timeout", "60"]
    parties: dict[str, Party] = {SERVER: star.server(*options, listen=f"{host}:{port}", place=places.get(SERVER))}
    parties.update({name: star.job(name, f"{host}:{port}", places.get(name)) for name in REGIONS})
    return star, parties


def all_train(star: Star) -> bool:
    """Whether all regions train, so that every seed strikes a run that goes on."""
    return len(list(star.evidence.glob("*.batches"))) >= WORKERS * len(REGIONS)


def soak(
    folder: Path,
    task: Task,
    faults: Sequence[Fault],
    limit: float,
    as_scripts: bool = True,
    log: Callable[[str], None] = print,
    begins: Callable[[Star], bool] = all_train,
) -> Report:
    """Trains a task under a plan of faults, and checks the result.

    Args:
        folder: Where everything of the run is kept.
        task: What is trained.
        faults: What the hand does.
        limit: Seconds in which the run must have ended.
        as_scripts: Whether processes are started as scripts; else they are forked.
        log: Is told what happens.
        begins: Whether the hand's time begins now.

    Raises:
        AssertionError: If anything is not as it must be.
    """
    with contextlib.ExitStack() as stack:
        starter = stack.enter_context(starting(folder, as_scripts))
        places = stack.enter_context(distant(SERVER, *REGIONS))
        star, parties = three_regions(starter, folder, task, places)
        for party in parties.values():
            party.start()
        deadline = time.monotonic() + limit
        while not begins(star):
            assert time.monotonic() < deadline, f"The run did not begin.\n{starter.logs()}"
            assert not any(party.has_ended() for party in parties.values()), starter.logs()
            time.sleep(0.05)
        hand = Hand(faults, parties, task.timeout + PATIENCE, log)
        while hand.is_busy or not all(party.has_ended() for party in parties.values()):
            if parties[SERVER].is_done():
                hand.finish()
            hand.act()
            assert not hand.complaints, f"{hand.complaints}\n{starter.logs()}"
            assert time.monotonic() < deadline, f"The run did not end within {limit:.0f} s.\n{starter.logs()}"
            time.sleep(0.05)
        present = [name for name in REGIONS if parties[name].is_done()]
        assert parties[SERVER].is_done(), starter.logs()
        assert present, starter.logs()
        assert all(hand.is_absent(name, 60 + task.timeout) for name in REGIONS if name not in present), starter.logs()
        left = [*starter.left(), *(pid for place in places.values() for pid in inhabitants(place.namespace))]
        assert not left, f"Processes {left} are left.\n{starter.logs()}"
        evidence = Evidence.read(star.evidence)
        star.assert_keys_are_hidden()
        global_step = star.assert_counters_add_up(evidence)
    lost = losses(hand.struck, connections((folder / "server.log").read_text(), hand.began))
    evidence.assert_used_once(
        task.epochs,
        task.samples,
        lambda batch: any(
            batch.worker.startswith(victim) and begin < batch.at - hand.began < end for victim, begin, end in lost
        ),
    )
    workers = [f"{name}-{rank}" for name in present for rank in range(WORKERS)]
    evidence.assert_same_step(workers, global_step)
    state = evidence.assert_same_model(workers)
    final = torch.load(star.directory / "final.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], final[name]) for name in state), "final.ckpt is another model"
    begin, end = evidence.span()
    return Report(
        hand.struck,
        end - begin,
        evidence.useful_steps(),
        len(evidence.batches) - evidence.useful_steps(),
        loss_of(state),
        evidence,
        hand,
    )


def losses(faults: Sequence[Fault], connected: Mapping[str, Sequence[float]]) -> list[tuple[str, float, float]]:
    """Whose work may be lost, from when to when in seconds: what ``docs/faults.md`` says of rounds in flight.

    A process that is killed takes with it what the global server does not have: usually a second's work, or all since
    the connection was lost. A job that SIGTERM ends takes nothing with it, unless it has no connection then and gets
    none within ``grace_time``. The data of a region that was not heard of for ``--liveness`` goes to others, though it
    went on with them.

    Args:
        faults: What struck.
        connected: When each region was connected, in seconds from the beginning of the hand.
    """

    def end(fault: Fault, victim: str) -> float:
        again = min((at for at in connected.get(victim, ()) if at > fault.at), default=0.0)
        return max(again + LAST_WORDS, fault.at + fault.lasts + RECONNECT)

    found = []
    for fault in faults:
        victims = REGIONS if fault.victim == SERVER else [fault.victim]
        if fault.kind in (KILL, RESTART, EXCEPTION, TERMINATE) and fault.victim != SERVER:
            before = [other for other in faults if other.victim in (SERVER, fault.victim) and other.at < fault.at]
            begin = min((other.at for other in before if fault.at < end(other, fault.victim)), default=fault.at)
            if fault.kind != TERMINATE or begin < fault.at:
                found.append((fault.victim, begin - IN_FLIGHT, fault.at + LAST_WORDS))
        elif fault.kind in (STOP, CUT, UNPLUG) and fault.lasts > LIVENESS - 2:
            found += [(victim, fault.at - IN_FLIGHT, end(fault, victim)) for victim in victims]
    return found


def connections(log: str, began: float) -> dict[str, list[float]]:
    """When each region was connected, by the server's log, in seconds from ``began``."""
    found: dict[str, list[float]] = {name: [] for name in REGIONS}
    for at, name in re.findall(r"^(\S+ \S+) INFO (\w+) \(\S+\) is connected\.$", log, re.MULTILINE):
        found[name].append(time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S")) - began)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the hand strikes (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the hand (default: 1)")
    parser.add_argument("--every", type=float, nargs=2, default=(5.0, 15.0), metavar="SECONDS", help="between faults")
    parser.add_argument("--without", type=Path, help="file with the run without faults; made if it does not exist")
    parser.add_argument("--folder", type=Path, help="where to keep everything (default: a temporary folder)")
    parser.add_argument("--fork", action="store_true", help="fork processes instead of starting scripts: less work")
    options = parser.parse_args(arguments)
    seconds = 60 * options.minutes
    task = task_for(seconds)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kinds = [kind for kind in KINDS if not missing() or kind not in NEEDS_NETWORK]
        faults = plan(options.seed, seconds, [SERVER, *REGIONS], tuple(options.every), kinds)
        limit = 3 * seconds + 120
        without = _without(folder / "without", options.without, task, limit, not options.fork)
        print(f"without faults: {without['rate']:.1f} local steps/s, loss {without['loss']:.4f}", flush=True)
        (folder / "with").mkdir(parents=True)
        say = partial(print, flush=True)
        report = soak(folder / "with", task, faults, limit, not options.fork, say)
    print(f"with {len(report.faults)} faults ({described(report.faults)}): {report.rate:.1f} local steps/s, ", end="")
    print(f"{report.repeated} batches again, loss {report.loss:.4f}")
    print(f"goodput: {report.rate / without['rate']:.1%}")
    assert report.loss <= 1.25 * without["loss"] + 0.002, "The loss is worse than without faults."
    return 0


def task_for(seconds: float) -> Task:
    """A task of about so many seconds, with epochs of at most two minutes."""
    pause, batch, epoch = 0.05, 4, min(120.0, seconds)
    samples = round(epoch * len(REGIONS) * WORKERS / pause * 0.9) * batch
    return Task(
        epochs=max(1, round(seconds / epoch)), samples=samples, batch=batch, pause=pause, local_steps=8, timeout=120.0
    )


def _without(folder: Path, path: Path | None, task: Task, limit: float, as_scripts: bool) -> dict[str, float]:
    """Rate and loss of the run without faults, from a file if it has been made before."""
    if path is not None and path.exists():
        return dict(json.loads(path.read_text()))
    folder.mkdir(parents=True)
    report = soak(folder, task, [], limit, as_scripts)
    result = {"rate": report.rate, "loss": report.loss}
    if path is not None:
        path.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(main())
