"""What a module changes itself: teachers, queues, banks, sparse and scripted buffers. All ranks end with one model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from lightning_halos import DilocoStrategy
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import BATCH, FEATURES, Toy, fit, halos, loader, make_trainer, state

WORKERS, DECAY = 2, 0.9


class Odd(nn.Module):
    """An average of every second parameter of a network, in a form and under names of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for number, parameter in list(enumerate(net.parameters()))[::2]:
            self.register_parameter(f"x{7 - number}", nn.Parameter(parameter.detach().clone(), requires_grad=False))

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        for average, parameter in zip(self.parameters(), list(net.parameters())[::2], strict=True):
            average.lerp_(parameter, 1 - DECAY)


class SelfSupervised(Toy):
    """A student, a teacher that follows it, and whatever such modules keep in buffers."""

    halos_buffers = {"own": "local", "own_bank": "local"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.average = copy.deepcopy(self.net)  # not frozen, but no optimizer has it
        self.odd = Odd(self.net)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
        self.traced = torch.jit.trace(nn.Linear(1, 1), torch.zeros(2, 1))
        self.prototype = nn.Parameter(torch.zeros(3), requires_grad=False)  # no copy of anything
        self.register_buffer("queue", normalize(torch.randn(16, FEATURES)))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("own", torch.zeros(1))
        self.register_buffer("own_bank", torch.zeros(0))
        self.register_buffer("bank", torch.zeros(0, FEATURES))
        self.register_buffer("phases", torch.ones(2, dtype=torch.complex64).conj())
        self.register_buffer("angles", torch.full((2,), 1j).conj().imag)
        self.register_buffer("graph", torch.eye(FEATURES).to_sparse_csr())
        self.register_buffer("edges", torch.eye(FEATURES).to_sparse_coo())

    def loss(self, batch: Any) -> Tensor:
        inputs = self.graph @ (self.edges @ batch[0].T)
        return mse_loss(self.traced(self.scripted(self.net(inputs.T))), batch[1])

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        copies = (self.teacher.parameters(), self.average.parameters())
        for teacher, average, student in zip(*copies, self.net.parameters(), strict=True):
            teacher.lerp_(student, 1 - DECAY)
            average.lerp_(student, 1 - DECAY)
        self.odd.follow(self.net)
        start = int(self.pointer)
        keys = normalize(batch[0] + self.global_rank)
        self.queue[start : start + len(keys)] = keys
        self.pointer[0] = (start + BATCH) % 16
        self.bank = torch.cat([self.bank, keys])
        self.prototype += self.global_rank + 1
        self.own += self.global_rank + 1
        self.own_bank = torch.cat([self.own_bank, torch.ones(self.global_rank + 1)])

    def configure_optimizers(self) -> Any:
        own = [p for name, p in self.named_parameters() if not name.startswith("average.")]
        return self.counted(torch.optim.AdamW(own, lr=1e-2))

    @torch.no_grad()
    def on_train_end(self) -> None:
        super().on_train_end()
        self.at_end = {name: tensor.clone() for name, tensor in self.named_buffers()}
        self.at_end["prototype"] = self.prototype.detach().clone()
        self.net[2].bias += self.global_rank

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.trainer.global_rank if self._trainer is not None else 0)

    def set_extra_state(self, state: Any) -> None:
        pass


