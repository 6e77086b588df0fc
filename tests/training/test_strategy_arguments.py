"""Users' mistakes are refused before any process starts, with the argument, the value and the remedy."""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from functools import partial
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO, FSDPPrecision, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_halos
from lightning_halos import (
    AlgorithmStrategy,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    DilocoStrategy,
    HalosMonitor,
    HalosStrategy,
    SimulatedCluster,
    SyncSGDStrategy,
)
from lightning_halos.checkpoint.files import AtomicCheckpointIO
from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.algorithms.halos import Halos
from lightning_halos.core.wire_formats import WireFormats
from lightning_halos.training.composed_strategy import refuse_averages_of_parts, refuse_precision_plugin
from lightning_halos.training.other_packages import refuse_elsewhere


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_steps": 0}, "local_steps=0 must be a whole number of at least 1"),
        ({"local_steps": 2.5}, "local_steps=2.5 must be a whole number of at least 1"),
        ({"local_steps": True}, "local_steps=True must be a whole number of at least 1"),
        ({"local_steps": 10**400}, "local_steps must be a whole number of at most 9223372036854775807, and has 1329"),
        ({"accumulate_updates": 10**400}, "accumulate_updates must be a whole number of at most"),
        ({"servers_per_region": 0}, "servers_per_region=0 must be a whole number of at least 1"),
        ({"accumulate_updates": -1}, "accumulate_updates=-1 must be a whole number of at least 1"),
        ({"merge_weight": 1.5}, r"merge_weight=1.5 must be a number from 0 .* to 1"),
        ({"merge_weight": float("nan")}, "merge_weight=nan must be a number from 0"),
        ({"max_norm_ratio": 1}, r"max_norm_ratio=1 must be None \(no limit\) or a number above 1, such as 10"),
        ({"max_norm_ratio": "10"}, "max_norm_ratio='10' must be None"),
        ({"timeout": 0}, "timeout=0 must be a positive number of seconds"),
        ({"grace_time": -1}, "grace_time=-1 must be a positive number of seconds"),
        ({"timeout": 1e18}, r"timeout=1e\+18 must be a positive number of seconds, of at most 315360000 \(ten years\)"),
        ({"timeout": "long"}, "timeout='long' must be a positive number of seconds"),
        ({"start_method": "forkserver"}, "start_method='forkserver' must be one of"),
        ({"regions": 0}, "regions=0 must be at least 1"),
        ({"regions": [[0, 1], []]}, r"regions=\[\[0, 1\], \[\]\]: region 1 has no workers"),
        ({"regions": [[0, 1], [1, 2]]}, "rank 1 is in region 0 and in region 1"),
        ({"worker": 0}, "worker=0 must be at least 1"),
        ({"simulate": "examples"}, "examples is a folder. Give the YAML file that describes the cluster"),
        ({"inner": "ddp"}, r"inner='ddp' needs workers of several processes: pass worker=2"),
        (
            {"worker": 4, "inner": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)},
            r"data_parallel_size=2, tensor_parallel_size=2\) must have data_parallel_size=4, the number of processes",
        ),
        (
            {"worker": 2, "inner": DDPStrategy(checkpoint_io=TorchCheckpointIO())},
            r"inner=<DDPStrategy> has a <TorchCheckpointIO>.* Pass it to Trainer\(plugins=...\)",
        ),
        (
            {"worker": 2, "inner": FSDPStrategy(precision_plugin=FSDPPrecision("bf16-mixed"))},
            r"inner=<FSDPStrategy> has a <FSDPPrecision>",
        ),
        ({"worker": 2, "inner": "deepspeed"}, r"inner='deepspeed' must be a strategy of Lightning, or one of \['ddp'"),
    ],
)
def test_a_wrong_value_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HalosStrategy(**arguments)


