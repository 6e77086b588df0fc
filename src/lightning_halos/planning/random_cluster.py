"""Random clusters of any size that resemble the paper's. The same seed gives the same cluster."""

from __future__ import annotations

import numpy as np

from lightning_halos.core.checks import check_count
from lightning_halos.simulation.cluster import SimulatedCluster

# The paper's environment: milliseconds per step of its fastest worker, a Pythia-70M in float32, and a region's network.
_STEP_MS = 238.391
_MESSAGE_BYTES = 281_706_496
_INSIDE_GBPS = 100.0

# More would take more memory than machines have.
_MOST_REGIONS = 2000
_MOST_WORKERS = 1_000_000


def random_cluster(regions: int, workers_per_region: int, seed: int = 0) -> SimulatedCluster:
    """Draws a cluster that resembles the paper's environment of 4 regions with 4 workers each.

    Speeds are uniform from 0.1 to 1 (the paper's 16 speeds range from 0.107 to 0.907, with a mean of 0.56). Bandwidths
    between regions are log-uniform from 0.1 to 1 Gbit/s and equal in both directions (the paper's 6 bandwidths range
    from 0.117 to 0.935, with a mean of 0.38). Bandwidths inside a region are 100 Gbit/s. The step time and the model
    are the paper's.

    Raises:
        ValueError: If a number is invalid.
    """
    check_count("regions", regions)
    check_count("workers_per_region", workers_per_region)
    check_count("seed", seed, least=0)
    if regions > _MOST_REGIONS or regions * workers_per_region > _MOST_WORKERS:
        raise ValueError(
            f"regions={regions} with workers_per_region={workers_per_region}: a random cluster has at most"
            f" {_MOST_REGIONS:,} regions, and {_MOST_WORKERS:,} workers in all of them."
        )
    draw = np.random.default_rng(seed)
    speeds = draw.uniform(0.1, 1.0, (regions, workers_per_region))
    one_way = np.triu(10 ** draw.uniform(-1.0, 0.0, (regions, regions)), k=1)
    bandwidths = one_way + one_way.T + _INSIDE_GBPS * np.eye(regions)
    return SimulatedCluster(bandwidths.tolist(), speeds.tolist(), _STEP_MS, _MESSAGE_BYTES)
