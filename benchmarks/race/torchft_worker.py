"""One worker of a run under torchft's DiLoCo. It runs in an environment of torchft's own.

Each worker is a replica group, as each is a worker of DiLoCo. Run as ``python -m race.torchft_worker FOLDER SETTINGS``,
with torchft's variables, RANK and ADDRESS in the environment. SETTINGS are JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ADDRESS = os.environ["ADDRESS"]
socket.gethostname = lambda: ADDRESS  # torchft tells others its host name, which this network does not know

import torch  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402
from torchft import Manager, ProcessGroupGloo  # noqa: E402
from torchft.local_sgd import DiLoCo  # noqa: E402

from race.task import BATCH, SEED, WORKERS, Device, RaceData, RaceGPT, Record  # noqa: E402

PATIENCE = timedelta(minutes=10)  # one averaging takes half a minute on the slowest link


def main(folder: str, text: str) -> None:
    """Trains until the last step, or until it is ended."""
    settings = json.loads(text)
    rank, steps, local_steps = int(os.environ["RANK"]), settings["steps"], settings["local_steps"]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(SEED)  # all start from one model, so that torchft need not copy the first
    store = torch.distributed.TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)

    model, data = RaceGPT(), RaceData()
    data.setup("fit")
    sampler: Any = DistributedSampler(data.train, WORKERS, rank, seed=SEED, drop_last=True)
    trainer = SimpleNamespace(estimated_stepping_batches=steps)
    model.trainer = trainer  # type: ignore[assignment]
    optimization: Any = model.configure_optimizers()
    inner, scheduler = optimization["optimizer"], optimization["lr_scheduler"]["scheduler"]
    outer = torch.optim.SGD(model.parameters(), **settings["outer"])
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        min_replica_size=WORKERS,
        use_async_quorum=False,
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=ADDRESS,
        store_port=store.port,
        replica_id=str(rank),
        hostname=ADDRESS,
        init_sync=False,
    )
    device, record = Device(settings["seconds"][rank]), Record(Path(folder), rank)

    def pace(*_: Any) -> None:
        computed = device.computed
        device.sleep_until(1.0)
        record.step(computed)

    inner.register_step_post_hook(pace)  # before torchft's own, which waits for the others
    # All parameters in one message, instead of one for each parameter, is the faster way here.
    with DiLoCo(manager, [model], inner, outer, sync_every=local_steps, use_bucketization=True):
        for step, batch in zip(range(1, steps + 1), DataLoader(data.train, BATCH, sampler=sampler), strict=False):
            record.begin()
            device.begin()
            inner.zero_grad()
            model.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = manager.current_step()
            inner.step()
            scheduler.step()
            if step % local_steps == 0:
                if manager.current_step() != before + 1:
                    raise RuntimeError("torchft has thrown a round away.")
                record.model(model, step, step == steps)
    os._exit(0)  # torchft's threads would outlive the last step


if __name__ == "__main__":
    main(*sys.argv[1:])
