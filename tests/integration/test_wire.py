"""A run in a narrow format trains as well, sends less, keeps its buffers exact, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import FEATURES, Toy, assert_trained, halos, loader, make_trainer, outcome, samples

STEPS, SAVED, WIDTH = 40, 20, 2048


class Wide(Toy):
    """A model of some 20,000 parameters, with a BatchNorm."""

    pause = 0.005

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)))
        self.bytes_per_exchange = 0.0

    def on_train_end(self) -> None:
        super().on_train_end()
        servers: Any = self.trainer.strategy.servers  # type: ignore[attr-defined]
        if servers is not None:
            counters = servers.statistics()[1]  # of the region that is not rank 0's
            self.bytes_per_exchange = counters["bytes_between_regions"] / counters["merges"]

    def configure_optimizers(self) -> Any:
        return self.counted(torch.optim.AdamW(self.parameters(), lr=1e-3))


def rounded(folder: Path) -> list[Result]:
    """Trains as it is, in int4 with checkpoints, and on from one of them."""
    results = []
    for wire, ckpt_path in (("float32", None), ("int4", None), ("int4", folder / f"step={SAVED}.ckpt")):
        module = Wide()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        flags = {"callbacks": saving, "enable_checkpointing": True} if wire == "int4" and not ckpt_path else {}
        trainer = make_trainer(halos(wire=wire, accumulate_updates=2), max_steps=STEPS, **flags)
        trainer.fit(module, loader(), ckpt_path=ckpt_path)
        results.append(outcome(trainer, module, bytes_per_exchange=module.bytes_per_exchange))
    return results


def error_of(result: Result) -> float:
    module = Wide().eval()
    module.load_state_dict(result["state"])
    inputs, targets, _ = samples()[:]
    with torch.no_grad():
        return float(mse_loss(module.net(inputs), targets))


def test_a_run_in_int4_trains_sends_little_and_goes_on(run: Run, tmp_path: Path) -> None:
    fits = run(rounded, tmp_path, timeout=180)
    plain, narrow, resumed = ([results[fit] for results in fits] for fit in range(3))
    for results in (plain, narrow):
        assert_trained(results, max_steps=STEPS)
    assert {result["global_step"] for result in resumed} == {STEPS}
    start = float(samples().tensors[1].square().mean())
    for results in (plain, narrow, resumed):
        assert error_of(results[0]) < 0.7 * start
        assert bool((results[0]["state"]["net.1.running_var"] > 0).all())
    # The first model on the connection is complete, like the last one.
    assert narrow[0]["bytes_per_exchange"] < 0.5 * plain[0]["bytes_per_exchange"]

    (folder,) = (tmp_path / f"step={SAVED}").glob("*/")
    parameters = sum(parameter.numel() for parameter in Wide().parameters())
    shards = {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    for state in (shards["worker-1"], shards["worker-3"], shards["server-1"]["server"]):
        assert state["residual"].shape == (parameters,)
        assert state["residual"].any()
    assert "residual" not in shards["worker-0"], "its server is in the same process"
