"""Comparisons of invented answers, so that every number is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch

from lightning_halos.cli import main
from lightning_halos.language.comparison import compare, comparison_json, comparison_table


def answered(questions: dict[str, list[float]], metric: str = "acc", samples: bool = True) -> dict[str, Any]:
    """Results in lm-eval's format, of a model with these scores on each question of each task."""
    results: dict[str, Any] = {"results": {}, "higher_is_better": {}, "samples": {}, "group_subtasks": {}}
    for task, scores in questions.items():
        mean, stderr = sum(scores) / len(scores), stdev(scores) / math.sqrt(len(scores))
        if metric == "perplexity":
            mean, stderr = math.exp(-mean), math.exp(-mean) * stderr
        results["results"][task] = {
            "alias": task,
            f"{metric},none": mean,
            f"{metric}_stderr,none": stderr,
            "sample_len": len(scores),
        }
        results["higher_is_better"][task] = {metric: metric != "perplexity"}
        if samples:
            results["samples"][task] = [
                {"doc_id": number, "doc_hash": f"{task}{number}", "filter": "none", "metrics": [metric], metric: score}
                for number, score in enumerate(scores)
            ]
    return results


def answers(number: int, share: float, seed: int) -> list[float]:
    return (torch.rand(number, generator=torch.Generator().manual_seed(seed)) < share).double().tolist()


def test_the_same_questions_make_a_paired_and_sharper_comparison() -> None:
    first = answers(400, 0.5, seed=0)
    second = [1.0 if index % 16 == 0 else score for index, score in enumerate(first)]  # a few more are right
    paired = compare([answered({"t": first}), answered({"t": second})])[0].differences[0]
    assert paired.paired
    assert paired.value == pytest.approx(sum(second) / 400 - sum(first) / 400)
    assert paired.stderr == pytest.approx(stdev(b - a for a, b in zip(first, second, strict=True)) / 20)
    assert (paired.within_noise, paired.better) == (False, True)
    alone = compare([answered({"t": first}, samples=False), answered({"t": second}, samples=False)])[0].differences[0]
    assert not alone.paired
    assert alone.stderr == pytest.approx(math.hypot(stdev(first) / 20, stdev(second) / 20))
    assert alone.within_noise


def test_other_questions_are_independent_samples() -> None:
    first, second = answered({"t": answers(50, 0.5, 0)}), answered({"t": answers(50, 0.5, 1)})
    for sample in second["samples"]["t"]:
        sample["doc_hash"] += "another question"
    assert not compare([first, second])[0].differences[0].paired


def test_equal_models_are_within_noise_nineteen_times_of_twenty() -> None:
    results = [answered({"t": answers(200, 0.4, seed)}) for seed in range(400)]
    verdicts = [compare(results[i : i + 2])[0].differences[0].within_noise for i in range(0, 400, 2)]
    assert sum(map(bool, verdicts)) / len(verdicts) == pytest.approx(0.95, abs=0.03)


def test_perplexities_are_compared_by_their_logarithms() -> None:
    first = [-2.0, -3.0, -4.0, -9.0]
    second = [value + gain for value, gain in zip(first, [0.5, 0.6, 0.4, 0.5], strict=True)]
    difference = compare([answered({"t": first}, "perplexity"), answered({"t": second}, "perplexity")])[0].differences[
        0
    ]
    assert difference.logarithmic
    assert difference.paired
    assert difference.value == pytest.approx(-0.5)
    assert difference.stderr == pytest.approx(stdev([0.5, 0.6, 0.4, 0.5]) / 2)
    assert (difference.within_noise, difference.better) == (False, True)


@pytest.mark.parametrize("values", [(math.nan, 20.0), (20.0, math.nan), (math.inf, 20.0), (math.inf, math.inf)])
def test_a_model_that_has_diverged_is_neither_better_nor_worse(values: tuple[float, float]) -> None:
    results = [answered({"t": [-2.0, -3.0]}, "perplexity") for _ in values]
    for one, value in zip(results, values, strict=True):
        one["results"]["t"]["perplexity,none"] = value
    (row,) = compare(results)
    assert (row.differences[0].within_noise, row.differences[0].better) == (None, None)
    assert comparison_table([row], ["a", "b"]).splitlines()[2].endswith("| not a number |")
    json.dumps(comparison_json([row], ["a", "b"]), allow_nan=False)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_a_standard_error_that_is_no_number_is_none(error: float) -> None:
    first, second = (answered({"t": scores}, samples=False) for scores in ([0.0, 1.0, 0.0], [1.0, 1.0, 0.0]))
    second["results"]["t"]["acc_stderr,none"] = error
    (row,) = compare([first, second])
    assert (row.differences[0].within_noise, row.differences[0].better) == (None, True)
    json.dumps(comparison_json([row], ["a", "b"]), allow_nan=False)