@pytest.mark.parametrize(
    ("strategy", "arguments", "message"),
    [
        (HalosStrategy, {"local_step": 4}, r"HalosStrategy has no argument local_step\. Did you mean local_steps\?"),
        (DilocoStrategy, {"merge_weight": 0.5}, r"DilocoStrategy has no argument merge_weight\."),
        (
            SyncSGDStrategy,
            {"simulate": "examples/clusters/paper.yaml", "defaults": "run"},
            r"SyncSGDStrategy has no argument defaults\.",
        ),
        (AsyncLocalSGDStrategy, {"grace_tim": 3, "x": 3}, r"has no argument grace_tim, x\. Did you mean grace_time\?"),
    ],
    ids=str,
)
def test_an_argument_that_a_strategy_does_not_have_is_named(
    strategy: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        strategy(**arguments)


def test_overlap_is_for_workers_that_push_when_they_are_ready() -> None:
    with pytest.raises(TypeError, match="overlap='yes' must be True or False"):
        HalosStrategy(overlap="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"overlap=True: DilocoStrategy has no such argument.* rounds are synchronous"):
        DilocoStrategy(overlap=True)
    for strategy in (HalosStrategy(overlap=True), AsyncLocalSGDStrategy(overlap=True)):
        assert isinstance(strategy.algorithm, ServerAlgorithm)
        assert strategy.algorithm.overlap


def test_wire_is_for_messages_between_workers_and_servers() -> None:
    with pytest.raises(ValueError, match="wire='int3' must be one of 'float32', 'bfloat16', 'int8', 'int4'"):
        HalosStrategy(wire="int3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"wire='int8': DilocoStrategy has no such argument.* has no residual"):
        DilocoStrategy(wire="int8")
    for strategy in (HalosStrategy(wire={"between": "int4"}), AsyncLocalSGDStrategy(wire={"between": "int4"})):
        assert isinstance(strategy.algorithm, ServerAlgorithm)
        assert strategy.algorithm.wire == WireFormats("float32", "int4")


@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        (None, DDPStrategy),
        ("ddp_find_unused_parameters_true", DDPStrategy),
        ("fsdp", FSDPStrategy),
        ("fsdp2", ModelParallelStrategy),
        (FSDPStrategy(), FSDPStrategy),
    ],
)
def test_the_strategy_inside_a_worker_is_lightnings_own(inner: Any, kind: type) -> None:
    assert type(HalosStrategy(worker=2, inner=inner).inner) is kind
    assert HalosStrategy().inner is None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], DDPStrategy),
        (["--trainer.strategy.inner=fsdp2"], ModelParallelStrategy),
        (
            [
                "--trainer.strategy.inner=lightning.pytorch.strategies.ModelParallelStrategy",
                "--trainer.strategy.inner.data_parallel_size=2",
            ],
            ModelParallelStrategy,
        ),
    ],
    ids=["default", "name", "class"],
)
@pytest.mark.parametrize("worker", ["2", "node"])
def test_workers_of_several_processes_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, worker: str, arguments: list[str], kind: type
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    common = ["--trainer.accelerator=cpu", "--trainer.devices=4", "--trainer.logger=false"]
    strategy = ["--trainer.strategy=lightning_halos.HalosStrategy", f"--trainer.strategy.worker={worker}"]
    cli = LightningCLI(BoringModel, args=[*common, *strategy, *arguments], run=False, save_config_callback=None)
    assert isinstance(cli.trainer.strategy, HalosStrategy)
    assert type(cli.trainer.strategy.inner) is kind


def test_averages_of_a_module_that_is_divided_are_refused() -> None:
    average = StochasticWeightAveraging(1e-2)
    trainer = L.Trainer(accelerator="cpu", devices=2, logger=False, callbacks=[average])
    refuse_averages_of_parts(trainer, DDPStrategy())
    with pytest.raises(ValueError, match="StochasticWeightAveraging keeps a copy of the complete module, but inner="):
        refuse_averages_of_parts(trainer, ModelParallelStrategy())


class OwnPrecision(MixedPrecision):
    """A precision plugin of the user."""


def test_a_precision_plugin_that_fsdp_would_not_use_is_refused() -> None:
    for plugin in (MixedPrecision("bf16-mixed", "cpu"), OwnPrecision("bf16-mixed", "cpu")):
        trainer = L.Trainer(accelerator="cpu", logger=False, plugins=plugin)
        with pytest.raises(TypeError, match=r"<(Own|Mixed)Precision>. Pass Trainer\(precision='bf16-mixed'\), or"):
            refuse_precision_plugin(trainer, plugin)
    trainer = L.Trainer(accelerator="cpu", logger=False, precision="bf16-mixed")
    refuse_precision_plugin(trainer, trainer.precision_plugin)


