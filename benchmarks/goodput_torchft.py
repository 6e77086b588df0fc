"""One worker of torchft's DiLoCo, for goodput.py, which starts it in an environment of torchft's own.

It trains the model of tests/star, as many batches per second, and writes down each local step: at once in ``.steps``,
and in ``.kept`` when a synchronization has kept it. Run as: goodput_torchft.py FOLDER NAME; the variables of torchft
and of torch.distributed are in the environment, with ADDRESS and TASK_*.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

ADDRESS = os.environ["ADDRESS"]
socket.gethostname = lambda: ADDRESS  # torchft tells others its host name, which this test's network does not know

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402
from torchft import Manager, ProcessGroupGloo  # noqa: E402
from torchft.local_sgd import DiLoCo  # noqa: E402

FEATURES = 8
TIMEOUT = timedelta(seconds=5)  # as long as HALoS waits for a silent region here
PATIENCE = timedelta(seconds=60)  # inside a group, which a worker that is stopped for a few seconds must not end


def main(folder: str, name: str) -> None:
    """Trains until it is killed."""
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_steps, pause = int(os.environ["TASK_LOCAL_STEPS"]), float(os.environ["TASK_PAUSE"])
    batch = int(os.environ["TASK_BATCH"])
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all start from one model, so that torchft need not copy the first
    dist.init_process_group("gloo", timeout=PATIENCE)

    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        min_replica_size=1,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=PATIENCE,
        quorum_retries=10,
        rank=rank,
        world_size=workers,
        replica_id=name,
        hostname=ADDRESS,
        init_sync=False,
    )
    path = Path(folder) / f"{name}-{rank}-{os.getpid()}"
    steps = os.open(path.with_suffix(".steps"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    kept = os.open(path.with_suffix(".kept"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    generator = torch.Generator().manual_seed(os.getpid())
    number = 0
    with DiLoCo(manager, [model], inner, outer, sync_every=local_steps):
        while True:
            inputs = torch.randn(batch, FEATURES, generator=generator) / FEATURES**0.5
            targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.5 * inputs[:, :1]
            time.sleep(pause)
            inner.zero_grad()
            mse_loss(model(inputs), targets + 0.1 * torch.randn(batch, 1, generator=generator)).backward()
            # A replica group is data parallel inside.
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
                parameter.grad /= workers
            before = manager.current_step()
            inner.step()  # which synchronizes each `local_steps` steps
            number += 1
            os.write(steps, f"{time.time():.3f}\n".encode())
            if number % local_steps == 0 and manager.current_step() == before + 1:
                os.write(kept, f"{time.time():.3f} {local_steps}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
