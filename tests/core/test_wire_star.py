"""A star of jobs in a narrow format: what a new connection changes, and that both ends of it keep the same shadow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_halos.core.messages import GlobalModel, Message, RegionUpdate
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.quantization import decode, encode
from tests.core.star import DESCRIPTION, Job, Star

NARROW = dataclasses.replace(DESCRIPTION, wire="int4")


class Meeting:
    """Two jobs, and the models that the first one got."""

    def __init__(self) -> None:
        self.star = Star(min_regions=2)
        self.eu, self.us = (self.star.job(name, description=NARROW) for name in ("eu", "us"))
        self.models: list[GlobalModel] = []
        receive = self.eu.receive

        def record(message: Message) -> None:
            if isinstance(message, GlobalModel):
                self.models.append(dataclasses.replace(message))
            receive(message)

        self.eu.receive = record  # type: ignore[method-assign]

    def exchange(self, job: Job, **fields: bool) -> None:
        for _ in range(2):
            job.push(**fields)

    def assert_same_shadow(self) -> None:
        assert self.eu.node is not None
        here, there = self.star.node._shadows[self.eu.index].values, self.eu.node.shadows[GLOBAL].values
        assert here is not None
        assert there is not None
        assert torch.equal(here, there)
        assert (here - self.star.node.model).abs().max() < 0.2 * self.star.node.model.abs().max()


def test_later_models_are_differences_until_the_connection_is_lost() -> None:
    meeting = Meeting()
    for _ in range(3):
        meeting.exchange(meeting.us)
        meeting.exchange(meeting.eu)
        meeting.assert_same_shadow()
    meeting.eu.cut()
    assert meeting.eu.index not in meeting.star.node._shadows
    meeting.eu.connect()
    for _ in range(2):
        meeting.exchange(meeting.us)
        meeting.exchange(meeting.eu)
        meeting.assert_same_shadow()
    assert [model.is_difference for model in meeting.models] == [False, True, True, False, True]


@pytest.mark.parametrize("restarts", [False, True])
def test_an_update_is_repeated_with_the_same_values(restarts: bool) -> None:
    meeting = Meeting()
    meeting.exchange(meeting.us)
    meeting.exchange(meeting.eu)
    state = meeting.star.disk
    meeting.star.saves = False
    meeting.exchange(meeting.eu, pump=not restarts)
    if restarts:
        meeting.star.restart(state)
        meeting.us.connect()
    else:
        meeting.eu.cut()
    before = len(meeting.models)
    meeting.eu.connect()
    meeting.exchange(meeting.eu)
    updates = [
        message for message in meeting.eu.sent if isinstance(message, RegionUpdate) and message.vector is not None
    ]
    numbers = [update.number for update in updates]
    for update in updates:
        out = torch.empty_like(update.vector)
        decode(encode(update.vector, "int4"), out, "int4")
        assert torch.equal(out, update.vector), "it has the values of the format"
        first = updates[numbers.index(update.number)]
        assert torch.equal(first.vector, update.vector)
    assert len(set(numbers)) >= 2
    assert not meeting.models[before].is_difference, "the first one on the new connection"
    meeting.assert_same_shadow()


def test_the_last_update_takes_the_residual_with_it_and_the_last_model_is_complete() -> None:
    meeting = Meeting()
    for _ in range(2):
        meeting.exchange(meeting.us)
        meeting.exchange(meeting.eu)
    meeting.us.push(final=True)
    meeting.eu.push(final=True, stop=True)
    assert meeting.eu.node is not None
    feedback = meeting.eu.node.server.feedback
    assert feedback is not None
    assert not feedback.residual.any()
    last = meeting.models[-1]
    assert last.final
    assert not last.is_difference
    assert torch.equal(last.vector, meeting.star.node.model)


def test_a_member_with_another_format_is_refused() -> None:
    star = Star(min_regions=1)
    star.job("eu", description=NARROW)
    refused = star.job("us")
    assert refused.refusal is not None
    assert "the wire format between regions is 'int4' in the run, and 'float32' in this job" in refused.refusal.reason
