"""Logs the activity of servers and workers.

It only reads counters that this process has received already. It never sends a request, which would slow down the run.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_SUMS = ("updates", "merges", "bytes_within_regions", "bytes_between_regions", "round_seconds")
_MOST_SHARES = 8  # on the progress bar, which is one line


class HalosMonitor(Callback):
    """Logs how a HALoS run is going, through any logger and on the progress bar.

    At the start of each of its rounds, rank 0 logs the latest report of the local servers. The progress bar shows the
    metrics with a star:

    ===================================  ==================================================================
    ``halos/global_step`` *              local steps of all workers / number of workers
    ``halos/staleness`` *                mean versions between pull and push so far
    ``halos/staleness_max``              largest staleness so far
    ``halos/updates`` *                  pushes that local servers applied
    ``halos/rejected``                   pushes that local servers rejected
    ``halos/rejected/rank_0``            rejected pushes of one worker, for each worker that has any
    ``halos/merges`` *                   global models that local servers merged
    ``halos/global_updates``             region updates that the global server applied
    ``halos/bytes_within_regions`` *     bytes between workers and servers, inside regions
    ``halos/bytes_between_regions`` *    bytes between regions
    ``halos/round_seconds`` *            seconds that all workers together spent computing rounds
    ``halos/compute_share/rank_0`` *     for each worker: seconds computing / seconds computing and waiting
    ``halos/compute_share_min``          the smallest of these; with more than 8 workers the progress bar
                                         shows it instead of them
    ===================================  ==================================================================

    In a real run, a message inside one process counts no bytes. Async-Local-SGD has one region, so all its bytes count
    as inside it. In a simulation, every push, pull and exchange counts with the cluster's message size, and it counts
    as between regions if worker and server are in different ones, also under Async-Local-SGD; seconds are virtual, and
    a worker waits while its messages are in transit.

    DiLoCo and synchronous SGD have no local servers, so nothing is logged.

    Raises:
        MisconfigurationException: If the Trainer's strategy is not a halos strategy.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(trainer.strategy, "servers"):
            raise MisconfigurationException(
                f"HalosMonitor needs Trainer(strategy='halos'), but the strategy is {type(trainer.strategy).__name__}."
                " Use one of the halos strategies or remove the callback."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if strategy.servers is None or strategy.round.batches > 0:
            return
        statistics = strategy.servers.statistics()
        if not statistics:
            return
        shown = {
            "halos/global_step": float(trainer.global_step),
            "halos/staleness": sum(s["staleness_sum"] for s in statistics)
            / max(1, sum(s["updates"] for s in statistics)),
        }
        shown |= {f"halos/{name}": float(sum(s[name] for s in statistics)) for name in _SUMS}
        quiet = {
            "halos/rejected": float(sum(s["rejected"] for s in statistics)),
            "halos/staleness_max": float(max(s["staleness_max"] for s in statistics)),
            "halos/global_updates": float(strategy.servers.version),
        }
        computing: dict[str, float] = {}
        for server in statistics:
            quiet |= {f"halos/rejected/rank_{rank}": float(count) for rank, count in server["rejected_of"].items()}
            computing |= server["compute_share"]
        shares = {f"halos/compute_share/rank_{rank}": computing[rank] for rank in sorted(computing, key=int)}
        smallest = {"halos/compute_share_min": min(shares.values())} if shares else {}
        each_is_shown = trainer.world_size <= _MOST_SHARES
        shown |= shares if each_is_shown else smallest
        quiet |= smallest if each_is_shown else shares
        pl_module.log_dict(shown, prog_bar=True, rank_zero_only=True)
        pl_module.log_dict(quiet, rank_zero_only=True)
