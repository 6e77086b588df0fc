"""A run in a narrow format loses no step, sends less, keeps its buffers exact, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import (
    FEATURES,
    LOCAL_STEPS,
    WORKERS,
    Toy,
    assert_same_model,
    assert_trained,
    halos,
    loader,
    make_trainer,
    outcome,
)

STEPS, SAVED, WIDTH, RATE = 40, 20, 2048, 2.0**-10


class Wide(Toy):
    """A model of some 20,000 parameters, with a BatchNorm."""

    pause = 0.005

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)))
        self.counters: dict[str, float] = {}

    def on_train_end(self) -> None:
        super().on_train_end()
        servers: Any = self.trainer.strategy.servers  # type: ignore[attr-defined]
        if servers is not None:
            self.counters = servers.statistics()[1]  # of the region that is not rank 0's

    def more(self) -> Result:
        return {"counters": self.counters}


class Steady(Toy):
    """The gradient is always 1, so each local step moves the weights equally far, wherever they are."""

    pause = 0.005

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, WIDTH, bias=False))
        nn.init.zeros_(self.net.weight)

    def loss(self, batch: Any) -> Tensor:
        return self.net.weight.sum()

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.SGD(self.parameters(), lr=RATE))


def rounded(folder: Path) -> list[Result]:
    """Trains with one server, with two and checkpoints, and on from one of them."""
    results = []
    for regions, ckpt_path in ((1, None), (2, None), (2, folder / f"step={SAVED}.ckpt")):
        module = Steady() if regions == 1 else Wide()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        flags = {"callbacks": saving, "enable_checkpointing": True} if regions == 2 and not ckpt_path else {}
        strategy = halos(regions=regions, wire="int4", accumulate_updates=2)
        trainer = make_trainer(strategy, max_steps=STEPS, **flags)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        results.append(outcome(trainer, module, **module.more()))
    return results


def test_a_run_in_int4_loses_no_step_sends_little_and_goes_on(run: Run, tmp_path: Path) -> None:
    fits = run(rounded, tmp_path)
    steady, narrow, resumed = ([results[fit] for results in fits] for fit in range(3))
    for results in (steady, narrow):
        assert_trained(results, max_steps=STEPS)
    # A server adds a worker's progress with the rate 1 / workers. A residual is less than 1 % of a push.
    moved = -RATE * sum(result["optimizer_steps"] for result in steady) / WORKERS
    torch.testing.assert_close(
        steady[0]["state"]["net.weight"], torch.full((WIDTH, FEATURES), moved), rtol=0, atol=0.02 * RATE * LOCAL_STEPS
    )
    assert_same_model(resumed)
    assert {result["global_step"] for result in resumed} == {STEPS}
    for results in (narrow, resumed):
        assert bool((results[0]["state"]["net.1.running_var"] > 0).all())
    # The first model on the connection is complete, like the last update, and so are the statistics of the BatchNorm,
    # a sixth of the model. On a busy machine, a region may make few other exchanges.
    parameters = sum(parameter.numel() for parameter in Wide().parameters())
    sent, merges = (narrow[0]["counters"][name] for name in ("bytes_between_regions", "merges"))
    assert sent < 4 * parameters * (2 + 2 * 0.35 * merges)

    (folder,) = (tmp_path / f"step={SAVED}").glob("*/")
    shards = {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    for state in (shards["worker-1"], shards["worker-3"], shards["server-1"]["server"]):
        assert state["residual"].shape == (parameters,)
        assert state["residual"].any()
    assert "residual" not in shards["worker-0"], "its server is in the same process"
