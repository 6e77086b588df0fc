"""A star of jobs: members join, leave, are cut off, are lost and return, and so does the global server."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_halos.core import leasing, open_global_node
from lightning_halos.core.cursor import LeaseStock, Spans
from lightning_halos.core.description import check as check_description
from lightning_halos.core.description import reason_against
from lightning_halos.core.members import MEMBER_TRANSITIONS, Member, MemberEvent, MemberState
from lightning_halos.core.messages import (
    Decide,
    Enrol,
    Enrolled,
    GlobalModel,
    InitialModel,
    Join,
    LeaseGrant,
    LeaseRequest,
    Message,
    ModelCopy,
    ModelRequest,
    Progress,
    Publish,
    Pull,
    Refusal,
    RegionUpdate,
    RunDescription,
    Welcome,
)
from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.core.open_region_node import MOST_KEPT
from lightning_halos.core.protocol import (
    GLOBAL,
    OPEN_GLOBAL_TRANSITIONS,
    OPEN_REGION_TRANSITIONS,
    GlobalState,
    OpenEvent,
    ProtocolError,
    RegionEvent,
    RegionState,
    Send,
)
from tests.core.star import DESCRIPTION, SHARED, Job, Star

LIMITED = dataclasses.replace(DESCRIPTION, max_steps=10)


def of_kind(sends: list[Send], kind: type) -> list[Any]:
    return [send.message for send in sends if isinstance(send.message, kind)]


def pair(description: Any = DESCRIPTION, **options: Any) -> tuple[Star, Job, Job]:
    """A run of two jobs with a worker each."""
    star = Star(min_regions=2, **options)
    return star, star.job("eu", description=description), star.job("us", description=description)


# ---------------------------------------------------------------------- the tables, completely


@pytest.mark.parametrize("event", MemberEvent, ids=lambda event: event.name)
@pytest.mark.parametrize("state", MemberState, ids=lambda state: state.name)
def test_a_member_moves_as_its_table_says_and_in_no_other_way(state: MemberState, event: MemberEvent) -> None:
    member = Member("eu", 0, state=state)
    if event in MEMBER_TRANSITIONS[state]:
        member.move(event)
        assert member.state is MEMBER_TRANSITIONS[state][event]
    else:
        with pytest.raises(ProtocolError, match="'eu' is "):
            member.move(event)
        assert member.state is state


def center_in(state: GlobalState) -> tuple[Star, Job, Job]:
    star, first, second = pair(dataclasses.replace(SHARED, max_steps=10))
    first.push()
    if state is GlobalState.STOPPING:
        first.push(steps=16, pump=True)
        second.push(steps=0)
    if state is GlobalState.FINISHED:
        first.push(stop=True, final=True)
        second.push(final=True)
    assert star.node.state is state
    return star, first, second


def happen(star: Star, first: Job, second: Job, event: OpenEvent) -> None:
    """Lets something happen to the global node."""
    node, index = star.node, first.index
    member = node._members[index]
    if event is OpenEvent.ENROL:
        node.handle(index, Enrol("eu", 1))
    elif event is OpenEvent.JOIN:
        node.handle(index, Join("a new process", 1, node.description))
    elif event is OpenEvent.GO:
        node.disconnected(index)
    elif event is OpenEvent.UPDATE:
        unsent = sum(report.steps for report in member.uncovered)
        node.handle(index, RegionUpdate(index, 0, unsent, vector=torch.zeros(2), number=member.update + 1))
    elif event is OpenEvent.PROGRESS:
        node.handle(index, Progress(index, member.report + 1, 0, 1, 1.0, 0.0, 1.0, update=member.update + 1))
    elif event is OpenEvent.LEASE_REQUEST:
        member.is_flushed = False
        node.handle(index, LeaseRequest(1, 99))
    elif event is OpenEvent.MODEL_REQUEST:
        node.handle(index, ModelRequest(1))
    elif event is OpenEvent.PUBLISH:
        node.handle(index, Publish(member.publication + 1))
    elif event is OpenEvent.STOP:
        node.end()
    elif event is OpenEvent.GO_ON:
        node.lose(index)  # which takes its steps back
    elif event is OpenEvent.FINISH:
        for member in node._members:
            member.is_flushed = True
        node.end()
    else:
        node.begin_snapshot()


@pytest.mark.parametrize("event", OpenEvent, ids=lambda event: event.name)
@pytest.mark.parametrize("state", GlobalState, ids=lambda state: state.name)
def test_the_global_node_moves_as_its_table_says_whatever_happens(state: GlobalState, event: OpenEvent) -> None:
    star, first, second = center_in(state)
    allowed = OPEN_GLOBAL_TRANSITIONS[state]
    if event in (OpenEvent.STOP, OpenEvent.FINISH, OpenEvent.GO_ON):  # conclusions of the node, never a mistake
        before = star.node.state
        happen(star, first, second, event)
        reached = {OpenEvent.STOP: GlobalState.STOPPING, OpenEvent.FINISH: GlobalState.FINISHED}
        expected = before if event not in allowed else reached.get(event, GlobalState.RUNNING)
        assert star.node.state in (expected, before if event is OpenEvent.GO_ON else expected)
    else:
        happen(star, first, second, event)
        expected = allowed.get(event, state)
        # The loss of the old process may take back what the budget was used up with.
        assert star.node.state in (expected, GlobalState.RUNNING if event is OpenEvent.JOIN else expected)


@pytest.mark.parametrize("state", RegionState, ids=lambda state: state.name)
def test_a_region_takes_the_final_model_at_any_time_and_its_workers_then_finish(state: RegionState) -> None:
    job = pair()[1]
    node = job.node
    if state is RegionState.EXCHANGING:
        job.is_connected = False  # the answer is lost
        job.push()
        job.push()
    elif state in (RegionState.FLUSHED, RegionState.FINISHED):
        job.push(final=True)
    final = GlobalModel(1, True, vector=torch.full((2,), 7.0))
    if state is RegionState.FINISHED:
        job.post(node.handle(GLOBAL, final))
    assert node.state is state
    assert RegionEvent.FINAL_MODEL in OPEN_REGION_TRANSITIONS[state] or state is RegionState.FINISHED
    job.post(node.handle(GLOBAL, final))
    if state in (RegionState.SERVING, RegionState.EXCHANGING):
        assert node.state is state
        assert job.push().stop
        job.push(final=True)
    assert node.state is RegionState.FINISHED
    assert job.final().vector.tolist() == [7, 7]


# ---------------------------------------------------------------------- founding


def test_a_run_of_two_jobs_from_the_first_join_to_the_final_model() -> None:
    star = Star(min_regions=2)
    first = star.job("eu")
    assert first.node is None
    second = star.job("us")
    assert first.node is not None
    assert second.node is not None
    for _ in range(4):
        for job in (first, second):
            assert isinstance(job.push(), Pull)
            star.check()
    first.push(stop=True, final=True)
    assert star.node.state is GlobalState.STOPPING
    second.push(final=True)
    assert star.node.state is GlobalState.FINISHED
    for job in (first, second):
        assert job.final().vector.tolist() == star.node.model.tolist()
        assert (job.final().position, job.final().stopped) == (20, True)
    assert star.node.budget.total == star.node.server.steps == 40


def test_the_founder_gives_the_model_and_another_one_does_if_it_goes() -> None:
    star = Star(min_regions=2)
    top = star.top
    first, second = top.index_of("eu"), top.index_of("us")
    (asked,) = of_kind(top.handle(first, Join("a", 1, DESCRIPTION)), Welcome)
    assert asked.needs_model
    assert of_kind(top.handle(second, Join("b", 1, DESCRIPTION)), Welcome) == []
    sends = top.disconnected(first)
    assert [(send.to, send.message.needs_model) for send in sends] == [(second, True)]
    assert top.handle(second, InitialModel(torch.ones(2))) == []
    assert top.node is None, "one member is too few"
    top.handle(first, Join("c", 1, DESCRIPTION))
    welcomes = top.node.start()
    assert [send.to for send in welcomes] == [first, second]
    assert top.node.model.tolist() == [1, 1]


@pytest.mark.parametrize("regions", [1, 2], ids=["while the run goes on", "before it begins"])
def test_a_job_that_does_not_fit_the_run_is_told_each_difference_and_what_to_do(regions: int) -> None:
    numbers = {"samples": 100, "seed": 0}
    ours = dataclasses.replace(
        DESCRIPTION,
        model=json.dumps({"elements": 2, "checksum of frozen parameters": 0}),
        data=json.dumps(numbers),
        steps_per_epoch=10,
        max_steps=100,
    )
    theirs = dataclasses.replace(
        ours,
        data=json.dumps({**numbers, "samples": 90}),
        settings={**ours.settings, "local_steps": 8},
        max_steps=None,
        shapes=[[1, 2]],
        buffers=[("mean", [3])],
        model=json.dumps({"elements": 5, "checksum of frozen parameters": 5}),
    )
    star = Star(min_regions=regions)
    star.job("eu", description=ours)
    refusal = star.job("us", description=theirs).refusal
    assert refusal is not None
    assert refusal.for_good
    assert refusal.reason == (
        "This job does not fit the run: checksum of frozen parameters is 0 in the run, and 5 in this job;"
        " local_steps is 4 in the run, and 8 in this job; the number of samples is 100 in the run, and 90 in this"
        " job; max_steps is 100 in the run, and None in this job; parameter weight is of shape (2,) in the run, and"
        " of shape (1, 2) in this job, and 1 more. All jobs of a run need the same module, data, max_steps,"
        " max_epochs and settings; another run needs a server with another --directory."
    )
    assert reason_against(ours, copy.deepcopy(ours)) == ""


def test_when_nobody_is_left_before_the_run_begins_another_job_may_found_another_run() -> None:
    star = Star(min_regions=2)
    star.job("eu").cut()
    assert star.job("us", description=LIMITED).refusal is None
    assert star.top.description == LIMITED


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.tensor([0.0, float("nan")]), torch.zeros(2, dtype=torch.float64)]
)
def test_an_initial_model_of_another_form_is_refused(bad: torch.Tensor) -> None:
    top = Star().top
    index = top.index_of("eu")
    top.handle(index, Join("a", 1, DESCRIPTION))
    with pytest.raises(ProtocolError, match="'eu' sent a model of another form"):
        top.handle(index, InitialModel(bad))


def test_jobs_learn_the_workers_of_a_global_step_before_they_join_and_also_when_they_come_late() -> None:
    star = Star(min_regions=2)
    first, second = star.top.index_of("eu"), star.top.index_of("us")
    assert star.top.handle(first, Enrol("a", 3)) == []
    sends = star.top.handle(second, Enrol("b", 2))
    assert [(send.to, send.message) for send in sends] == [(first, Enrolled(5, 0)), (second, Enrolled(5, 3))]
    star.job("eu", workers=3)
    star.job("us", workers=2)
    assert star.node.budget.workers == 5
    third = star.node.index_of("asia")
    assert star.node.handle(third, Enrol("c", 4))[0].message == Enrolled(5, 5)


# ---------------------------------------------------------------------- join and leave


def test_a_late_member_gets_the_global_model_the_budget_and_the_plateau_steps() -> None:
    star, first, _ = pair(LIMITED)
    first.post(first.node.publish([(0, 1.5)], {"val_loss": 1.5}, ""))
    for _ in range(2):
        first.push()
    late = star.job("asia", description=LIMITED)
    assert late.joining.copy.vector.tolist() == star.node.model.tolist() == [-2, -2]
    assert late.joining.welcome.workers == 2, "a global step stays what it was"
    assert late.joining.status.plateau_steps == [(0, 1.5)]
    pull = late.push()
    assert pull.position == 6
    assert pull.plateau_steps == [], "its workers take them when they start"
    assert pull.metrics == {"val_loss": 1.5}
    star.check()


def test_without_shared_data_a_job_begins_with_the_epoch_of_its_region_or_of_the_slowest_worker() -> None:
    own = dataclasses.replace(DESCRIPTION, epochs=3)
    star = Star()
    eu = star.job("eu", workers=2, description=own)
    eu.push(0, epoch=2)
    assert star.job("first", description=own).joining.welcome.epoch == 0  # the other worker of eu has finished none
    star.jobs["first"].die()
    eu.push(1, epoch=1)
    us = star.job("us", description=own)
    assert us.joining.welcome.epoch == 1
    eu.push(1, epoch=2)
    star.restart()
    eu.connect()
    us.connect()
    eu.die()
    eu = star.job("eu", workers=2, description=own)
    assert eu.joining.welcome.epoch == 2  # its region has come so far, and us has not
    assert star.node.status()["run"]["epoch"] == 1
    us.push(final=True, epoch=3)
    late = star.job("late", description=own)
    assert late.joining.welcome.epoch == 2  # us does not work any more
    eu.push(0, final=True, epoch=3)
    eu.push(1, final=True, epoch=3)
    late.push(final=True, epoch=3)
    assert star.node.state is GlobalState.FINISHED
    assert star.node.status()["run"]["epoch"] == 2  # the last one


def test_a_member_that_leaves_gives_all_its_steps_and_the_run_goes_on() -> None:
    star, first, second = pair(SHARED)
    second.ask()
    lease = first.ask()
    first.push(data=[(lease.first, lease.first + 1)], steps=1, leave=True, final=True)
    assert first.final() is not None
    assert not first.final().stopped
    assert first.node.state is RegionState.FINISHED
    assert star.node.status()["members"]["eu"]["state"] == "left"
    assert star.node.state is GlobalState.RUNNING
    assert star.node.budget.total == star.node.server.steps == 1
    held = Spans(star.node._members[second.index].open)
    assert star.node._leasing.cursor._taken.without(held, [(lease.first, lease.first + 1)]).steps == 0, (
        "its leases returned"
    )
    assert second.push(steps=1) is not None


def test_a_member_whose_farewell_was_lost_gets_it_when_it_asks_again() -> None:
    star, first, _ = pair()
    first.push(pump=False, leave=True, final=True)
    first.is_connected = False  # after it has sent everything
    star.pump()
    assert first.final() is None
    first.node.disconnected()
    first.connect()
    assert first.final().final


def test_a_new_process_may_join_after_its_region_has_left() -> None:
    star, first, _ = pair()
    first.push(leave=True, final=True)
    again = star.job("eu")
    assert again.index == first.index
    again.push()
    again.push()
    star.check()
    assert star.node.server.steps == 12


# ---------------------------------------------------------------------- lost connections


def test_a_lost_connection_goes_on_where_it_was_and_nothing_counts_twice() -> None:
    star, first, second = pair()
    first.push()
    first.cut()
    assert star.node.status()["members"]["eu"]["state"] == "disconnected"
    for _ in range(3):
        assert first.push().vector is not None, "its workers go on"
    assert star.node.budget.total == 4
    first.connect()
    assert star.node.budget.total == 16
    first.push()
    star.check()
    assert star.node.server.steps == 20
    assert second.push().position == 12
    assert star.node.server.senders == 2


def test_an_update_whose_answer_was_lost_is_answered_again_and_applied_once() -> None:
    star, first, _ = pair()
    first.push()
    first.push(pump=False)
    first.is_connected = False  # the update is on its way, its answer will be lost
    star.pump()
    assert star.node.server.version == 1
    assert first.node.state is RegionState.EXCHANGING
    first.node.disconnected()
    first.connect()
    assert first.node.state is RegionState.SERVING
    assert (star.node.server.version, first.node.server.merges) == (1, 1)


def test_an_update_is_applied_when_the_reports_of_its_pushes_have_arrived() -> None:
    star, first, _ = pair()
    first.push(pump=False)
    first.push(pump=False)
    messages = list(first.up)
    first.up.clear()
    update = next(message for message in messages if isinstance(message, RegionUpdate))
    reports = [message for message in messages if isinstance(message, Progress)]
    assert star.node.handle(first.index, update) == []
    star.node.handle(first.index, reports[0])
    assert star.node.server.steps == 0
    assert of_kind(star.node.handle(first.index, reports[1]), GlobalModel)[0].number == 1
    assert star.node.server.steps == star.node.budget.total == 8


# ---------------------------------------------------------------------- lost processes


def test_a_lost_process_is_rolled_back_exactly_steps_and_data() -> None:
    star, first, second = pair(SHARED)
    leases = [first.ask() for _ in range(3)]
    spans = [(lease.first, lease.first + lease.steps) for lease in leases]
    first.push(data=[spans[0]])
    first.push(data=[spans[1]])  # these two are in an update, the next is not
    first.push(data=[spans[2]])
    assert (star.node.budget.total, star.node.server.steps) == (12, 8)
    first.die()
    assert star.node.status()["members"]["eu"]["state"] == "lost"
    assert star.node.budget.total == star.node.server.steps == 8
    assert second.node.budget.total == 8, "the others are told"
    assert star.node.server.senders == 1
    assert list(star.node._leasing.done) == list(Spans(spans[:2]))
    used, number = list[int](), 0
    while (lease := second.ask()) is not None and lease.steps:
        number += 1
        used += range(lease.first, lease.first + lease.steps)
        second.push(steps=lease.steps, data=[(lease.first, lease.first + lease.steps)])
    assert sorted(used) == sorted(set(range(40)) - {i for start, stop in spans[:2] for i in range(start, stop)})
    star.check()


def test_no_data_is_left_is_not_said_while_another_member_may_return_its_data() -> None:
    star, first, second = pair(dataclasses.replace(SHARED, steps_per_epoch=8))
    held = first.ask()
    first.cut()
    while (lease := second.ask()) is not None:
        second.push(steps=lease.steps, data=[(lease.first, lease.first + lease.steps)])
    number = second.node._workers[0].request
    star.post(star.node.lose(first.index))
    star.pump()
    assert second.lease(0, number).first == held.first


def test_members_that_wait_for_each_others_data_are_told_the_end() -> None:
    _, first, second = pair(dataclasses.replace(SHARED, steps_per_epoch=8))
    ends = []
    for _ in range(12):
        for job in (first, second):
            if job not in ends and (grant := job.ask()) is not None and not grant.steps:
                ends.append(job)
    assert ends, "nobody waits for ever, though both hold data that is not reported"


def test_the_same_process_returns_after_it_was_lost_and_repeats_its_reports() -> None:
    star, first, _ = pair()
    for _ in range(3):
        first.push()
    star.post(star.node.lose(first.index))
    assert star.node.budget.total == 8
    first.node.disconnected()
    first.connect()
    assert star.node.budget.total == 12
    first.push()
    assert star.node.server.steps == 16
    star.check()


def test_data_that_others_got_meanwhile_is_dropped_by_the_one_that_returns() -> None:
    star, first, second = pair(dataclasses.replace(SHARED, steps_per_epoch=12))
    first.ask()
    stock = [(lease.first, lease.first + lease.steps) for lease in first.node._stock]
    assert stock
    star.post(star.node.lose(first.index))
    first.is_connected = False
    first.node.disconnected()
    for _ in range(4):
        second.ask()
    first.connect()
    ours, theirs = (star.node._members[job.index].open for job in (first, second))
    assert ours.common(theirs).steps == 0
    assert not list(first.node._stock)


def test_a_new_process_of_a_region_replaces_the_old_one_which_is_refused() -> None:
    star, first, _ = pair()
    first.push()
    old = first
    again = star.job("eu")
    assert star.node.budget.total == 0
    again.push()
    star.jobs["eu"] = old
    old.connect()
    assert "Another process" in old.refusal.reason
    assert star.node.budget.total == 4


def test_an_expelled_process_is_refused_and_a_new_one_of_its_region_is_not() -> None:
    star, first, _ = pair()
    first.push()
    star.post(star.node.expel(first.index, "it sent nonsense"))
    assert first.refusal == Refusal("it sent nonsense")
    assert star.node.budget.total == 0
    first.refusal = None
    first.connect()
    assert first.refusal == Refusal("it sent nonsense")
    assert star.job("eu").refusal is None


# ---------------------------------------------------------------------- the global server


def test_a_server_restarted_from_an_older_snapshot_gets_what_it_has_not_once() -> None:
    star, first, second = pair()
    star.saves = False
    first.push()
    first.push()
    star.save()
    for _ in range(3):
        first.push()
        second.push()
    total = star.node.budget.total
    star.restart()
    assert star.node.budget.total == 8
    first.push()  # while it is away
    first.connect()
    second.connect()
    star.check()
    assert star.node.budget.total == total + 4
    first.push(final=True, stop=True)
    second.push(final=True)
    assert star.node.budget.total == star.node.server.steps == total + 12
    assert star.node.state is GlobalState.FINISHED


def train(job: Job, rounds: int) -> None:
    for _ in range(rounds):
        grant = None if job.joining.description.data is None else job.ask()
        job.push(data=[] if grant is None else [(grant.first, grant.first + grant.steps)])


def another_run(state: str, region: str, description: RunDescription) -> Star:
    """Another run of the same description, with a region."""
    star = Star(min_regions=2 if state == "founding" else 1, run="another run")
    job = star.job(region, description=description)
    if state != "founding":
        train(job, 3)
    if state == "restored":
        star.restart()
    return star


@pytest.mark.parametrize("description", [DESCRIPTION, SHARED], ids=["own data", "shared data"])
@pytest.mark.parametrize("region", ["eu", "asia"], ids=["a region of this name", "no region of this name"])
@pytest.mark.parametrize("state", ["founding", "live", "restored"])
def test_a_job_of_another_run_is_refused_and_goes_on_when_the_server_has_the_right_directory(
    state: str, region: str, description: RunDescription
) -> None:
    star, first, second = pair(description)
    train(first, 2)
    train(second, 1)
    disk, total = star.disk, star.node.budget.total
    star.top = other = another_run(state, region, description).top
    other.index_of("eu")  # which a connection makes known
    star.saves = False
    before = copy.deepcopy((other.state_dict(), other.status()))
    first.is_connected = False
    first.node.disconnected()
    for _ in range(2):  # it asks again
        first.connect()
        assert first.refusal.reason.startswith("The global server serves another run than the one that this job")
        assert "Start the server with the --directory of this job's run" in first.refusal.reason
        assert not first.refusal.for_good
    assert repr(before) == repr((other.state_dict(), other.status()))
    first.push(steps=4)  # it trains on meanwhile
    star.restart(disk)
    first.connect()
    second.connect()
    star.check()
    assert star.node.budget.total == total + 4


@pytest.mark.parametrize("state", ["founding", "live", "restored"])
def test_a_job_of_which_no_snapshot_has_anything_joins_no_other_run(state: str) -> None:
    star, first, _ = pair()
    star.saves = False
    first.push()
    star.top = another_run(state, "eu", DESCRIPTION).top
    first.is_connected = False
    first.connect()
    assert "another run" in first.refusal.reason
    assert not first.refusal.for_good


@pytest.mark.parametrize("state", ["founding", "live", "restored"])
def test_a_job_that_is_started_anew_joins_the_run_that_the_server_has(state: str) -> None:
    again = another_run(state, "asia", DESCRIPTION).job("eu")
    assert again.refusal is None
    again.push()
    again.cut()
    again.connect()
    assert again.refusal is None, "it is a job of that run"


def test_an_older_snapshot_that_does_not_know_a_region_takes_it_in() -> None:
    star = Star()
    first = star.job("eu")
    old = copy.deepcopy(star.disk)
    second = star.job("us")
    for job in (first, second, second):
        job.push()
    star.restart(old)
    for job in (first, second):
        job.connect()
        assert job.refusal is None
        job.push()
    star.check()


def test_a_snapshot_is_plain_values_and_survives_the_disk() -> None:
    star, first, _ = pair(SHARED)
    first.ask()
    first.push()
    first.post(first.node.publish([(0, 1.5)], {"val_loss": 1.5}, "callbacks"))
    star.pump()
    file = io.BytesIO()
    torch.save(star.disk, file)
    file.seek(0)
    star.restart(torch.load(file, weights_only=True))
    first.connect()
    assert star.node.status()["members"]["eu"]["state"] == "active"
    assert star.node.description == SHARED
    assert star.node._deciding.callbacks == "callbacks"


def test_after_a_restart_data_is_leased_when_all_members_have_returned_or_are_lost() -> None:
    star, first, second = pair(SHARED)
    star.saves = False
    star.save()
    lease = second.ask()
    star.restart()
    first.connect()
    assert first.ask() is not None, "its stock"
    assert first.ask() is None
    second.connect()
    grant = first.lease(0, 2)
    assert grant.steps
    held = Spans([(lease.first, lease.first + lease.steps)])
    assert held.common([(grant.first, grant.first + grant.steps)]).steps == 0


def test_a_member_gets_data_when_a_snapshot_on_disk_has_it() -> None:
    star, *_ = pair(SHARED)
    star.saves = False
    late = star.job("asia", description=SHARED)
    assert star.node.wants_snapshot
    assert late.ask() is None
    star.save()
    assert late.lease(0, 1).steps
    assert not star.node.wants_snapshot


def test_updates_in_no_snapshot_are_kept_and_when_there_are_too_many_no_more_are_sent() -> None:
    star, first, _ = pair()
    star.saves = False
    for _ in range(4 * MOST_KEPT):
        first.push()
    assert len(first.node._kept) == MOST_KEPT
    star.save()
    assert not first.node._kept
    first.push()
    assert star.node.server.version == MOST_KEPT + 1
    star.check()


def test_if_only_an_older_snapshot_is_readable_what_nobody_has_any_more_is_done_again() -> None:
    star, first, second = pair()
    star.saves = False
    star.save()
    older = star.disk
    first.push()
    first.push()
    star.save()
    first.push()
    star.restart(older)
    first.connect()
    second.connect()
    assert (star.node.budget.total, star.node.server.steps) == (4, 0), "8 steps were in the damaged snapshot only"
    first.push()
    assert star.node.server.steps == 8
    star.check()


def test_publications_are_repeated_for_a_server_that_has_lost_them() -> None:
    star, first, second = pair()
    star.saves = False
    star.save()
    first.post(first.node.publish([(0, 1.5)], {"val_loss": 1.5}, "first"))
    star.pump()
    star.restart()
    second.connect()
    first.connect()
    assert star.node._plateau_steps == [(0, 1.5)]
    assert star.node._deciding.callbacks == "first"
    assert second.node._plateau_steps == [(0, 1.5)]


# ---------------------------------------------------------------------- who decides


def test_the_decider_moves_on_when_it_leaves_with_its_callbacks_and_not_when_it_is_cut_off() -> None:
    star, first, second = pair()
    assert (first.node.decides, second.node.decides) == (True, False)
    first.post(first.node.publish([], {}, "state"))
    star.pump()
    first.cut()
    assert not second.node.decides
    first.connect()
    assert first.node.decides
    received: list[Message] = []
    receive = second.receive
    second.receive = lambda message: (received.append(message), receive(message))  # type: ignore[assignment]
    first.push(leave=True, final=True)
    assert second.node.decides
    assert Decide("state") in received


def test_the_preferred_member_decides_as_soon_as_it_is_there() -> None:
    star, first, second = pair(decider="asia")
    first.post(first.node.publish([], {}, "state"))
    star.pump()
    third = star.job("asia")
    assert third.joining.welcome.callbacks == "state"
    assert [job.node.decides for job in (first, second, third)] == [False, False, True]
    first.post(first.node.publish([(0, 9.0)], {}, "too late"))
    star.pump()
    assert star.node._plateau_steps == [], "it has not heard yet"
    third.die()
    assert first.node.decides


def test_only_a_member_that_decides_may_stop_the_run() -> None:
    star, _, second = pair()
    second.push(stop=True)
    assert star.node.state is GlobalState.RUNNING
    index = second.index
    report = star.node._members[index].report
    star.node.handle(index, Progress(index, report + 1, 0, 1, 1.0, 0.0, 1.0, stop=True, update=1))
    assert star.node.state is GlobalState.RUNNING


# ---------------------------------------------------------------------- the end


def test_the_end_waits_for_a_member_that_is_cut_off_and_goes_on_if_it_is_lost() -> None:
    star, first, second = pair(LIMITED)
    for _ in range(2):
        second.push()
    second.push()  # 12 steps, the last 4 in no update
    first.push()
    first.push()  # 20: the budget is used up
    assert star.node.state is GlobalState.STOPPING
    second.cut()
    assert star.node.state is GlobalState.STOPPING
    star.post(star.node.lose(second.index))
    assert star.node.state is GlobalState.RUNNING
    assert not first.push(steps=2).stop
    first.push(steps=2, final=True)
    assert star.node.state is GlobalState.FINISHED
    assert star.node.budget.total == star.node.server.steps == 20
    star.check()


def test_if_all_others_have_finished_a_new_process_does_what_is_left() -> None:
    star, first, second = pair(LIMITED)
    second.push()
    for _ in range(3):
        first.push()
    first.push(final=True)
    second.die()
    assert (star.node.state, star.node.budget.total) == (GlobalState.RUNNING, 16)
    again = star.job("us", description=LIMITED)
    again.push()
    again.push(steps=0, final=True)
    assert star.node.state is GlobalState.FINISHED
    assert first.final().position == 10
    assert star.node.server.steps == 20


def test_the_operator_ends_a_run_that_nobody_works_on() -> None:
    star, first, second = pair(LIMITED)
    first.push()
    first.push()
    for job in (first, second):
        job.die()
    assert star.node.state is GlobalState.RUNNING
    star.node.end()
    assert star.node.state is GlobalState.FINISHED


@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted server"])
def test_late_returners_and_new_processes_get_the_final_model_at_once(restart: bool) -> None:
    star, first, second = pair()
    second.push()
    second.is_connected = False
    star.post(star.node.lose(second.index))
    first.push(stop=True, final=True)
    assert star.node.state is GlobalState.FINISHED
    if restart:
        star.restart()
    second.node.disconnected()
    second.connect()
    assert second.push().stop
    second.push(final=True)
    assert second.final().vector.tolist() == star.node.model.tolist()
    assert star.node.budget.total == star.node.server.steps == 4
    new = star.job("asia")
    assert new.joining.final is not None


# ---------------------------------------------------------------------- numbers of members


def test_default_rates_and_the_weight_of_buffers_follow_the_members_that_are_present() -> None:
    description = dataclasses.replace(DESCRIPTION, global_optimizer=None)
    star, first, second = pair(description)
    group = star.node.server._optimizer.param_groups[0]
    assert (group["lr"], group["delay"], star.node.server.senders) == (0.3, 1, 2)
    others = [star.job(name, description=description) for name in ("asia", "africa")]
    assert (group["lr"], group["delay"], star.node.server.senders) == (0.15, 2, 4)
    first.cut()
    assert star.node.server.senders == 4, "it is expected back"
    others[0].push(leave=True, final=True)
    second.die()
    assert (group["lr"], group["delay"], star.node.server.senders) == (0.3, 1, 2)


def test_rates_that_were_given_stay() -> None:
    star, *_ = pair()
    star.job("asia")
    assert star.node.server._optimizer.param_groups[0]["lr"] == 1.0


# ---------------------------------------------------------------------- messages that no member may send


def report(index: int = 0, number: int = 1, **fields: Any) -> Progress:
    return Progress(**{**vars(Progress(index, number, 0, 1, 1.0, 0.0, 1.0, update=1)), **fields})


BAD: dict[str, Callable[[], Message]] = {
    "a report in another's name": lambda: report(index=1),
    "a report that skips one": lambda: report(number=2),
    "a report of a worker that it has not": lambda: report(worker=1),
    "more steps than a round has": lambda: report(steps=4 * 2**16 + 1),
    "negative steps": lambda: report(steps=-1),
    "no time at all": lambda: report(seconds=float("nan")),
    "infinitely fast": lambda: report(fastest=float("inf")),
    "data that was not leased to it": lambda: report(data=[(30, 31)]),
    "data backwards": lambda: report(data=[(3, 2)]),
    "a report of an update that has arrived": lambda: report(update=0),
    "an update in another's name": lambda: RegionUpdate(1, 0, 0, vector=torch.ones(2), number=1),
    "an update that skips one": lambda: RegionUpdate(0, 0, 0, vector=torch.ones(2), number=2),
    "an update without a vector": lambda: RegionUpdate(0, 0, 0, number=1),
    "an update of another shape": lambda: RegionUpdate(0, 0, 0, vector=torch.ones(3), number=1),
    "an update of another dtype": lambda: RegionUpdate(0, 0, 0, vector=torch.ones(2).double(), number=1),
    "steps that were not reported": lambda: RegionUpdate(0, 0, 8, vector=torch.ones(2), number=1),
    "a publication that skips one": lambda: Publish(2),
    "too many steps of plateau schedulers": lambda: Publish(1, [(0, 1.0)] * 1001),
    "too many metrics": lambda: Publish(1, metrics={str(number): 1.0 for number in range(2**16 + 1)}),
    "a name of a metric that is too long": lambda: Publish(1, metrics={"x" * (2**22 + 1): 1.0}),
    "a report with too many ranges of data": lambda: report(data=[(0, 1)] * (2**14 + 1)),
    "too many ranges of data at once": lambda: Join("eu 1", 1, SHARED, [(0, 1)] * (2**16 + 1), run="a run"),
    "a welcome": lambda: Decide(""),
    "a final model": lambda: GlobalModel(1, True, vector=torch.ones(2)),
    "data for a new process": lambda: Join("x", 1, SHARED, [(0, 2**62)]),
    "data for a new process of a member": lambda: Join("x", 1, SHARED, [(0, 1)], run="a run"),
    "data that it never had": lambda: Join("eu 1", 1, SHARED, [(30, 31)], run="a run"),
    "another number of workers": lambda: Join("eu 1", 2, SHARED),
    "a million workers": lambda: Join("x", 10**6, SHARED),
    "no workers": lambda: Enrol("x", 0),
}


def refusal_of(node: OpenGlobalNode, index: int, message: Message) -> str:
    """The error or the refusal that a message gets."""
    try:
        (send,) = node.handle(index, message)
    except ProtocolError as error:
        return str(error)
    assert isinstance(send.message, Refusal)
    return send.message.reason


@pytest.mark.parametrize("what", BAD)
def test_a_bad_message_is_refused_before_anything_changes(what: str) -> None:
    star, first, _ = pair(SHARED)
    first.ask()
    before = copy.deepcopy((star.node.state_dict(), star.node.status()))
    answer = refusal_of(star.node, first.index, BAD[what]())
    assert "'eu'" in answer or "has no record" in answer or "fit the run" in answer
    assert "tensor" not in answer
    assert len(answer) < 400
    assert repr(before) == repr((star.node.state_dict(), star.node.status()))


def test_a_limit_that_a_member_exceeds_is_named() -> None:
    star, first, _ = pair(SHARED)
    assert refusal_of(star.node, first.index, report(steps=4 * 2**16 + 1)) == (
        "Region 'eu' has 262,145 local steps in a round. A run of several jobs allows 262,144."
    )


def test_many_metrics_and_many_steps_per_batch_are_usual() -> None:
    star, first, _ = pair(SHARED)
    metrics = {f"precision of class {number}, {'x' * 60}": 0.5 for number in range(20_000)}
    first.post(first.node.publish([], metrics, ""))
    star.pump()
    assert star.job("asia", description=SHARED).joining.welcome.status.metrics == metrics
    star.node.handle(first.index, report(steps=4 * 70))


def test_a_stranger_is_no_member() -> None:
    star, *_ = pair()
    with pytest.raises(ProtocolError):
        star.node.handle(9, ModelRequest(1))
    index = star.node.index_of("asia")
    with pytest.raises(ProtocolError, match="has not joined"):
        star.node.handle(index, ModelRequest(1))


def test_a_huge_order_of_data_gets_no_more_than_a_member_can_use() -> None:
    star, first, _ = pair(dataclasses.replace(SHARED, steps_per_epoch=10**6, epochs=None))
    (grant,) = of_kind(star.node.handle(first.index, LeaseRequest(10**9, 9)), LeaseGrant)
    assert grant.steps == 65 * 4


def test_a_member_that_orders_data_and_reports_none_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "_MOST_OPEN", 16)
    star, first, _ = pair(dataclasses.replace(SHARED, steps_per_epoch=10**6, epochs=None))
    for number in range(9, 25):
        (grant,) = of_kind(star.node.handle(first.index, LeaseRequest(10**9, number)), LeaseGrant)
        assert grant.steps == 65 * 4
    with pytest.raises(ProtocolError, match="'eu' asks for more data, and has not reported the 4164 local steps"):
        star.node.handle(first.index, LeaseRequest(10**9, 25))
    star.node.handle(first.index, report(data=[(8, 9), (9, 300)]))
    assert of_kind(star.node.handle(first.index, LeaseRequest(4, 99)), LeaseGrant), "it has reported"


def test_the_steps_of_plateau_schedulers_have_a_limit_in_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_global_node, "_MOST_PLATEAU_STEPS", 3)
    star, first, _ = pair(LIMITED)
    for value in range(3):
        first.post(first.node.publish([(0, value), (1, value)], {"val_loss": value}, ""))
        star.pump()
    late = star.job("asia", description=LIMITED)
    assert late.joining.welcome.status.plateau_steps == [(0, 0), (1, 0), (0, 1)]
    assert late.joining.welcome.status.metrics == {"val_loss": 2}, "the publication counts"
    assert caplog.text.count("Later ones are ignored") == 1


def test_a_rejected_update_is_its_regions_by_name(caplog: pytest.LogCaptureFixture) -> None:
    star, first, _ = pair()
    bad = RegionUpdate(first.index, 0, 0, vector=torch.full((2,), float("nan")), number=1)
    star.node.handle(first.index, bad)
    assert "The update of region 'eu' was rejected" in caplog.text


def test_messages_of_a_member_that_is_lost_change_nothing() -> None:
    star, first, _ = pair()
    star.node.lose(first.index)
    assert star.node.handle(first.index, report()) == []
    assert star.node.budget.total == 0


def test_the_model_is_copied_for_whoever_asks() -> None:
    star, first, _ = pair()
    (reply,) = of_kind(star.node.handle(first.index, ModelRequest(3)), ModelCopy)
    assert (reply.number, reply.vector.tolist()) == (3, [0, 0])
    assert reply.vector.data_ptr() != star.node.model.data_ptr()


# ---------------------------------------------------------------------- arithmetic


def test_spans_can_be_removed_and_compared() -> None:
    spans = Spans([(0, 10), (20, 30)])
    assert list(spans.without([(5, 25)])) == [(0, 5), (25, 30)]
    assert list(spans.common([(8, 22), (29, 40)])) == [(8, 10), (20, 22), (29, 30)]
    spans.remove([(0, 3), (3, 10), (19, 40)])
    assert list(spans) == []
    assert spans.steps == 0


def test_a_stock_drops_what_others_have() -> None:
    stock = LeaseStock(8)
    node = OpenGlobalNode("a run", torch.zeros(2), SHARED, 1)
    stock.add(node._leasing.cursor.take(8))
    stock.drop([(2, 4), (7, 40)], 40)
    assert [(lease.first, lease.steps) for lease in stock] == [(0, 2), (4, 3)]


def test_a_teacher_is_moved_by_the_differences_of_the_regions() -> None:
    described = dataclasses.replace(DESCRIPTION, shapes=[[1]], buffers=[("ema", [1])], teachers=1)
    star, first, second = pair(described)
    for job, moved in ((first, -4.0), (second, -2.0)):
        update = RegionUpdate(job.index, 0, 0, vector=torch.tensor([0.0, moved]), number=1)
        star.node.handle(job.index, update)
    assert star.node.server.model.tolist() == [0.0, 3.0]


def test_teachers_are_among_what_is_averaged() -> None:
    with pytest.raises(ValueError, match="2 elements of teachers: must be from 0 to the 1 of the buffers"):
        check_description(dataclasses.replace(DESCRIPTION, buffers=[("ema", [1])], teachers=2))
