"""A signal may arrive while the main thread reads the global model, and its handler may read it, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, threading, time
import torch
from lightning_halos.core.global_node import GlobalNode
from lightning_halos.core.schedule import StepBudget
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.transport.alarm import Alarm
from lightning_halos.transport.hosts import Host

model = torch.zeros(4_000_000)
server = GlobalServer(model, lambda params: torch.optim.SGD(params, lr=1.0))
host = Host(GlobalNode(server, 1, StepBudget(1)), Alarm("here"), print, print)
handled = []

def read(out):
    host.ask(lambda node: out.copy_(node.model))

# Lightning saves a checkpoint like this when SLURM announces the end of a job.
signal.signal(signal.SIGUSR1, lambda *_: handled.append(read(torch.empty_like(model))))

def send():
    for _ in range(100):
        time.sleep(0.003)
        os.kill(os.getpid(), signal.SIGUSR1)

sender = threading.Thread(target=send)
sender.start()
out = torch.empty_like(model)
while sender.is_alive():
    read(out)
print(len(handled) > 0)
"""


@pytest.mark.slow
def test_a_handler_reads_the_global_model_while_it_is_read() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, timeout=60, check=True, text=True
    )
    assert done.stdout.strip() == "True"
