"""The hand strikes as its plan says, makes good what it did, and complains about what must not happen."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from tests.star import hand as hand_module
from tests.star.hand import CUT, KILL, KINDS, RESTART, STOP, TERMINATE, UNPLUG, Fault, Hand, gaps, plan
from tests.star.processes import Party, Process, signal_all, wait_until

VICTIMS = ["server", "one", "two", "three"]
LIMIT = 60.0


def test_the_seed_decides_everything() -> None:
    assert plan(1, 600, VICTIMS) == plan(1, 600, VICTIMS) != plan(2, 600, VICTIMS)


def test_a_plan_of_ten_minutes_has_everything() -> None:
    faults = plan(3, 600, VICTIMS)
    assert {(fault.kind, fault.victim) for fault in faults} == {(kind, victim) for kind in KINDS for victim in VICTIMS}
    assert 600 / 15 <= len(faults) + 1 <= 600 / 5
    assert all(5 <= gap <= 15 for gap in gaps(faults))
    assert faults[-1].at <= 600


class Sleeper:
    """A process that sleeps."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def wait(self, limit: float) -> int | None:
        return self._process.wait(limit)


class Sleepers(Party):
    """Two processes, of which one ends with the other, or not."""

    def __init__(self, together: bool = True) -> None:
        super().__init__()
        self.together = together
        self.starts = 0
        self.calls: list[str] = []

    def launch(self) -> list[Process]:
        self.starts += 1
        return [Sleeper(), Sleeper()]

    def has_ended(self) -> bool:
        if self.together and set(self.codes()) != {None}:
            self.kill()
        return super().has_ended()

    def cut(self) -> None:
        self.calls.append("cut")

    def unplug(self) -> None:
        self.calls.append("unplug")

    def mend(self) -> None:
        self.calls.append("mend")

    def kill(self) -> None:
        signal_all(self.pids(), signal.SIGKILL)


@pytest.fixture
def party() -> Iterator[Sleepers]:
    party = Sleepers()
    party.start()
    yield party
    party.kill()


CarryOut = Callable[..., Hand]


@pytest.fixture
def carry_out(monkeypatch: pytest.MonkeyPatch) -> CarryOut:
    """Carries out a plan by a clock that never goes on by more than 10 ms between two looks of the hand."""
    now = [0.0]
    monkeypatch.setattr(hand_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def carry_out(party: Sleepers, *faults: Fault, patience: float = 5.0) -> Hand:
        hand = Hand(faults, {"one": party}, patience, log=print)
        deadline = time.monotonic() + LIMIT
        while hand.is_busy:
            assert time.monotonic() < deadline
            hand.act()
            time.sleep(0.01)
            now[0] += 0.01
        return hand

    return carry_out


@pytest.mark.parametrize("kind", [KILL, TERMINATE, RESTART])
def test_a_party_that_has_ended_is_started_again(party: Sleepers, carry_out: CarryOut, kind: str) -> None:
    before = party.pids()
    hand = carry_out(party, Fault(0.0, kind, "one", 1, 0.2))
    assert not hand.complaints
    assert party.starts == 2
    assert len(party.pids()) == 2
    assert not set(before) & set(party.pids())


def test_a_process_that_is_stopped_goes_on(party: Sleepers) -> None:
    hand = Hand([Fault(0.0, STOP, "one", 0, 0.3)], {"one": party}, 5.0, log=print)
    hand.act()
    pid = party.pids()[0]
    wait_until(lambda: state(pid) == "T", LIMIT)
    wait_until(lambda: (hand.act(), state(pid))[1] == "S", LIMIT)
    assert not hand.is_busy
    assert party.starts == 1


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2]


def test_a_cable_is_mended(party: Sleepers, carry_out: CarryOut) -> None:
    carry_out(party, Fault(0.0, CUT, "one", 0, 0.1), Fault(0.3, UNPLUG, "one", 0, 0.1))
    assert party.calls == ["cut", "mend", "unplug", "mend"]


def test_a_party_that_is_down_is_passed_over(party: Sleepers, carry_out: CarryOut) -> None:
    hand = carry_out(party, Fault(0.0, CUT, "one", 0, 0.5), Fault(0.1, KILL, "one", 0, 0.0))
    assert [fault.kind for fault in hand.struck] == [CUT]
    assert party.starts == 1


def test_complaint_about_processes_that_stay(carry_out: CarryOut) -> None:
    party = Sleepers(together=False)
    party.start()
    hand = carry_out(party, Fault(0.0, KILL, "one", 0, 0.0), patience=0.3)
    assert len(hand.complaints) == 1
    assert "still run" in hand.complaints[0]
    party.kill()


def test_complaint_about_a_party_that_ends_by_itself(party: Sleepers) -> None:
    hand = Hand([], {"one": party}, 5.0, log=print)
    signal_all(party.pids()[:1], signal.SIGKILL)
    wait_until(lambda: (hand.act(), hand.complaints)[1], LIMIT)
    assert "ended by itself" in hand.complaints[0]
    assert party.starts == 2
