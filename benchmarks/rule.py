"""Are the default settings, which go by the length of a run, as good as tuned ones?

Trains small models on described clusters, on the nodes and the virtual clock of a simulation, but without Lightning: a
pass trains many copies of the model at once, on the same batches, each with server optimizers of its own. So a pass
costs little more than one run. A case is a task, a cluster and a length. Its passes differ in K and alpha, and all have
H = 8::

    python benchmarks/rule.py                                # the passes that are missing, and the table
    python benchmarks/rule.py --tasks digits --clusters 2x2 --steps 100 300 --seeds 0 1 2
    python benchmarks/rule.py --table-only

The table compares the defaults with the lowest loss of all candidates in all passes of a case: the mean over all
seeds that every pass of the case has. Each pass is added to docs/defaults/rule.json when it is complete. After a
change of the rule, delete the rows of the pass ``default`` there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from small_runs import ROOT, network_of, rounds, schedule
from torch import Tensor, nn

from lightning_halos.core.algorithms import Halos
from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory
from lightning_halos.core.messages import Push
from lightning_halos.core.schedule import StepBudget
from lightning_halos.simulation.cluster import SimulatedCluster
from lightning_halos.simulation.network import Round, Work

CLUSTERS = {
    "2x2": SimulatedCluster([[10, 0.5], [0.5, 10]], [[1, 1], [1, 1]], step_ms=100, message_bytes=30_000_000),
    "4+2+2": SimulatedCluster(
        [[10, 0.3, 0.3], [0.3, 10, 0.1], [0.3, 0.1, 10]],
        [[1, 0.8, 0.9, 0.5], [0.6, 0.3], [1, 0.25]],
        step_ms=100,
        message_bytes=30_000_000,
    ),
    "paper": SimulatedCluster.from_yaml(ROOT / "examples/clusters/paper.yaml"),
}
STEPS = (100, 300, 1000)
PASSES = ((8, 0.25), (2, 0.25), (2, 0.5), (1, 0.5))  # K per worker, and alpha; that of the rule comes with them

Optimizers = tuple[tuple[float, float], tuple[float, float]]
"""Of the local servers and the global one: the sum of the rates over all senders, and the momentum."""
PUBLISHED: Optimizers = ((0.8, 0.9), (0.6, 0.5))
CANDIDATES: list[Optimizers] = [
    *itertools.product(
        ((0.5, 0.0), (1.0, 0.0), (1.5, 0.0), (0.8, 0.3), (0.8, 0.5)),
        ((1.0, 0.0), (1.5, 0.0), (2.0, 0.0), (3.0, 0.0), (0.6, 0.5)),
    ),
    PUBLISHED,
]


class Task:
    """Copies of a model, as the rows of one matrix, and its data.

    Attributes:
        shapes: Shapes of the parameters of a copy.
        lr: Peak of the inner learning rate.
        clip: Largest norm of a copy's gradient.
        pretrained: Steps of one worker with a peak rate of ``pretrained_lr``, from which the task starts; 0 for none.
    """

    shapes: list[tuple[int, ...]]
    lr: float
    clip = 1.0
    pretrained, pretrained_lr = 0, 0.0

    def start(self, seed: int) -> Tensor:
        """Returns the parameters of a copy at the start."""
        raise NotImplementedError

    def train_loss(self, copies: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the loss of each copy on a new batch."""
        raise NotImplementedError

    def val_loss(self, copies: Tensor) -> Tensor:
        """Returns the validation loss of each copy."""
        raise NotImplementedError

    def parameters(self, copies: Tensor) -> Iterable[Tensor]:
        """Returns the parameters, each with the copies as its first dimension."""
        parts = copies.split([math.prod(shape) for shape in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each copy, from logits of shape (copies, samples, classes)."""
    number = len(logits)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().repeat(number), reduction="none")
    return losses.view(number, -1).mean(1)


class Digits(Task):
    """A perceptron on scikit-learn's digits with noise, so that no sample comes twice."""

    lr = 3.5e-2  # between the best ones of synchronous SGD for 100 to 1000 steps and 4 to 16 workers

    def __init__(self) -> None:
        self.shapes = [(64, 32), (32,), (32, 10), (10,)]
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.pixels, self.labels = torch.tensor(pixels).float()[order] / 16, torch.tensor(labels)[order]

    def start(self, seed: int) -> Tensor:
        made = torch.Generator().manual_seed(seed)
        first, second = torch.randn(64, 32, generator=made) / 8, torch.randn(32, 10, generator=made) / 32**0.5
        return torch.cat([first.flatten(), torch.zeros(32), second.flatten(), torch.zeros(10)])

    def train_loss(self, copies: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(900, (16,), generator=generator)
        return self._loss(copies, chosen, generator)

    def val_loss(self, copies: Tensor) -> Tensor:
        return self._loss(copies, torch.arange(900, 1797).repeat(4), torch.Generator().manual_seed(1))

    def _loss(self, copies: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        first, bias, second, other = self.parameters(copies)
        noisy = self.pixels[chosen] + 0.5 * torch.randn(len(chosen), 64, generator=generator)
        hidden = F.relu(torch.einsum("bi,cio->cbo", noisy, first) + bias[:, None])
        return cross_entropy(torch.baddbmm(other[:, None], hidden, second), self.labels[chosen])


class Bytes(Task):
    """A GPT of one block on the source of Python's standard library."""

    width, context, heads, batch = 32, 32, 4, 4
    lr = 4e-3  # as in the demo

    def __init__(self) -> None:
        d = self.width
        norm, block = [(d,), (d,)], [(d, 3 * d), (d, d)]
        mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
        self.shapes = [(128, d), (self.context, d), *norm, *block, *norm, *mlp, *norm, (d, 128)]
        modules = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        held_out = self._tokens(b"".join(modules[::20]))
        del modules[::20]
        self.text = self._tokens(b"".join(modules))
        stride = (len(held_out) - self.context - 1) // 192
        self.windows = held_out.unfold(0, self.context + 1, stride)[:192]

    @staticmethod
    def _tokens(text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)

    def start(self, seed: int) -> Tensor:
        made, d = torch.Generator().manual_seed(seed), self.width
        parts, norms = [], 0
        for index, shape in enumerate(self.shapes):
            if len(shape) == 2:
                scale = 0.02 if index < 2 else (3 * shape[0]) ** -0.5
                parts.append(scale * torch.randn(shape, generator=made))
            elif shape == (d,) and index in (2, 6, 12):  # the weights of the norms
                parts.append(torch.ones(shape))
                norms += 1
            else:
                parts.append(torch.zeros(shape))
        assert norms == 3
        return torch.cat([part.flatten() for part in parts])

    def train_loss(self, copies: Tensor, generator: torch.Generator) -> Tensor:
        begins = torch.randint(len(self.text) - self.context - 1, (self.batch,), generator=generator)
        return self._loss(copies, self.text[begins[:, None] + torch.arange(self.context + 1)])

    def val_loss(self, copies: Tensor) -> Tensor:
        return torch.cat([self._loss(copy[None], self.windows) for copy in copies])

    def _loss(self, copies: Tensor, windows: Tensor) -> Tensor:
        tokens, targets = windows[:, :-1], windows[:, 1:]
        number, (batch, length), d = len(copies), tokens.shape, self.width
        embed, place, w1, b1, qkv, out, w2, b2, up, bias_up, down, bias_down, w3, b3, head = self.parameters(copies)

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, (d,)) * weight[:, None] + bias[:, None]

        x = embed[:, tokens.flatten()] + place.repeat(1, batch, 1)
        split = torch.bmm(norm(x, w1, b1), qkv).view(number * batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + torch.bmm(attention.transpose(1, 2).reshape(number, batch * length, d), out)
        hidden = F.gelu(torch.baddbmm(bias_up[:, None], norm(x, w2, b2), up))
        x = x + torch.baddbmm(bias_down[:, None], hidden, down)
        return cross_entropy(torch.bmm(norm(x, w3, b3), head), targets)


class FineTuning(Bytes):
    """The same, from a model that was trained before, with a low rate."""

    lr = 2e-4
    pretrained, pretrained_lr = 1500, Bytes.lr


TASKS: dict[str, type[Task]] = {"digits": Digits, "bytes": Bytes, "fine-tuning": FineTuning}


class Worker:
    """A worker's copies of the model, and its inner optimizer.

    Args:
        task: The task.
        start: The copies at the start, of shape (copies, parameters).
        lr: Peak of the learning rate.
        steps: Global steps of the run.
        seed: Of its batches.
    """

    def __init__(self, task: Task, start: Tensor, lr: float, steps: int, seed: int) -> None:
        self.copies = nn.Parameter(start.clone())
        self.version = 0
        self._task, self._lr, self._steps = task, lr, steps
        self._optimizer = torch.optim.AdamW([self.copies], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self._batches = torch.Generator().manual_seed(seed)

    def train(self, position: int, steps: int) -> Tensor:
        """Trains from a global step on. Returns the pseudo-gradient of all copies."""
        before = self.copies.detach().clone()
        for step in range(position, position + steps):
            self._optimizer.param_groups[0]["lr"] = self._lr * schedule(min((step + 1) / self._steps, 1.0))
            self._optimizer.zero_grad()
            self._task.train_loss(self.copies, self._batches).sum().backward()
            assert self.copies.grad is not None
            norms = self.copies.grad.norm(dim=1, keepdim=True)
            self.copies.grad.mul_((self._task.clip / (norms + 1e-6)).clamp(max=1))
            self._optimizer.step()
        return (before - self.copies.detach()).flatten()


def servers(settings: list[tuple[float, float]], senders: int, delay: int) -> OptimizerFactory:
    """Returns the function that makes a server's optimizer, with settings of its own for each copy."""

    def make(params: Iterable[nn.Parameter]) -> DelayedNesterov:
        groups = [
            {"params": [copy], "lr": total / senders, "momentum": momentum, "delay": delay if momentum else 1}
            for copy, (total, momentum) in zip(params, settings, strict=True)
        ]
        return DelayedNesterov(groups)

    return make


def run(task: Task, cluster: SimulatedCluster, steps: int, halos: Halos, copies: int, seed: int) -> list[float]:
    """Trains on a cluster. Returns the final validation loss of each copy."""
    workers = cluster.num_workers
    start = task.start(seed)[None]
    if task.pretrained:
        trained = Worker(task, start, task.pretrained_lr, task.pretrained, seed)
        trained.train(0, task.pretrained)
        start = trained.copies.detach()
    start = start.repeat(copies, 1)
    work, shapes = Work(StepBudget(workers, steps), steps * workers), [torch.Size([start.size(1)])] * copies
    network = network_of(halos, cluster, work, shapes, start.flatten())
    trainers = [Worker(task, start, task.lr, steps, 1000 * seed + rank) for rank in range(workers)]

    def train(one: Round) -> Push:
        worker = trainers[one.worker]
        vector = worker.train(one.position, one.steps)
        return Push(one.worker, worker.version, one.steps, one.steps, 1.0, final=not one.steps, vector=vector)

    def receive(rank: int, model: Tensor, version: int) -> None:
        trainers[rank].copies.data.copy_(model.view(copies, -1))
        trainers[rank].version = version

    for _ in rounds(network, train, receive):
        pass
    assert network.model is not None
    with torch.no_grad():
        return [round(loss, 4) for loss in task.val_loss(network.model.view(copies, -1)).tolist()]


class Candidates(Halos):
    """HALoS with one server optimizer for each copy of the model."""

    def make_local_optimizer(self, workers: int, servers_: int) -> OptimizerFactory:
        return servers([local for local, _ in CANDIDATES], workers, 4 * workers)

    def make_global_optimizer(self, servers_: int) -> OptimizerFactory:
        return servers([outer for _, outer in CANDIDATES], servers_, max(1, servers_ // 2))


def train(case: tuple[str, str, int], passes: list[Any], output: Path, seed: int) -> None:
    """Trains what is missing of a case, and adds each pass to the results."""
    name, cluster, steps = case
    for chosen in ("default", *passes):
        rows = read(output)
        label = chosen if isinstance(chosen, str) else f"K {chosen[0]} per worker, alpha {chosen[1]}"
        key = {"task": name, "cluster": cluster, "steps": steps, "seed": seed, "pass": label}
        if any(all(row[part] == value for part, value in key.items()) for row in rows):
            continue
        begin, task = time.perf_counter(), TASKS[name]()
        if isinstance(chosen, str):
            losses = {"default": run(task, CLUSTERS[cluster], steps, Halos(global_steps=steps), 1, seed)[0]}
        else:
            halos = Candidates(updates_per_worker=chosen[0], merge_weight=chosen[1])
            found = run(task, CLUSTERS[cluster], steps, halos, len(CANDIDATES), seed)
            losses = {title(one): loss for one, loss in zip(CANDIDATES, found, strict=True)}
        rows.append({**key, "seconds": round(time.perf_counter() - begin, 1), "losses": losses})
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(f"{name}, {cluster}, {steps} steps, {label}: {rows[-1]['seconds']} s", flush=True)


def title(candidate: Optimizers) -> str:
    """Returns a candidate's name: the sums of the rates and the momenta of both kinds of servers."""
    (local, beta), (outer, other) = candidate
    return f"local {local:g}/{beta:g}, global {outer:g}/{other:g}"


def read(output: Path) -> list[dict[str, Any]]:
    """Returns the results so far."""
    return json.loads(output.read_text()) if output.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Compares the defaults with the best and with the published settings, for each complete case."""
    cases: dict[tuple[str, str, int], dict[str, dict[int, float]]] = {}
    for row in rows:
        case = cases.setdefault((row["task"], row["cluster"], row["steps"]), {})
        for name, loss in row["losses"].items():
            case.setdefault(f"{row['pass']}, {name}", {})[row["seed"]] = loss
    head = f"{'task':13}{'cluster':9}{'steps':>6}{'seeds':>6}{'published':>11}{'default':>9}{'best':>8}{'more':>8}"
    lines = [f"{head}   the best"]
    published = f"K 8 per worker, alpha 0.25, {title(PUBLISHED)}"
    for (task, cluster, steps), found in cases.items():
        if "default, default" not in found or len(found) < 2:
            continue
        seeds = set.intersection(*(set(by_seed) for by_seed in found.values()))
        if not seeds:
            continue
        losses = {name: statistics.mean(by_seed[seed] for seed in seeds) for name, by_seed in found.items()}
        default = losses.pop("default, default")
        best = min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        lines.append(
            f"{task:13}{cluster:9}{steps:6}{len(seeds):6}{losses.get(published, math.nan):11.4f}{default:9.4f}"
            f"{losses[best]:8.4f}{default / losses[best] - 1:+8.1%}   {best}"
        )
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--passes", type=int, default=len(PASSES), help="the first N passes of a case only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/defaults/rule.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cases = () if args.table_only else itertools.product(args.tasks, args.clusters, args.steps, args.seeds)
    for *case, seed in cases:
        train((case[0], case[1], case[2]), list(PASSES[: args.passes]), args.output, seed)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
