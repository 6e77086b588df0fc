"""Compares the results of several models, and says which differences are within noise.

It works on numbers from lm-eval alone. It loads no models and needs none of the packages of the extra ``lm``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_halos.core.checks import is_number

Results = Mapping[str, Any]

# The difference between two equal models exceeds this many standard errors in one of twenty cases.
NOISE = 1.96


@dataclass(frozen=True)
class Difference:
    """The difference between a model and the first model."""

    value: float  # this model's value minus the first model's; if logarithmic, of their natural logarithms
    stderr: float | None  # ``None`` if lm-eval gives none for this metric
    paired: bool  # the standard error
    # Than the first model; ``None`` if they are equal, a value is not finite, or the metric has no direction.
    better: bool | None
    logarithmic: bool  # as for perplexities

    @property
    def within_noise(self) -> bool | None:
        """Whether the difference is at most 1.96 standard errors; ``None`` without a standard error."""
        return None if self.stderr is None else abs(self.value) <= NOISE * self.stderr


@dataclass(frozen=True)
class Comparison:
    """One metric of one task or group."""

    task: str  # or group
    depth: int  # number of groups that contain it
    metric: str  # with lm-eval's filter if it has one, as in ``"exact_match,strict-match"``
    higher_is_better: bool | None  # ``None`` if the metric has no direction
    values: tuple[tuple[float, float | None], ...]  # the value and its standard error, for each model
    differences: tuple[Difference, ...]  # between each model, except the first, and the first


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads a ``results.json`` from ``lightning-halos evaluate`` or from lm-eval itself.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise ValueError(f"{path} does not contain results of `lightning-halos evaluate` or lm-eval.")
    return results


def compare(results: Sequence[Results]) -> list[Comparison]:
    """Compares models on the tasks, groups and metrics that all of them have.

    If both models answered the same questions and their answers are in the results, the standard error of a difference
    is paired: ``stdev(b_i - a_i) / sqrt(n)``; for a group, the tasks' standard errors are combined with the tasks'
    weights. Otherwise the models count as independent samples: ``sqrt(stderr_a^2 + stderr_b^2)``. Perplexities are
    compared by their logarithms, which are means of the questions' negative log-likelihoods.

    Args:
        results: What ``evaluate`` returned for two or more models; each is compared with the first.

    Raises:
        ValueError: If there are fewer than two models, or they have no metric in common.
    """
    if len(results) < 2:
        raise ValueError(f"A comparison needs results of at least 2 models, but got {len(results)}.")
    rows = [
        _compare(results, task, depth, key)
        for task, depth in _in_order(results[0])
        for key in sorted(set.intersection(*(_metrics(one, task) for one in results)))
    ]
    if not rows:
        tasks = "; ".join(", ".join(one["results"]) for one in results)
        raise ValueError(f"The results have no metric of a task in common. Their tasks are: {tasks}.")
    return rows


def comparison_table(rows: Sequence[Comparison], labels: Sequence[str]) -> str:
    """Returns a table in Markdown, with an explanation of how to read it. ``labels`` are the models' names."""
    header = ["Task", "Metric", "", *labels]
    for label in labels[1:]:
        header += [f"{label} - {labels[0]}", ""]
    lines = [header, ["---"] * len(header)]
    last = None
    for row in rows:
        arrow = {True: "↑", False: "↓", None: ""}[row.higher_is_better]
        task = "" if row.task == last else "&nbsp;&nbsp;" * row.depth + row.task
        last = row.task
        line = [task, row.metric, arrow, *(_with_error(value, stderr) for value, stderr in row.values)]
        for difference in row.differences:
            text = _with_error(difference.value, difference.stderr, signed=True)
            line += [f"{text} (log)" if difference.logarithmic else text, _verdict(difference)]
        lines.append(line)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_legend(rows)}\n"


def comparison_json(rows: Sequence[Comparison], labels: Sequence[str]) -> dict[str, Any]:
    """Returns the same as :func:`comparison_table`, as plain values for JSON, which has no infinity and no NaN."""
    shown = []
    for row in rows:
        values = {
            label: {"value": _finite(value), "stderr": _finite(stderr)}
            for label, (value, stderr) in zip(labels, row.values, strict=True)
        }
        differences = {
            label: {**asdict(difference), "value": _finite(difference.value), "within_noise": difference.within_noise}
            for label, difference in zip(labels[1:], row.differences, strict=True)
        }
        shown.append({"task": row.task, "metric": row.metric, "models": values, f"minus {labels[0]}": differences})
    return {"models": list(labels), "comparisons": shown}


def _compare(results: Sequence[Results], task: str, depth: int, key: str) -> Comparison:
    metric, _, filter_name = key.partition(",")
    higher = results[0].get("higher_is_better", {}).get(task, {}).get(metric)
    values = tuple((one["results"][task][key], _stderr(one["results"][task], key)) for one in results)
    logarithmic = metric.endswith("perplexity")
    scaled = [(math.log(v), None if e is None else e / v) for v, e in values] if logarithmic else values
    differences = []
    for one, (value, stderr) in zip(results[1:], scaled[1:], strict=True):
        difference = value - scaled[0][0]
        paired = _paired_stderr(results[0], one, task, key)
        error = paired
        if paired is None and stderr is not None and scaled[0][1] is not None:
            error = math.hypot(stderr, scaled[0][1])
        better = None if higher is None or difference == 0 else (difference > 0) == higher
        if not math.isfinite(difference):  # a model has diverged
            better = None
        if error is not None and not (math.isfinite(error) and math.isfinite(difference)):
            error = None
        differences.append(Difference(difference, error, paired is not None, better, logarithmic))
    name = metric if filter_name in ("", "none") else key
    return Comparison(task, depth, name, higher, values, tuple(differences))


