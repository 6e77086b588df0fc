"""Makes the network of an algorithm: it chooses its kind and makes its servers, and simulates nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm, SynchronousAlgorithm
from lightning_halos.core.global_server import GlobalServer
from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.parameter_server import ParameterServer
from lightning_halos.core.topology import Topology
from lightning_halos.simulation.network import Network, Work
from lightning_halos.simulation.overlap import OverlappingNetwork
from lightning_halos.simulation.region_network import RegionNetwork
from lightning_halos.simulation.synchronous_network import SynchronousNetwork
from lightning_halos.simulation.timing import Timing


def make_network(
    algorithm: Algorithm,
    topology: Topology,
    timing: Timing,
    work: Work,
    shapes: Sequence[torch.Size],
    model: Tensor | None,
    prepare: Callable[[ParameterServer], object] = lambda server: None,
) -> Network:
    """Makes the network of an algorithm.

    Args:
        algorithm: The algorithm.
        topology: The local servers and their workers.
        timing: The durations on the cluster.
        work: The ordered work.
        shapes: Shapes of the parameters in the model.
        model: The initial model, which is copied; ``None`` for a network that only computes the rounds.
        prepare: Called with each server that has a model.
    """
    if isinstance(algorithm, SynchronousAlgorithm):
        server = None if model is None else algorithm.server(model.clone(), shapes)
        if server is not None:
            prepare(server)
        return SynchronousNetwork(timing, work, algorithm, server)
    assert isinstance(algorithm, ServerAlgorithm)
    groups, number = topology.groups, len(topology.groups)
    if model is None:
        sgd, period = partial(torch.optim.SGD, lr=1.0), None if number == 1 else 1
        locals_ = [LocalServer(g.index, torch.zeros(1), sgd, period, 0.0, workers=len(g.ranks)) for g in groups]
        global_ = None if number == 1 else GlobalServer(torch.zeros(1), sgd, servers=number)
    else:
        locals_ = [
            algorithm.local_server(g.index, number, len(g.ranks), model.clone(), shapes, topology.describe)
            for g in groups
        ]
        global_ = algorithm.global_server(number, model.clone(), shapes)
        for server_with_model in (*locals_, *filter(None, [global_])):
            prepare(server_with_model)
    kind = OverlappingNetwork if algorithm.overlap else RegionNetwork
    return kind(timing, work, algorithm, groups, locals_, global_)