@pytest.mark.parametrize("strategy", ["halos", HalosStrategy])
def test_files_are_written_atomically_unless_the_trainer_has_a_plugin_for_that(strategy: Any) -> None:
    def written_with(plugins: Any) -> Any:
        made = strategy if isinstance(strategy, str) else strategy()
        return L.Trainer(strategy=made, accelerator="cpu", devices=2, plugins=plugins).strategy.checkpoint_io

    mine = TorchCheckpointIO()
    assert isinstance(written_with(None), AtomicCheckpointIO)
    assert written_with(mine) is mine
    assert written_with(AsyncCheckpointIO(mine)).checkpoint_io is mine
    assert isinstance(written_with(AsyncCheckpointIO()).checkpoint_io, AtomicCheckpointIO)


def test_another_kind_of_strategy_inside_a_worker_is_refused() -> None:
    with pytest.raises(TypeError, match="inner=<HalosStrategy> must be Lightning's DDPStrategy, FSDPStrategy or"):
        HalosStrategy(worker=2, inner=HalosStrategy())  # type: ignore[arg-type]


def test_a_described_cluster_has_workers_of_the_strategys_size() -> None:
    cluster = SimulatedCluster([[1.0]], [[1.0, 1.0]], 10.0, devices_per_worker=4)
    with pytest.raises(ValueError, match=r"describes workers of 4 device\(s\), but worker=1. Pass worker=4"):
        HalosStrategy(simulate=cluster)
    assert HalosStrategy(simulate=cluster, worker=4).cluster is cluster
    with pytest.raises(ValueError, match="worker='node' has no meaning with simulate="):
        L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            strategy=HalosStrategy(simulate=SimulatedCluster([[1.0]], [[1.0, 1.0]], 10.0), worker="node"),
        )


def test_a_size_of_workers_that_does_not_divide_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"worker=2 does not divide the 3 process\(es\) of a node.* such as worker=3"):
        L.Trainer(accelerator="cpu", devices=3, strategy=HalosStrategy(worker=2), logger=False)


@pytest.mark.parametrize("name", ["local_optimizer", "global_optimizer"])
def test_an_optimizer_instead_of_a_function_that_makes_one_is_refused(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(TypeError, match=rf"{name}=<SGD> must be a function from parameters to an optimizer"):
        HalosStrategy(**{name: optimizer})


OTHER = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        (lambda params: None, TypeError, r" returns None\. It must return the optimizer that it makes"),
        (int, TypeError, "=<int> must be a function from parameters"),
        (
            lambda params: torch.optim.SGD([OTHER], lr=1.0),
            ValueError,
            "an optimizer of other parameters than those that",
        ),
        (torch.optim.LBFGS, ValueError, r"returns the optimizer LBFGS, whose step\(\) needs a closure"),
    ],
    ids=["nothing", "no optimizer", "other parameters", "a closure"],
)
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (HalosStrategy, "local_optimizer"),
        (HalosStrategy, "global_optimizer"),
        (AsyncLocalSGDStrategy, "optimizer"),
        (DilocoStrategy, "outer_optimizer"),
    ],
)
def test_an_optimizer_that_no_server_can_use_is_refused(
    strategy: Any, name: str, factory: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{name}.*{message}"):
        strategy(**{name: factory})


def test_regions_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError, match="regions='two' must be None, a number of regions"):
        HalosStrategy(regions="two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regions": 5}, r"regions=5 is more than the 4 worker\(s\)"),
        ({"regions": [[0, 1], [2]]}, r"ranks without a region: \[3\]"),
        ({"regions": [[0, 1], [2, 3, 4]]}, r"ranks that do not exist: \[4\]"),
        ({"regions": 2, "servers_per_region": 3}, r"servers_per_region=3 is more than the 2 worker\(s\)"),
    ],
)
def test_regions_that_do_not_fit_the_workers_are_refused_by_the_trainer(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        L.Trainer(strategy=HalosStrategy(**arguments), accelerator="cpu", devices=4, logger=False)


@pytest.mark.parametrize(
    ("name", "start_method"),
    [("halos", "popen"), ("halos_spawn", "spawn"), ("halos_fork", "fork"), ("halos_notebook", "fork")],
)
def test_the_strategies_are_registered(name: str, start_method: str) -> None:
    trainer = L.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, HalosStrategy)
    assert trainer.strategy._start_method == start_method


