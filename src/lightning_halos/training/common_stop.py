"""Lets all processes stop that have to stop together if one of them sets ``trainer.should_stop``, in whatever hook.

Lightning reads it after each batch, validation and epoch. A process that stopped alone would make the others wait for
ever: those of its worker, and all workers if they average their gradients in each batch. The usual case, a stop at the
end of a batch, is in ``worker_loop``, which also tells the other workers. Signals are in ``preemption``; here is only
what a process does that another one has left behind after a signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_halos.training.agreement import Agreement
from lightning_halos.training.preemption import Preemption
from lightning_halos.training.trainer_adapter import TrainerAdapter


class CommonStop:
    """Changes the Trainer's loops for one fit, if that is needed.

    Args:
        lightning: The Trainer's adapter.
        agreement: Asks the other processes of the worker.
        preemption: Knows whether the run has to end.
        in_batches: Whether a worker may only stop at the end of a batch.
    """

    def __init__(
        self, lightning: TrainerAdapter, agreement: Agreement, preemption: Preemption, in_batches: bool
    ) -> None:
        self._lightning = lightning
        self._trainer = lightning.trainer
        self._agreement = agreement
        self._preemption = preemption
        self._in_batches = in_batches
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Begins to ask. All processes of the worker must call this."""
        if not self._agreement.is_needed and not self._in_batches:
            return
        self._agree()
        fit_loop: Any = self._trainer.fit_loop
        self._follow(fit_loop, "on_advance_start")
        self._replace(fit_loop, "advance", self._end_as_preempted)
        self._follow(fit_loop, "on_advance_end")
        self._follow(fit_loop.epoch_loop.val_loop, "run")
        users: list[Any] = [self._trainer.lightning_module, *self._lightning.later]
        if not all(user.on_train_batch_end.__module__.startswith("lightning.") for user in users):  # else none stops
            self._precede(fit_loop.epoch_loop, "on_advance_end")

    def restore(self) -> None:
        """Restores the loops."""
        while self._replaced:
            owner, name, before = self._replaced.pop()
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before

    def _agree(self) -> None:
        asked = self._agreement.ask([self._trainer.should_stop])
        self._trainer.should_stop = any(flag for (flag,) in asked)
        if self._in_batches:
            self._lightning.hold_stop()

    def _end_as_preempted(self, method: Callable[..., Any], *args: Any) -> Any:
        """Ends this process like the others if one of them has ended before it, as each is told by its own links."""
        with self._preemption.ends_like_others():
            return method(*args)

    def _follow(self, owner: Any, name: str) -> None:
        def run_and_agree(method: Callable[..., Any], *args: Any) -> Any:
            result = method(*args)
            self._agree()
            return result

        self._replace(owner, name, run_and_agree)

    def _precede(self, owner: Any, name: str) -> None:
        def agree_and_run(method: Callable[..., Any], *args: Any) -> Any:
            self._agree()
            return method(*args)

        self._replace(owner, name, agree_and_run)

    def _replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        method = getattr(owner, name)
        vars(owner)[name] = lambda *args: wrapper(method, *args)
