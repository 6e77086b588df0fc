"""Trains a byte-level GPT on the source of Python's standard library, with HALoS and with DDP, with one slow worker.

By default the script trains with both, for the same number of steps, and compares the validation loss over wall-clock
time::

    python examples/train_char_lm.py

All workers share one machine. If they competed for its cores, the comparison would show the machine and its other work:
DDP's workers leave the cores to others while they wait, and those of HALoS do not. So each worker stands for a device
of its own. A batch takes ``--pace`` seconds, times the worker's ``--slowdown``; the worker computes for a part of them
and sleeps for the rest. Here only the speeds are unequal: the links are those inside the machine.

Then it compares both once more, with workers of equal speed, but a link of ``--link`` Mbit/s between the two regions. A
real slow link needs root (``examples/regions_on_one_machine.sh`` makes one, ``benchmarks/network.py`` a race on it). So
this comparison is a simulation: the same training, with the time of a virtual clock. How long it takes does not matter,
so it runs at the lowest priority, while DDP's workers sleep.

With ``--strategy`` it trains once, with any strategy of Lightning, and ``--pace 0`` lets the workers run freely::

    python examples/train_char_lm.py --strategy halos --accelerator gpu --devices 4 --pace 0

Every two devices may be one worker, with DDP between them::

    python examples/train_char_lm.py --strategy halos --devices 4 --worker 2 --pace 0

With ``HALOS_SERVER`` and ``HALOS_KEYS`` in the environment this is a job of one region, which connects to the server of
a run (``examples/deploy/regions_behind_nat.sh`` starts one, and two regions)::

    python examples/train_char_lm.py --strategy halos --devices 2
"""

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_halos import DelayedNesterov, HalosStrategy, SimulatedCluster, SyncSGDStrategy


class StandardLibrary(L.LightningDataModule):
    """The source of the Python standard library's top-level modules, some five megabytes, as windows of bytes.

    Args:
        context: The number of bytes in a window.
        batch_size: The number of windows in a batch.
        val_windows: The number of windows to validate on, spread evenly over the held-out modules.
    """

    def __init__(self, context: int = 64, batch_size: int = 16, val_windows: int = 256) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.val_windows = val_windows

    def setup(self, stage: str) -> None:
        """Reads the modules and holds every twentieth of them out for validation."""
        modules = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        held_out = b"".join(modules[::20])
        del modules[::20]
        self.train = self._windows(b"".join(modules), stride=self.context)
        self.val = self._windows(held_out, stride=len(held_out) // self.val_windows)

    def _windows(self, text: bytes, stride: int) -> TensorDataset:
        """Cuts a text into windows and their targets, the same bytes one position further on."""
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        return TensorDataset(tokens[:-1].unfold(0, self.context, stride), tokens[1:].unfold(0, self.context, stride))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, self.batch_size)


