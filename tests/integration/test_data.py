"""Any data loads unchanged."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from lightning_halos import HalosMonitor
from lightning_halos.training import sketches
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    BATCH,
    FEATURES,
    SAMPLES,
    Toy,
    assert_no_step_lost,
    assert_same_model,
    assert_trained,
    loader,
    make_trainer,
    outcome,
    samples,
)
from tests.integration.virtual import simulate


class Noting(Toy):
    """Also records the epoch of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.epochs += [self.current_epoch] * len(batch[2])
        return super().training_step(batch, batch_idx)

    def more(self) -> Result:
        return {
            "epochs": self.epochs,
            "batches": self.trainer.num_training_batches,
            "estimated": self.trainer.estimated_stepping_batches,
        }


def assert_every_sample_once_per_epoch(results: list[Result], drop_last: bool) -> None:
    used = Counter(pair for r in results for pair in zip(r["epochs"], r["trained_on"], strict=True))
    assert set(used.values()) == {1}
    for epoch in range(3):
        indices = {index for at, index in used if at == epoch}
        assert len(indices) == SAMPLES if drop_last else indices == set(range(SAMPLES + 10))
    for result in results:
        assert result["global_step"] == sum(r["optimizer_steps"] for r in results) // 4
        assert result["epoch"] == 3
        assert result["batches"] == (16 if drop_last else 17)  # those of a shard, as under DDP
        assert result["global_step"] <= result["estimated"]  # a module may have a table of as many values
    assert_no_step_lost(results)
    assert_same_model(results)


@pytest.mark.parametrize(
    ("servers", "data_workers", "drop_last", "flags"),
    [(1, 0, False, {}), (2, 1, False, {}), (1, 0, True, {}), (1, 1, False, {"accumulate_grad_batches": 3})],
    ids=str,
)
def test_max_epochs_uses_every_sample_once_per_epoch_and_a_slow_worker_gets_less(
    tmp_path: Path, servers: int, data_workers: int, drop_last: bool, flags: dict[str, Any]
) -> None:
    data = loader(SAMPLES + 10, shuffle=True, num_workers=data_workers, drop_last=drop_last)
    strategy = {"servers_per_region": servers}
    results = simulate(tmp_path, Noting(), data, slow=3, strategy=strategy, max_epochs=3, **flags)
    assert_every_sample_once_per_epoch(results, drop_last)
    counts = [len(result["trained_on"]) for result in results]
    assert min(counts[:3]) > 2 * counts[3], "the slow worker gets less to do, instead of keeping the others waiting"


class Looking(Noting):
    """Looks at the training data in hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[int] = []

    def look(self) -> None:
        self.looks.append(sum(len(batch[2]) for batch in self.trainer.train_dataloader))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 4 == 1:
            next(iter(self.trainer.train_dataloader))
        if batch_idx == 2:
            self.look()

    def on_train_epoch_end(self) -> None:
        self.look()

    def more(self) -> Result:
        return {**super().more(), "looks": self.looks}


class LookingFirst(Looking):
    """Takes the batches itself."""

    def on_train_epoch_start(self) -> None:
        next(iter(self.trainer.train_dataloader))

    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Looking, {}),
        pytest.param(Looking, {"num_workers": 1}, marks=pytest.mark.slow),
        (Looking, {"num_workers": 1, "persistent_workers": True}),
        (LookingFirst, {}),
    ],
    ids=str,
)
def test_a_hook_that_looks_at_the_training_data_takes_none_of_it(
    tmp_path: Path, kind: type[Looking], options: dict[str, Any]
) -> None:
    data = loader(SAMPLES + 10, shuffle=True, **options)
    results = simulate(tmp_path, kind(), data, max_epochs=3, callbacks=[HalosMonitor()])
    assert_every_sample_once_per_epoch(results, drop_last=False)
    for result in results:
        assert set(result["looks"]) == {math.ceil((SAMPLES + 10) / 4)}, "a shard, as under DDP"
        assert len(result["looks"]) == 6


class Leaving(Noting):
    """Leaves the first epoch in the middle of a step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 5 else None


def test_an_epoch_may_be_left_in_the_middle_of_a_step(tmp_path: Path) -> None:
    results = simulate(tmp_path, Leaving(), loader(), max_epochs=2, accumulate_grad_batches=4)
    assert_same_model(results)
    for result in results:
        assert result["epoch"] == 2
        assert result["epochs"].count(0) == 5 * BATCH
    second = [sample for r in results for epoch, sample in zip(r["epochs"], r["trained_on"], strict=True) if epoch == 1]
    assert sorted(second) == list(range(SAMPLES))