@pytest.mark.parametrize(("name", "kind"), [("diloco", DilocoStrategy), ("async_local_sgd", AsyncLocalSGDStrategy)])
def test_the_baselines_are_registered(name: str, kind: type[AlgorithmStrategy]) -> None:
    trainer = L.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is kind


def test_synchronous_sgd_by_name_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"'sync_sgd' is for simulations. Pass SyncSGDStrategy\(simulate=cluster\)"):
        L.Trainer(strategy="sync_sgd", accelerator="cpu", devices=2, logger=False)


def test_the_defaults_for_4_regions_of_4_workers_are_the_papers_values() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    algorithm = Halos(global_steps=6144)
    local = algorithm.make_local_optimizer(workers=4, servers=4)([parameter])
    everywhere = algorithm.make_global_optimizer(servers=4)([parameter])
    assert isinstance(local, DelayedNesterov)
    assert local.defaults == {"lr": 0.2, "momentum": 0.9, "delay": 16, "activation": 0.0}
    assert everywhere.defaults == {"lr": pytest.approx(0.15), "momentum": 0.5, "delay": 2, "activation": 0.0}


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_a_single_server_averages_its_workers_by_default(workers: int) -> None:
    model = torch.nn.Parameter(torch.zeros(1))
    optimizer = Halos().make_local_optimizer(workers, servers=1)([model])
    for worker in range(workers):
        model.grad = -torch.tensor([float(worker)])  # each worker moved from the same model to its own rank
        optimizer.step()
    assert model.item() == pytest.approx((workers - 1) / 2)
    assert not any("momentum" in state for state in optimizer.state.values())


def test_an_optimizer_that_is_given_replaces_that_of_a_single_server() -> None:
    given = partial(DelayedNesterov, lr=0.2)
    assert Halos(local_optimizer=given).make_local_optimizer(4, servers=1) is given


class ListConfig(MutableSequence[Any]):
    """A sequence that is no list, as in Hydra's configurations."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __setitem__(self, index: Any, value: Any) -> None: ...

    def __delitem__(self, index: Any) -> None: ...

    def insert(self, index: int, value: Any) -> None: ...


@pytest.mark.parametrize("kind", [ListConfig, lambda *items: items], ids=["ListConfig", "tuple"])
def test_any_sequence_of_integers_will_do(kind: Any) -> None:
    strategy = HalosStrategy(regions=kind(kind(0, 1), kind(2, 3)), servers_per_region=kind(1, 2))
    L.Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)
    assert [group.ranks for group in strategy.topology.groups] == [(0, 1), (2,), (3,)]
    with pytest.raises(ValueError, match=r"servers_per_region\[1\]='2' must be a whole number"):
        HalosStrategy(servers_per_region=kind(1, "2"))


@pytest.mark.parametrize("strategy", ["halos", "diloco", HalosStrategy(), DilocoStrategy()], ids=str)
@pytest.mark.parametrize("package", ["pytorch_lightning", "fabric"])
def test_other_packages_refuse_the_strategies_and_say_which_import_to_change(package: str, strategy: Any) -> None:
    trainer = L.Fabric if package == "fabric" else pytorch_lightning.Trainer
    refuse_elsewhere(["halos", "diloco"])  # as an import of lightning_halos does, after that of pytorch_lightning
    with pytest.raises((TypeError, ValueError), match=r"write 'import lightning.pytorch as pl' instead of"):
        trainer(strategy=strategy, accelerator="cpu", devices=2)


def test_the_monitor_needs_a_halos_strategy() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[HalosMonitor()])
    with pytest.raises(MisconfigurationException, match="strategy='halos'"):
        trainer.fit(BoringModel())


def test_everything_public_is_documented() -> None:
    assert all(getattr(lightning_halos, name).__doc__ for name in lightning_halos.__all__)
