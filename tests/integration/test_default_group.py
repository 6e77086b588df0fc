"""What ``torch.distributed`` says and does in every hook, in data loaders and around the Trainer."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info
from torch.utils.data.datapipes.iter import IterableWrapper
from torchmetrics import MeanMetric, SumMetric

from lightning_halos import HalosStrategy, SimulatedCluster
from tests.integration.conftest import Run
from tests.integration.harness import Result, lightning_environments, torchrun_environments
from tests.integration.toys import BATCH, Toy, assert_same_model, halos, loader, make_trainer, samples, state

SAMPLES = 64
HOOKS = ["setup", "train_dataloader", "training_step", "on_train_end", "on_fit_end", "teardown", "test_step"]


def as_objects(value: Any) -> list[Any]:
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, value)
    return objects


def everything(rank: int, size: int) -> dict[str, Any]:
    """The result of every collective, on values that differ from rank to rank."""
    mine = torch.tensor([1.0, 10.0]) + rank
    found: dict[str, Any] = {"objects": as_objects({"rank": rank})}
    for operation in ("SUM", "AVG", "MAX", "MIN", "PRODUCT"):
        found[operation] = mine.clone()
        dist.all_reduce(found[operation], getattr(dist.ReduceOp, operation))
    dist.barrier()
    found["broadcast"] = mine.clone()
    dist.broadcast(found["broadcast"], src=1)
    found["broadcast_objects"] = [f"from {rank}"]
    dist.broadcast_object_list(found["broadcast_objects"], src=1)
    found["gather"] = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(found["gather"], mine)
    found["gather_at_0"] = [torch.zeros(2) for _ in range(size)] if rank == 0 else None
    dist.gather(mine, found["gather_at_0"], dst=0)
    found["into_tensor"] = torch.zeros(2 * size)
    dist.all_gather_into_tensor(found["into_tensor"], mine)
    found["reduce_at_1"] = mine.clone()
    dist.reduce(found["reduce_at_1"], dst=1)
    found["scatter"] = torch.zeros(1)
    dist.scatter(found["scatter"], [torch.tensor([5.0]), torch.tensor([6.0])] if rank == 0 else None, src=0)
    found["reduce_scatter"] = torch.zeros(1)
    dist.reduce_scatter(found["reduce_scatter"], list(mine.split(1)))
    found["all_to_all"] = [torch.zeros(1) for _ in range(size)]
    dist.all_to_all(found["all_to_all"], list(mine.split(1)))
    work = dist.all_reduce(mine, async_op=True)
    work.wait()
    found["async"] = mine
    return found


class Asking(Toy):
    """Asks in every hook, and keeps the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}
        self.seen = SumMetric()
        self.validated = SumMetric()
        self.mean = MeanMetric()

    def ask(self, hook: str) -> None:
        answer = [dist.get_rank(), dist.get_world_size(), self.global_rank, self.trainer.world_size, as_objects(0)]
        self.asked.setdefault(hook, answer)

    def setup(self, stage: str) -> None:
        self.ask("setup")
        self.sampler = DistributedSampler(samples(SAMPLES), shuffle=False)
        self.validation = DataLoader(samples(32), 4, sampler=DistributedSampler(samples(32), shuffle=False))

    def train_dataloader(self) -> Any:
        self.ask("train_dataloader")
        return DataLoader(samples(SAMPLES), BATCH, sampler=self.sampler)

    def val_dataloader(self) -> Any:
        return self.validation

    def on_fit_start(self) -> None:
        self.asked["before"] = everything(self.global_rank, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ask("training_step")
        if "during" not in self.asked:
            self.asked["during"] = everything(self.global_rank, 2)
            with pytest.raises(RuntimeError, match=r"send\(\) is not possible with this strategy"):
                dist.send(torch.ones(1), 1 - self.global_rank)
            self.asked["new_group"] = dist.get_world_size(dist.new_group(backend="gloo"))
        self.seen.update(len(batch[2]))
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.ask("validation_step")
        super().validation_step(batch, batch_idx)
        self.mean.update(batch[2].float())
        self.validated.update(len(batch[2]))
        self.log("val_mean", self.mean)

    def on_validation_epoch_end(self) -> None:
        self.asked["metrics"] = [float(self.mean.compute()), float(self.validated.compute())]
        self.validated.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.ask("test_step")
        self.seen.update(len(batch[2]))

    def on_test_epoch_end(self) -> None:
        self.asked["tested"] = float(self.seen.compute())

    def on_train_end(self) -> None:
        super().on_train_end()
        self.ask("on_train_end")
        self.asked["seen"] = float(self.trainer.callback_metrics["seen"])

    def on_fit_end(self) -> None:
        self.ask("on_fit_end")

    def teardown(self, stage: str) -> None:
        self.ask("teardown")


def asking() -> Result:
    module = Asking()
    trainer = make_trainer(devices=2, max_epochs=2, num_sanity_val_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    asked = {**module.asked, "after": everything(trainer.global_rank, 2), "trained_on": module.trained_on}
    module.seen.reset()
    trainer.test(module, loader(60), verbose=False)
    second = Asking()
    make_trainer(devices=2, max_epochs=1).fit(second)
    kept = dist.is_initialized(), dist.get_backend()
    dist.destroy_process_group()
    return {
        **asked,
        "tested": module.asked["tested"],
        "test_step": module.asked["test_step"],
        "warnings": [str(warning.message) for warning in caught],
        "validated_on": module.validated_on,
        "state": state(module),
        "second": second.asked["on_fit_end"],
        "kept": kept,
    }


def test_every_hook_gets_an_answer(run: Run) -> None:
    results = run(asking, workers=2)
    assert_same_model(results)
    for rank, result in enumerate(results):
        for hook in HOOKS:
            assert result[hook] == [rank, 2, rank, 2, [0, 0]], hook
        assert result["second"] == [rank, 2, rank, 2, [0, 0]]
        assert result["kept"] == (True, "halos")  # as after a Trainer with DDP
    # In a fit only rank 0 validates, all of the data, in a world of one.
    assert results[0]["validation_step"] == [0, 1, 0, 1, [0]]
    assert "validation_step" not in results[1]
    assert all(sorted(indices) == list(range(32)) for indices in results[0]["validated_on"][1:])
    # A sampler that divides by rank is not divided again.
    mine = [set(result["trained_on"]) for result in results]
    assert mine == [set(range(0, SAMPLES, 2)), set(range(1, SAMPLES, 2))]
    # Metrics: of this worker's data while training, of all validation data in a fit, of all workers' data in a test.
    assert results[0]["seen"] == SAMPLES / 2
    assert results[0]["metrics"] == [15.5, 32]
    assert [result["tested"] for result in results] == [60, 60]
    for moment in ("before", "after"):
        assert_true(*(result[moment] for result in results))
    for rank, result in enumerate(results):
        assert_as_if_all_had_its_values(result["during"], rank)
        assert result["new_group"] == 2
    (warned,) = [text for text in results[0]["warnings"] if "torch.distributed" in text and "during training" in text]

    assert "torch.distributed.all_gather_object() was called during training at " in warned
    assert "test_default_group.py" in warned
    assert "Compute the loss from this worker's own batch" in warned
    assert not [text for text in results[0]["warnings"] if "sync_dist" in text]


def assert_true(first: Any, second: Any) -> None:
    """Collectives combine the values of both workers, [1, 10] and [2, 11]."""
    for rank, found in enumerate((first, second)):
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["SUM"].tolist() == found["async"].tolist() == [3, 21]
        assert found["AVG"].tolist() == [1.5, 10.5]
        assert found["MAX"].tolist() == found["broadcast"].tolist() == [2, 11]
        assert found["MIN"].tolist() == [1, 10]
        assert found["PRODUCT"].tolist() == [2, 110]
        assert found["broadcast_objects"] == ["from 1"]
        assert torch.cat(found["gather"]).tolist() == found["into_tensor"].tolist() == [1, 10, 2, 11]
        assert found["scatter"].tolist() == [5 + rank]
        assert found["reduce_scatter"].tolist() == [[3], [21]][rank]
        assert torch.cat(found["all_to_all"]).tolist() == [[1, 2], [10, 11]][rank]
    assert torch.cat(first["gather_at_0"]).tolist() == [1, 10, 2, 11]
    assert second["reduce_at_1"].tolist() == [3, 21]


def assert_as_if_all_had_its_values(found: Any, rank: int) -> None:
    """Collectives act as if the other worker had the same values."""
    low, high = 1 + rank, 10 + rank
    assert found["objects"] == [{"rank": rank}] * 2
    assert found["SUM"].tolist() == found["async"].tolist() == [2 * low, 2 * high]
    for name in ("AVG", "MAX", "MIN", "broadcast"):
        assert found[name].tolist() == [low, high]
    assert found["PRODUCT"].tolist() == [low**2, high**2]
    assert found["broadcast_objects"] == [f"from {rank}"]
    assert torch.cat(found["gather"]).tolist() == found["into_tensor"].tolist() == [low, high, low, high]
    assert found["scatter"].tolist() == [[5], [0]][rank]
    assert found["reduce_scatter"].tolist() == [[2 * low], [2 * high]][rank]
    assert torch.cat(found["all_to_all"]).tolist() == [[low, low], [high, high]][rank]


class Divided(IterableDataset[Any]):
    """Divides its samples as data libraries do.

    Args:
        how: ``"group"``, by ``torch.distributed``, or ``"environment"``, by variables if there are any, as WebDataset.
        number: Number of samples.
    """

    def __init__(self, how: str, number: int) -> None:
        self.how, self.samples = how, samples(number)

    def __iter__(self) -> Any:
        if self.how == "environment" and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        else:
            rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(rank + first * size, len(self.samples), size * step):
            yield self.samples[index]


def in_columns(rows: list[dict[str, Tensor]]) -> list[Tensor]:
    return [torch.stack([row[name] for row in rows]) for name in "012"]


class OfUsers(Toy):
    """Its data is divided by the user or by a library.

    Args:
        how: As in :class:`Divided`, ``"datasets"``, or ``"pipe"``.
        processes: Number of DataLoader workers.
        start: How they start.
    """

    def __init__(self, how: str, processes: int = 0, start: str = "fork") -> None:
        super().__init__()
        self.how, self.processes, self.start = how, processes, start

    def data(self, number: int) -> Any:
        options: dict[str, Any] = {"batch_size": BATCH, "num_workers": self.processes}
        if self.processes:
            options["multiprocessing_context"] = self.start
        if self.how == "datasets":
            from datasets import Dataset
            from datasets.distributed import split_dataset_by_node

            table = Dataset.from_dict(dict(zip("012", map(Tensor.tolist, samples(number).tensors), strict=True)))
            stream = table.with_format("torch").to_iterable_dataset(num_shards=4)
            part = split_dataset_by_node(stream, dist.get_rank(), dist.get_world_size())
            return DataLoader(part, collate_fn=in_columns, **options)
        if self.how == "pipe":
            return DataLoader(IterableWrapper(list(samples(number))).sharding_filter(), **options)
        return DataLoader(Divided(self.how, number), **options)

    def train_dataloader(self) -> Any:
        return self.data(SAMPLES)

    def val_dataloader(self) -> Any:
        return self.data(32)


def dividing(cases: list[Any]) -> Result:
    found = {}
    for case in cases:
        module = OfUsers(*case)
        make_trainer(devices=2, max_epochs=2 if "fork" in case else 1).fit(module)
        found[str(case)] = [module.trained_on, module.validated_on]
    return found


@pytest.mark.parametrize(
    ("launcher", "cases"),
    [
        ("lightning", [["group", 0, "fork"], ["datasets", 0, "fork"], ["pipe", 0, "fork"]]),
        ("torchrun", [["environment", 0, "fork"], ["environment", 2, "fork"]]),
        pytest.param("lightning", [["environment", 1, "spawn"]], marks=pytest.mark.slow),
    ],
    ids=["by the group", "by the environment", "in processes that are not forked"],
)
def test_data_libraries_divide_by_rank(run: Run, launcher: str, cases: list[Any]) -> None:
    pytest.importorskip("datasets")
    environments = torchrun_environments(2) if launcher == "torchrun" else lightning_environments(2)
    first, second = run(dividing, cases, environments=environments)
    for case, (trained_on, validated_on) in first.items():
        other, validated_by_other = second[case]
        assert not set(trained_on) & set(other), case
        assert set(trained_on) | set(other) == set(range(SAMPLES)), case
        assert all(sorted(indices) == list(range(32)) for indices in validated_on), case  # by rank 0, in a world of one
        assert validated_on, case
        assert not validated_by_other, case


def with_own_group() -> Result:
    dist.init_process_group("gloo")
    own, part = dist.group.WORLD, dist.new_group([0, 1])
    module = Asking()
    trainer = make_trainer(devices=2, max_epochs=1)
    trainer.fit(module)
    inside = module.asked["training_step"], module.asked["during"]["SUM"].tolist(), module.asked["on_fit_end"]
    is_back = dist.group.WORLD is own and dist.get_backend() == "gloo"
    after = everything_by_gloo(part)
    trainer.validate(module, verbose=False)
    is_back_again = dist.group.WORLD is own
    dist.destroy_process_group()
    return {"inside": inside, "is_back": is_back and is_back_again, "after": after}


def everything_by_gloo(group: Any) -> list[float]:
    found = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(found)
    dist.all_reduce(found, group=group)
    return found.tolist()


def test_a_default_group_of_the_user_is_put_aside_while_the_trainer_runs(run: Run) -> None:
    for rank, result in enumerate(run(with_own_group, environments=torchrun_environments(2))):
        answer = [rank, 2, rank, 2, [0, 0]]
        assert result["inside"] == (answer, [2 * (1 + rank), 2 * (10 + rank)], answer)
        assert result["is_back"]
        assert result["after"] == [6]


class Contrastive(Toy):
    """A contrastive loss over the embeddings of all workers, in the two forms that are common.

    Args:
        sync_grads: Whether gradients flow through the gathered embeddings. Otherwise only through this worker's own.
    """

    def __init__(self, sync_grads: bool) -> None:
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 4)))
        self.sync_grads = sync_grads
        self.losses: list[list[float]] = []

    def loss(self, batch: Any) -> Tensor:
        z, keys = (normalize(self.net(x)) for x in (batch[0], batch[0] + 0.1))
        n = len(z)
        if self.sync_grads:
            gathered = self.all_gather(keys, sync_grads=True).view(self.trainer.world_size * n, -1)
        else:
            parts = self.all_gather(keys)
            parts[self.global_rank] = keys
            gathered = torch.cat(list(parts))
        targets = torch.arange(n) + self.global_rank * n
        loss = cross_entropy(z @ gathered.T, targets)
        self.losses.append([float(loss.detach()), float(cross_entropy(z @ keys.T, torch.arange(n)).detach())])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