def epochs(number: int, data_workers: int, drop_last: bool, flags: dict[str, Any]) -> Result:
    module, trainer = Noting(), make_trainer(max_epochs=number, **flags)
    trainer.fit(module, loader(SAMPLES + 10, shuffle=True, num_workers=data_workers, drop_last=drop_last))
    return outcome(trainer, module, **module.more())


@pytest.mark.parametrize(
    ("data_workers", "drop_last", "flags"),
    [(1, False, {}), (0, True, {"accumulate_grad_batches": 3})],
    ids=str,
)
def test_in_real_time_every_sample_is_used_once_per_epoch_too(
    run: Run, data_workers: int, drop_last: bool, flags: dict[str, Any]
) -> None:
    assert_every_sample_once_per_epoch(run(epochs, 3, data_workers, drop_last, flags), drop_last)


class Stream(IterableDataset[Any]):
    """A worker's share of the samples, of unknown length, again and again if endless."""

    def __init__(self, endless: bool) -> None:
        self.endless = endless

    def __iter__(self) -> Iterator[Any]:
        data = samples()
        while True:
            for index in range(self.rank, SAMPLES, 4):
                yield data[index]
            if not self.endless:
                return

    @property
    def rank(self) -> int:
        import os

        return int(os.environ["LOCAL_RANK"])


def stream(endless: bool, **kwargs: Any) -> Result:
    module, trainer = Toy(), make_trainer(**kwargs)
    trainer.fit(module, DataLoader(Stream(endless), batch_size=4), loader(16))
    return outcome(trainer, module)


def endless_stream() -> Result:
    return stream(True, max_steps=60, val_check_interval=20)


def test_endless_iterable_dataset(run: Run) -> None:
    results = run(endless_stream)
    assert_trained(results, max_steps=60)
    assert 2 <= len(results[0]["validated_on"]) <= 3  # two that fall due at once, on a busy machine, are one


def finite_stream() -> Result:
    return stream(False, max_epochs=2)


def test_iterable_dataset_without_length(run: Run) -> None:
    results = run(finite_stream)
    for rank, result in enumerate(results):
        assert result["trained_on"] == [*range(rank, SAMPLES, 4)] * 2
        assert result["global_step"] == 2 * SAMPLES / 4 / 4
    assert [len(result["validated_on"]) for result in results] == [2, 0, 0, 0]
    assert_no_step_lost(results)
    assert_same_model(results)


def with_data_workers(persistent: bool) -> Result:
    module, trainer = Toy(), make_trainer(max_steps=40)
    trainer.fit(module, loader(num_workers=1, persistent_workers=persistent))
    return outcome(trainer, module)


@pytest.mark.parametrize("persistent", [False, True])
def test_data_loader_workers(run: Run, persistent: bool) -> None:
    assert_trained(run(with_data_workers, persistent), max_steps=40)


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append("setup" if stage == "fit" else stage)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16)

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown" if stage == "fit" else stage)


def data_module() -> Result:
    module, data, trainer = Toy(), Data(), make_trainer(max_steps=40, val_check_interval=16)
    trainer.fit(module, datamodule=data)
    return outcome(trainer, module, calls=data.calls)


def test_data_module(run: Run) -> None:
    results = run(data_module)
    assert_trained(results, max_steps=40)
    assert results[0]["calls"] == ["prepare", "setup", "teardown"]
    assert all(result["calls"] == ["setup", "teardown"] for result in results[1:])
    validated = results[0]["validated_on"]
    assert validated == [[*range(16)]] * len(validated)
    assert 1 <= len(validated) <= 2  # two that fall due at once, on a busy machine, are one


def uneven() -> Result:
    module, trainer = Toy(), make_trainer(max_epochs=2)
    trainer.fit(module, loader(42))
    return outcome(trainer, module)


def test_samples_that_do_not_divide_are_not_repeated(run: Run) -> None:
    results = run(uneven)
    seen = Counter(index for result in results for index in result["trained_on"])
    assert seen == Counter(dict.fromkeys(range(42), 2))
    assert sum(result["optimizer_steps"] for result in results) == 2 * 11
    assert_no_step_lost(results)
    assert_same_model(results)


def own_sampler() -> Result:
    module, trainer = Toy(), make_trainer(max_epochs=2)
    data = samples()
    sampler = DistributedSampler(data, num_replicas=4, rank=trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=sampler))
    return outcome(trainer, module)


