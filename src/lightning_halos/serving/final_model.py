"""The final model as a checkpoint that ``MyModule.load_from_checkpoint(path, strict=False)`` reads.

The server knows only the names and shapes of what the members train and average, so the rest of a module's state, such
as frozen parameters, is not in the file.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch

from lightning_halos.core.open_global_node import OpenGlobalNode
from lightning_halos.version import __version__


def checkpoint_of(node: OpenGlobalNode) -> dict[str, Any]:
    """Returns the checkpoint of a finished run.

    ``state_dict`` has the tensors by their names in the module, in the dtype of the servers. The remaining fields are
    those that Lightning expects, and ``halos`` says where the model comes from.
    """
    description, run = node.description, node.status()["run"]
    named = [*zip(description.names, description.shapes, strict=True), *description.buffers]
    shapes = [torch.Size(shape) for _, shape in named]
    parts = torch.split(node.model, [shape.numel() for shape in shapes])
    # Each has its own memory, so that who keeps one of them does not keep all.
    state = {name: part.view(shape).clone() for (name, _), shape, part in zip(named, shapes, parts, strict=True)}
    return {
        "state_dict": state,
        "epoch": run["epoch"],
        "global_step": run["global_step"],
        "pytorch-lightning_version": lightning.__version__,
        "halos": {"version": __version__, "algorithm": description.algorithm, "updates": run["version"]},
    }
