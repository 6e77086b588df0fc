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
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.model_helpers import _ModuleMode
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_halos.core.checks import check_count, check_seed, is_positive
from lightning_halos.extras import language_package
from lightning_halos.language.export import export_checkpoint
from lightning_halos.language.models import find_tokenizer

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, Any]


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
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
        model_args: Further arguments of lm-eval's ``HFLM``, such as ``{"peft": "my-adapter"}``. They override
            ``batch_size`` and ``dtype``.
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
    benchmark = Benchmark(tasks, include_path, limit, num_fewshot, batch_size, bootstrap_iters, seed)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} must be 'auto' or the name of a data type of torch, such as 'bfloat16'.")
    options = dict(model_args or {})
    twice = [name for name in ("pretrained", "tokenizer", *(["device"] if device else [])) if name in options]
    if twice:
        raise ValueError(
            f"model_args={options!r} must not have {', '.join(twice)}: the model, the tokenizer and the device are"
            " arguments of their own."
        )
    _refuse_absent(options.get("device", device))
    benchmark.load()
    name = model if isinstance(model, (str, Path)) else model.name_or_path or type(model).__name__
    with isolate_rng(), _language_model(model, tokenizer, batch_size, device, dtype, options) as lm:
        return benchmark.run(lm) | {"model_name": str(name)}


