"""Logs the activity of servers and workers.

It only reads counters that this process has received already. It never sends a request, which would slow down the run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_halos.callbacks.picture import draw

_SUMS = ("updates", "rejected", "merges", "bytes_within_regions", "bytes_between_regions", "round_seconds")
_OF_WORKERS = ("rounds", "staleness_of", "rejected_of", "compute_share")
_MOST_WORKERS = 4  # whose numbers fit on the progress bar, which is one line


class HalosMonitor(Callback):
    """Logs how a HALoS run is going, through any logger, and shows all workers on the progress bar.

    The progress bar has the rounds and the mean staleness of each worker, by rank, as in
    ``rounds=147/153/164/91, staleness=1.0/1.0/0.5/1.8``; with more than 4 workers, that of all, and the range. At the
    start of each of its rounds, rank 0 logs the latest report of the local servers:

    | metric                          | meaning                                                            |
    | ------------------------------- | ------------------------------------------------------------------ |
    | ``halos/global_step``           | local steps of all workers / number of workers                     |
    | ``halos/seconds``               | seconds since the start of the fit                                 |
    | ``halos/staleness``             | mean versions between pull and push so far                         |
    | ``halos/staleness_max``         | largest staleness so far                                           |
    | ``halos/updates``               | pushes that local servers applied                                  |
    | ``halos/rejected``              | pushes that local servers rejected                                 |
    | ``halos/merges``                | global models that local servers merged                            |
    | ``halos/global_updates``        | region updates that the global server applied                      |
    | ``halos/bytes_within_regions``  | bytes between workers and servers, inside regions                  |
    | ``halos/bytes_between_regions`` | bytes between regions                                              |
    | ``halos/round_seconds``         | seconds that all workers together spent computing rounds           |
    | ``halos/compute_share_min``     | the smallest compute share of a worker                             |
    | ``halos/rounds/rank_0``         | for each worker: its rounds that have ended                        |
    | ``halos/staleness_of/rank_0``   | for each worker: the mean staleness of its pushes                  |
    | ``halos/rejected_of/rank_0``    | for each worker that has any: its rejected pushes                  |
    | ``halos/compute_share/rank_0``  | for each worker: seconds computing / seconds computing and waiting |

    Ranks are those of workers, and of workers of several processes, bytes are those of the first lane.

    Bytes between a worker and a server of another region, as under Async-Local-SGD, count as between regions. In a real
    run, a message inside one process counts no bytes. In a simulation, every push, pull and exchange counts with the
    cluster's message size, seconds are virtual, and a worker waits while its messages are in transit.

    DiLoCo and synchronous SGD have no local servers, so nothing is logged.

    Raises:
        MisconfigurationException: If the Trainer's strategy is not a halos strategy.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._shown: dict[str, str] = {}

    @staticmethod
    def plot(log: str | Path, picture: str | Path | None = None) -> Any:
        """Draws loss, staleness, compute share and traffic over time, from the log of a ``CSVLogger``.

        Time is that of the simulated cluster, or in a real run the time since the start of the fit. If the log has
        several fits, the time of each goes on from the last one before. Every metric with ``loss`` in its name is
        drawn.

        Args:
            log: The ``metrics.csv``, or its folder.
            picture: The file to write, such as ``"run.png"``. Default: none.

        Returns:
            The ``matplotlib.figure.Figure``, which notebooks show.

        Raises:
            FileNotFoundError: If there is no such log.
            ModuleNotFoundError: Without matplotlib.
            ValueError: If the log is not of a run with this callback.
        """
        return draw(Path(log), picture)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(trainer.strategy, "servers"):
            raise MisconfigurationException(
                f"HalosMonitor needs Trainer(strategy='halos'), but the strategy is {type(trainer.strategy).__name__}."
                " Use one of the halos strategies or remove the callback."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._shown = time.monotonic(), {}
        bar = trainer.progress_bar_callback
        if bar is not None:
            # As text, which cannot be logged: a bar that had each number as a metric would be longer than the line.
            own = bar.get_metrics
            vars(bar)["get_metrics"] = lambda trainer, module: {**own(trainer, module), **self._shown}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy: Any = trainer.strategy
        servers = strategy.servers
        if servers is None or strategy.round.batches > 0:
            return
        statistics = servers.statistics()
        if not statistics:
            return
        metrics = {name: float(sum(server[name] for server in statistics)) for name in _SUMS}
        metrics["global_step"] = float(trainer.global_step)
        metrics["global_updates"] = float(servers.version)
        metrics["seconds"] = time.monotonic() - self._start if servers.clock is None else servers.clock()
        metrics["staleness"] = sum(server["staleness_sum"] for server in statistics) / (metrics["updates"] or 1.0)
        metrics["staleness_max"] = float(max(server["staleness_max"] for server in statistics))
        workers = {name: {rank: n for one in statistics for rank, n in one[name].items()} for name in _OF_WORKERS}
        if shares := workers["compute_share"].values():
            metrics["compute_share_min"] = min(shares)
        for name, numbers in workers.items():
            metrics |= {f"{name}/rank_{rank}": float(numbers[rank]) for rank in sorted(numbers)}
        pl_module.log_dict(
            {f"halos/{name}": value for name, value in metrics.items()}, rank_zero_only=True, batch_size=1
        )
        size = strategy.site.size
        self._shown = {
            "rounds": _shown(workers["rounds"], size, sum(workers["rounds"].values()), digits=0),
            "staleness": _shown(workers["staleness_of"], size, metrics["staleness"], digits=1),
        }

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.progress_bar_callback is not None:
            vars(trainer.progress_bar_callback).pop("get_metrics", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def _shown(numbers: dict[int, float], size: int, of_all: float, digits: int) -> str:
    """The number of each of ``size`` workers, 0 before its first report; or if they are many, of all and the range."""
    each = [numbers.get(rank, 0.0) for rank in range(size)]
    if size <= _MOST_WORKERS:
        return "/".join(f"{number:.{digits}f}" for number in each)
    return f"{of_all:.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"
