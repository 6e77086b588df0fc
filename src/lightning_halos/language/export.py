"""Turns a Lightning checkpoint into a Hugging Face folder.

It reads one checkpoint and writes one folder, without a Trainer. The callback
:class:`~lightning_halos.HuggingFaceCheckpoint` puts the model's description into the checkpoint.
"""

from __future__ import annotations

import os
import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_halos.core.compat import COMPILED
from lightning_halos.extras import language_package
from lightning_halos.language.models import find_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RECORD = "hugging_face"
_TASKS = {"CausalLM": "text-generation", "MaskedLM": "fill-mask", "SequenceClassification": "text-classification"}


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    submodule: str | None = None,
    weights_only: bool = True,
) -> Path:
    """Writes the model of a Lightning checkpoint as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder has the weights as safetensors, in the dtype of the checkpoint, the configuration, the generation
    configuration, the tokenizer, and a model card with the training settings. Under a halos strategy these are the
    weights of the global model.

    Args:
        checkpoint: The ``.ckpt`` file, from a training with :class:`~lightning_halos.HuggingFaceCheckpoint`.
        output: The folder to write. Existing files of the same names are overwritten.
        config: Name or folder of a Hugging Face model with the same configuration, for a checkpoint that was written
            without that callback.
        tokenizer: The tokenizer, or its name or folder. Default: the checkpoint's.
        submodule: Name of the model in the LightningModule, such as ``"student"``. Default: what the checkpoint says,
            or the only one that has weights of the expected names.
        weights_only: Whether to refuse to unpickle anything but tensors and plain values. Use ``False`` only for a file
            that you trust and that contains more, such as hyperparameters of your own classes.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ModuleNotFoundError: If transformers is not installed.
        ValueError: If the checkpoint cannot be read, does not describe its model, or has weights of another model.
    """
    language_package("transformers")
    output = Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file. Name a folder to write to.")
    chosen = find_tokenizer(tokenizer)
    model_config = None if config is None else _load_config(config)
    contents = _read(Path(checkpoint).expanduser(), weights_only)
    record = contents.get(RECORD)
    if record is None and model_config is None:
        raise ValueError(
            f"{checkpoint} does not say what its Hugging Face model is. For this checkpoint, give the name or folder of"
            " a model with the same configuration: lightning-halos export --config NAME_OR_FOLDER (config=... in"
            " Python). For the next one, train with"
            " Trainer(callbacks=[lightning_halos.HuggingFaceCheckpoint(tokenizer)])."
        )
    record = record or {}
    weights = {name.replace(COMPILED, ""): weight for name, weight in contents["state_dict"].items()}
    with TemporaryDirectory() as folder:
        _write_files(record.get("files", {}), Path(folder))
        model = _make_model(_load_config(folder) if model_config is None else model_config, record.get("architecture"))
        _load(model, weights, record.get("submodule") if submodule is None else submodule, checkpoint)
        if model.can_generate() and "generation_config.json" in record.get("files", {}):
            model.generation_config = type(model.generation_config).from_pretrained(folder)
        model.save_pretrained(output)
    if chosen is not None:
        chosen.save_pretrained(output)
    else:
        _write_files(record.get("tokenizer_files", {}), output)
    card = model_card(type(model).__name__, model.num_parameters(), record.get("training", {}))
    (output / "README.md").write_text(card, encoding="utf-8")
    return output


def model_card(architecture: str, parameters: int, training: Mapping[str, str]) -> str:
    """Returns the model card: Markdown below metadata in YAML, as the hub expects it."""
    task = next((f"pipeline_tag: {task}\n" for end, task in _TASKS.items() if architecture.endswith(end)), "")
    rows = [("Architecture", architecture), ("Parameters", f"{parameters:,}"), *training.items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"---\nlibrary_name: transformers\n{task}tags:\n- lightning-halos\n---\n\n"
        "# Model card\n\n"
        "Trained with PyTorch Lightning and lightning-halos, exported by `lightning-halos export`.\n\n"
        f"| Setting | Value |\n|---|---|\n{table}\n"
    )


def refuse_missing(path: Path) -> None:
    """Refuses a checkpoint that is missing, or in the pieces of a divided model.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is a folder.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder. If FSDP saved a divided model there, make a file of it: python -m"
            f" lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give a checkpoint file of Lightning (.ckpt).")


def _read(path: Path, weights_only: bool) -> dict[str, Any]:
    refuse_missing(path)
    try:
        contents = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a checkpoint, or it contains more than tensors and plain values. If you trust the file, use"
            " lightning-halos export --no-weights-only (weights_only=False in Python)."
        ) from error
    except OSError:
        raise
    except Exception as error:  # any that there is, from bytes that mean something else
        raise ValueError(
            f"{path} cannot be read: it is damaged or not a checkpoint. {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(contents, dict) or "state_dict" not in contents:
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no state_dict.")
    return contents


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _write_files(files: Mapping[str, str | bytes], folder: Path) -> None:
    root = folder.resolve()
    for name, contents in files.items():
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"The checkpoint contains a file {name!r} that would be written outside of {folder}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode("utf-8") if isinstance(contents, str) else contents)


def _load_config(name: str | Path) -> PretrainedConfig:
    import transformers

    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the configuration {name} (--config, or config=... in Python): {_first_line(error)} A folder"
            " must hold a Hugging Face model's config.json; a name on the hub needs the network, or an earlier"
            " download."
        ) from error
    return config


def _make_model(config: PretrainedConfig, architecture: str | None) -> Any:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    name = architecture or next(iter(config.architectures or []), None)
    if name is None:
        return auto.from_config(config)
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"The model is a {name}, which is not a class of transformers {transformers.__version__}.")
    return kind(config)


def _load(model: PreTrainedModel, weights: Mapping[str, Tensor], submodule: str | None, checkpoint: str | Path) -> None:
    """Loads the weights of the submodule. By default it is the only submodule with weights of the expected names."""
    if submodule is None:
        some = next(iter(model.state_dict()))
        prefixes = [name.removesuffix(some) for name in weights if name == some or name.endswith(f".{some}")]
        if len(prefixes) > 1:
            names = ", ".join(prefix.removesuffix(".") or "the module itself" for prefix in prefixes)
            raise ValueError(
                f"{checkpoint} has several models that may be the one: {names}. Choose it: lightning-halos export"
                " --submodule NAME (submodule=... in Python)."
            )
        if not prefixes:
            raise ValueError(
                f"{checkpoint} has no weight called {some}, but a {type(model).__name__} of this"
                " configuration has one. Give the configuration of the model that was trained."
            )
        prefix = prefixes[0]
    else:
        name = f"{submodule}.".replace(COMPILED, "")
        prefix = "" if name == "." else name
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(f"{checkpoint} has no weights in submodule={submodule!r}.")
    if any(".lora_" in name for name in own):
        raise ValueError(
            f"{checkpoint} contains adapters of peft, not a complete model. Save the merged model instead"
            " (model.merge_and_unload().save_pretrained(FOLDER)), or the adapters (model.save_pretrained(FOLDER))."
        )
    # A state made of named_parameters(), as in the server's final.ckpt, has a tied weight under one of its names only.
    entries = list(model.named_parameters(remove_duplicate=False))
    there = {parameter: own[name] for name, parameter in entries if name in own}
    own |= {name: there[parameter] for name, parameter in entries if name not in own and parameter in there}
    try:
        model.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {checkpoint} do not fit this configuration. Give the configuration of the model that was"
            f" trained. {textwrap.shorten(str(error), 500)}"
        ) from None
    model.tie_weights()
