"""Finds the Hugging Face model in a LightningModule, and its tokenizer.

It changes nothing, and loads nothing except a tokenizer that is given by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_halos.data.tokenizers import fetch_tokenizer
from lightning_halos.extras import language_package

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_language_model(module: nn.Module, submodule: str | None = None) -> tuple[str, PreTrainedModel]:
    """Finds the ``transformers.PreTrainedModel`` in a module, or in one of its submodules, and its name in the module.

    A compiled model is found under the name of the original module, such as ``"model._orig_mod"``.

    Raises:
        AttributeError: If the submodule does not exist.
        ModuleNotFoundError: If transformers is not installed.
        ValueError: If there is no model, or there are several that are not part of each other.
    """
    language_package("transformers")
    from transformers import PreTrainedModel

    root = module if submodule is None else module.get_submodule(submodule)
    found: dict[str, PreTrainedModel] = {}
    inside: set[nn.Module] = set()
    for name, part in root.named_modules(prefix=submodule or ""):
        if isinstance(part, PreTrainedModel) and part not in inside:
            found[name] = part
            inside.update(part.modules())
    where = type(module).__name__ if submodule is None else f"{type(module).__name__}.{submodule}"
    if not found:
        raise ValueError(
            f"{where} contains no transformers.PreTrainedModel. Make one an attribute of the module, such as"
            " self.model = AutoModelForCausalLM.from_config(config)."
        )
    if len(found) > 1:
        raise ValueError(
            f"{where} contains {len(found)} models of transformers: {', '.join(found)}. Choose one, such as"
            f" submodule={next(iter(found))!r}."
        )
    return next(iter(found.items()))


def find_tokenizer(tokenizer: Any, trainer: pl.Trainer | None = None) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer that is given, itself or by its name or folder, or else that of the Trainer's datamodule.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        TypeError: If it is not a tokenizer of transformers.
        ValueError: If it does not exist or cannot be reached.
    """
    language_package("transformers")
    from transformers import PreTrainedTokenizerBase

    given = tokenizer
    if given is None and trainer is not None:
        given = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if isinstance(given, (str, Path)):
        given = fetch_tokenizer(given)
    if given is not None and not isinstance(given, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer=<{type(given).__name__}> must be a tokenizer of transformers, or its name or folder. Wrap a"
            " tokenizer of the tokenizers library in PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    return given
