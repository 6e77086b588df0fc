"""The servers' default settings, by a rule from the topology and the length of the run.

They are computed when a run begins. Nothing here changes during a run, and settings that a user gives are not here.
``docs/defaults.md`` has the rule's reasons, and what it was measured against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lightning_halos.core.delayed_nesterov import DelayedNesterov, OptimizerFactory

Defaults = Literal["run", "published"]
"""What the defaults are for: the length of the run, or the runs of the HALoS paper, whatever the length."""

PUBLISHED_STEPS = 6144
"""Global steps of the HALoS paper's runs: 12.9 billion tokens, 2 million in a global step."""
ASSUMED_STEPS = 600
"""Global steps that a run of unknown length is taken to have: few, because a long run loses less to a short run's
defaults than a short one loses to a long run's."""
PUBLISHED_WEIGHT = 0.25
"""Weight of the global model in a merge, in the HALoS paper's runs."""

_PUBLISHED_PERIOD = 8  # pushes per worker between two exchanges (32 with 4 workers)
_EXCHANGES = 40  # of a server in a run, as far as one push per worker and exchange is enough for it
_SHORT_WEIGHT = 0.5  # of the global model in a merge


@dataclass(frozen=True)
class _Rule:
    """The rate and the momentum of a kind of server.

    Attributes:
        total: The published sum of the rates over a round of all senders.
        momentum: The published momentum.
        short_total: The sum of the rates in a short run.
        short_momentum: The momentum in a short run.
    """

    total: float
    momentum: float
    short_total: float
    short_momentum: float = 0.0

    def at(self, length: float) -> tuple[float, float]:
        """Returns the sum of the rates, and the momentum.

        They are those of a short run up to half the length of the paper's runs, and the published ones from their
        length on. Between the two they are on a straight line.

        Args:
            length: Length of the run, in lengths of the paper's runs.
        """
        share = min(max(0.0, 2 * length - 1), 1.0)
        momentum = share * self.momentum + (1 - share) * self.short_momentum
        return share * self.total + (1 - share) * self.short_total, round(momentum, 2)


_LOCAL = _Rule(0.8, 0.9, short_total=1.0)
_OUTER = _Rule(0.7, 0.9, short_total=0.7, short_momentum=0.6)


def length_of(rounds: float, published_local_steps: int) -> float:
    """Returns the length of a run of a number of rounds of a worker, in lengths of the paper's runs."""
    return rounds * published_local_steps / PUBLISHED_STEPS


def local_optimizer(workers: int, length: float, windows: int) -> OptimizerFactory:
    """Returns the optimizer of a local server for a number of workers.

    With 4 workers, in a run of the paper's length, these are the paper's values (section 5.1): 0.2, 0.9, 16.

    Args:
        workers: Workers of the server.
        length: Length of the run, in lengths of the paper's runs.
        windows: Rounds of all workers in a window of the momentum.
    """
    return _nesterov(_LOCAL, length, workers, windows * workers)


def global_optimizer(servers: int, length: float) -> OptimizerFactory:
    """Returns the optimizer of the global server for a number of local servers.

    With 4 servers, in a run of the paper's length, these are the paper's values (section 5.1): 0.15, 0.5, 2. In short
    runs the rates of several servers sum to more than 1, up to 2.2 for 4 and more, because not all pushes of a server
    are part of an update: those that arrive during an exchange are not, and a merge replaces a part of what they have
    changed.
    """
    rule = _Rule(0.6, 0.5, short_total=1 + 0.4 * (min(servers, 4) - 1))
    return _nesterov(rule, length, servers, max(1, servers // 2))


def averaging_optimizer(senders: int) -> OptimizerFactory:
    """Returns an optimizer that moves the model to about the mean of its senders' in a round: 1 / senders, no momentum.

    One worker then trains as it would alone. It is the optimizer of the only local server of a run, whatever the
    length: momentum is no clear gain there in some thousand steps (``docs/defaults.md``).
    """
    return partial(DelayedNesterov, lr=1 / senders, momentum=0.0, delay=1)


def outer_optimizer(length: float) -> OptimizerFactory:
    """Returns DiLoCo's optimizer; in long runs SGD with rate 0.7 and Nesterov momentum 0.9 (arXiv 2311.08105).

    Its rounds are synchronous, so that it can have momentum in short runs, too.
    """
    total, momentum = _OUTER.at(length)
    return partial(torch.optim.SGD, lr=total, momentum=momentum, nesterov=momentum > 0)


def period(workers: int, rounds: float) -> int:
    """Returns the pushes between two exchanges (``K``) of a server with a number of workers.

    Args:
        workers: Workers of the server.
        rounds: Rounds of a worker in the run.
    """
    per_worker = _PUBLISHED_PERIOD if math.isinf(rounds) else round(rounds / _EXCHANGES)
    return workers * min(max(1, per_worker), _PUBLISHED_PERIOD)


def merge_weight(length: float) -> float:
    """Returns the weight of the global model in a merge (``alpha``).

    A server takes in a part ``1 - (1 - alpha)^n`` of what the others have learned in ``n`` exchanges, so it has to be
    larger if there are few.
    """
    share = min(length, 1.0)
    return round(share * PUBLISHED_WEIGHT + (1 - share) * _SHORT_WEIGHT, 2)


def _nesterov(rule: _Rule, length: float, senders: int, delay: int) -> OptimizerFactory:
    total, momentum = rule.at(length)
    return partial(DelayedNesterov, lr=total / senders, momentum=momentum, delay=delay if momentum else 1)
