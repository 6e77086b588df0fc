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


def enrolled(top: Founding, name: str, workers: int, session: str = "") -> list[tuple[str, int, int]]:
    """The answers to an enrolment: name, workers of a global step, and workers of the regions before."""
    sends = top.handle(top.index_of(name), Enrol(session or f"{name} {id(top)}", workers))
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


def test_a_region_that_was_told_nothing_before_the_restart_counts_when_it_is_back() -> None:
    top = Founding("a run", min_regions=2)
    assert enrolled(top, "eu", 3) == []
    again = Founding("a run", min_regions=2, state=top.state_dict())
    assert enrolled(again, "us", 2) == []
    assert enrolled(again, "eu", 3) == [("us", 5, 0), ("eu", 5, 2)]


def test_a_file_of_an_earlier_version_has_regions_that_were_told_and_whose_jobs_are_unknown() -> None:
    regions = [{"name": "eu", "first": 0, "workers": 3}, {"name": "us", "first": 3, "workers": 2}]
    again = Founding("a run", min_regions=2, state={"workers": 5, "regions": regions})
    assert [again.name_of(index) for index in again.told] == ["eu", "us"]
    assert enrolled(again, "us", 2) == [("us", 5, 3)]
    assert enrolled(again, "asia", 1) == [("asia", 5, 5)]
    waits = Founding("a run", min_regions=3, state={"workers": None, "regions": regions})
    assert waits.told == []


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


# ---------------------------------------------------------------------- jobs that are gone before the run begins


def gone(top: Founding, name: str) -> None:
    """The job of a region fails, or nothing is heard of it for too long."""
    top.lose(top.index_of(name))


def restarted(top: Founding, **options: Any) -> Founding:
    return Founding("a run", **options, state=json.loads(json.dumps(top.state_dict())))


@pytest.mark.parametrize("is_noticed", [False, True])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_job_that_comes_back_with_other_workers_is_counted_as_it_is(is_noticed: bool, is_restarted: bool) -> None:
    top = Founding("a run")
    assert enrolled(top, "us", 1) == [("us", 1, 0)]
    if is_noticed:
        gone(top, "us")
    if is_restarted:
        top = restarted(top)
    assert enrolled(top, "us", 2, "a new job") == [("us", 2, 0)]
    top.handle(top.index_of("us"), Join("a new job", 2, DESCRIPTION))
    top.handle(top.index_of("us"), InitialModel(torch.ones(2)))
    assert top.node.budget.workers == 2


def test_a_job_that_has_lost_its_connection_before_it_was_told_anything_does_not_count() -> None:
    top = Founding("a run", min_regions=2)
    assert enrolled(top, "us", 2) == []
    top.disconnected(top.index_of("us"))
    assert enrolled(top, "us", 4, "a new job") == []
    assert enrolled(top, "eu", 2) == [("us", 6, 0), ("eu", 6, 4)]


def test_a_region_that_has_only_tried_does_not_count() -> None:
    top = Founding("a run", min_regions=2)
    assert enrolled(top, "ap", 16) == []
    top.disconnected(top.index_of("ap"))
    assert enrolled(top, "eu", 2) == []
    assert enrolled(top, "us", 2) == [("eu", 4, 0), ("us", 4, 2)]


def test_numbers_stay_for_a_job_that_was_told_them_and_may_still_live() -> None:
    top = Founding("a run", min_regions=2)
    enrolled(top, "us", 2)
    assert enrolled(top, "eu", 3) == [("us", 5, 0), ("eu", 5, 2)]
    top.disconnected(top.index_of("eu"))
    assert enrolled(top, "us", 4, "more workers") == [("us", 5, 5)], "behind all others"
    gone(top, "us")
    assert enrolled(top, "us", 1, "fewer workers") == [("us", 5, 5)], "in the place that it has"
    assert enrolled(top, "eu", 3) == [("eu", 5, 2)]
    gone(top, "us")
    gone(top, "eu")
    assert enrolled(top, "eu", 1, "a new job") == [], "the numbers are open again"
    assert enrolled(top, "us", 1, "another new job") == [("eu", 2, 0), ("us", 2, 1)]


def test_the_number_that_was_ordered_stays() -> None:
    top = Founding("a run", workers=8)
    assert enrolled(top, "us", 2) == [("us", 8, 0)]
    assert enrolled(top, "us", 4, "a new job") == [("us", 8, 0)]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_job_that_was_thought_gone_keeps_its_numbers_if_nobody_was_told_others(is_restarted: bool) -> None:
    top = Founding("a run", min_regions=2)
    enrolled(top, "us", 2, "us")
    assert enrolled(top, "eu", 3, "eu") == [("us", 5, 0), ("eu", 5, 2)]
    for name in ("us", "eu"):  # the server was not reached for a while
        gone(top, name)
    top = restarted(top, min_regions=2) if is_restarted else top
    assert enrolled(top, "ap", 1) == []
    assert enrolled(top, "eu", 3, "eu") == [("ap", 5, 5), ("eu", 5, 2)]
    top.handle(top.index_of("us"), Join("us", 2, DESCRIPTION))
    assert enrolled(top, "us", 2, "us") == [("us", 5, 0)]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_job_that_was_thought_gone_is_refused_if_others_were_told_other_numbers(
    begins: bool, is_restarted: bool
) -> None:
    top = Founding("a run")
    assert enrolled(top, "us", 2, "us") == [("us", 2, 0)]
    gone(top, "us")
    top = restarted(top) if is_restarted else top
    assert enrolled(top, "eu", 3, "eu") == [("eu", 3, 0)]
    us, eu = top.index_of("us"), top.index_of("eu")
    node: Any = top
    if begins:
        top.handle(eu, Join("eu", 3, DESCRIPTION))
        top.handle(eu, InitialModel(torch.ones(2)))
        node = top.node
        node.start()
    refusal = node.handle(us, Join("us", 2, DESCRIPTION))[0].message
    assert isinstance(refusal, Refusal)
    assert refusal.for_good
    assert refusal.reason.startswith("This job was told that a global step is divided by 2 worker(s), 0 of them before")
    assert "Start this job again." in refusal.reason
    assert enrolled(node, "us", 2, "a new job") == [("us", 3, 3)]


def test_a_job_that_is_refused_does_not_count() -> None:
    top = Founding("a run", min_regions=2)
    enrolled(top, "us", 2, "us")
    enrolled(top, "eu", 3, "eu")
    us, eu = top.index_of("us"), top.index_of("eu")
    top.handle(us, Join("us", 2, DESCRIPTION))
    assert list(refused(top.handle(eu, Join("eu", 3, OTHER)))) == [eu]
    gone(top, "us")
    assert enrolled(top, "eu", 1, "mended") == []
