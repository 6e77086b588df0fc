"""The experiments of benchmarks/questions.py and server_rules.py: the rules that they change, and a small run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_halos import DelayedNesterov
from lightning_halos.core.messages import GlobalModel, Push

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def stepped(optimizer: Any, *gradients: Tensor) -> Tensor:
    """The parameter, 0 at first, after steps with these gradients."""
    parameter = torch.zeros_like(gradients[0], requires_grad=True)
    made = optimizer([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach()


def test_shares_of_changes_add_up_and_follow_the_steps_where_links_take_no_time() -> None:
    import questions

    cluster = replace(questions.CLUSTERS["1, 2, 4, 9 workers, server at the 9"], bandwidths=[[1e6] * 4] * 4)
    steps, changes, _ = questions.influence("rate 0.25, K 8", cluster)
    assert steps == pytest.approx([1 / 16, 2 / 16, 4 / 16, 9 / 16], abs=1e-3)
    assert changes == pytest.approx(steps, abs=0.04)  # simultaneous pushes are lost


def test_a_run_does_the_ordered_work_and_learns() -> None:
    import questions
    import small_runs

    text = torch.arange(4000) % 7
    data = torch.utils.data.TensorDataset(text.unfold(0, 8, 1)[:-1], text[8:])
    task = small_runs.Task(partial(small_runs.NextByte, embedding=4, hidden=8), data, data, 16)
    algorithm = questions.split_algorithm("rate 0.25, K 8")
    run = small_runs.Run(algorithm, questions.PAPER, task, steps=12, seed=0)
    before = run.loss(run.network.model)
    row = run.train()
    assert sum(run.trained) == 12 * 16
    assert row["final_loss"] < before - 0.1
    assert row["global_step"][-1] == 12


def test_the_gradient_that_is_written_out_is_that_of_autograd() -> None:
    import small_runs

    model = small_runs.NextByte(embedding=3, hidden=5)
    batch = torch.randint(256, (7, 8)), torch.randint(256, (7,))
    small_runs.loss_of(model, batch).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.backward(batch)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(("counts_all", "sent"), [(False, [3.0, 2.0]), (True, [3.0, 4.0])])
def test_pushes_during_an_exchange_are_in_the_next_update_if_all_are_counted(
    counts_all: bool, sent: list[float]
) -> None:
    import questions
    from small_runs import nesterov

    algorithm = questions.ChangedHalos(
        accumulate_updates=2, merge_weight=0.0, local_optimizer=nesterov((1.0, 0.0, 1)), counts_all=counts_all
    )
    server = algorithm.local_server(0, 2, 1, torch.zeros(1), [torch.Size([1])], str)

    def push(size: float) -> None:
        vector = torch.tensor([size])
        assert server.judge(Push(0, 0, 1, 1, 0.0, vector=vector), server.inspect(vector), 0)
        server.apply(vector, True, torch.empty(1))

    updates = []
    for sizes, during in (([1.0, 2.0], 2.0), ([1.0, 1.0], 0.0)):
        for size in sizes:
            push(size)
        assert server.is_due
        update = server.begin_exchange()
        server.fill(update)
        assert update.vector is not None
        updates.append(update.vector.item())
        if during:
            push(during)
        server.merge(GlobalModel(1, vector=torch.zeros(1)))
    assert updates == sent


def test_a_restart_forgets_the_momentum() -> None:
    import server_rules

    values: dict[str, Any] = {"lr": 1.0, "momentum": 0.5, "delay": 1}
    ones = [torch.ones(1)] * 4
    two = stepped(partial(DelayedNesterov, **values), *ones[:2])
    assert stepped(partial(server_rules.Restarting, period=2, **values), *ones) == 2 * two
    assert stepped(partial(server_rules.Restarting, period=5, **values), *ones) == stepped(
        partial(DelayedNesterov, **values), *ones
    )


def test_only_what_disagrees_with_the_momentum_is_turned() -> None:
    import server_rules

    momentum = torch.tensor([1.0, 0.0])
    along, across, against = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])
    assert server_rules._turned(along, momentum, 0.2) is along
    assert server_rules._turned(against, momentum, -1.0) is against
    turned = server_rules._turned(across, momentum, 0.2)
    assert turned.norm() == pytest.approx(1.0)
    assert turned[0] > 0
    shrunk = server_rules._turned(against, momentum, 0.2)
    assert -1 < shrunk[0] < 0
    assert shrunk[1] == 1


def test_ahead_is_by_the_momentum() -> None:
    import server_rules

    gradients = [torch.tensor([1.0]), torch.tensor([3.0])]
    values: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "aligned": -1.0}
    plain = stepped(partial(server_rules.Corrected, **values), *gradients)
    ahead = stepped(partial(server_rules.Corrected, **values, ahead=True), *gradients)
    momentum = 0.5 * (0.5 * 1.0) + 0.5 * 3.0
    assert ahead == pytest.approx((plain - 0.5 * 0.5 * momentum).item())