class Marching(Toy):
    """A teacher that moves by 1 in each batch."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 1))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        self.teacher.bias += 1


def marching(kind: Any, options: dict[str, Any], devices: int) -> Result:
    return fit(Marching(), devices=devices, max_steps=40, strategy=kind(local_steps=4, **options))


@pytest.mark.parametrize(
    ("kind", "devices", "options"),
    [
        (halos, WORKERS, {"regions": 1}),
        (halos, WORKERS, {"regions": 1, "overlap": True}),
        (halos, 4, {"regions": 2, "accumulate_updates": 1}),
        (halos, 4, {"regions": 2, "accumulate_updates": 1, "worker": 2}),
        (DilocoStrategy, WORKERS, {"timeout": 60}),
    ],
    ids=["one region", "overlap", "two regions", "workers of two processes", "DiLoCo"],
)
def test_a_teacher_moves_as_far_as_those_of_its_workers(
    run: Run, kind: Any, devices: int, options: dict[str, Any]
) -> None:
    results = run(marching, kind, options, devices, workers=devices)
    mean = sum(result["optimizer_steps"] for result in results) / devices
    for result in results:
        moved = result["state"]["teacher.bias"] - results[0]["start"]["teacher.bias"]
        torch.testing.assert_close(moved, torch.full((1,), mean), rtol=1e-4, atol=1e-3)


def self_supervised() -> Result:
    module = SelfSupervised()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(module, devices=WORKERS, max_steps=24, strategy=halos(regions=1))
    module.trainer.validate(module, loader(8), verbose=False)
    validated = {"validated": state(module), "at_end": module.at_end}
    return {**result, **validated, "warnings": [str(warning.message) for warning in caught]}


def test_what_a_module_changes_itself_is_the_same_on_all_ranks(run: Run, tmp_path: Path) -> None:
    results = run(self_supervised, workers=WORKERS)
    first, second = (result["state"] for result in results)
    for result in results:  # also after the fit
        assert torch.equal(result["validated"]["own"], result["state"]["own"])
        assert torch.equal(result["validated"]["own_bank"], result["state"]["own_bank"])
        for name, tensor in result["at_end"].items():
            assert torch.equal(tensor.to_dense(), result["state"][name].to_dense()), f"{name} at the end of training"
    own = [first.pop("own").item(), second.pop("own").item()]
    steps_of_each = [result["optimizer_steps"] for result in results]
    assert own == [steps_of_each[0], 2 * steps_of_each[1]], "a local buffer stays with its worker"
    assert len(first.pop("own_bank")) == results[0]["optimizer_steps"]
    assert len(second.pop("own_bank")) == 2 * results[1]["optimizer_steps"]
    for name, tensor in first.items():
        if name != "_extra_state":
            assert second[name].layout is tensor.layout
            assert torch.equal(second[name].to_dense(), tensor.to_dense()), name
    assert not torch.equal(first["teacher.0.weight"], results[0]["start"]["teacher.0.weight"])
    assert torch.allclose(first["teacher.0.weight"], first["average.0.weight"])
    for odd, name in (("x7", "0.weight"), ("x5", "1.weight"), ("x3", "2.weight")):
        assert torch.allclose(first[f"odd.{odd}"], first[f"teacher.{name}"]), "a teacher of another form"
    assert torch.allclose(first["queue"].norm(dim=1), torch.ones(16)), "a queue is not averaged"
    assert len(first["bank"]) == len(results[0]["trained_on"]), "rank 0's bank, which grew"
    assert first["pointer"].item() == len(first["bank"]) % 16
    steps = results[0]["optimizer_steps"]
    assert first["net.1.num_batches_tracked"] == steps
    assert torch.equal(first["prototype"], torch.full((3,), float(steps))), (
        "a frozen parameter that is no copy: rank 0's"
    )
    log = (tmp_path / "log0").read_text()
    averaged = "net.1.running_mean, net.1.running_var, teacher.0.weight"
    assert f"Buffers and frozen parameters, averaged with the model: {averaged}" in log
    assert "Buffers and frozen parameters, each worker's own: own, own_bank." in log
    assert [text.split(".")[0] for text in results[0]["warnings"] if "changes frozen" in text] == [
        "The module changes frozen parameters itself: prototype"
    ]
    changed, extra = (
        [warning for warning in results[0]["warnings"] if text in warning]
        for text in ("differed between the workers after the final model was loaded", "state_dict differ")
    )
    assert len(changed) == 1
    assert "net.2.bias" in changed[0]
    assert "net.0.weight" not in changed[0]
    assert len(extra) == 1
    assert "_extra_state" in extra[0]
    assert not results[1]["warnings"] or not any("differ" in warning for warning in results[1]["warnings"])


class Following(Toy):
    """With a teacher that only its values at the start tell."""

    slow = 1

    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.odd.follow(self.net)


def followed(folder: Path) -> Result:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
    first, second, states = Following(), Following(), []
    flags = {"devices": WORKERS, "enable_checkpointing": True}
    make_trainer(halos(regions=1), max_steps=12, callbacks=[saving], **flags).fit(first, loader())
    states.append(state(first))
    make_trainer(halos(regions=1), max_steps=20, **flags).fit(second, loader(), ckpt_path=folder / "step=8.ckpt")
    states.append(state(second))
    make_trainer(halos(regions=1), max_steps=8, **flags).fit(first, loader())
    states.append(state(first))
    return {"states": states}


def test_a_teacher_of_any_form_is_averaged_in_resumed_and_later_fits(run: Run, tmp_path: Path) -> None:
    results = run(followed, tmp_path, workers=WORKERS)
    before = results[0]["states"]
    for first, second in zip(*(result["states"] for result in results), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    for earlier, later in ((0, 2), (0, 1)):
        assert not torch.equal(before[earlier]["odd.x7"], before[later]["odd.x7"])
    log = (tmp_path / "log0").read_text()
    assert log.count("averaged with the model: odd.x7, odd.x5.") == 3
    assert "changes frozen parameters itself" not in log