@pytest.mark.parametrize("by_size", [True, False], ids=["weighted by size", "equal weights"])
def test_a_group_has_the_paired_error_of_its_tasks(by_size: bool) -> None:
    sizes = {"a": 100, "b": 300}
    weights = [0.25, 0.75] if by_size else [0.5, 0.5]
    models = []
    for seed in (0, 10):
        one = answered({task: answers(size, 0.5, seed + size) for task, size in sizes.items()})
        values = [one["results"][task]["acc,none"] for task in sizes]
        value = sum(weight * value for weight, value in zip(weights, values, strict=True))
        one["results"]["g"] = {"alias": "g", "acc,none": value, "acc_stderr,none": 0.02, "sample_len": 400}
        one["group_subtasks"] = {"g": list(sizes)}
        models.append(one)
    rows = compare(models)
    assert [(row.task, row.depth) for row in rows] == [("g", 0), ("a", 1), ("b", 1)]
    errors = [row.differences[0].stderr or 0.0 for row in rows]
    assert rows[0].differences[0].paired
    assert errors[0] == pytest.approx(math.hypot(weights[0] * errors[1], weights[1] * errors[2]))


def test_the_table_says_what_is_noise() -> None:
    base = answers(400, 0.3, 0)
    same, good = answers(400, 0.3, 1), answers(400, 0.6, 2)
    rows = compare([answered({"t": scores}) for scores in (base, same, good)])
    table = comparison_table(rows, ["base", "same", "good"])
    line = next(line for line in table.splitlines() if line.startswith("| t |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cells[7], cells[9]] == ["within noise", "better"]
    assert "paired, question by question" in table


def test_differences_without_standard_errors_are_called_neither_paired_nor_noise() -> None:
    models = [answered({"t": [0.0, 1.0]}, samples=False) for _ in range(2)]
    for model in models:
        del model["results"]["t"]["acc_stderr,none"]
    table = comparison_table(compare(models), ["a", "b"])
    assert "No difference has one, so none can be told from noise" in table
    assert "paired" not in table


def test_options_that_existing_results_ignore_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--limit", "3", "--tasks", "x", "--device", "y", "--model-args", "a=b", "--batch-size", "8"]
    assert main(["evaluate", "--compare", "a/results.json", "b/results.json", *options]) == 2
    assert "leave --tasks, --limit, --batch-size, --device, --model-args out" in capsys.readouterr().err


def test_results_that_are_there_already_are_compared_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, share in (("ddp", 0.3), ("halos", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(answered({"t": answers(100, share, 0)})))
    assert main(["evaluate", "--compare", "ddp/results.json", "halos/results.json", "--output", "both"]) == 0
    assert "| halos - ddp |" in capsys.readouterr().out
    written = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert written["comparisons"][0]["minus ddp"]["halos"]["within_noise"] is False
    assert "better" in (tmp_path / "both" / "comparison.md").read_text()


@pytest.mark.parametrize("missing", ["halos.ckpt", "halos/results.json", "divided.ckpt"])
def test_a_file_that_is_missing_is_noticed_before_any_model_is_evaluated(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_halos.commands.evaluate._scores", lambda *arguments: pytest.fail("evaluated"))
    (tmp_path / "ddp.ckpt").write_bytes(b"")
    (tmp_path / "divided.ckpt").mkdir()
    assert main(["evaluate", "--compare", "ddp.ckpt", missing, "--tasks", "hellaswag"]) == 2
    assert missing in capsys.readouterr().err


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        compare([answered({"t": [0.0, 1.0]})])
    with pytest.raises(ValueError, match="no metric of a task in common"):
        compare([answered({"t": [0.0, 1.0]}), answered({"u": [0.0, 1.0]})])
    (tmp_path / "other.json").write_text("[]")
    assert main(["evaluate", "--compare", str(tmp_path / "other.json"), str(tmp_path / "other.json")]) == 2
    assert "does not contain results" in capsys.readouterr().err
