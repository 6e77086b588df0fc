"""Before a run begins: founders that send nothing, little or nonsense, and a server that is started again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from lightning_halos.core.founding import Founding
from lightning_halos.core.messages import Enrol, Enrolled, InitialModel, Join, Refusal, RunDescription, Welcome
from lightning_halos.core.protocol import ProtocolError, Send
from tests.core.star import DESCRIPTION

LARGE = dataclasses.replace(DESCRIPTION, shapes=[[100]])
OTHER = dataclasses.replace(DESCRIPTION, max_steps=10)


def founding(*names: str, description: RunDescription = DESCRIPTION, **options: Any) -> tuple[Founding, list[int]]:
    """A founding with members that have joined; the first one is the founder."""
    top = Founding("a run", **{"min_regions": 2, "patience": 600.0, **options})
    indices = [top.index_of(name) for name in names]
    for index, name in zip(indices, names, strict=True):
        top.handle(index, Join(name, 1, description))
    top.tick(0.0)
    return top, indices


def asked(sends: list[Send]) -> list[int]:
    """The members that are asked for the initial model."""
    return [send.to for send in sends if isinstance(send.message, Welcome) and send.message.needs_model]


def refused(sends: list[Send]) -> dict[int, str]:
    return {send.to: send.message.reason for send in sends if isinstance(send.message, Refusal)}


# ---------------------------------------------------------------------- founders that do not do their part


def test_a_founder_that_sends_nothing_loses_its_part_and_stays_a_member(caplog: pytest.LogCaptureFixture) -> None:
    top, (first, second) = founding("eu", "us")
    assert top.tick(59.0) == []
    assert asked(top.tick(61.0)) == [second]
    assert "'eu' has not sent the initial model in 60 s. Region 'us' is the founder instead." in caplog.text
    assert top.status()["run"]["founder"] == "us"
    assert top.handle(second, InitialModel(torch.ones(2))) == []
    assert top.node is not None
    assert [send.to for send in top.node.start()] == [first, second]
    assert top.node.handle(first, InitialModel(torch.zeros(2))) == [], "it was slow, which is no offence"
    assert top.node.model.tolist() == [1, 1]
    with pytest.raises(ProtocolError):
        top.node.handle(first, InitialModel(torch.zeros(2)))


def test_the_model_that_is_complete_first_counts_also_if_it_is_that_of_the_first_founder() -> None:
    top, (first, second) = founding("eu", "us")
    top.tick(61.0)
    top.handle(first, InitialModel(torch.ones(2)))
    assert top.node.model.tolist() == [1, 1]
    top.node.start()
    assert top.node.handle(second, InitialModel(torch.zeros(2))) == []


def test_each_member_is_asked_once_and_then_the_founding_waits(caplog: pytest.LogCaptureFixture) -> None:
    top, indices = founding("eu", "us", "asia", min_regions=4)
    assert [asked(top.tick(now)) for now in (61.0, 122.0, 183.0, 244.0)] == [[indices[1]], [indices[2]], [], []]
    assert "nobody else can" in caplog.text


def test_a_founder_whose_model_arrives_slowly_keeps_its_part_and_one_that_trickles_does_not() -> None:
    top, (_, second) = founding("eu", "us", description=LARGE)

    def arrive() -> Any:
        for tenth in range(1, 11):
            assert top.tick(50.0 * tenth) == []
            yield 10 * tenth

    message = InitialModel(torch.ones(100))
    top.inspect(message, arrive())
    top.tick(500.0)
    assert asked(top.tick(501.0 + 60.0)) == [second], "it is complete, and was not handled"
    top, (_, second) = founding("eu", "us", description=LARGE)
    waits = []

    def trickle() -> Any:
        for element in range(1, 10):
            waits.append(asked(top.tick(10.0 * element)))
            yield element

    top.inspect(message, trickle())
    assert [second] in waits


def test_a_founder_that_sends_nonsense_is_expelled_and_the_next_one_is_asked() -> None:
    top, (first, second) = founding("eu", "us")
    with pytest.raises(ProtocolError, match="NaN"):
        top.handle(first, InitialModel(torch.tensor([0.0, float("nan")])))
    sends = top.expel(first, "it sent nonsense")
    assert asked(sends) == [second]
    assert asked(top.handle(first, Join("a new process", 1, DESCRIPTION))) == [], "it is not the founder again"


@pytest.mark.parametrize("reconnects", [False, True])
def test_a_job_that_sends_nothing_does_not_keep_out_those_with_another_description(reconnects: bool) -> None:
    top, (first,) = founding("eu")
    second, third = top.index_of("us"), top.index_of("asia")
    assert second in refused(top.handle(second, Join("a", 1, OTHER)))
    top.tick(50.0)
    if reconnects:
        top.disconnected(first)
        top.tick(50.2)
        top.handle(first, Join("again", 1, DESCRIPTION))
    top.tick(61.0)
    sends = top.handle(second, Join("b", 1, OTHER))
    assert asked(sends) == [second]
    assert list(refused(sends)) == [first]
    assert (
        "No initial model has arrived in time. This job does not fit the run: max_steps is 10" in refused(sends)[first]
    )
    assert top.description == OTHER
    assert first in refused(top.handle(first, Join("once more", 1, DESCRIPTION)))
    top.handle(third, Join("c", 1, OTHER))
    top.handle(second, InitialModel(torch.ones(2)))
    assert top.node is not None


def test_the_time_before_a_job_has_joined_and_after_its_model_has_arrived_does_not_count() -> None:
    top, (first,) = founding("eu")
    second = top.index_of("us")
    top.handle(first, InitialModel(torch.ones(2)))
    top.tick(1000.0)
    top.disconnected(first)
    top.tick(5000.0)
    top.handle(first, Join("again", 1, DESCRIPTION))
    top.tick(5010.0)
    assert list(refused(top.handle(second, Join("a", 1, OTHER)))) == [second]


def test_a_job_whose_model_arrives_is_not_replaced() -> None:
    top, (first,) = founding("eu")
    second = top.index_of("us")
    top.tick(61.0)
    top.inspect(InitialModel(torch.ones(2)), iter([1]))
    top.tick(62.0)
    assert list(refused(top.handle(second, Join("a", 1, OTHER)))) == [second]
    top.handle(first, InitialModel(torch.ones(2)))
    top.tick(200.0)
    assert list(refused(top.handle(second, Join("b", 1, OTHER)))) == [second]


# ---------------------------------------------------------------------- a server that is started again


def enrolled(top: Founding, name: str, workers: int) -> list[tuple[str, int, int]]:
    """The answers to an enrolment: name, workers of a global step, and workers of the regions before."""
    sends = top.handle(top.index_of(name), Enrol(f"{name} {id(top)}", workers))
    answers = [(top.name_of(send.to), send.message) for send in sends]
    return [(name, answer.workers, answer.first) for name, answer in answers if isinstance(answer, Enrolled)]


def test_after_a_restart_before_the_start_each_region_gets_the_numbers_that_it_was_told() -> None:
    top = Founding("a run", min_regions=2)
    enrolled(top, "eu", 3)
    assert enrolled(top, "us", 2) == [("eu", 5, 0), ("us", 5, 3)]
    state = json.loads(json.dumps(top.state_dict()))
    again = Founding("a run", min_regions=2, state=state)
    assert enrolled(again, "asia", 4) == [("asia", 5, 5)]
    assert enrolled(again, "us", 2) == [("us", 5, 3)]
    assert enrolled(again, "eu", 3) == [("eu", 5, 0)]
    for name, workers in (("us", 2), ("eu", 3)):
        again.handle(again.index_of(name), Join(name, workers, DESCRIPTION))
    again.handle(again.index_of("us"), InitialModel(torch.ones(2)))
    assert again.node is not None
    assert again.node.budget.workers == 5
    assert enrolled(again.node, "africa", 1) == [("africa", 5, 9)]


def test_a_region_that_enrolled_before_the_restart_counts_for_the_start() -> None:
    top = Founding("a run", min_regions=2)
    assert enrolled(top, "eu", 3) == []
    again = Founding("a run", min_regions=2, state=top.state_dict())
    assert enrolled(again, "us", 2) == [("us", 5, 3)]


def test_a_region_that_asks_again_on_a_new_connection_is_answered_once() -> None:
    """The server may not have noticed yet that the old connection is lost."""
    top = Founding("a run", min_regions=2)
    assert enrolled(top, "eu", 3) == []
    assert enrolled(top, "eu", 3) == []
    assert enrolled(top, "us", 2) == [("eu", 5, 0), ("us", 5, 3)]


def test_what_regions_were_told_is_stronger_than_another_number_of_workers(caplog: pytest.LogCaptureFixture) -> None:
    top = Founding("a run", workers=8)
    assert enrolled(top, "eu", 3) == [("eu", 8, 0)]
    again = Founding("a run", workers=4, state=top.state_dict())
    assert enrolled(again, "us", 2) == [("us", 8, 3)]
    assert "stays divided by 8 workers" in caplog.text


def test_a_region_whose_first_message_was_wrong_gets_a_place_of_its_own() -> None:
    top = Founding("a run")
    first, second = top.index_of("eu"), top.index_of("us")
    with pytest.raises(ProtocolError):
        top.handle(second, Enrol("a", 0))
    top.handle(first, Join("b", 2, DESCRIPTION))
    top.handle(first, InitialModel(torch.ones(2)))
    top.node.start()
    assert top.node.handle(second, Enrol("c", 1))[0].message == Enrolled(2, 2)
