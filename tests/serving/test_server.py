"""The server goes on whatever its members do, and gives every one of them the same final model."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_halos.core import open_run
from lightning_halos.core.member_status import status_of
from lightning_halos.core.members import Member, MemberState
from lightning_halos.core.messages import (
    Enrol,
    Enrolled,
    Failure,
    ModelCopy,
    ModelRequest,
    Progress,
    Refusal,
    RegionUpdate,
    StatusReply,
    StatusRequest,
)
from lightning_halos.serving import client, host, snapshots
from lightning_halos.serving import server as server_module
from lightning_halos.serving.final_model import checkpoint_of
from lightning_halos.serving.inquiry import ask_status
from lightning_halos.serving.storage import RunDirectory
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.revocations import Revocations
from tests.serving.conftest import Server, until
from tests.serving.region import DESCRIPTION, ELEMENTS, LIMIT, STEPS, Region

Serve = Callable[..., Server]
Regions = Callable[..., Region]
ROUNDS = 40 // STEPS  # of the complete run, if a global step is one local step
LIVENESS = 4.0  # of servers whose members must not be lost: a busy machine may take a second for a sign of life


class Toy(pl.LightningModule):
    """The module whose parameters and buffer the regions' description names, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layer.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(2))
        self.frozen = nn.Parameter(torch.full((1,), 7.0), requires_grad=False)