class Block(nn.Module):
    """A pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteGPT(L.LightningModule):
    """A GPT whose tokens are bytes.

    Args:
        context: The longest text the model can attend to, in bytes.
        depth: The number of transformer blocks.
        width: The width of the residual stream.
        heads: The number of attention heads per block.
        lr: The peak learning rate, reached after a tenth of the training steps.
    """

    def __init__(self, context: int = 64, depth: int = 2, width: int = 128, heads: int = 4, lr: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.token_embedding = nn.Embedding(256, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_bits_per_byte", loss / math.log(2), sync_dist=True)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate warmed up over a tenth of the training and then lowered to a tenth by a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], betas=(0.9, 0.95), weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            progress = min((step + 1) / steps, 1.0)
            return min(10 * progress, 0.55 + 0.45 * math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.inference_mode()
    def generate(self, prompt: str, length: int = 400, temperature: float = 0.7) -> str:
        """Continues a text by as many bytes as asked for."""
        tokens = torch.tensor([list(prompt.encode())], device=self.device)
        for _ in range(length):
            logits = self(tokens[:, -self.hparams["context"] :])[:, -1]
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            tokens = torch.cat([tokens, token], dim=1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


class Pace(L.Callback):
    """Makes each batch last as long as on a device of a given speed: the worker sleeps when it has computed the batch.

    Args:
        seconds: Seconds per batch of a device that is not slowed down. 0: do not sleep.
        factors: How many times longer a batch takes, per rank. Further ranks are not slowed down.
    """

    def __init__(self, seconds: float, factors: list[float]) -> None:
        self.seconds = seconds
        self.factors = dict(enumerate(factors))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        end = self.start + self.seconds * self.factors.get(trainer.global_rank, 1.0)
        time.sleep(max(0.0, end - time.perf_counter()))


class LossCurve(L.Callback):
    """Prints each validation and appends it to a file of JSON lines, with the time since the start of training.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = self._seconds(trainer.strategy)
        loss, bits = (trainer.callback_metrics[name].item() for name in ("val_loss", "val_bits_per_byte"))
        pl_module.print(f"step {trainer.global_step:4}  {seconds:6.1f} s  val loss {loss:.3f}  {bits:.3f} bits/byte")
        if trainer.is_global_zero:
            point = {"step": trainer.global_step, "seconds": seconds, "val_loss": loss, "val_bits_per_byte": bits}
            with self.path.open("a") as file:
                print(json.dumps(point), file=file)

    def _seconds(self, strategy: Any) -> float:
        if getattr(strategy, "cluster", None) is None:
            return time.perf_counter() - self.start
        return strategy.model_seconds


def slow_link(args: argparse.Namespace, all_reduce: str) -> SimulatedCluster:
    """Describes the regions with a slow link between them: workers of equal speed, and 10 Gbit/s inside a region."""
    inside, between = 10.0, args.link / 1e3
    return SimulatedCluster(
        bandwidths=[[inside if a == b else between for b in range(args.regions)] for a in range(args.regions)],
        worker_speeds=[[1.0] * len(range(region, args.devices, args.regions)) for region in range(args.regions)],
        step_ms=1e3 * args.pace,
        all_reduce=all_reduce,
    )


def make_strategy(args: argparse.Namespace) -> Any:
    """Makes the strategy of a run."""
    if args.strategy == "ddp" and args.link:
        return SyncSGDStrategy(simulate=slow_link(args, "ring"))
    if args.strategy != "halos":
        return args.strategy
    is_region = "HALOS_SERVER" in os.environ  # this job is one of several
    # A run of a few hundred steps wants frequent exchanges and little momentum. The defaults go by max_steps, too; the
    # figures in the documentation were measured with these settings.
    return HalosStrategy(
        regions=None if is_region or args.link else args.regions,
        simulate=slow_link(args, "star") if args.link else None,
        worker=args.worker,
        local_steps=args.local_steps,
        accumulate_updates=4,
        merge_weight=0.5,
        local_optimizer=partial(DelayedNesterov, lr=0.4, momentum=0.0, delay=1),
        global_optimizer=partial(DelayedNesterov, lr=0.4, momentum=0.2, delay=1),
    )


