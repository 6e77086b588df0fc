"""The time that counts as computing, on a device that works only while it is waited for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_halos.training.stopwatch import Stopwatch


class Queueing(Stopwatch):
    """A stopwatch with a clock and a device of its own."""

    def __init__(self) -> None:
        self.time = self.queued = 0.0
        super().__init__(torch.device("cpu"))

    def now(self) -> float:
        return self.time

    def synchronize(self) -> None:
        self.time += self.queued
        self.queued = 0.0


@pytest.fixture
def watch() -> Queueing:
    return Queueing()


def test_a_lap_is_the_time_since_the_last_one(watch: Queueing) -> None:
    watch.time = 3.0
    assert watch.lap() == 3.0
    watch.time = 4.5
    assert (watch.lap(), watch.lap()) == (1.5, 0.0)


def test_what_was_before_a_restart_does_not_count(watch: Queueing) -> None:
    watch.time = 3.0
    with watch.paused():
        pass
    watch.restart()
    watch.time = 4.0
    assert watch.lap() == 1.0


def test_draining_takes_as_long_as_the_work_in_the_queue(watch: Queueing) -> None:
    watch.queued = 2.0
    assert (watch.drain(), watch.drain()) == (2.0, 0.0)


def test_pauses_are_left_out_also_nested_ones(watch: Queueing) -> None:
    watch.time = 1.0
    with watch.paused():
        watch.time = 10.0
        with watch.paused():
            watch.time = 20.0
        watch.time = 30.0
    watch.time = 32.0
    assert watch.lap() == 3.0


def test_a_lap_in_a_pause_has_what_was_before_it(watch: Queueing) -> None:
    watch.time = 1.0
    with watch.paused():
        watch.time = 10.0
        assert watch.lap() == 1.0
    watch.time = 12.0
    assert watch.lap() == 2.0


def test_work_queued_before_a_pause_counts_and_work_queued_in_it_does_not(watch: Queueing) -> None:
    watch.queued = 2.0
    with watch.paused():
        watch.time += 100.0
        watch.queued = 50.0
    assert watch.lap() == 2.0
    assert watch.queued == 0.0


def test_a_pause_ends_with_an_error(watch: Queueing) -> None:
    with pytest.raises(ValueError, match="full"), watch.paused():
        raise ValueError("full")
    watch.time += 1.0
    assert watch.lap() == 1.0


def test_the_time_to_get_items_is_left_out_and_their_use_is_not(watch: Queueing) -> None:
    def items() -> Iterator[int]:
        for item in range(3):
            watch.time += 100.0
            yield item
        watch.time += 100.0

    for _ in watch.excluding(items()):
        watch.time += 1.0
    assert watch.lap() == 3.0


def test_every_kind_of_device_can_be_waited_for() -> None:
    Stopwatch(torch.device("cpu")).synchronize()
