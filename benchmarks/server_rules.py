"""Would another rule of the servers lower the loss of HALoS? Trains small models with each rule, tuned a little.

    baseline     DelayedNesterov at both servers, with the settings that docs/time-to-loss.md found
    restarts     the momentum is set to 0 every so many updates (arXiv 2605.28585)
    corrected    updates are turned towards the momentum if they disagree with it (HeLoCo, arXiv 2606.00271)
    look-ahead   the regions get the model that the momentum is about to make (the same paper, equation 5)
    counted      pushes that arrive during an exchange are in the next update
    scaled       an update is scaled to all pushes since the last one, because those during an exchange are in none

All candidates of a rule train with seed 0, the three best ones with two more seeds. ``average`` asks something else:
whether an average of recent global models has a lower loss than the last one. Each row is in ``rules.json`` as soon as
it is there, and is not computed again::

    python benchmarks/server_rules.py                      # what is missing, and the table
    python benchmarks/server_rules.py restarts --report    # one rule, from the rows that are there
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from questions import PAPER, ChangedHalos, make_task
from small_runs import ROOT, TASKS, TUNED_LOCAL, Row, Rows, Run
from torch import Tensor
from torch.optim import Optimizer

from lightning_halos import DelayedNesterov
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import RegionUpdate

SEEDS = range(3)
FINALISTS = 3  # candidates of a rule that train with all seeds
STEPS = 300  # global steps
Settings = dict[str, Any]

# ---------------------------------------------------------------------- optimizers


class Restarting(DelayedNesterov):
    """``DelayedNesterov`` whose momentum is set to 0 after every ``period`` updates.

    Args:
        params: Parameters.
        period: Updates between two restarts.
        **arguments: Those of ``DelayedNesterov``.
    """

    def __init__(self, params: Any, period: int, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self._period = period

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            if state["step"] % self._period == 0 and "momentum" in state:
                state["momentum"].zero_()
        return result


class Corrected(Optimizer):
    """Nesterov momentum as an average, on gradients that are corrected tensor by tensor (HeLoCo, algorithm 2).

    A gradient ``g`` whose cosine ``c`` with the momentum ``m`` is at least ``aligned`` stays as it is. If ``c < 0``,
    its part along ``m`` is made smaller; between the two it is turned towards ``m`` and keeps its norm. How far grows
    with ``|g| / (|g| + 3 |m|)``. Then::

        m <- momentum * m + (1 - momentum) * g
        p <- p - lr * (g + momentum * m)

    and with ``ahead``, ``p`` is that minus ``lr * momentum * m``: what the paper sends to the workers. The constants
    are those of the paper.

    Args:
        params: Parameters.
        lr: Rate.
        momentum: Decay of the momentum.
        aligned: The cosine from which on a gradient is kept; -1: always.
        ahead: Whether the parameters are ahead of the model by the momentum.
    """

    def __init__(self, params: Any, lr: float, momentum: float, aligned: float = 0.2, ahead: bool = False) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "aligned": aligned, "ahead": ahead})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                g = _turned(p.grad, m, group["aligned"])
                lead = lr * beta if group["ahead"] else 0.0
                p.add_(m, alpha=lead)
                m.lerp_(g, 1 - beta)
                p.sub_(g + beta * m, alpha=lr).sub_(m, alpha=lead)


def _turned(g: Tensor, m: Tensor, aligned: float) -> Tensor:
    """Returns a corrected gradient."""
    size, pace = float(g.norm()), float(m.norm())
    if size < 1e-8 or pace < 1e-8:
        return g
    cosine = float((g * m).sum()) / (size * pace)
    if cosine >= aligned:
        return g
    trust = size / (size + 3.0 * pace)
    if cosine < 0:
        return g - min(-0.5 * cosine * trust, 0.5) * cosine * size / pace * m
    part = min((1 - cosine) * trust, 1.0)
    mixed = (1 - part) / size * g + part / pace * m
    return mixed * (size / float(mixed.norm()))


class ScalingServer(LocalServer):
    """A local server that scales an update to the size that it would have with the pushes during the exchange."""

    sent_at = 0

    def begin_exchange(self) -> RegionUpdate:
        factor = (self.version - self.sent_at) / max(1, self.version - self.merged_at)
        assert self._base is not None
        self._base += (factor - 1) * (self._base - self.model)  # an update is the base minus the model
        self.sent_at = self.version
        return super().begin_exchange()


@dataclass(frozen=True, kw_only=True)
class ScaledHalos(ChangedHalos):
    """HALoS with ``ScalingServer``."""

    def local_server(self, *arguments: Any) -> LocalServer:
        server = super().local_server(*arguments)
        server.__class__ = ScalingServer
        return server


# ---------------------------------------------------------------------- candidates

OPTIMIZERS = {"nesterov": DelayedNesterov, "restarting": Restarting, "corrected": Corrected}


def _server(kind: str, **arguments: Any) -> Settings:
    return {"kind": kind, **arguments}


def _nesterov(lr: float, momentum: float = 0.0, delay: int = 1) -> Settings:
    return _server("nesterov", lr=lr, momentum=momentum, delay=delay)


def _both(outer: Settings, local: Settings | None = None, rule: str = "", period: int = 8) -> Settings:
    return {"local": local or _nesterov(*TUNED_LOCAL), "global": outer, "rule": rule, "K": period}


def _restarting(lr: float, momentum: float, delay: int, period: int) -> Settings:
    return _server("restarting", lr=lr, momentum=momentum, delay=delay, period=period)


RATES = (0.5, 0.7, 1.0, 1.4, 2.0)
RULES: dict[str, list[Settings]] = {
    "baseline": [_both(_nesterov(lr, 0.2)) for lr in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)]
    + [_both(_nesterov(lr, 0.5)) for lr in (0.35, 0.7, 1.0, 1.4)]
    + [_both(_nesterov(lr, 0.2), period=16) for lr in (0.5, 1.4)],
    "restarts": [_both(_restarting(lr, 0.5, 1, period)) for lr in (0.7, 1.0, 1.4) for period in (16, 64)]
    + [_both(_restarting(lr, 0.9, 1, period)) for lr, period in ((0.2, 16), (0.2, 64), (0.35, 16), (0.7, 16))],
    "corrected": [_both(_server("corrected", lr=lr, momentum=0.9)) for lr in RATES]
    + [_both(_server("corrected", lr=lr, momentum=0.5)) for lr in RATES],
    "look-ahead": [_both(_server("corrected", lr=lr, momentum=0.9, aligned=-1.0, ahead=True)) for lr in RATES]
    + [_both(_server("corrected", lr=lr, momentum=0.5, aligned=-1.0, ahead=True)) for lr in RATES],
    "counted": [_both(_nesterov(lr, 0.2), rule="counted") for lr in (0.25, 0.35, *RATES)],
    "scaled": [_both(_nesterov(lr, 0.2), rule="scaled") for lr in (0.25, 0.35, *RATES)],
}


def algorithm(settings: Settings) -> ChangedHalos:
    """Returns the algorithm of a candidate: H 4, alpha 0.25, and the settings."""
    servers = []
    for name in ("local", "global"):
        arguments = dict(settings[name])
        servers.append(partial(OPTIMIZERS[arguments.pop("kind")], **arguments))
    return (ScaledHalos if settings["rule"] == "scaled" else ChangedHalos)(
        local_steps=4,
        dynamic_local_steps=True,
        accumulate_updates=settings["K"],
        merge_weight=0.25,
        local_optimizer=servers[0],
        global_optimizer=servers[1],
        counts_all=settings["rule"] == "counted",
    )


def described(settings: Settings) -> str:
    """Returns a candidate in a few words."""
    words = []
    for name in ("local", "global"):
        values = {key: value for key, value in settings[name].items() if key != "kind"}
        if settings[name] == _nesterov(*TUNED_LOCAL) and name == "local":
            continue
        period = values.pop("period", None)
        for key in ("aligned", "ahead"):  # in the name of the rule
            values.pop(key, None)
        text = f"{name} {'/'.join(format(value, 'g') for value in values.values())}"
        text += f", restart every {period}" if period else ""
        words.append(text)
    return ", ".join([*words, f"K {settings['K']}"])


def trained(settings: Settings, task: str, steps: int, seed: int) -> Row:
    """Trains a candidate."""
    return Run(algorithm(settings), PAPER, make_task(task), steps, seed).train()


Find = Callable[..., Row | None]


def losses(rows: Find, settings: Settings, task: str, steps: int, seeds: Sequence[int]) -> list[float]:
    """Returns the final losses of a candidate with the seeds whose rows are there."""
    found = [
        rows(
            {**settings, "task": task, "steps": steps, "seed": seed},
            partial(trained, settings, task, steps, seed),
        )
        for seed in seeds
    ]
    return [row["final_loss"] for row in found if row is not None]


def rules(rows: Find, names: Sequence[str], task: str, steps: int) -> str:
    """Trains all candidates of some rules, and the best of each with more seeds. Returns the table.

    The best candidate with one seed may be one that is about to diverge, so the mean of all seeds decides.
    """
    lines = [
        f"{task}, {steps} global steps, H 4, alpha 0.25, local 0.25/0/1 unless stated",
        "",
        f"{'':12}{'the best of its candidates':60}{'mean loss':>10}{'spread':>9}   of each seed",
    ]
    tried = []
    for name in names:
        first = {number: losses(rows, settings, task, steps, [0]) for number, settings in enumerate(RULES[name])}
        known = {number: found[0] for number, found in first.items() if found}
        for number, loss in known.items():
            tried.append(f"{name:12}{described(RULES[name][number]):60}{loss:10.3f}")
        if not known:
            continue
        best = sorted(known, key=lambda number: known[number])[:FINALISTS]
        finals = {number: losses(rows, RULES[name][number], task, steps, SEEDS) for number in best}
        number, final = min(finals.items(), key=lambda item: statistics.mean(item[1]))
        lines.append(
            f"{name:12}{described(RULES[name][number]):60}{statistics.mean(final):10.3f}{max(final) - min(final):9.3f}"
            f"   {' '.join(f'{loss:.3f}' for loss in final)}"
        )
    return "\n".join([*lines, "", "All candidates, seed 0:", "", *tried])


# ---------------------------------------------------------------------- an average of models

DECAYS = (0.8, 0.9, 0.95, 0.98)  # per global step


def averaged(candidate: Settings, task: str, steps: int, seed: int) -> Row:
    """Trains a candidate. Returns the final loss, and those of averages of the global models.

    An average takes in the global model after every global step.
    """
    averages: dict[float, Tensor] = {}
    taken = 0

    def observe(run: Run) -> None:
        nonlocal taken
        model = run.network.model
        assert model is not None
        while taken < run.network.steps // PAPER.num_workers:
            taken += 1
            for decay in DECAYS:
                averages.setdefault(decay, model.clone()).lerp_(model, 1 - decay)

    run = Run(algorithm(candidate), PAPER, make_task(task), steps, seed)
    row = run.train(observe)
    return {**row, "average": [round(run.loss(averages[decay]), 4) for decay in DECAYS]}


def average(rows: Find, task: str, steps: int) -> str:
    """Returns the table of averages, for the baseline with a low and with a high rate."""
    lines = [
        f"{task}, {steps} global steps; an average of the global models with a decay per global step of",
        f"{'':30}{'last model':>12}{''.join(f'{decay:>10g}' for decay in DECAYS)}",
    ]
    for candidate in (RULES["baseline"][0], _both(_nesterov(2.0, 0.2))):
        for seed in SEEDS:
            key = {"average": list(DECAYS), **candidate, "task": task, "steps": steps, "seed": seed}
            row = rows(key, partial(averaged, candidate, task, steps, seed))
            if row is not None:
                values = "".join(f"{loss:10.3f}" for loss in row["average"])
                name = f"{described(candidate)}, seed {seed}"
                lines.append(f"{name:30}{row['final_loss']:12.3f}{values}")
    return "\n".join(lines)


def main() -> int:
    """Computes the missing rows, and writes and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=[*RULES, "average"], help="default: all, and 'average'")
    parser.add_argument("--task", choices=TASKS, default="next_byte")
    parser.add_argument("--steps", type=int, default=STEPS, help="global steps")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/questions", help="the folder of all files")
    args = parser.parse_args()
    if unknown := set(args.rules) - {*RULES, "average"}:
        parser.error(f"{unknown.pop()!r} is none of {', '.join(RULES)}, average")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = Rows(args.output / "rules.json", trains=not args.report)
    names = [name for name in args.rules if name != "average"]
    texts = [rules(rows, names, args.task, args.steps)] if names else []
    if "average" in args.rules:
        texts.append(average(rows, args.task, args.steps))
    text = "\n\n\n".join(texts)
    (args.output / f"rules_{args.task}_{args.steps}.txt").write_text(f"{text}\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