def contrasting() -> Result:
    found = {}
    for sync_grads in (True, False):
        module = Contrastive(sync_grads)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(devices=2, max_epochs=1).fit(module, loader(SAMPLES), loader(8))
        warned = [str(warning.message) for warning in caught if "was called during training" in str(warning.message)]
        found[str(sync_grads)] = {"losses": module.losses, "warned": warned, "state": state(module)}
        layers = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]
        assert all("forward" not in vars(layer) for layer in layers)
    return found


def test_a_contrastive_loss_over_all_workers_is_that_of_this_workers_batch(run: Run) -> None:
    results = run(contrasting, workers=2)
    for form in results[0]:
        assert_same_model([result[form] for result in results])
        for rank, result in enumerate(results):
            for loss, own in result[form]["losses"][: -2 if rank == 0 else None]:
                assert loss == pytest.approx(own + math.log(2), rel=1e-5)  # each negative counts twice
        assert all(loss == own for loss, own in results[0][form]["losses"][-2:])  # rank 0 validates in a world of one
        (warned,) = results[0][form]["warned"]
        assert warned.startswith("self.all_gather() was called during training.")
        assert "Compute the loss from this worker's own batch" in warned


class Placed(Toy):
    def on_train_start(self) -> None:
        answer = [dist.get_rank(), dist.get_world_size(), as_objects(self.global_rank)]
        torch.save(answer, f"asked{self.global_rank}.pt")


