"""Lane 0's client tells the processes that carry no slice what it receives, and hides nothing of what it wraps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning_halos.core.messages import Pull
from lightning_halos.training.worlds.bystander import tell_bystanders


class OneProcess:
    """Collectives that note what is passed on."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def broadcast_object(self, value: Any) -> Any:
        self.told.append(value)
        return value


def test_a_checkpoint_of_lane_0_has_the_answer_that_its_worker_has_not_taken() -> None:
    client = SimpleNamespace(answer=None, take=lambda: client.answer)
    world: Any = SimpleNamespace(client=client, leases=iter(()), first_round=SimpleNamespace(state_dict=dict))
    collectives: Any = OneProcess()
    tell_bystanders(world, collectives)
    assert world.client is not client
    assert world.client.answer is None
    # A simulation that resumes restores it.
    world.client.answer = Pull(version=3, local_steps=4, position=5, stop=False)
    assert client.answer.position == 5
    assert world.client.answer is client.answer
    assert world.client.take() is client.answer
    assert collectives.told[-1]["version"] == 3
