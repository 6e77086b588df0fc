"""Evaluates language models on benchmark tasks, through lm-eval.

Every score comes from lm-eval's ``simple_evaluate`` and its Hugging Face model class ``HFLM``, so that scores can be
compared with published ones. This file only loads the model, finds the tasks and writes the results.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.model_helpers import _ModuleMode
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_halos.extras import language_package
from lightning_halos.language.export import export_checkpoint
from lightning_halos.language.models import find_tokenizer

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, Any]

PACKAGES = ("transformers", "datasets", "lm_eval", "accelerate")
_NEEDS_NETWORK = (
    "Without a local folder it comes from the Hugging Face hub, which needs the network, or a copy in the hub's cache"
    " (HF_HOME) from an earlier run."
)


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    model_args: Mapping[str, Any] | None = None,
    bootstrap_iters: int = 1000,
    seed: int = 1234,
) -> Results:
    """Evaluates a model on tasks of lm-eval.

    The evaluation restores the state of all random number generators, and the mode and values of a loaded model.

    Args:
        model: Name on the Hugging Face hub, folder of a Hugging Face model, a Lightning checkpoint (``.ckpt``; see
            :class:`~lightning_halos.HuggingFaceCheckpoint`), or a loaded model of transformers, which stays on its
            device.
        tasks: Names of tasks or groups of lm-eval, such as ``["hellaswag", "mmlu"]`` or ``"hellaswag,mmlu"``, or paths
            of YAML files that define tasks.
        tokenizer: The tokenizer, or its name or folder. Default: the model's own; required with a loaded model.
        include_path: Folder or folders with YAML files that define more tasks.
        limit: Questions per task; below 1, a share of them. Default: all.
        num_fewshot: Solved examples before each question. Default: as the task defines it, mostly none.
        batch_size: Sequences per forward pass, or ``"auto"``: as many as fit into memory.
        device: The device, such as ``"cuda:0"``. Default: CUDA if available, else CPU.
        dtype: Data type of the weights, such as ``"bfloat16"``. Default: the one they are saved in.
        model_args: Further arguments of lm-eval's ``HFLM``, such as ``{"peft": "my-adapter"}``.
        bootstrap_iters: Resamplings for the standard error of metrics without a formula for it, such as perplexity.
            With 1000, the standard error is accurate to 2 %.
        seed: Seed of lm-eval's random choices, such as few-shot examples.

    Returns:
        The results of ``lm_eval.simple_evaluate``, with the answers to every question in ``"samples"``, and the model's
        name in ``"model_name"``.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ModuleNotFoundError: If a package of the extra ``lm`` is not installed.
        OSError: If something has to come from the hub, which cannot be reached.
        ValueError: If an argument is invalid, or a task is unknown.
    """
    names = check_arguments(tasks, limit, num_fewshot, batch_size, bootstrap_iters, include_path)
    for package in PACKAGES:
        language_package(package)
    language_model = _language_model(model, tokenizer, batch_size, device, dtype, dict(model_args or {}))
    with isolate_rng():
        manager = find_tasks(names, include_path)
        with language_model as lm:
            results = run_tasks(lm, names, manager, limit, num_fewshot, bootstrap_iters, seed)
    return results | {"model_name": _name(model)}


def check_arguments(
    tasks: str | Sequence[str],
    limit: int | float | None,
    num_fewshot: int | None,
    batch_size: int | str,
    bootstrap_iters: int,
    include_path: str | Path | Sequence[str | Path] | None,
) -> list[str]:
    """Checks the arguments of :func:`evaluate` before anything is loaded.

    Returns:
        The names of the tasks.

    Raises:
        FileNotFoundError: If a folder of tasks does not exist.
        ValueError: If another argument is invalid.
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ValueError(f"tasks={tasks!r} must name at least one task, such as 'hellaswag,lambada_openai'.")
    if limit is not None and (isinstance(limit, bool) or limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(f"limit={limit!r} must be a number of questions per task, or a share of them below 1.")
    if num_fewshot is not None and (isinstance(num_fewshot, bool) or num_fewshot < 0):
        raise ValueError(f"num_fewshot={num_fewshot!r} must be 0 or more.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1, or 'auto'.")
    if bootstrap_iters < 1:
        raise ValueError(f"bootstrap_iters={bootstrap_iters!r} must be a whole number of at least 1.")
    for folder in _folders(include_path):
        if not folder.is_dir():
            raise FileNotFoundError(f"include_path={str(folder)!r} is not a folder with YAML files that define tasks.")
    return names


def find_tasks(names: Sequence[str], include_path: str | Path | Sequence[str | Path] | None) -> TaskManager:
    """Finds tasks and their data.

    Args:
        names: Names of tasks or groups, or paths of YAML files.
        include_path: Folder or folders with YAML files that define more tasks. If they define all of ``names``, the
            thousands of tasks that come with lm-eval are not searched, which saves half a minute.

    Raises:
        OSError: If the data of a task cannot be loaded.
        ValueError: If a task is unknown.
    """
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(folder) for folder in _folders(include_path)]
    manager = TaskManager(include_path=folders, include_defaults=False) if folders else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders or None)
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise ValueError(
            f"There is no task called {', '.join(unknown)}. `lm-eval ls tasks` lists the tasks that come with lm-eval."
            " Give the folder of other tasks with --include-path FOLDER (include_path=... in Python)."
        )
    with _explained(f"the data of {', '.join(names)}"):
        manager.load(list(names))
    return manager


