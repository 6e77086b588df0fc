"""What a search has found, as a table and as a YAML for LightningCLI. Nothing is computed here that is not shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lightning_halos.planning.settings import make_arguments
from lightning_halos.text_tables import align
from lightning_halos.tuning.goal import Goal
from lightning_halos.tuning.space import Settings, Values
from lightning_halos.tuning.study import Tried

_SHORT = {
    "local_steps": "H",
    "accumulate_updates": "K",
    "merge_weight": "alpha",
    "local_optimizer": "local",
    "global_optimizer": "global",
    "optimizer": "server",
    "outer_optimizer": "outer",
}
_MEANINGS = {
    "local_steps": "local_steps (H)",
    "dynamic_local_steps": "dynamic_local_steps",
    "pushes_per_worker": "accumulate_updates (K) per worker",
    "merge_weight": "merge_weight (alpha)",
    "gain": "gain: rate x pushes per round / (1 - momentum)",
    "memory": "momentum",
    "window": "delay, in rounds of all workers",
    "wire_within": "wire inside regions",
    "wire_between": "wire between regions",
    "overlap": "overlap",
}


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        settings: The best settings: arguments of the strategy as LightningCLI has them.
        value: What they reach: the metric, or the virtual seconds to it; more than a trial has if they do not reach it.
        start_value: What the settings reach that the search started from; ``None`` if that trial has not ended.
        steps: Global steps that the best trial trained.
        table: All of it as a table.
        yaml: The best settings for LightningCLI.
        importances: The share of each parameter in what makes good trials good.
        trials: All trials that have ended.
        algorithm: The class of the algorithm.
    """

    settings: Settings
    value: float
    start_value: float | None
    steps: int
    table: str
    yaml: str
    importances: Mapping[str, float]
    trials: tuple[Tried, ...]
    algorithm: type[Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The best settings as arguments of the strategy: ``HalosStrategy(**tuned.arguments)``."""
        return {**self.settings, **make_arguments(self.algorithm, self.settings)}


def describe_settings(settings: Settings) -> str:
    """Returns settings in a line: an optimizer as its rate, momentum and delay."""
    words = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and "class_path" in value:
            arguments = value.get("init_args") or {}
            numbers = [arguments.get("lr"), arguments.get("momentum", 0), arguments.get("delay")]
            text = "/".join(f"{number:g}" for number in numbers if number is not None) if arguments else "by default"
        elif isinstance(value, Mapping):
            text = " ".join(f"{key} {entry}" for key, entry in value.items())
        else:
            text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{_SHORT.get(name, name)} {text}")
    return ", ".join(words)


def as_yaml(settings: Settings, strategy: str, comments: list[str]) -> str:
    """Returns settings as a configuration of LightningCLI.

    Args:
        settings: The settings.
        strategy: The strategy's ``class_path``.
        comments: Lines that say where they come from.
    """
    config = {"trainer": {"strategy": {"class_path": strategy, **({"init_args": settings} if settings else {})}}}
    lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
    return "\n".join(lines) + "\n" + yaml.safe_dump(config, sort_keys=False)


def make_table(
    goal: Goal,
    trials: list[Tried],
    start: Values,
    importances: Mapping[str, float],
    left_out: Mapping[str, int],
) -> str:
    """Returns the table: the best trials, what each parameter did, and how the others ended."""
    done = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value or 0.0)
    lines = [goal.title, ""]
    rows = [["trial", "result", "global steps", "settings"]]
    for trial in [*done[:5], *(trial for trial in done[5:] if trial.name)]:
        assert trial.value is not None
        note = f"  <- {trial.name}" if trial.name else ""
        settings = describe_settings(trial.settings) or "the strategy's defaults"
        rows.append([str(trial.number), goal.describe(trial.value), str(trial.curve[-1].step), f"{settings}{note}"])
    lines += [align(rows, left=len(rows[0])), ""]
    if done:
        lines += [_parameters(done, start, importances), ""]
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.outcome] = counts.get(trial.outcome, 0) + 1
    names = {"complete": "complete", "pruned": "ended early", "diverged": "diverged", "failed": "failed"}
    ends = ", ".join(f"{counts[key]} {name}" for key, name in names.items() if key in counts)
    count = "1 trial" if len(trials) == 1 else f"{len(trials)} trials"
    lines.append(f"{count}: {ends}." if trials else "No trial has ended.")
    if left_out:
        reasons: dict[str, int] = {}
        for reason, number in left_out.items():
            kind = "too slow" if reason.startswith("only") else reason
            reasons[kind] = reasons.get(kind, 0) + number
        text = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        lines.append(f"Left out without training, by the plan, the stability check and what was tried: {text}.")
    return "\n".join(lines) + "\n"


def _parameters(done: list[Tried], start: Values, importances: Mapping[str, float]) -> str:
    """Returns a row for each parameter: where it started, where it is best, and how much that matters."""
    good = done[: max(2, len(done) // 3)]
    rows = [["parameter", "start", "best", "in the best third", "importance"]]
    for name in sorted(start, key=lambda name: -importances.get(name, 0.0)):
        values = [trial.values[name] for trial in good if name in trial.values]
        shown = [_shown(name, value) for value in values]
        if all(isinstance(value, float | int) and not isinstance(value, bool) for value in values):
            spread = f"{_shown(name, min(values))} to {_shown(name, max(values))}"
        else:
            spread = ", ".join(sorted(set(shown)))
        share = f"{importances[name]:.0%}" if name in importances else "-"
        rows.append([_meaning(name), _shown(name, start[name]), _shown(name, done[0].values[name]), spread, share])
    text = align(rows, left=len(rows[0]))
    if not importances:
        text += "\n(importances need at least 10 trials)"
    return text


def _meaning(name: str) -> str:
    for prefix in ("local_", "global_"):
        rest = name.removeprefix(prefix)
        if rest != name and rest in ("gain", "memory", "window"):
            return f"{prefix.rstrip('_')} {_MEANINGS[rest]}"
    return _MEANINGS.get(name, name)


def _shown(name: str, value: Any) -> str:
    if name.endswith("memory"):
        return f"{max(0.0, 1 - 2**-value):.2g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
