"""A fit of 4 workers in 2 regions in which one rank misbehaves; run by test_failures.py.

Usage: script.py FOLDER START_METHOD RANK FAULT STRATEGY. Every process writes its PID into FOLDER; RANK writes the file
"fault" right before it misbehaves after a few steps.
"""

import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import DilocoStrategy, HalosStrategy

folder, start_method, rank, fault = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.batches = 0

    def on_train_start(self) -> None:
        (folder / f"pid_{self.global_rank}").write_text(str(os.getpid()))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches += 1
        time.sleep(0.02)
        if self.global_rank == rank and (self.batches == 30 or (self.batches > 30 and fault == "huge")):
            self.misbehave()
        return self.layer(batch[0]).square().mean()

    def misbehave(self) -> None:
        (folder / "fault").touch()
        if fault == "raise":
            raise ValueError("a mistake in the user's code")
        if fault in ("nan", "huge"):
            with torch.no_grad():
                self.layer.weight.fill_({"nan": float("nan"), "huge": 1e6}[fault])
        elif fault != "none":
            os.kill(os.getpid(), getattr(signal, fault))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


if __name__ == "__main__":
    timeout = 8 if fault == "SIGSTOP" else 120
    strategy = HalosStrategy(
        regions=2,
        local_steps=2 if fault == "huge" else 8,
        accumulate_updates=2,
        max_norm_ratio=10 if fault == "huge" else None,
        timeout=timeout,
        start_method=start_method,
    )
    if sys.argv[5] == "diloco":
        strategy = DilocoStrategy(local_steps=4, timeout=timeout, start_method=start_method)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        max_steps=60 if fault in ("nan", "huge") else 100_000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(4096, 8)), batch_size=4))
    is_sound = bool((model.layer.weight.abs() < 100).all())
    print(f"END {trainer.global_rank} {trainer.global_step} {is_sound}", flush=True)
