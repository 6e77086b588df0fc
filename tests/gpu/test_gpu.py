"""Tests that need a GPU. One is enough, because several workers share it. Run them with ``pytest tests/gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_halos.core.copies import Run, StagedCopies, copies_of
from lightning_halos.core.messages import Push
from lightning_halos.core.vector import ModelVector
from lightning_halos.core.worker import WorkerRound
from tests.core.test_copies import Mixed
from tests.integration.harness import Result, free_port, run_workers
from tests.integration.toys import FEATURES, LOCAL_STEPS, Toy, assert_trained, halos, loader, make_trainer, outcome

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ACCELERATOR = "gpu"
DEVICE = torch.device("cuda")
WIDTH = 2048


def one_worker_per_node(workers: int) -> list[dict[str, str]]:
    """Environments of nodes with one worker each: so that each worker has the first device of its node."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    return [{**shared, "NODE_RANK": str(rank)} for rank in range(workers)]


def trainer_of(workers: int, overlap: bool = False, **kwargs: Any) -> pl.Trainer:
    return make_trainer(
        halos(regions=1, overlap=overlap), accelerator=ACCELERATOR, devices=1, num_nodes=workers, **kwargs
    )


def busy(seconds: float = 0.1) -> None:
    """Queues computations that keep the device busy for about this time."""
    matrix = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(int(seconds * 300)):
        matrix @ matrix


# ---------------------------------------------------------------------- copies


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Mixed, Mixed]:
    """The same module on the host and on the device. Vectors have many parts."""
    monkeypatch.setattr("lightning_halos.core.vector.PART", 64)
    return Mixed(), Mixed().to(DEVICE)


def test_a_gpu_is_copied_from_and_to_through_pinned_memory() -> None:
    assert isinstance(copies_of({torch.device("cuda", 0)}), StagedCopies)


def test_a_round_trip_gives_the_same_bits_as_on_the_host(modules: tuple[Mixed, Mixed]) -> None:
    vectors = [ModelVector(module) for module in modules]
    for _ in range(3):
        host, device = (vector.read(vector.new()) for vector in vectors)
        assert torch.equal(host, device)
        start = torch.randn_like(host)
        host, device = (vector.pseudo_gradient_(start.clone()) for vector in vectors)
        assert torch.equal(host, device)
        for vector in vectors:
            vector.write(start)
        for name, tensor in modules[0].state_dict().items():
            assert torch.equal(modules[1].state_dict()[name].cpu(), tensor), name


def test_copies_wait_for_computations_and_computations_for_copies() -> None:
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device=DEVICE)
    vector = ModelVector(layer)
    with torch.no_grad():
        for value in range(3):
            busy()
            layer.weight.fill_(value)
            assert torch.equal(vector.read(vector.new()), torch.full((WIDTH**2,), float(value)))
            vector.write(torch.full((WIDTH**2,), value + 0.5))
            total = layer.weight.sum()
            layer.weight.zero_()
            assert total.item() == (value + 0.5) * WIDTH**2


def test_what_is_computed_when_it_is_requested_is_copied_afterwards_from_memory_that_nobody_uses_meanwhile() -> None:
    def runs() -> Iterator[Run]:
        for value in range(8):
            busy(0.02)
            yield [torch.full((WIDTH**2,), float(value), device=DEVICE)], [torch.empty(WIDTH**2)], value

    for value, (tensors, _, _) in enumerate(copies_of({torch.device("cuda", 0)}).to_host(runs())):
        assert torch.equal(tensors[0], torch.full((WIDTH**2,), float(value)))


# ---------------------------------------------------------------------- training


def fitting(precision: Any, overlap: bool) -> Result:
    module = Toy()
    flags: dict[str, Any] = {"precision": precision, "val_check_interval": 10, "check_val_every_n_epoch": None}
    trainer = trainer_of(2, overlap, max_steps=20, **flags)
    trainer.fit(module, loader(), loader())
    return outcome(trainer, module.cpu())


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlap"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_two_workers_train_on_one_device(tmp_path: Path, precision: str, overlap: bool) -> None:
    environments = one_worker_per_node(2)
    results = run_workers(fitting, precision, overlap, folder=tmp_path, environments=environments)
    assert_trained(results, max_steps=20)


class Large(Toy):
    """Has 67 MB of parameters."""

    pause = 0.0

    def __init__(self) -> None:
        hidden = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        super().__init__(nn.Sequential(nn.Linear(FEATURES, WIDTH), *hidden, nn.Linear(WIDTH, 1)))


class Saving(pl.Callback):
    """Saves a checkpoint after 8 batches, and validates it against the memory that it needs.

    Attributes:
        models: Device memory that the save needed, in models.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = -1.0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.is_global_zero and args[-1] == 8:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trainer.save_checkpoint(self.path)
            model = sum(p.numel() * p.itemsize for p in module.parameters())
            self.models = (torch.cuda.max_memory_allocated() - before) / model


def saving(path: Path) -> Result:
    module, callback = Large(), Saving(path)
    trainer = trainer_of(2, max_steps=40, callbacks=[callback])
    trainer.fit(module, loader())
    return {"models": callback.models}


def test_a_checkpoint_while_training_needs_no_memory_for_a_model_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    results = run_workers(saving, path, folder=tmp_path, environments=one_worker_per_node(2))
    assert 0 <= results[0]["models"] < 0.25
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


class Busy(Toy):
    """Queues work that takes the device much longer than the host. Takes the device's own time of it."""

    pause = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        busy(0.05)
        events[1].record()
        self.events.append(events)
        return self.loss(batch)


def measuring() -> Result:
    pushes: list[Push] = []
    push = WorkerRound.push

    def recorded(self: WorkerRound, *args: Any, **kwargs: Any) -> Push:
        pushes.append(push(self, *args, **kwargs))
        return pushes[-1]

    WorkerRound.push = recorded  # type: ignore[method-assign]
    module = Busy()
    trainer_of(1, max_steps=5 * LOCAL_STEPS).fit(module, loader())
    torch.cuda.synchronize()
    return {
        "pushes": [(p.steps, p.seconds) for p in pushes if p.steps],
        "device": [start.elapsed_time(end) / 1e3 for start, end in module.events],
    }


def test_the_seconds_of_a_push_include_those_of_the_device(tmp_path: Path) -> None:
    (result,) = run_workers(measuring, folder=tmp_path, environments=one_worker_per_node(1))
    device = iter(result["device"])
    assert sum(steps for steps, _ in result["pushes"]) == len(result["device"])
    for steps, seconds in result["pushes"]:
        assert seconds >= 0.95 * sum(next(device) for _ in range(steps))
