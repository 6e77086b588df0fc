"""Trains small models on the nodes of a simulated run, in one process and without Lightning: in seconds, not minutes.

``questions.py`` and ``server_rules.py`` compare many settings with it, and ``rule.py`` trains tasks of its own in its
loop. The servers, their messages and the virtual clock are those of ``HalosStrategy(simulate=...)``. Only the workers
are different: each is a model and an inner optimizer in this process. So results differ from those of a Trainer with
the same settings, as between two seeds.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_halos import DelayedNesterov, SimulatedCluster
from lightning_halos.core.algorithms import Halos, ServerAlgorithm
from lightning_halos.core.messages import Pull, Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.planning.planner import make_timing
from lightning_halos.simulation.network import Network, Round, Work
from lightning_halos.simulation.networks import make_network

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

Row = dict[str, Any]
Rate = tuple[float, float, int]
"""A server's rate, momentum and delay."""

PUBLISHED_LOCAL, PUBLISHED_GLOBAL = (0.2, 0.9, 16), (0.15, 0.5, 2)  # the paper's, for 4 regions of 4 workers
TUNED_LOCAL, TUNED_GLOBAL = (0.25, 0.0, 1), (0.5, 0.2, 1)  # see docs/time-to-loss.md
VALIDATIONS = 12  # of the global model, spread evenly over a run


def nesterov(rate: Rate) -> Callable[..., DelayedNesterov]:
    """Returns the function that makes a server's optimizer."""
    lr, momentum, delay = rate
    return partial(DelayedNesterov, lr=lr, momentum=momentum, delay=delay)


Batch = Sequence[Tensor]
"""Inputs and targets."""


class NextByte(nn.Module):
    """Predicts a byte from the ones before it (Bengio et al. 2003): embeddings, a hidden layer, and 256 logits.

    Its gradient is written out, because autograd takes three times as long for a network as small as this one.

    Args:
        context: Number of bytes before it.
        embedding: Width of a byte's embedding.
        hidden: Width of the hidden layer.
    """

    def __init__(self, context: int = 8, embedding: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.hidden = nn.Linear(context * embedding, hidden)
        self.head = nn.Linear(hidden, 256)

    def forward(self, contexts: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.embedding(contexts).flatten(1)).relu())
        return logits

    @torch.no_grad()
    def backward(self, batch: Batch) -> None:
        """Sets the gradient of the mean cross-entropy of a batch. All parameters must have one already."""
        contexts, targets = batch
        embedding, hidden, head = self.embedding.weight, self.hidden, self.head
        below = embedding[contexts].flatten(1)
        inside = torch.addmm(hidden.bias, below, hidden.weight.T).relu_()
        error = torch.addmm(head.bias, inside, head.weight.T).softmax(1)
        error[torch.arange(len(targets)), targets] -= 1
        error /= len(targets)
        torch.mm(error.T, inside, out=head.weight.grad)
        torch.sum(error, 0, out=head.bias.grad)
        error = (error @ head.weight).mul_(inside > 0)
        torch.mm(error.T, below, out=hidden.weight.grad)
        torch.sum(error, 0, out=hidden.bias.grad)
        error = (error @ hidden.weight).view(-1, embedding.shape[1])
        assert embedding.grad is not None
        embedding.grad.zero_().index_add_(0, contexts.flatten(), error)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy of a batch."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def by_autograd(model: nn.Module, batch: Batch) -> None:
    """Sets the gradient of the mean cross-entropy of a batch. All parameters must have one already."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    loss_of(model, batch).backward()


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        make: Makes the model.
        train: Inputs and targets.
        val: Inputs and targets.
        batch_size: Samples of a local step.
        backward: Sets the gradient of a model's loss. Default: by autograd.
        lr: Highest learning rate of the inner AdamW, with betas of 0.9 and 0.95 and a weight decay of 0.1.
        clip: Maximum norm of the gradient.
    """

    make: Callable[[], nn.Module]
    train: TensorDataset
    val: TensorDataset
    batch_size: int
    backward: Callable[[Any, Batch], None] = by_autograd
    lr: float = 3e-3
    clip: float = 1.0