def test_a_users_own_sampler_goes_on_as_it_is(run: Run) -> None:
    results = run(own_sampler)
    for rank, result in enumerate(results):
        assert result["trained_on"] == [*range(rank, SAMPLES, 4)] * 2
    assert_no_step_lost(results)


def several_loaders() -> Result:
    module, trainer = Several(), make_trainer(max_epochs=2)
    trainer.fit(module, [loader(), loader(128)])
    return outcome(trainer, module)


class Several(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


def test_several_loaders_are_divided_as_under_ddp(run: Run) -> None:
    results = run(several_loaders)
    assert [result["optimizer_steps"] for result in results] == [32] * 4
    assert_same_model(results)


def too_small() -> Result:
    module, trainer = Toy(), make_trainer(max_epochs=3)
    trainer.fit(module, loader(8), loader(8))
    return outcome(trainer, module)


def test_an_epoch_with_less_data_than_workers(run: Run) -> None:
    results = run(too_small)
    seen = Counter(index for result in results for index in result["trained_on"])
    assert seen == Counter(dict.fromkeys(range(8), 3))
    assert all(result["epoch"] == 3 for result in results)
    assert_same_model(results)


class Divided(pl.LightningDataModule):
    """Gives every rank its own samples: 24 to the first, 36 to the second."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        own = range(24) if self.trainer.global_rank == 0 else range(24, 60)
        return DataLoader(Subset(samples(60), own), batch_size=4)


class Reader(Dataset[Any]):
    """Reads the sample at an index, plus random numbers, as from a file; nothing in it says where it begins."""

    def __init__(self, first: int, noise: float) -> None:
        self.first = first
        self.noise = noise

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        values, target, number = samples(64)[self.first + index]
        return values + self.noise * torch.randn(FEATURES), target, number


class Readers(pl.LightningDataModule):
    def __init__(self, own: int, noise: float) -> None:
        super().__init__()
        self.own = own
        self.noise = noise

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(Reader(self.own * self.trainer.global_rank, self.noise), batch_size=4)


class Opened(Reader):
    """Holds what it has opened when it was first read, as rank 0 may have before the others: it validates first."""

    def __init__(self) -> None:
        super().__init__(0, noise=0.0)
        self.opened: list[Any] = []

    def __getitem__(self, index: int) -> Any:
        self.opened = self.opened or [torch.zeros(3)]
        return super().__getitem__(index)


class ReadBefore(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        dataset = Opened()
        if self.trainer.global_rank == 0:
            dataset[0]
        return DataLoader(dataset, batch_size=4)


def divided(distributed: bool, data: pl.LightningDataModule | None = None) -> Result:
    module, trainer = Toy(), make_trainer(devices=2, max_epochs=1, use_distributed_sampler=distributed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data or Divided())
    texts = [str(warning.message) for warning in caught]
    return outcome(trainer, module, warnings=[text for text in texts if "datasets of the workers" in text])


def test_data_that_the_user_divided_by_rank_is_noticed_and_trains_as_under_ddp(run: Run) -> None:
    results = run(divided, True, workers=2)
    (text,) = results[0]["warnings"]
    assert "have different lengths (24, 36, by rank)" in text
    assert "use_distributed_sampler=False" in text
    first, second = (result["trained_on"] for result in results)
    assert len(first) == len(set(first)) == 12
    assert len(second) == len(set(second)) == 18
    assert set(first) <= set(range(24))
    assert set(second) <= set(range(24, 60))
    assert_same_model(results)


def with_readers() -> Result:
    sketches.SECONDS = 60.0  # however busy this machine is
    return {
        "divided": divided(True, Readers(32, noise=0.0))["warnings"],
        "divided and random": divided(True, Readers(32, noise=1.0))["warnings"],
        "random": divided(True, Readers(0, noise=1.0))["warnings"],
        "read before": divided(True, ReadBefore())["warnings"],
    }


def test_samples_are_compared_if_the_datasets_have_equal_lengths(run: Run) -> None:
    said = run(with_readers, workers=2)[0]
    counts = {"divided": 1, "divided and random": 1, "random": 0, "read before": 0}
    assert {name: len(texts) for name, texts in said.items()} == counts
    assert "have different samples at the same index" in said["divided"][0]


def test_data_that_the_user_divided_by_rank_is_used_completely_with_the_remedy(run: Run) -> None:
    results = run(divided, False, workers=2)
    assert [result["trained_on"] for result in results] == [list(range(24)), list(range(24, 60))]
    assert not results[0]["warnings"]
    assert_same_model(results)