def simulated() -> Result:
    cluster = SimulatedCluster(bandwidths=[[10.0]], worker_speeds=[[1.0, 0.5]], step_ms=10.0)
    strategy = HalosStrategy(simulate=cluster, local_steps=2)
    make_trainer(strategy, devices=1, max_steps=2).fit(Placed(), loader(16))
    return {"asked": [torch.load(f"asked{rank}.pt") for rank in range(2)], "here": dist.is_initialized()}


def test_in_a_simulation_a_process_has_the_rank_of_the_simulated_worker(run: Run) -> None:
    (result,) = run(simulated, environments=[{}])
    assert result == {"asked": [[0, 2, [0, 1]], [1, 2, [0, 1]]], "here": False}


class Sharing(Toy):
    """Each worker has a part of the optimizer's state, or of a parameter."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def configure_model(self) -> None:
        if self.what == "parameter":
            from torch.distributed.device_mesh import init_device_mesh

            try:
                from torch.distributed.tensor import distribute_tensor
            except ImportError:  # torch 2.4
                from torch.distributed._tensor import distribute_tensor

            parameter = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
            self.register_parameter("part", nn.Parameter(parameter))

    def configure_optimizers(self) -> Any:
        if self.what == "optimizer":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-2)
        return torch.optim.AdamW(self.parameters())


def sharing() -> Result:
    found = {}
    for what in ("optimizer", "parameter"):
        try:
            make_trainer(halos(regions=1), devices=1, max_steps=2).fit(Sharing(what), loader())
        except ValueError as error:
            found[what] = str(error)
    return found


def test_what_is_divided_among_workers_is_refused(run: Run) -> None:
    (result,) = run(sharing, workers=1)
    assert result["optimizer"].startswith("ZeroRedundancyOptimizer is divided among workers")
    assert result["parameter"].startswith("the parameter part is divided among workers")
