"""Members that are connected and let the others wait: for data that they hold, or for the end of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from lightning_halos.core import leasing
from lightning_halos.core.messages import LeaseGrant
from lightning_halos.core.protocol import GlobalState
from tests.core.star import DESCRIPTION, SHARED, Job, Star

LIMITED = dataclasses.replace(DESCRIPTION, max_steps=10)
SMALL = dataclasses.replace(SHARED, steps_per_epoch=16)


def pair(description: object = SMALL, patience: float = 60.0) -> tuple[Star, Job, Job]:
    """A run of two jobs with a worker each: the first is the one that the other waits for."""
    star = Star(min_regions=2, patience=patience)
    jobs = [star.job(name, description=description) for name in ("eu", "us")]  # type: ignore[arg-type]
    star.tick(0.0)
    return star, jobs[0], jobs[1]


def state_of(star: Star, job: Job) -> str:
    return str(star.node.status()["members"][job.name]["state"])


def hoard(job: Job) -> list[int]:
    """A worker asks for data until it gets none, and trains on nothing. Returns what it has."""
    held = list[int]()
    while (grant := job.ask()) is not None and grant.steps:
        held += range(grant.first, grant.first + grant.steps)
    return held


def train(job: Job) -> Iterator[int]:
    """A worker trains on all data that it gets. Yields the data."""
    while (grant := job.ask()) is not None and grant.steps:
        yield from range(grant.first, grant.first + grant.steps)
        job.push(steps=grant.steps, data=[(grant.first, grant.first + grant.steps)])


def waiting(job: Job) -> LeaseGrant | None:
    """The answer to the last order of a worker."""
    return job.lease(0, job.node._workers[0].request)


# ---------------------------------------------------------------------- data


def test_a_member_that_leases_a_small_epoch_and_trains_on_nothing_loses_it_to_the_others() -> None:
    star, first, second = pair()
    held = hoard(first)
    used = list(train(second))
    assert sorted([*held, *used])[-1] == 15
    assert waiting(second) is None, "it waits for what the other one holds"
    star.tick(1.0)
    star.tick(60.0)
    assert state_of(star, first) == "active"
    star.tick(62.0)
    assert state_of(star, first) == "lost"
    assert first.refusal is not None
    assert not first.refusal.for_good
    assert first.refusal.reason == "The others have waited 61 s for data that it holds and does not report."
    grant = waiting(second)
    used += range(grant.first, grant.first + grant.steps)
    second.push(steps=grant.steps, data=[(grant.first, grant.first + grant.steps)])
    used += train(second)
    assert sorted(used) == list(range(16)), "every sample of the epoch is used once"
    second.push(steps=0, final=True)
    assert star.node.state is GlobalState.FINISHED
    assert star.node.budget.total == star.node.server.steps == 16
    star.check()


def test_it_may_return_and_does_not_get_back_what_others_have_taken() -> None:
    star, first, second = pair()
    held = hoard(first)
    list(train(second))
    for now in (1.0, 62.0):
        star.tick(now)
    grant = waiting(second)
    first.refusal = None
    first.connect()
    assert state_of(star, first) == "active"
    assert first.refusal is None
    assert star.node._members[first.index].open.steps == 0
    assert not list(first.node._stock)
    assert grant.steps
    assert held
    hoard(first)
    star.check()


def test_the_second_time_it_is_expelled_and_a_new_process_is_not() -> None:
    star, first, second = pair()
    hoard(first)
    list(train(second))
    for now in (1.0, 62.0):
        star.tick(now)
    first.connect()
    grant = waiting(second)
    second.push(steps=grant.steps, data=[(grant.first, grant.first + grant.steps)])
    list(train(second))
    second.push(steps=0, final=True)
    assert star.node.state is GlobalState.RUNNING, "the other one may have something to send"
    for now in (101.0, 162.0):
        star.tick(now)
    assert star.node.state is GlobalState.FINISHED
    assert first.refusal.for_good
    assert first.refusal.reason.endswith("It was the second time.")
    assert star.job("eu", description=SMALL).refusal is None
    star.check()


def test_one_that_works_its_data_off_slowly_keeps_it_and_one_that_would_need_too_long_does_not() -> None:
    for seconds, state in ((20.0, "active"), (90.0, "lost")):
        star, first, second = pair()
        held = hoard(first)
        assert len(held) >= 4
        list(train(second))
        star.tick(0.0)
        first.push(steps=1, data=[(held[0], held[0] + 1)])
        star.tick(1.0)
        for number, index in enumerate(held[1:3], 1):
            star.tick(seconds * number)
            if state_of(star, first) == "active":
                first.push(steps=1, data=[(index, index + 1)])
        star.tick(seconds * 3)
        assert state_of(star, first) == state


def test_long_rounds_of_the_others_make_the_limit_longer() -> None:
    star, first, second = pair()
    hoard(first)
    while (grant := second.ask()) is not None and grant.steps:
        second.push(steps=grant.steps, data=[(grant.first, grant.first + grant.steps)], seconds=10.0)
    star.tick(0.5)
    star.tick(199.0)
    assert state_of(star, first) == "active"
    star.tick(202.0)
    assert state_of(star, first) == "lost"


def test_before_the_others_have_reported_anything_its_own_rounds_count() -> None:
    star, first, second = pair(LIMITED)
    first.push(seconds=50.0)
    first.push(stop=True, seconds=50.0)
    star.tick(0.5)
    star.tick(62.0)
    assert state_of(star, first) == "active", "its rounds take 50 s"
    assert second.refusal is None, "and those of the other one seem to"
    star.tick(1002.0)
    assert state_of(star, first) == "lost"


def test_who_asks_for_more_while_it_holds_much_is_told_the_end_and_the_others_wait_for_its_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "_MUCH", 1)
    star, first, second = pair()
    held = hoard(first)
    list(train(second))
    number = first.node._workers[0].request
    first.post(first.node.handle(0, type(first.node._order)(4, number)))
    star.pump()
    assert waiting(second) is None
    assert len(held) > 4
    star.tick(1.0)
    star.tick(62.0)
    assert waiting(second).steps, "its data goes to the other one, to whom the end was not told"


def test_data_of_an_epoch_that_the_others_have_left_behind_goes_back() -> None:
    endless = dataclasses.replace(SHARED, steps_per_epoch=8, epochs=None, max_steps=1000)
    star, first, second = pair(endless)
    lease = first.ask()
    assert lease.epoch == 0
    star.tick(1.0)
    while star.node._leasing.epoch < 2:
        grant = second.ask()
        begin = grant.epoch * 8 + grant.first
        second.push(steps=grant.steps, data=[(begin, begin + grant.steps)])
    star.tick(2.0)
    star.tick(61.0)
    assert state_of(star, first) == "active"
    first.push(steps=1, data=[(lease.first, lease.first + 1)])
    star.tick(62.0)
    star.tick(121.0)
    assert state_of(star, first) == "active", "it has reported something"
    star.tick(123.0)
    assert state_of(star, first) == "lost"
    again = second.ask()
    while again.epoch:
        again = second.ask()
    assert again.epoch == 0, "its data is used before others"


def test_nobody_waits_for_a_member_that_only_trains_slowly() -> None:
    star, first, second = pair(SHARED)
    first.ask()
    second.ask()
    for now in range(1, 100):
        star.tick(60.0 * now)
    assert [state_of(star, job) for job in (first, second)] == ["active", "active"]


# ---------------------------------------------------------------------- the end


def test_a_member_that_never_sends_its_last_update_does_not_keep_the_run_from_its_end() -> None:
    star, first, second = pair(LIMITED)
    for _ in range(2):
        first.push()
    for _ in range(3):
        second.push()
    second.push(final=True)
    assert star.node.state is GlobalState.STOPPING
    star.tick(1.0)
    star.tick(60.0)
    assert star.node.state is GlobalState.STOPPING
    star.tick(62.0)
    assert first.refusal.reason == "The others have waited 61 s for its last update."
    assert star.node.state is GlobalState.FINISHED
    assert second.final() is not None
    first.connect()
    assert first.push().stop
    first.push(final=True)
    assert first.final().vector.tolist() == star.node.model.tolist()
    star.check()


def test_if_the_others_have_left_and_it_has_data_of_its_own_it_must_report_something() -> None:
    own = dataclasses.replace(DESCRIPTION, epochs=1)
    star, first, second = pair(own)
    second.push(final=True)
    for now in range(0, 600, 50):
        star.tick(float(now))
        first.push()
    assert state_of(star, first) == "active"
    star.tick(550.5)
    star.tick(612.0)
    assert state_of(star, first) == "lost"
    assert star.node.state is GlobalState.FINISHED


def test_when_all_have_sent_their_last_updates_and_work_is_left_nobody_counts_as_present() -> None:
    star, first, second = pair(LIMITED)
    second.push()
    for _ in range(3):
        first.push()
    first.push(final=True)
    assert star.node.present == 2
    second.die()
    assert star.node.state is GlobalState.RUNNING
    assert star.node.present == 0