class Benchmark:
    """Tasks of lm-eval, and how to run them. The arguments, which are checked at once, are those of :func:`evaluate`.

    Attributes:
        tasks: The names of the tasks.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        include_path: str | Path | Sequence[str | Path] | None,
        limit: int | float | None,
        num_fewshot: int | None,
        batch_size: int | str,
        bootstrap_iters: int,
        seed: int,
    ) -> None:
        names = tasks.split(",") if isinstance(tasks, str) else tasks
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tasks={tasks!r} must be names of tasks, such as ['hellaswag', 'lambada_openai'].")
        self.tasks = [name.strip() for name in names]
        if not self.tasks or not all(self.tasks):
            raise ValueError(f"tasks={tasks!r} must name at least one task, such as 'hellaswag,lambada_openai'.")
        if limit is not None and (not is_positive(limit) or (limit > 1 and limit != int(limit))):
            raise ValueError(f"limit={limit!r} must be a number of questions per task, or a share of them below 1.")
        if num_fewshot is not None:
            check_count("num_fewshot", num_fewshot, least=0)
        if batch_size != "auto":
            check_count("batch_size", batch_size)
        check_count("bootstrap_iters", bootstrap_iters)
        check_seed("seed", seed)
        folders = [include_path] if isinstance(include_path, (str, Path)) else include_path or ()
        if not isinstance(folders, Sequence) or not all(isinstance(folder, (str, Path)) for folder in folders):
            raise ValueError(f"include_path={include_path!r} must be a folder, or a list of folders.")
        self._folders: list[str | Path] = [os.path.expanduser(folder) for folder in folders]
        for path in self._folders:
            if not os.path.isdir(path):
                raise FileNotFoundError(f"include_path={path!r} is not a folder with YAML files that define tasks.")
        self._options = {"limit": limit, "num_fewshot": num_fewshot, "bootstrap_iters": bootstrap_iters}
        self._seed = seed
        self._manager: TaskManager | None = None

    def load(self) -> None:
        """Finds the tasks and their data, unless it has been done. For the errors see :func:`evaluate`."""
        if self._manager is not None:
            return
        for package in ("transformers", "datasets", "lm_eval", "accelerate"):
            language_package(package)
        from lm_eval.tasks import TaskManager

        with isolate_rng():
            # To search the thousands of tasks that come with lm-eval takes half a minute.
            manager = TaskManager(include_path=self._folders, include_defaults=False) if self._folders else None
            if manager is None or not set(self.tasks) <= set(manager.all_tasks):
                manager = TaskManager(include_path=self._folders or None)
            unknown = [name for name in self.tasks if name not in manager.all_tasks and not Path(name).is_file()]
            if unknown:
                raise ValueError(
                    f"There is no task called {', '.join(unknown)}. `lm-eval ls tasks` lists the tasks that come with"
                    " lm-eval. Give the folder of other tasks with --include-path FOLDER (include_path=... in Python)."
                )
            with _explained(f"the data of {', '.join(self.tasks)}"):
                manager.load(list(self.tasks))
        self._manager = manager

    def run(self, lm: HFLM) -> Results:
        """Runs the tasks, which must have been loaded, and seeds all random number generators."""
        from lm_eval import simple_evaluate

        os.environ["DISABLE_MULTIPROC"] = "1"  # for lm-eval's bootstrap: forking is unsafe with threads and CUDA
        kinds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        options = self._options | dict.fromkeys(kinds, self._seed)
        try:
            results = simple_evaluate(lm, tasks=list(self.tasks), task_manager=self._manager, **options)
        except AssertionError as error:
            if error.args:
                raise
            raise ValueError(
                f"{', '.join(self.tasks)}: an answer is empty, or longer than the model's context of {lm.max_length}"
                " tokens. Leave the task out, or evaluate a model with a longer context."
            ) from error
        if results is None:
            raise ValueError("lm-eval returns results only in the process with LOCAL_RANK=0. Evaluate there.")
        return dict(results)


@contextmanager
def loaded_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Iterator[HFLM]:
    """Wraps a loaded model for lm-eval, and restores its training mode afterwards."""
    from lm_eval.models.huggingface import HFLM

    mode = _ModuleMode()
    mode.capture(model)
    hf_logger = logging.getLogger("lm_eval.models.huggingface")
    level = hf_logger.level
    hf_logger.setLevel(logging.ERROR)  # hide its warning that the model is already loaded
    try:
        # A copy of the tokenizer, because lm-eval may add a padding token.
        lm = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size)
    finally:
        hf_logger.setLevel(level)
    try:
        yield lm
    finally:
        mode.restore(model)


def write_results(results: Results, folder: str | Path) -> None:
    """Writes ``results.json``, with what a later comparison needs of each answer, and ``results.md``."""
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

    return "\n".join(make_table(results, part) for part in ("results", "groups") if results.get(part))


def _essence(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    identity = ("doc_id", "doc_hash", "filter", "metrics")
    return [{name: sample[name] for name in (*identity, *sample["metrics"])} for sample in samples]


@contextmanager
def _language_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
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
        chosen = find_tokenizer(tokenizer)
        if chosen is None:
            raise ValueError("tokenizer=None must be the tokenizer of the loaded model.")
        with loaded_model(model, chosen, batch_size) as lm:
            yield lm
        return
    model = os.path.expanduser(model)
    with TemporaryDirectory() as folder:
        source = model
        if Path(model).suffix == ".ckpt":
            source = str(export_checkpoint(model, folder, tokenizer=tokenizer))
            tokenizer = None
            if not (Path(folder) / "tokenizer_config.json").exists():
                raise ValueError(f"{model} has no tokenizer. Give one: --tokenizer NAME_OR_FOLDER (tokenizer=...).")
        elif Path(model).is_dir():
            source = str(Path(model).resolve())  # a relative path could be taken for a name on the hub
        elif Path(model).is_absolute() or model.startswith((".", "~")):
            raise FileNotFoundError(f"{model} is neither a folder of a Hugging Face model nor a .ckpt file.")
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"batch_size": batch_size, "dtype": dtype, "device": where, **model_args}
        named = os.path.expanduser(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        with _explained(f"the model {model}"):
            try:
                lm = HFLM(pretrained=source, tokenizer=named, **options)
            except TypeError as error:
                if not model_args or "unexpected keyword argument" not in str(error):
                    raise
                raise ValueError(f"model_args={model_args!r} must be arguments of lm-eval's HFLM: {error}") from error
            except (OSError, ValueError):
                find_tokenizer(tokenizer)  # says so if it is the tokenizer that cannot be loaded
                raise
        yield lm


def _refuse_absent(device: str | None) -> None:
    """Refuses a device that lm-eval would replace by another one without a word."""
    if device is None:
        return
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} must be a device of torch, such as 'cuda:0' or 'cpu'.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices.")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Adds to an error of the hub that ``what`` needs the network."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Could not load {what}: {str(error).splitlines()[0]} Without a local folder it comes from the Hugging Face"
            " hub, which needs the network, or a copy in the hub's cache (HF_HOME) from an earlier run."
        ) from error
