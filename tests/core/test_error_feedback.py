"""What rounding takes from a sender's updates comes with the later ones; models are rounded once and not again."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from lightning_halos.core.error_feedback import ErrorFeedback
from lightning_halos.core.local_server import LocalServer, unsent_update
from lightning_halos.core.messages import Pull, Push, RegionUpdate
from lightning_halos.core.protocol import GLOBAL
from lightning_halos.core.quantization import Format, decode, encode
from lightning_halos.core.region_node import RegionNode
from lightning_halos.core.schedule import RoundPlanner, StepBudget
from lightning_halos.core.shadow import Shadow
from lightning_halos.core.vector import PART, Advance, in_parts
from lightning_halos.core.worker_wire import WorkerWire

FORMATS: list[Format] = ["bfloat16", "int8", "int4"]
PARAMETERS, BUFFERS = 2000, 10
SIZE = PARAMETERS + BUFFERS
generator = torch.Generator().manual_seed(0)


def update() -> torch.Tensor:
    return torch.randn(SIZE, generator=generator)


def filling(vector: torch.Tensor, values: torch.Tensor) -> object:
    """Fills a vector in steps that are no parts."""

    def fill(advance: Advance) -> None:
        for start in range(0, SIZE, 999):
            stop = min(start + 999, SIZE)
            vector[start:stop] = values[start:stop]
            advance(stop)

    return fill


def sent(feedback: ErrorFeedback, values: torch.Tensor, is_last: bool = False) -> torch.Tensor:
    vector = torch.full((SIZE,), 9.0)
    feedback.rounding(filling(vector, values), vector, is_last)(lambda complete: None)
    return vector


def is_in_format(values: torch.Tensor, form: Format) -> bool:
    out = torch.empty_like(values)
    decode(encode(values, form), out, form)
    return torch.equal(out, values)


def test_parts_are_reported_when_they_are_rounded() -> None:
    size, told, used = 2 * PART + 5, list[int](), list[tuple[int, int]]()

    def fill(advance: Advance) -> None:
        for complete in (3, PART - 1, PART + 1, PART + 2, 2 * PART + 4):
            advance(complete)

    in_parts(fill, size, lambda start, stop: used.append((start, stop)))(told.append)
    assert used == [(0, PART), (PART, 2 * PART), (2 * PART, size)]
    assert told == [PART, 2 * PART, size]


@pytest.mark.parametrize("form", FORMATS)
def test_all_updates_together_lack_nothing(form: Format) -> None:
    feedback = ErrorFeedback(form, PARAMETERS, torch.float32)
    values = [update() for _ in range(4)]
    vectors = [sent(feedback, own, is_last=own is values[-1]) for own in values]
    for vector, own in zip(vectors, values, strict=True):
        assert torch.equal(vector[PARAMETERS:], own[PARAMETERS:]), "buffers travel as they are"
    for vector in vectors[:-1]:
        assert is_in_format(vector[:PARAMETERS], form)
    total, ordered = sum(vectors)[:PARAMETERS], sum(values)[:PARAMETERS]  # type: ignore[index]
    torch.testing.assert_close(total, ordered, rtol=0, atol=1e-5)
    assert not feedback.residual.any()


def test_what_is_not_trained_is_not_sent() -> None:
    feedback = ErrorFeedback("int4", PARAMETERS, torch.float32)
    sent(feedback, update())
    before = feedback.residual[70:400].clone()
    values = update()
    values[70:400] = 0.0  # not at the borders of blocks
    assert not sent(feedback, values)[70:400].any()
    assert torch.equal(feedback.residual[70:400], before)


def resumed(form: Format | None) -> tuple[LocalServer, torch.Tensor]:
    """A server that goes on from a state with a residual, and the residual. Half of the parameters are not trained."""
    shapes, sgd = [torch.Size([PARAMETERS])], partial(torch.optim.SGD, lr=1.0)
    before, after = (LocalServer(0, torch.zeros(SIZE), sgd, 1, 0.5, shapes) for _ in range(2))
    before.round_updates("int4")
    assert before.feedback is not None
    residual = before.feedback.residual.copy_(update()[:PARAMETERS])
    before.model[: PARAMETERS // 2] -= 1
    if form is not None:
        after.round_updates(form)
    after.load_state_dict(before.state_dict())
    return after, residual


@pytest.mark.parametrize("form", [None, "float32", "int8"])
def test_a_residual_of_another_run_moves_nothing_that_is_not_trained(form: Format | None) -> None:
    server, residual = resumed(form)
    trained, idle = slice(PARAMETERS // 2), slice(PARAMETERS // 2, PARAMETERS)
    state = server.state_dict()
    last = unsent_update(0, state).vector
    assert last is not None
    assert torch.equal(last[trained], 1 + residual[trained])
    assert not last[idle].any()
    first = server.begin_exchange()
    server.fill(first)
    assert first.vector is not None
    torch.testing.assert_close(first.vector[trained], 1 + residual[trained], rtol=0, atol=0.05)
    assert not first.vector[idle].any()
    server.model[idle] -= 1  # they are trained now, and get what they lacked
    second = server.flush().vector
    assert second is not None
    torch.testing.assert_close(second[idle], 1 + residual[idle], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("form", FORMATS)
def test_an_update_that_will_be_rejected_spoils_no_later_one(form: Format, wrong: float) -> None:
    feedback = ErrorFeedback(form, PARAMETERS, torch.float32)
    values = update()
    values[5] = wrong
    assert not bool(sent(feedback, values).isfinite().all())
    assert bool(sent(feedback, update()).isfinite().all())


@pytest.mark.parametrize("form", FORMATS)
def test_both_ends_of_a_model_hold_the_same_bits(form: Format) -> None:
    here, there = Shadow(PARAMETERS, form), Shadow(PARAMETERS)
    model = update()
    for number in range(4):
        vector = torch.empty(SIZE)
        is_difference, fill = here.sending(filling(vector, model), vector)
        assert is_difference == (number > 0)
        fill(lambda complete: None)
        if is_difference:
            received = torch.empty(PARAMETERS)
            decode(encode(vector[:PARAMETERS], form), received, form)
            vector[:PARAMETERS] = received
        arrived = list(there.receiving(vector, is_difference, [1, 70, 1024, SIZE]))
        assert arrived == [1, 70, 1024, SIZE]
        assert here.values is not None
        assert there.values is not None
        assert torch.equal(here.values.view(torch.int32), there.values.view(torch.int32))
        assert torch.equal(vector[:PARAMETERS], there.values)
        assert torch.equal(vector[PARAMETERS:], model[PARAMETERS:])
        if is_difference:
            assert (vector - model).abs().max() < 0.05, "the error does not grow"
        else:
            assert torch.equal(vector, model)
        model += 0.1 * update()


def test_a_difference_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="came as a difference"):
        Shadow(PARAMETERS).receive(torch.zeros(SIZE), True)


def test_scalars_empty_parameters_and_buffers_are_parts_of_a_vector_like_others() -> None:
    shapes = [torch.Size([]), torch.Size([0, 3]), torch.Size([5, 13])]
    parameters, size = 66, 69
    server = LocalServer(0, torch.zeros(size), partial(torch.optim.SGD, lr=1.0), 2, 0.5, shapes)
    planner, budget = RoundPlanner(8, False, 1), StepBudget(1)
    node = RegionNode(server, planner, [0], budget, formats={0: "int4", GLOBAL: "int8"})
    worker, model, updates = WorkerWire("int4", parameters, torch.float32), torch.zeros(parameters), []
    for number in range(1, 5):
        progress = torch.randn(size, generator=generator)
        push = Push(0, None, 8, 8, 1.0, vector=torch.empty(size), number=number)
        assert push.vector is not None
        vector = push.vector
        worker.filling(push, lambda advance, vector=vector, progress=progress: vector.copy_(progress))(lambda _: None)
        assert is_in_format(vector[:parameters], "int4")
        model -= vector[:parameters]
        for send in node.handle(0, push):
            message = send.complete()
            if isinstance(message, Pull):
                assert message.vector is not None
                list(worker.arriving(message, [size]))
                torch.testing.assert_close(message.vector[:parameters], model, rtol=0, atol=0.3)
                torch.testing.assert_close(message.vector[parameters:], progress[parameters:])
            elif isinstance(message, RegionUpdate):
                assert message.vector is not None
                updates.append(message.vector)
                assert is_in_format(message.vector[:parameters], "int8")
    assert len(updates) == 1


def test_a_worker_goes_on_with_its_residual_and_shadow() -> None:
    one, values, model = WorkerWire("int4", PARAMETERS, torch.float32), update(), update()
    push = Push(0, 0, 1, 1, 1.0, vector=torch.empty(SIZE))
    assert push.vector is not None
    one.filling(push, filling(push.vector, values))(lambda complete: None)  # type: ignore[arg-type]
    list(one.arriving(Pull(1, 1, 1, False, vector=model.clone()), [SIZE]))
    other = WorkerWire("int4", PARAMETERS, torch.float32)
    other.load_state_dict(one.state_dict(has_shadow=True))
    results = []
    for wire in (one, other):
        push = Push(0, 0, 1, 1, 1.0, vector=torch.empty(SIZE))
        assert push.vector is not None
        wire.filling(push, filling(push.vector, values))(lambda complete: None)  # type: ignore[arg-type]
        difference = torch.ones(SIZE)
        list(wire.arriving(Pull(2, 1, 1, False, vector=difference, is_difference=True), [SIZE]))
        results.append((push.vector, difference))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1][:PARAMETERS], model[:PARAMETERS] + 1)
    assert not one.state_dict(has_shadow=False).keys() & {"shadow"}


def test_a_worker_on_an_ordinary_link_changes_nothing() -> None:
    wire = WorkerWire("float32", PARAMETERS, torch.float32)
    push = Push(0, 0, 1, 1, 1.0, vector=torch.empty(1))
    assert wire.filling(push, len) is len  # type: ignore[arg-type]
    progress = [1]
    assert wire.arriving(Pull(1, 1, 1, False, vector=torch.empty(1)), progress) is progress
    assert wire.state_dict(has_shadow=True) == {}