def schedule(done: float) -> float:
    """Returns the factor of the learning rate: warm-up in the first tenth of a run, then a cosine down to a tenth."""
    return min(10 * done, 0.55 + 0.45 * math.cos(math.pi * done))


def next_byte() -> Task:
    """A network with one hidden layer that predicts the next byte of the Python standard library's source."""
    from train_char_lm import StandardLibrary

    data = StandardLibrary(context=9, val_windows=4096)
    data.setup("fit")
    train, val = (TensorDataset(part.tensors[0][:, :8], part.tensors[0][:, 8]) for part in (data.train, data.val))
    return Task(NextByte, train, val, 32, NextByte.backward)


def gpt() -> Task:
    """The byte-level GPT of the demo, with one block of width 64 and 32 bytes of context, on the same text."""
    from train_char_lm import ByteGPT, StandardLibrary

    data = StandardLibrary(context=32)
    data.setup("fit")
    return Task(partial(ByteGPT, context=32, depth=1, width=64), data.train, data.val, 8)


TASKS = {"next_byte": next_byte, "gpt": gpt}


@dataclass
class Worker:
    """A model whose parameters are one flat tensor, and its inner optimizer."""

    model: nn.Module
    flat: nn.Parameter
    optimizer: torch.optim.Optimizer
    pulled: Tensor
    version: int = 0
    shapes: list[torch.Size] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, task: Task) -> Worker:
        """Makes a worker with a copy of a model."""
        model = copy.deepcopy(model)
        parameters = list(model.parameters())
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        flat.grad = torch.zeros_like(flat)
        sizes = [p.numel() for p in parameters]
        pieces = zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True)
        for parameter, values, gradient in pieces:
            parameter.data, parameter.grad = values.view_as(parameter), gradient.view_as(parameter)
        optimizer = torch.optim.AdamW([flat], lr=task.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        return cls(model, flat, optimizer, flat.detach().clone(), 0, [p.shape for p in parameters])


class Batches:
    """The batches of a run, by their number: all samples in a new order in each epoch."""

    def __init__(self, task: Task, seed: int) -> None:
        self._tensors, self._size, self._seed = task.train.tensors, task.batch_size, seed
        self._orders: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        samples = len(self._tensors[0])
        epoch, place = divmod(number, samples // self._size)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(1000 * self._seed + epoch)
            self._orders[epoch] = torch.randperm(samples, generator=generator)
        chosen = self._orders[epoch][place * self._size : (place + 1) * self._size]
        return tuple(tensor[chosen] for tensor in self._tensors)


def network_of(
    algorithm: ServerAlgorithm, cluster: SimulatedCluster, work: Work, shapes: Sequence[torch.Size], start: Tensor
) -> Network:
    """Returns the nodes and the clock of a run on a cluster.

    Args:
        algorithm: The algorithm.
        cluster: The cluster.
        work: The ordered work.
        shapes: Shapes of the parameters.
        start: The flat model at the start.
    """
    topology = algorithm.arrange(cluster.regions, cluster.names, cluster.global_region)
    return make_network(algorithm, topology, make_timing(cluster), work, shapes, start)


def rounds(
    network: Network, train: Callable[[Round], Push], receive: Callable[[int, Tensor, int], None]
) -> Iterator[None]:
    """Runs a network to its end. Yields after each moment at which rounds have ended.

    Args:
        network: The network.
        train: Trains a round of a worker.
        receive: Gives a worker the model that its server has answered with, and the model's version.
    """
    network.start()
    while due := network.due():
        network.finish([train(one) for one in due])
        for rank, message in network.outbox:
            if isinstance(message, Pull) and message.vector is not None:
                receive(rank, message.vector, message.version)
        network.outbox.clear()
        yield


class Run:
    """A run: the network and its workers.

    Args:
        algorithm: The algorithm.
        cluster: The cluster.
        task: What is trained.
        steps: Global steps.
        seed: Of the model and the data.

    Attributes:
        network: The nodes and the clock.
        trained: Local steps of each worker so far.
    """

    def __init__(
        self, algorithm: ServerAlgorithm, cluster: SimulatedCluster, task: Task, steps: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        model, workers = task.make(), cluster.num_workers
        self.task, self.steps = task, steps
        self._workers = [Worker.of(model, task) for _ in range(workers)]
        self._batches = Batches(task, seed)
        self.trained = [0] * workers
        start = self._workers[0].pulled
        work = Work(StepBudget(workers), end=steps * workers)
        self.network = network_of(algorithm, cluster, work, self._workers[0].shapes, start)
        self._evaluated = Worker.of(model, task)

    def loss(self, model: Tensor) -> float:
        """Returns the validation loss of a flat model."""
        self._evaluated.flat.data.copy_(model)
        with torch.no_grad():
            return loss_of(self._evaluated.model, self.task.val.tensors).item()

    def train(self, observe: Callable[[Run], None] = lambda run: None) -> Row:
        """Trains to the end. Returns the curve of the global model's loss.

        Args:
            observe: Called after each push.
        """
        every = self.steps * len(self._workers) / VALIDATIONS
        curve: list[tuple[float, float, float]] = []
        for _ in rounds(self.network, self._round, self._receive):
            observe(self)
            if self.network.steps >= every * (len(curve) + 1) and not self.network.finished:
                curve.append(self._point())
        curve.append(self._point())
        step, seconds, loss = zip(*curve, strict=True)
        return {"global_step": step, "virtual_seconds": seconds, "val_loss": loss, "final_loss": loss[-1]}

    def _point(self) -> tuple[float, float, float]:
        assert self.network.model is not None
        step = self.network.steps / len(self._workers)
        return round(step, 1), round(self.network.now / 1e3, 2), round(self.loss(self.network.model), 4)

    def _receive(self, rank: int, model: Tensor, version: int) -> None:
        self._workers[rank].pulled, self._workers[rank].version = model.clone(), version

    def _round(self, one: Round) -> Push:
        worker = self._workers[one.worker]
        worker.flat.data.copy_(worker.pulled)
        assert worker.flat.grad is not None
        for number in range(one.steps):
            done = (one.position + number + 1) / self.steps
            worker.optimizer.param_groups[0]["lr"] = self.task.lr * schedule(min(done, 1.0))
            self.task.backward(worker.model, self._batches[one.first + number])
            worker.flat.grad.mul_((self.task.clip / worker.flat.grad.norm()).clamp_(max=1.0))
            worker.optimizer.step()
        self.trained[one.worker] += one.steps
        vector = worker.pulled - worker.flat.detach() if one.steps else None
        return Push(one.worker, worker.version, one.steps, one.steps, 0.0, final=not one.steps, vector=vector)


class Rows:
    """Rows of results in a file, by their key. A row is written as soon as it is there, and never computed again.

    Args:
        path: The file.
        trains: Whether to compute missing rows.
    """

    def __init__(self, path: Path, trains: bool = True) -> None:
        self._path = path
        self._trains = trains
        self._rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def __call__(self, key: Row, compute: Callable[[], Row]) -> Row | None:
        """Returns the row with a key; ``None`` if it is missing and no rows are computed."""
        key = json.loads(json.dumps(key))
        found = next((row for row in self._rows if row["key"] == key), None)
        if found is None and self._trains:
            found = {"key": key, **json.loads(json.dumps(compute()))}
            self._rows.append(found)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(json.dumps(row) for row in self._rows)
            self._path.write_text(f"[\n{lines}\n]\n")
            print(json.dumps(key), found.get("final_loss", ""), flush=True)
        return found


def halos(steps: int, period: int, local: Rate, outer: Rate, alpha: float = 0.25, **arguments: Any) -> Halos:
    """Returns HALoS with all its settings named: ``H``, ``K``, the servers' optimizers and ``alpha``."""
    optimizers = {"local_optimizer": nesterov(local), "global_optimizer": nesterov(outer)}
    return Halos(
        local_steps=steps,
        dynamic_local_steps=True,
        accumulate_updates=period,
        merge_weight=alpha,
        **{**optimizers, **arguments},
    )
