"""Adds to checkpoints what ``lightning-halos export`` needs to make a Hugging Face folder.

It adds only text, numbers and bytes, so that ``torch.load(weights_only=True)`` still reads the checkpoint.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_halos.core import run_length
from lightning_halos.language.export import RECORD
from lightning_halos.language.models import find_language_model, find_tokenizer
from lightning_halos.training.strategy import AlgorithmStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HuggingFaceCheckpoint(Callback):
    """Lets ``lightning-halos export`` turn every checkpoint into a Hugging Face folder.

    The module is any LightningModule with a ``transformers.PreTrainedModel`` among its submodules. The callback adds to
    the checkpoint, under the key ``"hugging_face"``: the files that ``save_pretrained`` writes for the model's
    configuration, generation configuration and tokenizer; the model's class and its name in the module; and the
    training settings, for the model card. It adds no weights, because the checkpoint has them already. Checkpoints with
    weights only, as of ``ModelCheckpoint(save_weights_only=True)``, get it if they are saved during the fit.

    Args:
        tokenizer: The model's tokenizer, or its name or folder. Default: the ``tokenizer`` of the datamodule. Without
            either, ``export`` needs to be given one.
        submodule: Name of the submodule that is the model, if there are several.

    Raises:
        ModuleNotFoundError: When the fit starts, if transformers is not installed.
        TypeError: When the fit starts, if the tokenizer is not one of transformers.
        ValueError: When the fit starts, if the module contains no model, or several and ``submodule`` is not given; or
            if the tokenizer does not exist or cannot be reached.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | str | Path | None = None, submodule: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.submodule = submodule
        self._tokenizer_files: dict[str, str | bytes] | None = None
        self._hook_of_module: Any = None  # what the module itself had in the place of a hook

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            find_language_model(pl_module, self.submodule)
            if trainer.is_global_zero:
                self._find_tokenizer_files(trainer)
            # Lightning asks no callback about a checkpoint with weights only, but always the module.
            hook = pl_module.on_save_checkpoint
            self._hook_of_module = vars(pl_module).get("on_save_checkpoint")

            def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
                hook(checkpoint)
                if RECORD not in checkpoint:
                    self.on_save_checkpoint(trainer, pl_module, checkpoint)

            vars(pl_module)["on_save_checkpoint"] = on_save_checkpoint

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._restore_hook(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_hook(pl_module)

    def _restore_hook(self, module: pl.LightningModule) -> None:
        vars(module).pop("on_save_checkpoint", None)
        if self._hook_of_module is not None:
            vars(module)["on_save_checkpoint"], self._hook_of_module = self._hook_of_module, None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        name, model = find_language_model(pl_module, self.submodule)
        files = _files_of(model.config)
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            files |= _files_of(generation_config)
        checkpoint[RECORD] = {
            "submodule": name,
            "architecture": _architecture(model),
            "files": files,
            "tokenizer_files": self._find_tokenizer_files(trainer),
            "training": training_settings(trainer),
        }

    def _find_tokenizer_files(self, trainer: pl.Trainer) -> dict[str, str | bytes]:
        if self._tokenizer_files is None:
            tokenizer = find_tokenizer(self.tokenizer, trainer)
            self._tokenizer_files = {} if tokenizer is None else _files_of(tokenizer)
        return self._tokenizer_files


def training_settings(trainer: pl.Trainer) -> dict[str, str]:
    """Returns the training settings for the model card: text by name."""
    settings: dict[str, Any] = {"Strategy": type(trainer.strategy).__name__, "Workers": trainer.world_size}
    if isinstance(trainer.strategy, AlgorithmStrategy):
        member = trainer.strategy.membership
        workers = trainer.strategy.site.size if member is None else member.workers
        settings |= {"Workers": workers, **_halos_settings(trainer.strategy)}
    settings |= {
        "Global steps": trainer.global_step,
        "max_steps": trainer.max_steps if trainer.max_steps != -1 else None,
        "max_epochs": trainer.max_epochs if trainer.max_epochs != -1 else None,
        "Precision": trainer.precision,
        "Gradient accumulation": trainer.accumulate_grad_batches,
        "Gradient clipping": trainer.gradient_clip_val,
    }
    for index, optimizer in enumerate(trainer.optimizers):
        settings["Optimizer" if len(trainer.optimizers) == 1 else f"Optimizer {index}"] = describe_optimizer(optimizer)
    settings["Versions"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    )
    return {name: str(value) for name, value in settings.items() if value is not None}


def describe_optimizer(optimizer: Optimizer) -> str:
    """Returns the optimizer's class and its constructor's settings as text; a setting is a list where groups differ."""
    settings = {}
    for name in ("lr", *(name for name in optimizer.defaults if name != "lr")):
        # Prefer the value that a scheduler started from, which it stores in the groups.
        values = [group.get(f"initial_{name}", group.get(name)) for group in optimizer.param_groups]
        settings[name] = values[0] if all(value == values[0] for value in values) else values
    shown = (f"{name}={value}" for name, value in settings.items() if value is not None and value is not False)
    return f"{type(optimizer).__name__}({', '.join(shown)})"


def _halos_settings(strategy: AlgorithmStrategy) -> dict[str, Any]:
    topology, algorithm = strategy.topology, strategy.algorithm
    defaults: dict[str, Any] = {}
    regions = zip(topology.names, topology.regions, strict=True)
    settings: dict[str, Any] = {
        "Regions": ", ".join(f"{name}: {len(ranks)} worker(s)" for name, ranks in regions),
        "Local servers": len(topology.groups),
    }
    if (run := strategy.algorithm_of_run) is not None:
        defaults = run_length.settings(run, topology.groups, joins=strategy.membership is not None)
        if defaults:
            settings["Defaults"] = f"for {run_length.length_of_defaults(run)}"
    for field in fields(algorithm):
        value = getattr(algorithm, field.name)
        if callable(value):
            value = describe_optimizer(value([nn.Parameter(torch.zeros(1))]))
        if field.name in defaults:
            value = f"{_described(defaults[field.name])} (default)"
        if field.name not in ("defaults", "global_steps"):
            settings[field.name] = value
    return settings


def _described(default: Any) -> str:
    """Returns a default as text; those of an optimizer are its arguments by name."""
    if isinstance(default, Mapping):
        return ", ".join(f"{name}={value:.3g}" for name, value in default.items())
    return str(default)


def _architecture(model: nn.Module) -> str:
    """The name of the transformers class that the model is, or inherits from."""
    import transformers

    for kind in type(model).__mro__:
        if getattr(transformers, kind.__name__, None) is kind:
            return str(kind.__name__)
    return type(model).__name__


def _files_of(part: Any) -> dict[str, str | bytes]:
    """The files that ``part.save_pretrained`` writes: as text, or as bytes if they are not UTF-8."""
    with TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> str | bytes:
    contents = path.read_bytes()
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError:
        return contents
