"""Lane 0 joins the slices of updates for a global server, and rounds them: a repeated update is the one sent before."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor

from lightning_halos.core.error_feedback import ErrorFeedback
from lightning_halos.core.layout import Layout
from lightning_halos.core.messages import RegionUpdate
from lightning_halos.core.quantization import Format
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.lanes import Lanes
from lightning_halos.transport.link import LoopbackLink, wait_all
from lightning_halos.transport.slices import JoiningLink

LIMIT = 30.0
SIZES, PARAMETERS = (300, 41, 7), 341
LAYOUT = Layout.build(SIZES, 2, 2)
LAST = 4


class Job:
    """The link of a job of two lanes to a global server, which counts what has arrived."""

    def __init__(self, form: Format) -> None:
        torch.manual_seed(0)
        self.updates = [torch.randn(sum(SIZES)) for _ in range(LAST + 1)]
        self.arrived: SimpleQueue[RegionUpdate] = SimpleQueue()
        alarm = Alarm("lane 0")
        models, self._server = LoopbackLink.pair("the global server", "lane 0")
        slices, self._other = LoopbackLink.pair("lane 1", "lane 0")
        order, self._order = LoopbackLink.pair("lane 1", "lane 0")
        lanes = Lanes(0, {1: order}, alarm, print)
        feedback = ErrorFeedback(form, PARAMETERS, torch.float32)
        self.link = JoiningLink(models, LAYOUT, {1: slices}, lanes, feedback)
        self.link.start(print, alarm.fail)
        self._server.start(lambda message, progress: (wait_all(progress), self.arrived.put(message)), alarm.fail)
        self._links = [models, self._server, slices, self._other, order, self._order]
        lanes.start()

    def send(self, number: int) -> Tensor:
        """Posts an update in both lanes, as the nodes keep it, and returns what the server gets."""
        own, other = (LAYOUT.cut(self.updates[number], lane).clone() for lane in (0, 1))
        self._other.post(RegionUpdate(0, 1, 1, number=number, final=number == LAST, vector=other))
        self.link.post(RegionUpdate(0, 1, 1, number=number, final=number == LAST, vector=own))
        update = self.arrived.get(timeout=LIMIT)
        assert update.number == number
        assert update.vector is not None
        return update.vector

    def close(self) -> None:
        for link in self._links:
            link.close()
        for link in self._links:
            link.join(10)


@pytest.fixture(params=["bfloat16", "int8", "int4"])
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(request.param)
    yield job
    job.close()


def test_an_update_is_repeated_bit_for_bit_and_none_of_it_is_lost(job: Job) -> None:
    """Also when later updates, and the last one, have been sent in between."""
    first = job.send(1).clone()
    assert not torch.equal(first[:PARAMETERS], job.updates[1][:PARAMETERS]), "it is rounded"
    job.link.forget()
    assert torch.equal(job.send(1), first)
    sent = {1: first, **{number: job.send(number).clone() for number in (2, 3, LAST)}}
    job.link.forget()
    for number in (2, 3, LAST):
        assert torch.equal(job.send(number), sent[number])
    total = sum(job.updates[1:])
    assert isinstance(total, Tensor)
    torch.testing.assert_close(sum(sent.values()), total, rtol=0, atol=1e-5)
    assert torch.equal(sent[2][PARAMETERS:], job.updates[2][PARAMETERS:]), "buffers are not rounded"
    job.link.release(3)
    assert list(job.link._repeatable) == [LAST], "what is safe on the global server's disk is not kept"