def train(args: argparse.Namespace) -> None:
    """Does one run: trains with ``args.strategy``, writes the loss curve and prints a sample of the model's writing."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the complete text is in memory
    L.seed_everything(args.seed)
    name = f"link-{args.strategy}" if args.link else args.strategy
    if args.link:
        torch.set_num_threads(1)  # all simulated workers share this machine
        os.nice(19)  # with what runs in real time
    trainer = L.Trainer(
        strategy=make_strategy(args),
        accelerator=args.accelerator,
        devices=1 if args.link else args.devices,
        num_nodes=args.num_nodes,
        max_steps=args.max_steps,
        val_check_interval=min(args.val_every, args.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[
            Pace(0.0 if args.link else args.pace, args.slowdown),
            LossCurve(args.output / f"{name}.jsonl"),
        ],
        logger=False,
        enable_checkpointing=False,
    )
    model = ByteGPT()
    trainer.fit(model, StandardLibrary(batch_size=args.batch_size))
    if trainer.is_global_zero and not args.link:
        print(f"\nWhat the model writes after training:\n\n{model.generate('def ')}\n")


def run_all(args: argparse.Namespace) -> None:
    """Does the runs to compare, each in a process of its own, which Lightning starts anew for every worker."""

    def command(strategy: str, link: float) -> list[str]:
        return [sys.executable, *sys.argv, "--strategy", strategy, "--link", str(link)]

    print("\n--- Training with halos ---\n", flush=True)
    subprocess.run(command("halos", 0.0), check=True)
    args.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        simulations = {}
        for strategy in NAMES if args.link else ():
            log = stack.enter_context((args.output / f"link-{strategy}.log").open("w+", errors="replace"))
            run = subprocess.Popen(command(strategy, args.link), stdout=log, stderr=log)
            simulations[strategy] = stack.enter_context(run), log
        beside = ", and in simulations with both beside it" if simulations else ""
        print(f"\n--- Training with ddp{beside} ---\n", flush=True)
        subprocess.run(command("ddp", 0.0), check=True)
        for strategy, (run, log) in simulations.items():
            run.wait()
            log.seek(0)
            where = f"{args.link:g} Mbit/s between the regions, simulated"
            print(f"\n--- Training with {strategy}, {where} ---\n\n{log.read()}", flush=True)
            if run.returncode:
                raise subprocess.CalledProcessError(run.returncode, run.args)


Curve = dict[str, "np.ndarray[Any, Any]"]
"""Of a run: the global step, the seconds and the validation loss of each validation."""
NAMES = {"halos": "HALoS", "ddp": "DDP"}


def read_curves(folder: Path, prefix: str) -> dict[str, Curve]:
    """Reads the curves of HALoS and of DDP."""
    curves = {}
    for strategy in NAMES:
        points = [json.loads(line) for line in (folder / f"{prefix}{strategy}.jsonl").read_text().splitlines()]
        curves[strategy] = {key: np.array([point[key] for point in points]) for key in ("step", "seconds", "val_loss")}
    return curves


def compare(args: argparse.Namespace) -> None:
    """Plots all loss curves over time and over steps, and prints when they reach DDP's half-way loss."""
    from matplotlib.figure import Figure

    factors = (args.slowdown + [1.0] * args.devices)[: args.devices]
    paces = ", ".join(f"{args.pace * factor:g}" for factor in factors)
    # Seconds if the workers only had batches to do: with HALoS each as many as it can, with DDP each as the slowest.
    ideal = {
        "halos": args.max_steps * args.devices * args.pace / sum(1 / factor for factor in factors),
        "ddp": args.max_steps * args.pace * max(factors),
    }
    rows = [(f"{args.devices} workers with {paces} s per batch", "wall-clock time", "", ideal)]
    if args.link:
        where = f"{args.devices} equal workers, {args.link:g} Mbit/s between {args.regions} regions"
        rows.append((where, "virtual time of a simulation", "link-", {}))
    figure = Figure(figsize=(11, 4.5 * len(rows)), layout="constrained")
    for (over_time, over_steps), (title, clock, prefix, seconds) in zip(
        figure.subplots(len(rows), 2, squeeze=False, sharey="row"), rows, strict=True
    ):
        curves = read_curves(args.output, prefix)
        print(f"\n{title} ({clock}):")
        outcome = draw_over_time(over_time, curves, args, seconds)
        over_time.set_title(f"{title}:\nHALoS {outcome}", fontsize="medium")
        over_time.set_xlabel(f"{clock} since the start of training (s)")
        draw_over_steps(over_steps, curves)
    figure.savefig(args.output / "val_loss.png", dpi=150)
    print(f"\nSee {args.output / 'val_loss.png'}")


