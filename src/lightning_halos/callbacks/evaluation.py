"""Evaluates the model with lm-eval during training.

Only rank 0 evaluates. An evaluation must not change the training: it restores the weights, the mode of every module and
the state of the random number generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_halos.core.checks import check_count, check_switch
from lightning_halos.language.evaluation import Benchmark, loaded_model
from lightning_halos.language.models import find_language_model, find_tokenizer
from lightning_halos.training.compat import show_metrics
from lightning_halos.training.strategy import AlgorithmStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LMEvalCallback(Callback):
    """Evaluates the model on tasks of lm-eval after the fit and, optionally, every N global steps.

    Under the halos strategies, the worker of rank 0 evaluates the *global* model while the other workers go on
    training. Under other strategies, such as DDP, the other processes wait for rank 0 in the next step, at most for the
    strategy's timeout. The module is any LightningModule with a ``transformers.PreTrainedModel`` among its submodules.

    The results go to the Trainer's loggers at the present global step, and to ``trainer.callback_metrics`` on rank 0,
    as ``lm_eval/<task>/<metric>``, such as ``lm_eval/lambada_openai/perplexity``, and their standard errors as
    ``lm_eval/<task>/<metric>_stderr``. The attribute ``results`` has the last results of lm-eval.

    Arguments that are not described here are those of :func:`~lightning_halos.evaluate`.

    Args:
        tasks: Names of tasks or groups of lm-eval, as a list or separated by commas, or paths of YAML files.
        every_n_steps: Evaluate also whenever the global step passes a multiple of this. Default: only at the end.
        at_end: Whether to evaluate the final model when the fit has ended.
        tokenizer: The model's tokenizer, or its name or folder. Default: the ``tokenizer`` of the datamodule.
        submodule: Name of the submodule that is the model, if there are several.

    Raises:
        FileNotFoundError: If a folder of tasks does not exist.
        MisconfigurationException: When the fit starts, if the strategy shards the model, or no tokenizer is known.
        ModuleNotFoundError: When the fit starts, if a package of the extra ``lm`` is not installed.
        TypeError: If ``at_end`` is not a bool.
        OSError: When the fit starts, if the data of a task cannot be loaded.
        ValueError: If an argument is invalid; when the fit starts, if a task or the submodule is unknown.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        every_n_steps: int | None = None,
        *,
        at_end: bool = True,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        submodule: str | None = None,
        include_path: str | Path | Sequence[str | Path] | None = None,
        limit: int | float | None = None,
        num_fewshot: int | None = None,
        batch_size: int | str = 8,
        bootstrap_iters: int = 1000,
        seed: int = 1234,
    ) -> None:
        self._benchmark = Benchmark(tasks, include_path, limit, num_fewshot, batch_size, bootstrap_iters, seed)
        self.tasks = self._benchmark.tasks
        check_switch("at_end", at_end)
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps)
        elif not at_end:
            raise ValueError("at_end=False needs every_n_steps=...: otherwise nothing is ever evaluated.")
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.results: dict[str, Any] | None = None
        self._tokenizer = tokenizer
        self._submodule = submodule
        self._batch_size = batch_size
        self._passed = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the model, the tokenizer and the tasks, so that missing pieces are reported before training starts."""
        if stage != "fit":
            return
        strategy: Any = trainer.strategy
        if isinstance(strategy, AlgorithmStrategy) and strategy.inner is not None:
            strategy = strategy.inner
        if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"LMEvalCallback needs the complete model on rank 0, but {type(strategy).__name__} shards it."
                " Evaluate the checkpoints instead: lightning-halos evaluate CKPT --tasks ... FSDP saves one"
                " as a single file with ModelParallelStrategy(save_distributed_checkpoint=False) or"
                ' FSDPStrategy(state_dict_type="full").'
            )
        find_language_model(pl_module, self._submodule)
        self._find_tokenizer(trainer)
        if trainer.is_global_zero:
            self._benchmark.load()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._passed = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        every, before, step = self.every_n_steps, self._passed, trainer.global_step
        self._passed = step
        if every is None or step // every == before // every or (self.at_end and step == trainer.max_steps):
            return
        self._evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.at_end:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not (strategy.decides if isinstance(strategy, AlgorithmStrategy) else trainer.is_global_zero):
            return
        _, model = find_language_model(pl_module, self._submodule)
        metrics: dict[str, float] = {}
        with _global_model(trainer, model):
            if trainer.is_global_zero:
                metrics = self._run(trainer, model)
            if isinstance(strategy, AlgorithmStrategy) and strategy.round is not None:
                metrics = strategy.broadcast(metrics)  # the other processes of its worker decide with it what follows
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        show_metrics(trainer, metrics)

    def _run(self, trainer: pl.Trainer, model: PreTrainedModel) -> dict[str, float]:
        with (
            isolate_rng(),
            _on_device(model, trainer.strategy.root_device),
            loaded_model(model, self._find_tokenizer(trainer), self._batch_size) as lm,
            trainer.precision_plugin.forward_context(),
        ):
            self.results = self._benchmark.run(lm)
        return flatten(self.results)

    def _find_tokenizer(self, trainer: pl.Trainer) -> PreTrainedTokenizerBase:
        tokenizer = find_tokenizer(self._tokenizer, trainer)
        if tokenizer is None:
            raise MisconfigurationException(
                "LMEvalCallback needs a tokenizer. Pass one, LMEvalCallback(..., tokenizer=tokenizer), or give the"
                " datamodule an attribute `tokenizer`."
            )
        self._tokenizer = tokenizer
        return tokenizer


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers in lm-eval's results, by ``lm_eval/<task>/<metric>``.

    lm-eval calls a metric ``<metric>,<filter>``. The filter becomes part of the name unless it is ``none``.
    """
    metrics = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            if "," in key and isinstance(value, (int, float)):
                metrics[f"lm_eval/{task}/{key.removesuffix(',none').replace(',', '_')}"] = float(value)
    return metrics


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves ``model`` to a device and back: before ``on_fit_end``, the strategy's teardown has moved it to the CPU."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def _global_model(trainer: pl.Trainer, model: nn.Module) -> Iterator[None]:
    """Puts the global model into ``model``, and aborts the evaluation as soon as the run has failed or is preempted."""
    strategy = trainer.strategy
    if not isinstance(strategy, AlgorithmStrategy):
        yield
        return
    # A hook's handle is a context manager that removes it.
    with strategy.global_model(), model.register_forward_pre_hook(lambda *_: strategy.check()):
        yield