def _paired_stderr(first: Results, second: Results, task: str, key: str) -> float | None:
    weights = _weights(first, task, key)
    if weights is None or weights != _weights(second, task, key):
        return None
    errors = []
    for leaf, weight in weights.items():
        ours, theirs = _contributions(first, leaf, key), _contributions(second, leaf, key)
        if ours is None or theirs is None or ours.keys() != theirs.keys() or len(ours) < 2:
            return None
        errors.append(weight * stdev(theirs[question] - ours[question] for question in ours) / math.sqrt(len(ours)))
    return math.hypot(*errors)


def _contributions(results: Results, task: str, key: str) -> dict[tuple[int, str], float] | None:
    """Each question's contribution to a metric that is the questions' mean, or to the logarithm of a perplexity.

    Returns ``None`` if the metric is neither, that is, if the contributions' mean is not the metric's value.
    """
    metric, _, filter_name = key.partition(",")
    values = {}
    for sample in results.get("samples", {}).get(task, ()):
        if sample["filter"] == filter_name and metric in sample:
            if not isinstance(sample[metric], (int, float)):
                return None
            values[sample["doc_id"], sample["doc_hash"]] = float(sample[metric])
    if not values:
        return None
    shown = results["results"][task][key]
    if metric.endswith("perplexity"):
        values, shown = {question: -value for question, value in values.items()}, math.log(shown)
    return values if math.isclose(fmean(values.values()), shown, rel_tol=1e-6, abs_tol=1e-9) else None


def _weights(results: Results, name: str, key: str) -> dict[str, float] | None:
    """The weights that give a group's value from its tasks' values: by size or equal; ``None`` if neither does."""
    tasks = _leaves(results, name)
    if tasks == [name]:
        return {name: 1.0}
    parts = [results["results"].get(task, {}) for task in tasks]
    if any(not is_number(part.get(key)) or not part.get("sample_len") for part in parts):
        return None
    sizes = [part["sample_len"] for part in parts]
    for weights in ([size / sum(sizes) for size in sizes], [1 / len(sizes)] * len(sizes)):
        value = sum(weight * part[key] for weight, part in zip(weights, parts, strict=True))
        if math.isclose(value, results["results"][name][key], rel_tol=1e-6, abs_tol=1e-9):
            return dict(zip(tasks, weights, strict=True))
    return None


def _leaves(results: Results, group: str) -> list[str]:
    children = results.get("group_subtasks", {}).get(group)
    return [leaf for child in sorted(children) for leaf in _leaves(results, child)] if children else [group]


def _in_order(results: Results) -> list[tuple[str, int]]:
    """Tasks and groups with their depth. A group comes before its members."""
    groups: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})
    inside = {child for children in groups.values() for child in children}
    ordered: dict[str, int] = {}

    def visit(name: str, depth: int) -> None:
        ordered.setdefault(name, depth)
        for child in sorted(groups.get(name, ())):
            visit(child, depth + 1)

    for name in [*groups, *results["results"]]:
        if name not in inside:
            visit(name, 0)
    return [(name, depth) for name, depth in ordered.items() if name in results["results"]]


def _metrics(results: Results, task: str) -> set[str]:
    """The keys of metrics, which lm-eval writes as ``metric,filter``, without those of standard errors."""
    values = results["results"].get(task, {})
    return {key for key, value in values.items() if "," in key and "_stderr," not in key and is_number(value)}


def _stderr(values: Mapping[str, Any], key: str) -> float | None:
    stderr = values.get(key.replace(",", "_stderr,", 1))
    return stderr if is_number(stderr) else None


def _with_error(value: float, stderr: float | None, signed: bool = False) -> str:
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text if stderr is None else f"{text} ± {stderr:.2g}"


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _verdict(difference: Difference) -> str:
    if not math.isfinite(difference.value):
        return "not a number"
    if difference.within_noise is None:
        return "no standard error"
    if difference.within_noise:
        return "within noise"
    return {True: "better", False: "worse", None: "different"}[difference.better]


def _legend(rows: Sequence[Comparison]) -> str:
    pairs = [difference.paired for row in rows for difference in row.differences if difference.stderr is not None]
    if not pairs:
        return "± is one standard error. No difference has one, so none can be told from noise."
    kind = "paired, question by question" if all(pairs) else "as of independent samples"
    if any(pairs) and not all(pairs):
        unpaired = {row.task for row in rows if any(not one.paired for one in row.differences)}
        kind = f"paired, question by question (of independent samples for {', '.join(sorted(unpaired))})"
    return (
        f"± is one standard error; that of a difference is {kind}. Within noise: at most {NOISE} standard errors. Of"
        " twenty differences between equal models, one is expected beyond that."
    )
