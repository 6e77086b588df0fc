"""Who is connected with whom in one job: workers with their leader, leaders with rank 0, and nobody else."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

from lightning_halos import DilocoStrategy, HalosStrategy
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import Toy, loader, make_trainer

REGIONS = [[0, 1, 2], [3, 4, 5]]
PEERS = {0: {1, 2, 3}, 1: {0}, 2: {0}, 3: {0, 4, 5}, 4: {3}, 5: {3}}


def connections() -> list[list[str]]:
    """Both ends of each connection of this process, except those with the store."""
    store = int(os.environ["MASTER_PORT"])
    open_now = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    found = [c for c in open_now if store not in (c.laddr[1], c.raddr[1])]
    return [[f"{end[0]}:{end[1]}" for end in (c.laddr, c.raddr)] for c in found]


class Looking(Toy):
    seen: list[list[str]]

    def on_train_end(self) -> None:  # a worker that is late may have no batch
        super().on_train_end()
        self.seen = connections()


def looking(strategy: type[HalosStrategy] | type[DilocoStrategy]) -> Result:
    module = Looking()
    trainer = make_trainer(strategy(regions=REGIONS, local_steps=2, timeout=60), devices=6, max_steps=8)
    trainer.fit(module, loader(), loader(12))
    training = module.seen
    trainer.validate(module, loader(12), verbose=False)
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    validated = connections()
    trainer.strategy.barrier()  # no worker ends, and closes its connections, before all have looked
    return {"training": training, "validated": validated, "listening": sorted(listening)}


@pytest.mark.parametrize("strategy", [HalosStrategy, DilocoStrategy])
def test_workers_are_connected_with_their_leader_and_leaders_with_rank_0(run: Run, strategy: Any) -> None:
    results = run(looking, strategy, workers=6)
    # A connection of the fit may be closed between the moments at which its two ends look.
    moments = ("training", "validated")
    # It is known by both of its ends, because a port that was closed may be another process's then.
    owner = {tuple(ends): rank for rank, result in enumerate(results) for when in moments for ends in result[when]}
    for when in moments:
        seen = {rank: {(b, a) for a, b in result[when]} & owner.keys() for rank, result in enumerate(results)}
        assert {rank: {owner[end] for end in ends} for rank, ends in seen.items()} == PEERS
    assert all(result["listening"] == ["127.0.0.1"] for result in results)
