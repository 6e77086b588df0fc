"""``lightning-halos evaluate``: scores language models on benchmark tasks, and compares them."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lightning_halos.commands.inputs import check_folder, given_path, refuse

SUMMARY = "Score a language model on benchmark tasks with lm-eval, or compare several: results.json and results.md."
EXAMPLES = """\
examples:
  lightning-halos evaluate checkpoints/last.ckpt --tasks hellaswag,lambada_openai,winogrande,mmlu
  lightning-halos evaluate EleutherAI/pythia-70m --tasks lambada_openai --device cuda --dtype bfloat16 --batch-size auto
  lightning-halos evaluate my-model --tasks local_lambada --include-path examples/tasks
      tasks of your own, or those of this project that need no network
  lightning-halos evaluate --compare ddp.ckpt halos.ckpt --tasks hellaswag
      both models, and whether they differ by more than noise
  lightning-halos evaluate --compare ddp/results.json halos/results.json
      the same from existing results
"""
_OPTIONS = ("tasks", "tokenizer", "include_path", "limit", "num_fewshot", "batch_size", "device", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_evaluate)
    parser.add_argument(
        "model",
        nargs="?",
        type=os.path.expanduser,
        help="a .ckpt file, a folder of a Hugging Face model, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=os.path.expanduser,
        metavar="MODEL",
        help="two or more models, or results.json files; each is compared with the first",
    )
    parser.add_argument(
        "--output", type=given_path, metavar="FOLDER", help="folder for the results (default: evaluation)"
    )
    what = parser.add_argument_group("the questions")
    what.add_argument("--tasks", metavar="NAMES", help="tasks or groups of lm-eval, separated by commas")
    what.add_argument(
        "--include-path", action="append", metavar="FOLDER", help="a folder that defines more tasks; may be given again"
    )
    what.add_argument("--limit", type=_number, metavar="N", help="questions per task; below 1, a share of them")
    what.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    how = parser.add_argument_group("how to run the model")
    how.add_argument("--batch-size", type=_batch_size, metavar="N", help="sequences per pass, or auto (default: 8)")
    how.add_argument("--device", help="such as cuda:0 (default: cuda if available, else cpu)")
    how.add_argument("--dtype", help="data type of the weights (default: as they are saved)")
    how.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="the tokenizer (default: the model's own)")
    how.add_argument(
        "--model-args",
        metavar="KEY=VALUE,...",
        help="further arguments of lm-eval's HFLM, such as peft=FOLDER",
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.compare is None):
        raise ValueError("give either a model, or --compare with two or more models or results.json files.")
    folder = arguments.output or Path("evaluation")
    check_folder("--output", folder)
    if arguments.compare is None:
        _scores(arguments, arguments.model, folder)
    else:
        _compare(arguments, folder)


def _scores(arguments: argparse.Namespace, model: str, folder: Path) -> dict[str, Any]:
    from lightning_halos.extras import language_package
    from lightning_halos.language.evaluation import evaluate, results_table, write_results

    if arguments.tasks is None:
        raise ValueError("--tasks NAMES is missing, such as --tasks hellaswag,lambada_openai,winogrande,mmlu.")
    language_package("lm_eval")
    from lm_eval.utils import simple_parse_args_string

    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    results = evaluate(model, **options, model_args=simple_parse_args_string(arguments.model_args))
    write_results(results, folder)
    print(f"\n{model}\n\n{results_table(results)}\nWrote {folder / 'results.json'} and {folder / 'results.md'}")
    return results


def _compare(arguments: argparse.Namespace, folder: Path) -> None:
    from lightning_halos.language.comparison import compare, comparison_json, comparison_table, load_results
    from lightning_halos.language.export import refuse_missing

    if len(arguments.compare) < 2:
        raise ValueError("--compare takes two or more models or results.json files.")
    labels = _labels(arguments.compare)
    for model in arguments.compare:  # before any of them is evaluated, which may take hours
        if model.endswith(".ckpt"):
            refuse_missing(Path(model))
    if all(model.endswith(".json") for model in arguments.compare):
        refuse(arguments, "the results are there already, and no model is evaluated", *_OPTIONS, "model_args")
    existing = {model: load_results(model) for model in arguments.compare if model.endswith(".json")}
    for model, label in zip(arguments.compare, labels, strict=True):
        if model not in existing:
            check_folder("--output", folder / label)
    results = [
        existing[model] if model in existing else _scores(arguments, model, folder / label)
        for model, label in zip(arguments.compare, labels, strict=True)
    ]
    rows = compare(results)
    table = comparison_table(rows, labels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(table, encoding="utf-8")
    text = json.dumps(comparison_json(rows, labels), indent=1, ensure_ascii=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{table}\nWrote {folder / 'comparison.md'} and {folder / 'comparison.json'}")


def _labels(models: list[str]) -> list[str]:
    """The shortest path endings that distinguish the models, as folder names."""
    paths = [path.parent if path.name == "results.json" else path for path in map(Path, models)]
    paths = [path.with_suffix("") if path.suffix in (".ckpt", ".json") else path for path in paths]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["-".join(path.parts[-length:]).strip("/") or "results" for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{number}-{path.name}" for number, path in enumerate(paths, start=1)]


def _number(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of questions, or a share of them below 1"
        ) from None


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of sequences, or auto") from None