def test_a_run_from_its_founding_to_its_final_model(serve: Serve, region: Regions, tmp_path: Path) -> None:
    server = serve(min_regions=2, workers=1)
    us, eu = region("us", server), region("eu", server)
    us.connect()
    us.join()
    until(lambda: "us" in server.status()["members"])
    assert server.status()["run"]["state"] == "waiting"
    eu.connect()
    eu.join()
    us.model = torch.arange(float(ELEMENTS))
    assert [us.settle().needs_model, eu.settle().needs_model] == [False, False]
    for _ in range(ROUNDS // 2):
        us.work()
        us.answer()
        eu.work()
        eu.answer()
    assert server.status()["run"]["global_step"] == 40
    us.flush()
    eu.flush()
    finals = [us.final(), eu.final()]
    for one in (us, eu):
        one.goodbye()
    assert server.wait() == 0
    for final in finals:
        assert final.vector is not None
        assert torch.equal(final.vector[:16], torch.arange(16.0) + ROUNDS)  # each update adds one
        assert final.position == 40

    checkpoint = torch.load(tmp_path / "run" / "final.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 40
    loaded = Toy.load_from_checkpoint(tmp_path / "run" / "final.ckpt", strict=False, map_location="cpu")
    assert torch.equal(loaded.layer.weight, (torch.arange(12.0) + ROUNDS).view(3, 4))
    assert torch.equal(loaded.layer.bias, torch.arange(12.0, 16.0) + ROUNDS)
    assert finals[0].vector is not None
    assert torch.equal(loaded.mean, finals[0].vector[16:])
    assert loaded.frozen == 7


class Newcomer:
    """A region that comes for the first time while the server looks at all regions, unless it has to wait for that."""

    def __init__(self, server: Server) -> None:
        self.has_come = False
        self._server = server

    def come(self) -> None:
        if not self.has_come:
            self.has_come = True
            host, name = self._server.server.host, "ap"
            thread = threading.Thread(target=host.ask, args=[lambda node: node.index_of(name)], daemon=True)
            thread.start()
            thread.join(0.5)


def test_a_region_may_come_while_the_server_counts_regions(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1)
    region("us", server).enter()
    newcomer, here = Newcomer(server), threading.get_ident()

    def is_active(member: Member) -> bool:
        if threading.get_ident() == here:
            newcomer.come()
        return member.state is MemberState.ACTIVE

    monkeypatch.setattr(Member, "is_active", property(is_active))
    assert not server.server._too_few(time.monotonic())
    assert newcomer.has_come


def test_a_region_may_come_while_the_server_makes_the_final_checkpoint(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(workers=1)
    newcomer, is_made = Newcomer(server), threading.Event()

    def final(node: Any) -> dict[str, Any]:
        is_made.set()
        return checkpoint_of(node)

    def status(member: Member, rejected_updates: int) -> dict[str, Any]:
        if is_made.is_set():
            newcomer.come()
        return status_of(member, rejected_updates)

    monkeypatch.setattr(server_module, "checkpoint_of", final)
    monkeypatch.setattr(open_run, "status_of", status)
    us = region("us", server)
    us.enter()
    us.flush(stop=True)
    us.final()
    us.goodbye()
    assert server.wait() == 0
    assert newcomer.has_come
    assert "has met an error" not in caplog.text


def test_a_finished_run_that_is_served_again_gives_its_final_model_to_who_returns(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "RETURN", LIVENESS + 1)
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    us.work()
    us.answer()
    us.flush(stop=True)
    eu.flush()
    final = us.final()
    us.goodbye()
    eu.final()
    eu.cut()  # the server cannot know whether eu has the final model
    until(lambda: "connection of eu" in server.events)
    server.server.stop(signal.SIGKILL)
    server.wait()

    server = serve(liveness=LIVENESS)
    until(lambda: "is finished" in server.events)
    assert f"Members that return within {LIVENESS + 1:g} s get it" in server.events
    eu.connect(server.port)
    eu.join()
    again = eu.final()
    assert final.vector is not None
    assert again.vector is not None
    assert torch.equal(again.vector, final.vector)
    # A new process may ask for the model, too, and take its time.
    us = region("us", server)
    us.connect()
    us.join()
    us.settle()
    us.post(ModelRequest(1))
    copy = us.expect(ModelCopy)
    assert copy.vector is not None
    assert torch.equal(copy.vector, final.vector)
    us.final()
    eu.goodbye()
    us.goodbye()
    server.server._stays_until = 0.0  # nobody else returns
    assert server.wait() == 0


def test_a_connection_that_is_lost_is_not_taken_for_a_goodbye(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not before the server has heard of the loss: otherwise it ends before the member has the final model."""
    server = serve(workers=1)
    lose = server.server.host._on_failure
    monkeypatch.setattr(server.server.host, "_on_failure", lambda *failure: (time.sleep(0.5), lose(*failure)))
    us = region("us", server)
    us.enter()
    us.flush(stop=True)
    us.final()
    us.cut()
    until(lambda: "connection of us" in server.events or server.code is not None)
    assert server.code is None


def test_the_end_of_an_old_connection_does_not_concern_the_new_one(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    old, new = region("us", server), region("us", server)
    old.enter()
    old.session.control.close()
    until(lambda: "us (127.0.0.1:" in server.events and "has said goodbye" in server.events)
    new.enter()
    old.cut()
    time.sleep(0.3)
    new.work()
    new.answer()
    assert server.status()["members"]["us"]["state"] == "active"


def test_a_second_client_with_the_name_of_a_present_region_is_refused(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    us, double = region("us", server), region("us", server)
    us.enter()
    double.connect()
    double.join()
    refusal = double.expect(Refusal)
    assert "us is present already, from 127.0.0.1:" in refusal.reason
    assert " UTC. Two jobs must not use the same key file: stop one of them, or give it a key of" in refusal.reason
    assert not refusal.for_good
    assert "us is present already" in server.events
    us.work()
    us.answer()

    # When the first one is gone, the other one may join.
    us.post(Failure("rank 0", "CUDA error\x1b[31m: out of memory"))
    until(lambda: server.status()["members"]["us"]["state"] == "lost")
    assert "The job of us (127.0.0.1:" in server.events
    assert "\x1b" not in server.events
    assert double.enter().is_new


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Progress(0, 1, 9, STEPS, 0.1, 0.0, 1.0, update=1), "must not send this"),  # in the name of another worker
        (Progress(0, 1, 0, 10**9, 0.1, 0.0, 1.0, update=1), "1,000,000,000 local steps in a round"),
        (Progress(1, 1, 0, STEPS, 0.1, 0.0, 1.0, update=1), "must not send this"),  # of another server
        (Progress(0, 1, 0, 1, 0.1, 0.0, 1.0, data=[(5, 6)], update=1), "must not send this"),  # not leased to it
        (Enrol("another process", 1), "changed its session"),
        (Refusal("hello"), "must not send this"),
    ],
)
def test_a_message_that_makes_no_sense_costs_its_sender_the_membership_and_not_the_run(
    serve: Serve, region: Regions, message: Any, reason: str
) -> None:
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    us.post(message)
    assert reason in us.expect(Refusal).reason
    assert "us (127.0.0.1:" in server.events
    assert "loses its membership" in server.events
    eu.work()
    eu.answer()
    # The expelled process may not come back; a new one may.
    us.connect()
    us.join()
    assert us.expect(Refusal).for_good
    us.goodbye()
    assert region("us", server).enter().is_new


def test_an_error_in_the_server_costs_the_sender_the_membership_and_not_the_run(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    with monkeypatch.context() as patch:
        patch.setattr(server.server.host.node, "handle", lambda *_: 1 / 0)
        us.work_blindly()
        assert "division by zero" in us.expect(Refusal).reason
    eu.work()
    eu.answer()


def test_another_job_is_refused_with_the_difference(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    region("us", server).enter()
    eu = region("eu", server, description=replace(DESCRIPTION, max_steps=50))
    eu.connect()
    eu.join()
    assert "max_steps" in eu.expect(Refusal).reason
    assert "max_steps" in server.events


def test_a_region_whose_connection_is_lost_goes_on_where_it_was(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    us = region("us", server)
    us.enter()
    us.work()
    us.answer()
    for _ in range(3):
        us.cut()
        until(lambda: server.status()["members"]["us"]["state"] == "disconnected")
        us.connect()
        us.join()
        welcome = us.settle()
        assert not welcome.is_new
        us.repeat(welcome)
        us.work()
        us.answer()
    assert server.status()["run"]["total"] == 4 * STEPS
    assert torch.equal(us.model[:16], torch.full((16,), 4.0))
    assert "connection of us" in server.events


def test_members_and_strangers_get_in_while_an_update_takes_long(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    node, begun, may_end = server.server.host.node, threading.Event(), threading.Event()
    handle = node.handle

    def slow(sender: int, message: Any, finding: Any = None) -> Any:
        if isinstance(message, RegionUpdate):
            begun.set()
            may_end.wait(LIMIT)
        return handle(sender, message, finding)

    monkeypatch.setattr(node, "handle", slow)
    us.work()
    assert begun.wait(LIMIT)
    eu.cut()
    ap = region("ap", server)
    for one in (eu, ap):  # the second only gets in if the listener did not wait for the first one's admission
        one.connect()
        one.join()
    may_end.set()
    assert not eu.settle().is_new
    assert ap.settle().is_new
    us.answer()


def test_a_region_that_says_nothing_is_lost_and_may_return(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1, liveness=LIVENESS)
    us = region("us", server)
    us.enter()
    us.work()
    us.answer()
    with monkeypatch.context() as patch:
        patch.setattr(server.server.host, "_liveness", 0.5)
        us.cut()
        until(lambda: server.status()["members"]["us"]["state"] == "lost")
    assert "us is lost: nothing came from it for 0.5 s." in server.events
    us.connect()
    us.join()
    us.repeat(us.settle())
    us.work()
    us.answer()
    assert torch.equal(us.model[:16], torch.full((16,), 2.0))


def test_a_run_that_too_few_regions_work_on_ends_and_can_go_on(serve: Serve, region: Regions) -> None:
    server = serve(workers=1, min_regions=2, timeout=0.5)
    us, eu = region("us", server), region("eu", server)
    us.connect()
    us.join()
    eu.connect()
    eu.join()
    us.settle()
    eu.settle()
    us.work()
    us.answer()
    eu.cut()
    reason = "Fewer than 2 regions took part for longer than 0.5 s, so the server ends."
    assert reason in us.expect(Failure).reason
    us.goodbye()
    assert server.wait() == 1
    assert reason in server.events

    server = serve(liveness=LIVENESS)  # after this time eu's data is leased to others
    us.repeat(us.enter(server.port))
    us.work()
    us.answer()
    assert torch.equal(us.model[:16], torch.full((16,), 2.0))


def test_after_a_signal_the_run_goes_on_elsewhere(serve: Serve, region: Regions, tmp_path: Path) -> None:
    server = serve(workers=1)
    us = region("us", server)
    us.enter()
    us.work()
    us.answer()
    server.server.stop(signal.SIGTERM)
    assert server.wait() == 143
    assert "start the server again" in server.events
    until(lambda: us.failure is not None)

    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").symlink_to("moved")
    server = serve()
    until(lambda: "goes on from global step 4" in server.events)  # its thread says so when it has begun
    us.repeat(us.enter(server.port))
    us.work()
    us.answer()
    assert torch.equal(us.model[:16], torch.full((16,), 2.0))


def test_a_refused_job_does_not_stand_for_the_missing_region_of_its_name(serve: Serve, region: Regions) -> None:
    """However often it asks, and however politely it goes: the others get the data of that region in time."""
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    server.terminate()

    server = serve(liveness=LIVENESS)
    eu.enter(server.port)
    end = time.monotonic() + 2 * LIVENESS
    while server.status()["members"]["us"]["state"] != "lost":
        assert time.monotonic() < end
        another = region("us", server, description=replace(DESCRIPTION, max_steps=41))
        another.connect()
        another.join()
        another.expect(Refusal)
        another.goodbye()


def enrol(region: Region) -> None:
    region.connect()
    region.post(Enrol(region.process, 1))
    region.expect(Enrolled)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["", "restarted server"])
def test_a_job_that_only_enrols_does_not_stand_for_the_missing_one_of_its_name(
    serve: Serve, region: Regions, is_restarted: bool
) -> None:
    """It may take long to join, fail before, and start again: the others get the missing one's data in time."""
    server = serve(workers=1, liveness=LIVENESS)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    eu.lease()
    if is_restarted:
        server.terminate()
        server = serve(liveness=LIVENESS)
        us.enter(server.port)
    else:
        eu.cut()
        until(lambda: "The connection of eu" in server.events)
    end = time.monotonic() + 2 * LIVENESS
    first, second = region("eu", server), region("eu", server)
    enrol(first)
    time.sleep(LIVENESS / 2)
    losses = server.events.count("The connection of eu")
    first.cut()
    until(lambda: server.events.count("The connection of eu") > losses)
    enrol(second)
    until(lambda: server.status()["members"]["eu"]["state"] == "lost", end - time.monotonic())
    us.work()
    us.answer()
    second.join()
    assert second.settle().is_new


@pytest.mark.parametrize("is_restored", [True, False], ids=["restored", "new"])
def test_a_region_of_another_run_is_refused_and_the_run_goes_on(
    serve: Serve, region: Regions, tmp_path: Path, is_restored: bool
) -> None:
    server = serve(workers=1)
    us = region("us", server)
    us.enter()
    us.work()
    us.answer()
    server.terminate()
    (tmp_path / "run").rename(tmp_path / "first")
    server = serve(workers=1, liveness=LIVENESS)
    eu = region("eu", server)
    if is_restored:
        other = region("us", server)
        eu.enter()
        other.enter()
        server.terminate()
        server = serve(liveness=LIVENESS)

    us.connect(server.port)
    us.join()
    refusal = us.expect(Refusal)
    assert "another run than the one that this job trains in" in refusal.reason
    assert not refusal.for_good
    us.cut()
    if is_restored:  # it does not stand for the other run's region of its name, whose data others get
        until(lambda: server.status()["members"]["us"]["state"] == "lost")
    eu.enter(server.port)
    eu.work()
    eu.answer()
    server.terminate()

    (tmp_path / "run").rename(tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "run")
    server = serve()
    us.repeat(us.enter(server.port))
    us.work()
    us.answer()
    assert server.status()["run"]["total"] == 2 * STEPS


def test_a_region_that_leaves_hears_so_only_when_its_work_is_on_disk(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1, snapshot_every=8)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    eu.enter()
    may_write, save = threading.Event(), RunDirectory.save

    def slow(*arguments: Any) -> Any:
        may_write.wait(20)
        return save(*arguments)

    monkeypatch.setattr(RunDirectory, "save", slow)
    us.flush(leave=True)
    # While the snapshot waits for the disk, the others are served.
    for _ in range(3):
        eu.work()
        eu.answer()
    until(lambda: server.status()["members"]["us"]["state"] == "left")
    us.expect_nothing()
    may_write.set()
    assert us.final().final
    us.goodbye()
    until(lambda: server.status()["members"]["us"]["address"] is None)
    server.server.stop(signal.SIGKILL)  # what was told is on disk
    server.wait()
    server = serve()
    assert server.status()["members"]["us"]["state"] == "left"
    assert server.status()["run"]["total"] >= STEPS


def fill_the_disk(*_: object) -> None:
    raise OSError("No space left on device")


def test_a_full_disk_does_not_end_the_run(serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(workers=1)
    us = region("us", server)
    us.enter()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", fill_the_disk)
        for _ in range(3):
            us.work()
            us.answer()
        until(lambda: "No space left on device" in server.events)
    us.flush(leave=True)
    us.final()


def test_a_disk_that_stays_full_ends_the_server_and_its_members_hear_why(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_RETRY", 0.1)
    server = serve(workers=1, timeout=0.5)
    us = region("us", server)
    us.enter()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", fill_the_disk)
        us.work()
        us.answer()
        reason = "No snapshot could be written for 0.5 s (No space left on device), so the server ends."
        assert reason in us.expect(Failure).reason
        us.goodbye()
        assert server.wait() == 1
    assert reason in server.events


def test_a_final_model_that_cannot_be_written_ends_the_server_and_its_members_hear_why(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1, timeout=0.5)
    us = region("us", server)
    us.enter()
    monkeypatch.setattr(RunDirectory, "write_final_model", fill_the_disk)
    us.flush(stop=True)
    us.final()
    assert "The final model could not be written for 0.5 s" in us.expect(Failure).reason
    us.goodbye()
    assert server.wait() == 1


def test_who_is_revoked_is_expelled_and_let_in_with_a_new_key(
    serve: Serve, region: Regions, keys: Path, tmp_path: Path
) -> None:
    server = serve(workers=1)
    ap = region("ap", server)
    ap.enter()
    Revocations(tmp_path / "run" / "revoked").add("ap")
    assert "revoked" in ap.expect(Refusal).reason
    ap.goodbye()
    assert "ap (127.0.0.1:" in server.events


def test_anybody_with_a_key_may_ask_for_the_status(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    us, eu = region("us", server), region("eu", server)
    us.enter()
    us.work()
    us.answer()
    eu.connect()
    eu.post(StatusRequest())
    text = eu.expect(StatusReply).text
    assert '"us"' in text
    assert '"eu"' not in text


def test_a_snapshot_that_failed_when_a_member_came_is_written_later(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the member would never get data."""
    monkeypatch.setattr(snapshots, "_RETRY", 0.2)
    server = serve(workers=1)
    save, failed = RunDirectory.save, threading.Event()

    def fail_once(*arguments: Any) -> Any:
        if not failed.is_set():
            failed.set()
            raise OSError("No space left on device")
        return save(*arguments)

    monkeypatch.setattr(RunDirectory, "save", fail_once)
    us = region("us", server)
    us.enter()
    assert failed.is_set()
    us.work()
    us.answer()


def test_a_name_has_a_limited_number_of_connections(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    askers = [region("us", server) for _ in range(client.MOST_SESSIONS)]
    for asker in askers:
        asker.connect()
    refused = [region("us", server) for _ in range(client._MOST_REFUSED)]
    for one_more in refused:
        one_more.connect()
        refusal = one_more.expect(Refusal)
        assert refusal.reason.startswith("us has 16 connections already.")
        assert not refusal.for_good
    cut = region("us", server)
    cut.connect()
    with pytest.raises(PeerLostError):
        cut.expect(Refusal)
    region("eu", server).enter()
    for one in (*askers, *refused):
        one.goodbye()
    until(lambda: len(list(server.server.host._clients)) == 1)
    region("us", server).enter()


def test_who_asks_for_the_status_again_and_again_does_not_keep_its_region_out(
    serve: Serve, region: Regions, keys: Path
) -> None:
    server = serve(workers=1)
    for _ in range(3 * client.MOST_SESSIONS):
        assert ask_status(f"127.0.0.1:{server.port}", keys / "us.pem", LIMIT)
    region("us", server).enter()
    assert "is refused" not in server.events


def test_who_asks_for_models_and_takes_none_is_expelled(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1, liveness=LIVENESS)
    us = region("us", server)
    us.enter()
    member = next(iter(server.server.host._members.values()))
    member.copies = 1  # one that is never sent
    wait = member.wait_for_room
    monkeypatch.setattr(member, "wait_for_room", lambda seconds: wait(seconds / 10))
    us.post(ModelRequest(1))
    assert f"has taken nothing of the last one for {LIVENESS / 10:g} s" in us.expect(Refusal).reason


def test_who_takes_a_model_slowly_is_waited_for(serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(workers=1, liveness=LIVENESS)
    us = region("us", server)
    us.enter()
    member = next(iter(server.server.host._members.values()))
    monkeypatch.setattr(client.Client, "_models_sent", property(lambda _: time.monotonic()))  # it goes on
    member.copies = 1
    threading.Timer(1.5, setattr, (member, "copies", 0)).start()
    member.wait_for_room(0.5)
    assert member.copies == 0


def test_a_machine_that_vanishes_while_the_server_waits_for_memory_is_lost(
    serve: Serve, region: Regions, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(workers=1, liveness=LIVENESS)
    us = region("us", server)
    us.enter()
    member = next(iter(server.server.host._members.values()))
    member._free.get()  # the memory is in use, by an answer that is never taken
    before = member.traffic()[1]
    us.work()
    until(lambda: member.traffic()[1] > before and member.models.silence(time.monotonic()) == 0)
    us.fall_silent()
    monkeypatch.setattr(server.server.host, "_liveness", 0.5)
    until(lambda: server.status()["members"]["us"]["state"] == "lost")


def test_a_job_that_ends_without_a_word_is_disconnected_at_once(serve: Serve, region: Regions) -> None:
    server = serve(workers=1)
    us = region("us", server)
    us.enter()
    us.goodbye()
    until(lambda: server.status()["members"]["us"]["state"] == "disconnected")
    assert "has said goodbye before the run's end" in server.events


def test_the_final_model_is_that_of_this_end(serve: Serve, region: Regions, tmp_path: Path) -> None:
    """And not that of an end before, which a server wrote that was killed before its last snapshot."""
    server = serve(workers=1)
    (tmp_path / "run" / "final.ckpt").write_text("of an end that no snapshot has")
    us = region("us", server)
    us.enter()
    us.flush(stop=True)
    us.final()
    us.goodbye()
    assert server.wait() == 0
    assert torch.load(tmp_path / "run" / "final.ckpt", weights_only=True)["halos"]["updates"] == 0
