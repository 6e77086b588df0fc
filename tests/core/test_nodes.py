"""The nodes, message by message; their transition tables, walked through completely."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_halos.core.cursor import DataCursor, LeaseStock
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import (
    GlobalModel,
    LeaseGrant,
    LeaseRequest,
    Marker,
    MarkerReply,
    Message,
    Progress,
    Pull,
    Push,
    RegionModel,
    RegionUpdate,
    Status,
)
from lightning_halos.core.protocol import (
    GLOBAL,
    GLOBAL_TRANSITIONS,
    REGION_TRANSITIONS,
    STORAGE,
    GlobalEvent,
    GlobalState,
    ProtocolError,
    RegionEvent,
    RegionState,
    Send,
)
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.snapshot import Shard
from lightning_halos.core.worker import WorkerRound
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.hosts import RegionHost
from lightning_halos.transport.link import LoopbackLink

SGD = partial(torch.optim.SGD, lr=1.0)


def region(k: int | None = 2, workers: int = 2, max_steps: int | None = None, total: int = 0) -> RegionNode:
    """A local server with workers 0, 1, ... of a run of two such servers, or alone if k is None."""
    everybody = workers if k is None else 2 * workers
    return RegionNode(
        LocalServer(0, torch.zeros(2), SGD, k, 0.5, workers=workers),
        RoundPlanner(8, False, everybody, max_steps),
        range(workers),
        StepBudget(everybody, max_steps, total),
        LeaseStock(8),
    )


def center(servers: int = 2, max_steps: int | None = None, total: int = 0) -> GlobalNode:
    server = GlobalServer(torch.zeros(2), SGD, servers=servers) if servers > 1 else None
    return GlobalNode(server, servers, StepBudget(2, max_steps, total), DataCursor(10, 2))


def push(
    worker: int, number: int, *, final: bool = False, steps: int = 8, stop: bool = False, empty: bool = False
) -> Push:
    vector, steps = (None, 0) if empty else (torch.ones(2), steps)
    return Push(worker, 0, steps, steps, 1.0, stop=stop, final=final, vector=vector, number=number)


def update(server: int, number: int, *, final: bool = False, stop: bool = False) -> RegionUpdate:
    return RegionUpdate(server, 0, 16, final, stop, torch.ones(2), number)


def progress(server: int, number: int, *, steps: int = 8, stop: bool = False) -> Progress:
    return Progress(server, number, 2 * server, steps, 1.0, 0.0, 8.0, staleness=0, updates=number, stop=stop)


def messages(sends: list[Send]) -> list[Message | Shard]:
    """The messages of a node, with their vectors computed."""
    return [send.complete() for send in sends]


def receivers(sends: list[Send], kind: type) -> list[int]:
    return [send.to for send in sends if isinstance(send.message, kind)]


def only(sends: list[Send], kind: type) -> Message | Shard:
    (found,) = [message for message in messages(sends) if isinstance(message, kind)]
    return found


# ---------------------------------------------------------------------- the tables, completely


def region_in(state: RegionState) -> RegionNode:
    node = region()
    if state is RegionState.EXCHANGING:
        messages(node.handle(0, push(0, 1)))
        messages(node.handle(1, push(1, 1)))
    if state in (RegionState.FLUSHED, RegionState.FINISHED):
        messages(node.handle(0, push(0, 1, final=True)))
        messages(node.handle(1, push(1, 1, final=True)))
    if state is RegionState.FINISHED:
        node.handle(GLOBAL, GlobalModel(3, True, vector=torch.zeros(2), number=1))
    assert node.state is state
    return node


def happen_in_region(node: RegionNode, event: RegionEvent) -> None:
    """Lets something happen to a node, with new numbers: nothing is a repetition."""
    exchanging = node.state is RegionState.EXCHANGING
    served = 2 if exchanging or node.state in (RegionState.FLUSHED, RegionState.FINISHED) else 1
    if event is RegionEvent.PUSH:
        messages(node.handle(0, push(0, served, empty=True)))
    elif event is RegionEvent.UPDATE:
        messages(node.handle(0, push(0, served)))
        messages(node.handle(0, push(0, served + 1)))
    elif event is RegionEvent.LAST_PUSH:
        messages(node.handle(0, push(0, served, final=True)))
        messages(node.handle(1, push(1, served, final=True)))
    elif event is RegionEvent.ANSWER:
        number = node.server.number + (node.state is RegionState.SERVING)
        node.handle(GLOBAL, GlobalModel(1, vector=torch.zeros(2), number=number))
    elif event is RegionEvent.FINAL_MODEL:
        node.handle(GLOBAL, GlobalModel(1, True, vector=torch.zeros(2), number=node.server.number))
    elif event is RegionEvent.STATUS:
        node.handle(GLOBAL, Status(8, 1.0, False))
    elif event is RegionEvent.LEASE_REQUEST:
        node.handle(0, LeaseRequest(number=1))
    elif event is RegionEvent.LEASE_GRANT:
        node.handle(GLOBAL, LeaseGrant(0, 0, 8, 1))
    else:
        node.handle(GLOBAL, Marker("a", "folder"))


@pytest.mark.parametrize("event", RegionEvent, ids=lambda event: event.name)
@pytest.mark.parametrize("state", RegionState, ids=lambda state: state.name)
def test_a_region_moves_as_its_table_says_and_refuses_everything_else(state: RegionState, event: RegionEvent) -> None:
    node = region_in(state)
    node.start()
    if event is RegionEvent.ANSWER and state is RegionState.FLUSHED:
        node = region()  # the answer to an update that was sent before the last one
        for number in (1, 2):
            messages(node.handle(0, push(0, number)))
        messages(node.handle(0, push(0, 3, final=True)))
        messages(node.handle(1, push(1, 1, final=True)))
        node.handle(GLOBAL, GlobalModel(1, vector=torch.zeros(2), number=1))
        assert node.server.merges == 0
        assert node.state is RegionState.FLUSHED
    elif event is RegionEvent.UPDATE and state is RegionState.EXCHANGING:
        happen_in_region(node, event)  # one exchange at a time: pushes go on
        assert node.state is RegionState.EXCHANGING
        assert node.server.number == 1
    elif event in REGION_TRANSITIONS[state]:
        happen_in_region(node, event)
        assert node.state is REGION_TRANSITIONS[state][event]
    elif event is RegionEvent.FINAL_MODEL and state is RegionState.FINISHED:
        happen_in_region(node, event)  # repeated
        assert node.state is RegionState.FINISHED
    else:
        with pytest.raises(ProtocolError):
            happen_in_region(node, event)
        assert node.state is state


def center_in(state: GlobalState) -> GlobalNode:
    node = center(max_steps=100)
    if state is GlobalState.STOPPING:
        node.handle(0, progress(0, 1, stop=True))
    if state is GlobalState.FINISHED:
        node.handle(0, update(0, 1, final=True))
        node.handle(1, update(1, 1, final=True))
    assert node.state is state
    return node


def happen_in_center(node: GlobalNode, event: GlobalEvent) -> None:
    report = 1 + (node.state is GlobalState.STOPPING)
    sent = 1 + (node.state is GlobalState.FINISHED)
    if event is GlobalEvent.UPDATE:
        node.handle(0, update(0, sent))
    elif event is GlobalEvent.LAST_UPDATE:
        node.handle(0, update(0, sent, final=True))
    elif event is GlobalEvent.ALL_UPDATES:
        node.handle(0, update(0, sent, final=True))
        node.handle(1, update(1, sent, final=True))
    elif event is GlobalEvent.PROGRESS:
        node.handle(0, progress(0, report))
    elif event is GlobalEvent.STOP:
        node.handle(0, progress(0, report, stop=True))
    elif event is GlobalEvent.LEASE_REQUEST:
        node.handle(0, LeaseRequest(4, 1))
    elif event is GlobalEvent.MARKER_REPLY:
        node.handle(0, MarkerReply("a", 0, 0))
    elif event is GlobalEvent.PUBLISH:
        node.publish([], {})
    else:
        node.start_snapshot(Marker("a", "folder"))


@pytest.mark.parametrize("event", GlobalEvent, ids=lambda event: event.name)
@pytest.mark.parametrize("state", GlobalState, ids=lambda state: state.name)
def test_the_global_node_moves_as_its_table_says_and_refuses_everything_else(
    state: GlobalState, event: GlobalEvent
) -> None:
    node = center_in(state)
    if event is GlobalEvent.STOP and state is not GlobalState.RUNNING:
        happen_in_center(node, event)  # told already: a report like any other
        assert node.state is state
    elif event in GLOBAL_TRANSITIONS[state]:
        happen_in_center(node, event)
        assert node.state is GLOBAL_TRANSITIONS[state][event]
    else:
        with pytest.raises(ProtocolError):
            happen_in_center(node, event)
        assert node.state is state


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (GLOBAL, push(0, 1)),
        (0, push(1, 1)),
        (7, push(7, 1)),
        (0, Status(0, 0.0, False)),
        (0, Marker("a", "folder")),
        (GLOBAL, LeaseRequest(8, 1)),
    ],
    ids=["push from above", "in another's name", "of a stranger", "status", "marker", "request from above"],
)
def test_a_region_refuses_what_its_sender_must_not_send(sender: int, message: Message) -> None:
    with pytest.raises(ProtocolError):
        region().handle(sender, message)


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        (1, update(0, 1)),
        (5, update(5, 1)),
        (1, progress(0, 1)),
        (0, push(0, 1)),
        (0, RegionModel(0, 8, vector=torch.ones(2))),
        (0, RegionUpdate(0, 0, 8)),
    ],
    ids=["in another's name", "of a stranger", "another's progress", "push", "a model beside others", "no vector"],
)
def test_the_global_node_refuses_what_its_sender_must_not_send(sender: int, message: Message) -> None:
    with pytest.raises(ProtocolError):
        center().handle(sender, message)


# ---------------------------------------------------------------------- the budget and the stop


def test_a_region_counts_the_steps_of_its_workers_at_once() -> None:
    node = region(workers=1, max_steps=10)
    pull = only(node.handle(0, push(0, 1)), Pull)
    assert (pull.position, pull.stop) == (4, False)
    assert pull.local_steps == 6, "towards the end rounds get shorter"
    assert only(node.handle(0, push(0, 2, steps=12)), Pull).stop


def test_steps_of_others_come_with_the_status_and_own_steps_are_not_counted_twice() -> None:
    node = region(workers=1, max_steps=10)
    node.handle(0, push(0, 1))
    node.handle(GLOBAL, Status(total=4, fastest=1.0, stop=False, counted=0))
    assert only(node.handle(0, push(0, 2, empty=True)), Pull).position == 6
    node.handle(GLOBAL, Status(total=12, fastest=1.0, stop=False, counted=8))
    assert only(node.handle(0, push(0, 3, empty=True)), Pull).position == 6
    assert only(node.handle(0, push(0, 4)), Pull).stop


def test_an_older_status_undoes_neither_the_stop_nor_the_steps() -> None:
    node = region(workers=1, max_steps=10)
    node.handle(GLOBAL, Status(total=4, fastest=1.0, stop=True))
    node.handle(GLOBAL, Status(total=2, fastest=1.0, stop=False))
    pull = only(node.handle(0, push(0, 1, empty=True)), Pull)
    assert pull.stop
    assert pull.position == 2


def test_a_repeated_push_is_answered_with_stop_once_the_steps_of_others_use_up_the_budget() -> None:
    node = region(workers=1, max_steps=10)
    assert not only(node.handle(0, push(0, 1)), Pull).stop
    node.handle(GLOBAL, Status(total=12, fastest=1.0, stop=False, counted=0))  # 20 steps, as the global node will see
    assert only(node.handle(0, push(0, 1)), Pull).stop


def test_a_workers_wish_to_stop_holds_in_its_region_at_once_and_reaches_the_other() -> None:
    node, above = region(workers=1), center()
    sends = node.handle(0, push(0, 1, stop=True))
    assert only(sends, Pull).stop
    told = above.handle(0, only(sends, Progress))
    assert receivers(told, Status) == [0, 1]
    assert all(message.stop for message in messages(told))


def test_a_server_that_has_flushed_hears_that_the_others_go_on() -> None:
    node = center()
    assert receivers(node.handle(0, progress(0, 1)), Status) == [0], "the other hears when it has something to say"
    node.handle(1, update(1, 1, final=True))
    assert receivers(node.handle(0, progress(0, 2)), Status) == [0, 1]


def test_workers_that_have_finished_get_every_status_until_the_final_model() -> None:
    node = region()
    node.handle(0, push(0, 1, final=True))
    assert receivers(node.handle(GLOBAL, Status(8, 1.0, False)), Status) == [0]
    node.handle(1, push(1, 1, final=True))
    assert receivers(node.handle(GLOBAL, GlobalModel(1, True, vector=torch.zeros(2), number=1)), GlobalModel) == [0, 1]
    assert node.handle(GLOBAL, Status(8, 1.0, False)) == []


def test_the_final_model_goes_to_all_servers_when_the_last_has_flushed() -> None:
    node = center(max_steps=100)
    assert receivers(node.handle(0, update(0, 1)), GlobalModel) == [0]
    assert node.handle(0, update(0, 2, final=True)) == []
    sends = node.handle(1, update(1, 1, final=True, stop=True))
    assert receivers(sends, GlobalModel) == [0, 1]
    final = sends[0].message
    assert (final.final, final.stopped, final.position) == (True, True, 24)
    assert final.vector.tolist() == [-3, -3]


def test_the_only_server_gives_its_model_away_at_the_end() -> None:
    node, above = region(k=None), center(servers=1)
    for number in range(1, 5):
        sends = node.handle(0, push(0, number))
        assert [send.to for send in sends] == [0, GLOBAL]
        messages(sends)
    node.handle(0, push(0, 5, final=True, empty=True))
    model = only(node.handle(1, push(1, 1, final=True)), RegionModel)
    (final,) = messages(above.handle(0, model))
    assert final.final
    assert final.vector.tolist() == [-5, -5]
    assert final.position == 20
    assert above.applied == 40


# ---------------------------------------------------------------------- repeated messages


def test_a_repeated_push_is_answered_again_and_counted_once() -> None:
    node = region(k=100)
    messages(node.handle(0, push(0, 1)))
    (again,) = messages(node.handle(0, push(0, 1)))
    assert again.number == 1
    assert again.vector.tolist() == [-1, -1]
    assert (node.server.version, node.budget.total) == (1, 8)


def test_pushes_without_a_number_are_all_new() -> None:
    node = region(k=100)
    for _ in range(3):
        messages(node.handle(0, push(0, 0)))
    assert node.server.version == 3


def test_a_repeated_answer_is_not_merged_again() -> None:
    node = region(k=1)
    for number in (1, 2):
        messages(node.handle(0, push(0, number)))
        node.handle(GLOBAL, GlobalModel(1, vector=torch.zeros(2), number=1))
    assert node.server.merges == 1
    assert node.state is RegionState.EXCHANGING


def test_a_repeated_report_is_answered_again_and_counted_once() -> None:
    node = center()
    node.handle(0, progress(0, 1))
    (status,) = messages(node.handle(0, progress(0, 1)))
    assert (status.total, status.counted, node.budget.total) == (8, 8, 8)


def test_a_repeated_request_for_data_gets_the_same_data() -> None:
    node = center()
    first, again, second = (only(node.handle(0, LeaseRequest(4, number)), LeaseGrant) for number in (1, 1, 2))
    assert first == again
    assert (first.first, second.first) == (0, 4)


def test_plateau_steps_reach_every_worker_once_even_if_a_pull_is_repeated() -> None:
    node, above = region(k=100), center()
    status = above.publish([(0, 1.5)], {"loss": 1.5})[0].message
    node.handle(GLOBAL, status)
    node.handle(GLOBAL, status)
    first = only(node.handle(0, push(0, 1)), Pull)
    again = only(node.handle(0, push(0, 1)), Pull)
    assert first.plateau_steps == again.plateau_steps == [(0, 1.5)]
    node.handle(GLOBAL, above.publish([(0, 2.5)], {})[0].message)
    assert only(node.handle(0, push(0, 1)), Pull).plateau_steps == [(0, 1.5)], "the worker may have the first answer"
    assert only(node.handle(0, push(0, 2)), Pull).plateau_steps == [(0, 2.5)]
    assert only(node.handle(0, push(0, 3)), Pull).plateau_steps == []
    assert above.publish([(0, 1.0)], {})[0].message.plateau_steps == [(0, 1.0)], "a status holds only what is new"


# ---------------------------------------------------------------------- snapshots


def test_a_snapshot_holds_what_was_on_its_way_and_nothing_that_was_sent_after_it() -> None:
    node = center()
    node.handle(0, update(0, 1))
    markers = node.start_snapshot(Marker("a", "folder"))
    assert receivers(markers, Marker) == [0, 1]
    node.handle(0, progress(0, 1))
    node.handle(1, update(1, 1))  # sent before region 1 took its snapshot
    node.handle(1, MarkerReply("a", 1, updates=1))
    node.handle(1, update(1, 2))  # and this one after it
    node.handle(1, progress(1, 1))
    sends = node.handle(0, MarkerReply("a", 0, updates=1))
    assert receivers(sends, Shard) == [STORAGE]
    shard = sends[0].message
    assert [fields["number"] for fields in shard.state["updates"]] == [1]
    assert shard.state["server"]["model"].tolist() == [-1, -1]
    assert (shard.state["applied"], shard.progress["total"]) == (16, 8)


def test_a_snapshot_waits_for_an_update_that_is_slower_than_the_reply() -> None:
    node = center()
    node.start_snapshot(Marker("a", "folder"))
    node.handle(1, MarkerReply("a", 1, updates=0))
    assert node.handle(0, MarkerReply("a", 0, updates=1)) == []
    sends = node.handle(0, update(0, 1))
    assert receivers(sends, Shard) == [STORAGE]


def test_a_snapshot_copies_no_update_that_was_sent_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    node = center()
    node.start_snapshot(Marker("a", "folder"))
    node.handle(1, MarkerReply("a", 1, updates=0))
    copies: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copies.append(tensor) or tensor)
    for number in (1, 2, 3):
        node.handle(1, update(1, number))  # the other server's marker is on a slow link
    assert copies == []


def test_a_run_goes_on_from_a_snapshot_with_the_updates_that_were_on_their_way() -> None:
    node = center()
    node.start_snapshot(Marker("a", "folder"))
    node.handle(0, update(0, 1))
    node.handle(0, MarkerReply("a", 0, updates=1))
    shard = only(node.handle(1, MarkerReply("a", 1, updates=0)), Shard)
    restarted = center()
    restarted.load_state_dict(shard.state)
    (answer,) = messages(restarted.start())
    assert answer.number == 1
    assert answer.vector.tolist() == [-1, -1]
    assert restarted.applied == 16
    assert restarted.handle(0, update(0, 1))[0].message.number == 1, "that update comes again: it is answered"
    assert restarted.server.version == 1, "and not applied twice"


def test_a_last_update_without_steps_changes_nothing_when_a_run_goes_on_either() -> None:
    node = center()
    node.start_snapshot(Marker("a", "folder"))
    node.handle(0, RegionUpdate(0, 0, 0, True, False, torch.zeros(2), 1))
    node.handle(0, MarkerReply("a", 0, updates=1))
    restarted = center()
    restarted.load_state_dict(only(node.handle(1, MarkerReply("a", 1, updates=0)), Shard).state)
    assert restarted.start() == []
    assert restarted.server.version == 0


def test_a_region_forwards_the_marker_and_gives_its_state_to_storage() -> None:
    node = region()
    for number in (1, 2):
        messages(node.handle(0, push(0, number)))
    sends = node.handle(GLOBAL, Marker("a", "folder"))
    assert receivers(sends, Marker) == [0, 1]
    assert only(sends, MarkerReply).updates == 1
    assert only(sends, Shard).server == 0
    assert node.handle(GLOBAL, Marker("a", "folder")) == [], "a repeated marker is the same snapshot"
    assert only(node.handle(GLOBAL, Marker("b", "folder")), Shard).marker.save == "b"
    assert node.handle(GLOBAL, Marker("a", "folder")) == [], "also after that of another snapshot"


def test_a_snapshot_that_starts_before_another_is_complete_leaves_it_alone() -> None:
    node = center()
    node.start_snapshot(Marker("a", "folder"))
    node.handle(0, update(0, 1))
    node.start_snapshot(Marker("urgent", "folder"))
    node.handle(0, MarkerReply("a", 0, updates=1))
    node.handle(0, MarkerReply("urgent", 0, updates=1))
    first = only(node.handle(1, MarkerReply("a", 1, updates=0)), Shard)
    second = only(node.handle(1, MarkerReply("urgent", 1, updates=0)), Shard)
    assert (first.marker.save, second.marker.save) == ("a", "urgent")
    assert [len(shard.state["updates"]) for shard in (first, second)] == [1, 0]


# ---------------------------------------------------------------------- what a resumed run goes on counting


def test_the_steps_of_the_only_server_are_in_the_global_model_as_soon_as_they_are_reported() -> None:
    node, above = region(k=None), center(servers=1)
    above.handle(0, only(node.handle(0, push(0, 1)), Progress))
    assert above.steps == 8


def test_a_resumed_run_with_one_server_counts_its_own_steps() -> None:
    node, above = region(k=None), center(servers=1)
    above.handle(0, only(node.handle(0, push(0, 1)), Progress))
    sends = node.handle(GLOBAL, only(above.start_snapshot(Marker("a", "folder")), Marker))
    saved = only(above.handle(0, only(sends, MarkerReply)), Shard)
    again, top = region(k=None, total=8), center(servers=1, total=saved.progress["total"])
    again.load_state_dict(only(sends, Shard).state)
    top.load_state_dict(saved.state)
    assert top.steps == 0
    top.handle(0, only(again.handle(0, push(0, 1)), Progress))
    assert top.steps == 8
    again.handle(0, push(0, 2, final=True, empty=True))
    (final, *_) = messages(top.handle(0, only(again.handle(1, push(1, 1, final=True, empty=True)), RegionModel)))
    assert (final.position, top.steps) == (8, 8)


def test_a_resumed_run_counts_none_of_its_steps_before_they_are_applied() -> None:
    node = center()
    node.handle(0, progress(0, 1))  # of which nothing is in the global model yet
    state, total = node.state_dict(), node.budget.total
    resumed = center(total=total)
    resumed.load_state_dict(state)
    assert resumed.steps == 0


def test_workers_of_a_resumed_run_start_from_the_model_of_its_state() -> None:
    node = region(k=100)
    for number in range(1, 6):
        messages(node.handle(0, push(0, number)))
    resumed = region(k=100)
    resumed.load_state_dict(node.state_dict())
    round_ = WorkerRound(0, 8)
    sends = resumed.handle(0, round_.push(torch.ones(2)))
    assert only(sends, Progress).staleness == 0
    assert only(resumed.handle(1, WorkerRound(1, 8).push(torch.ones(2))), Progress).staleness == 1
    round_.receive(only(sends, Pull), waited=0.0)
    assert only(resumed.handle(0, round_.push(torch.ones(2))), Progress).staleness == 1


def test_a_resumed_run_goes_on_counting_bytes() -> None:
    node, resumed = region(), region()
    node.traffic = (30, 10)
    resumed.load_state_dict(node.state_dict())
    host = RegionHost(resumed, Alarm("here"), near=(), store=print)
    for peer in (GLOBAL, 0):
        host.attach(peer, LoopbackLink.pair("a", "b")[0])
    host.handle(2, push(0, 1), None, (4, 2))  # the second link
    assert resumed.traffic == (34, 12)