def draw_over_time(axes: Any, curves: dict[str, Curve], args: argparse.Namespace, ideal: dict[str, float]) -> str:
    """Draws the losses over time, and prints when they reach DDP's half-way loss. Returns the outcome for HALoS."""
    halfway = curves["ddp"]["val_loss"][[0, -1]].mean()
    axes.axhline(halfway, color="gray", linestyle="--", label=f"half-way down DDP's curve: {halfway:.2f}")
    reached = {}
    for strategy, curve in curves.items():
        name, seconds, loss = NAMES[strategy], curve["seconds"], curve["val_loss"]
        reached[strategy] = np.interp(-halfway, -np.minimum.accumulate(loss), seconds, right=np.nan)
        (line,) = axes.plot(seconds, loss, marker=".", label=name)
        axes.plot(reached[strategy], halfway, "o", color=line.get_color())
        side = {"xytext": (-6, -14), "ha": "right"} if strategy == "halos" else {"xytext": (6, 6), "ha": "left"}
        axes.annotate(f"{reached[strategy]:.1f} s", (reached[strategy], halfway), textcoords="offset points", **side)
        alone = f" (batches alone: {ideal[strategy]:.1f} s)" if ideal else ""
        print(
            f"{name:5}  reaches the half-way loss, {halfway:.3f}, in {reached[strategy]:.1f} s"
            f" and ends at {loss[-1]:.3f} after {seconds[-1]:.1f} s{alone}"
        )
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend()
    axes.grid(alpha=0.3)
    ratio = reached["ddp"] / reached["halos"]
    outcome = f"is {ratio:.2f} times as fast as DDP to the half-way loss"
    late = [name for name, seconds in ideal.items() if curves[name]["seconds"][-1] > 1.3 * seconds > 0]
    if late:
        outcome = "cannot be compared with DDP, because this machine was too slow or too busy"
    elif math.isnan(ratio):
        outcome = "did not reach the half-way loss: train for more steps, or with smaller rates on the servers"
    print(f"HALoS {outcome}.")
    for name in late:
        print(
            f"With {name}, batches alone take {ideal[name]:.0f} s at --pace {args.pace:g}. It took over 1.3 times"
            " as long, so it shows the machine. Repeat the demo when less is running, or with a longer --pace."
        )
    return outcome


def draw_over_steps(axes: Any, curves: dict[str, Curve]) -> None:
    """Draws the losses over the number of steps: what a step teaches, however long it takes."""
    for strategy, curve in curves.items():
        axes.plot(curve["step"], curve["val_loss"], marker=".", label=NAMES[strategy])
    last = ", ".join(f"{NAMES[strategy]} {curve['val_loss'][-1]:.2f}" for strategy, curve in curves.items())
    axes.set_title(f"The same runs, by steps instead of time:\nloss at the end: {last}", fontsize="medium")
    axes.set_xlabel("global step (a local step of every worker)")
    bits = axes.secondary_yaxis(
        "right", functions=(lambda nats: np.divide(nats, np.log(2)), lambda bits: np.multiply(bits, np.log(2)))
    )
    bits.set_ylabel("bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)


def main() -> None:
    """Does one run if a strategy is given, else the four runs and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", help="do one run only, with this strategy: halos, ddp or another of Lightning's")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4, help="the number of devices, on each node")
    parser.add_argument(
        "--num-nodes", type=int, default=1, help="the number of nodes, each started by torchrun or SLURM"
    )
    parser.add_argument("--pace", type=float, default=0.15, help="seconds per batch; 0: as few as possible")
    parser.add_argument("--slowdown", type=float, nargs="+", default=[1, 1, 1, 4], help="a factor for each worker")
    parser.add_argument("--regions", type=int, default=2, help="the regions HALoS spreads the workers of one job over")
    parser.add_argument(
        "--link",
        type=float,
        metavar="MBIT",
        help="simulate a link of so many Mbit/s between the regions, without --slowdown; in the comparison: of the"
        " runs with a slow link (default there: 50; 0: none)",
    )
    parser.add_argument("--worker", type=int, default=1, help="the devices of a HALoS worker, with DDP between them")
    parser.add_argument("--local-steps", type=int, default=4, help="the steps a HALoS worker takes between exchanges")
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--val-every", type=int, default=25, help="the steps between validations")
    parser.add_argument("--batch-size", type=int, default=8, help="the windows of text in the batch of a worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="the folder for the loss curves and the plot")
    args = parser.parse_args()

    if args.link is None and not args.strategy:
        args.link = 50.0
    if args.link and args.devices < args.regions:
        parser.error(f"--devices {args.devices} is less than --regions {args.regions}: give each region a worker.")
    if args.strategy:
        train(args)
        return
    run_all(args)
    compare(args)


if __name__ == "__main__":
    main()