def run_tasks(
    lm: HFLM,
    names: Sequence[str],
    manager: TaskManager,
    limit: int | float | None,
    num_fewshot: int | None,
    bootstrap_iters: int,
    seed: int,
) -> Results:
    """Runs tasks and seeds all random number generators. For the arguments see :func:`evaluate`."""
    from lm_eval import simple_evaluate

    with _without_process_pool():
        results = simple_evaluate(
            lm,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=bootstrap_iters,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if results is None:
        raise ValueError("lm-eval returns results only in the process with LOCAL_RANK=0. Evaluate there.")
    return dict(results)


@contextmanager
def loaded_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Iterator[HFLM]:
    """Wraps a loaded model for lm-eval, and restores its training mode afterwards.

    Args:
        model: The model.
        tokenizer: Its tokenizer. lm-eval gets a copy, because it may add a padding token.
        batch_size: Sequences per forward pass, or ``"auto"``.
    """
    from copy import deepcopy

    from lm_eval.models.huggingface import HFLM

    mode = _ModuleMode()
    mode.capture(model)
    hf_logger = logging.getLogger("lm_eval.models.huggingface")
    level = hf_logger.level
    hf_logger.setLevel(logging.ERROR)  # hide its warning that the model is already loaded
    try:
        lm = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)
    finally:
        hf_logger.setLevel(level)
    try:
        yield lm
    finally:
        mode.restore(model)


def write_results(results: Results, folder: str | Path) -> None:
    """Writes ``results.json`` and ``results.md``.

    For each answer, the JSON keeps only what a later comparison needs: the question's identity and its metrics.

    Args:
        results: The return value of :func:`evaluate`.
        folder: The folder, which is created if it does not exist.
    """
    from lm_eval.utils import handle_non_serializable

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {**results, "samples": {task: _essence(samples) for task, samples in results.get("samples", {}).items()}}
    text = json.dumps(kept, indent=1, default=handle_non_serializable, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    limit = results.get("config", {}).get("limit")
    note = ""
    if limit is not None:
        amount = f"a share of {limit} of each task's questions" if limit < 1 else f"{limit} questions per task"
        note = f"\nLimited to {amount}: not comparable to full results.\n"
    markdown = f"# {results.get('model_name', 'Results')}\n{note}\n{results_table(results)}"
    (folder / "results.md").write_text(markdown, encoding="utf-8")


def results_table(results: Results) -> str:
    """Returns lm-eval's table of the results in Markdown, followed by a table of groups if it has any."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def _essence(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    identity = ("doc_id", "doc_hash", "filter", "metrics")
    return [{name: sample[name] for name in (*identity, *sample["metrics"])} for sample in samples]


@contextmanager
def _language_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | None,
    batch_size: int | str,
    device: str | None,
    dtype: str | torch.dtype,
    model_args: dict[str, Any],
) -> Iterator[HFLM]:
    from lm_eval.models.huggingface import HFLM

    if not isinstance(model, (str, Path)):
        if device is not None or dtype != "auto" or model_args:
            raise ValueError(
                f"device={device!r}, dtype={dtype!r} and model_args={model_args!r} are for a model that evaluate()"
                " loads. A loaded model is evaluated as it is: move it with model.to(...) first."
            )
        if tokenizer is None:
            raise ValueError("tokenizer=None must be the tokenizer of the loaded model.")
        chosen = find_tokenizer(tokenizer)
        assert chosen is not None
        with loaded_model(model, chosen, batch_size) as lm:
            yield lm
        return
    with TemporaryDirectory() as folder:
        source = str(model)
        if Path(model).suffix == ".ckpt":
            source = str(export_checkpoint(model, folder, tokenizer=tokenizer))
            tokenizer = None
            if not (Path(folder) / "tokenizer_config.json").exists():
                raise ValueError(f"{model} has no tokenizer. Give one: --tokenizer NAME_OR_FOLDER (tokenizer=...).")
        elif Path(model).is_dir():
            source = str(Path(model).resolve())  # a relative path could be taken for a name on the hub
        elif Path(model).is_absolute() or str(model).startswith((".", "~")):
            raise FileNotFoundError(f"{model} is neither a folder of a Hugging Face model nor a .ckpt file.")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        with _explained(f"the model {model}"):
            lm = HFLM(
                pretrained=source,
                tokenizer=tokenizer,
                batch_size=batch_size,
                device=device or default,
                dtype=dtype,
                **model_args,
            )
        yield lm


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Adds to an error of the hub that ``what`` needs the network."""
    try:
        yield
    except OSError as error:
        raise OSError(f"Could not load {what}: {str(error).splitlines()[0]} {_NEEDS_NETWORK}") from error


@contextmanager
def _without_process_pool() -> Iterator[None]:
    """Keeps lm-eval from forking processes for its bootstrap: forking is unsafe with threads and CUDA contexts."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _folders(include_path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if include_path is None:
        return []
    return [Path(path) for path in ([include_path] if isinstance(include_path, (str, Path)) else include_path)]


def _name(model: Any) -> str:
    if isinstance(model, (str, Path)):
        return str(model)
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
