"""A training script for nodes of unequal size: ``python -m tests.integration.unequal FOLDER``.

torchrun starts it, with one process on the first node and two on the second. Each node is a region.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_halos import HalosStrategy
from tests.integration.harness import Result, save_result
from tests.integration.toys import LOCAL_STEPS, Toy, assert_trained, loader, make_trainer, outcome

PROCESSES = (1, 2)
"""Number of processes on each node."""


def unequal(**kwargs: Any) -> Result:
    """Fits in the default regions, with the devices that each node has."""
    module = Toy()
    strategy = HalosStrategy(local_steps=LOCAL_STEPS, accumulate_updates=4, timeout=60)
    trainer = make_trainer(strategy, max_steps=20, devices="auto", **kwargs)
    trainer.fit(module, loader())
    regions = [list(region) for region in strategy.topology.regions]
    sizes = [trainer.world_size, trainer.num_nodes, trainer.num_devices]
    trainer.validate(module, loader(60), verbose=False)
    environment = type(strategy.cluster_environment).__name__
    return outcome(trainer, module, regions=regions, sizes=sizes, environment=environment)


def assert_unequal(results: list[Result], environment: str) -> None:
    """All processes trained one model, each node was a region, and validation divided its data among all processes."""
    assert_trained(results, max_steps=20)
    assert [result["sizes"] for result in results] == [[3, 2, 1], [3, 2, 2], [3, 2, 2]]
    assert all(result["environment"] == environment for result in results)
    assert all(result["regions"] == [[0], [1, 2]] for result in results)
    assert sorted(sample for result in results for sample in result["validated_on"][-1]) == list(range(60))


def main(folder: str) -> None:
    """Tries wrong settings, each of which is refused before anything starts, and fits."""
    with pytest.raises(ValueError, match=r"num_nodes=3\), but torchrun started this job on 2 node\(s\)"):
        make_trainer(HalosStrategy(), devices="auto", num_nodes=3)
    with pytest.raises(ValueError, match=r"has 4 device\(s\) .* torchrun started . process.*--nproc-per-node 4"):
        make_trainer(HalosStrategy(), devices=4)
    with pytest.raises(ValueError, match=r"regions=4 is more than the 3 worker\(s\)"):
        make_trainer(HalosStrategy(regions=4), devices="auto")
    save_result(Path(folder), int(os.environ["RANK"]), unequal())


if __name__ == "__main__":
    main(*sys.argv[1:])
