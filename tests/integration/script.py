"""A user's training script: ``python -m tests.integration.script FOLDER START_METHOD MAX_STEPS``.

It has two workers only, because to import Lightning is most of what a new process does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.integration.harness import save_result
from tests.integration.toys import Toy, halos, loader, make_trainer, outcome

WORKERS = 2


class Script(Toy):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (self.folder / f"pid{self.global_rank}").write_text(str(os.getpid()))
        return super().training_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        save_result(self.folder, self.global_rank, outcome(self.trainer, self))


def main(folder: str, start_method: str, max_steps: str) -> None:
    module = Script(Path(folder))
    trainer = make_trainer(halos(start_method=start_method), devices=WORKERS, max_steps=int(max_steps))
    trainer.fit(module, loader())


if __name__ == "__main__":
    main(*sys.argv[1:])
