from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lightning_halos.transport.alarm import Alarm
from tests.transport.ends import End, GlooWire, TLSWire, Wire, groups, ignore


@pytest.fixture(autouse=True)
def _no_group_stays() -> Iterator[None]:
    """Destroys the test's process groups here: in a process that a later test forks, that would be fatal."""
    yield
    gc.collect()


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An alarm that nobody asks does not end the process, and threads do not outlive their test."""
    monkeypatch.setattr(Alarm, "_end_process", ignore)
    yield
    for end in End.all:
        end.alarm.disarm()
        end.link.close()
        end.failed.set()
    for end in End.all:
        end.link.join(10)
    End.all.clear()


@pytest.fixture(params=["gloo", "tls"])
def wire(request: pytest.FixtureRequest, nothing_is_left: None) -> Iterator[Wire]:
    if request.param == "gloo":
        with groups() as processes:
            made: Wire = GlooWire(processes)
    else:
        made = TLSWire(streams=3)
    yield made
    made.close()
