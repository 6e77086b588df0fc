"""Where the global server of a star of jobs is, and with which keys a job dials it: the arguments and their checks.

No process is started and nothing is dialed here, so that users' mistakes are reported first.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_halos.core.algorithms import Algorithm, ServerAlgorithm
from lightning_halos.core.checks import check_count
from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.transport.address import Address, parse_server

if TYPE_CHECKING:
    from lightning_halos.transport.certificates import Keys

SERVER_VARIABLE, KEYS_VARIABLE = "HALOS_SERVER", "HALOS_KEYS"


@dataclass(frozen=True)
class ServerSettings:
    """The global server that a job of a region dials.

    Attributes:
        address: Its address.
        keys: The file with the region's key and certificate.
        streams: TCP connections for models.
    """

    address: Address
    keys: Path
    streams: int

    @property
    def server(self) -> str:
        """The address as text."""
        return str(self.address)

    def read_keys(self) -> Keys:
        """Reads the region's keys.

        Raises:
            ValueError: If they are not the keys of a region, or the file cannot be read.
        """
        from lightning_halos.transport.certificates import read_keys

        try:
            keys = read_keys(self.keys)
        except OSError as error:
            raise ValueError(
                f"keys={str(self.keys)!r} cannot be read: {error.strerror or error}. It has to be the file that"
                " `lightning-halos keys region` has made for this region, on the machine of the job's rank 0."
            ) from None
        if keys.certificate.role != "region":
            raise ValueError(
                f"keys={str(self.keys)!r} are those of {'the' if keys.certificate.role == 'server' else 'an'}"
                f" {keys.certificate.role}, but a job needs the keys of its region: `lightning-halos keys region keys"
                " NAME` makes them."
            )
        return keys


def find_server(server: str | None, keys: str | Path | None, streams: int) -> ServerSettings | None:
    """Returns the global server from a strategy's arguments, else from the environment; ``None`` without one.

    Args:
        server: Its address, as ``"host:port"``. Default: ``HALOS_SERVER``.
        keys: The file with the region's keys. Default: ``HALOS_KEYS``.
        streams: TCP connections for models.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid, or one of the two is missing.
    """
    check_count("streams", streams)
    for name, value in (("server", server), ("keys", keys)):
        if value is not None and not isinstance(value, (str, Path)):
            raise TypeError(f"{name}=<{type(value).__name__}> must be a text.")
    file = keys or os.environ.get(KEYS_VARIABLE)
    text = server or os.environ.get(SERVER_VARIABLE)
    if not text:
        if file:
            name = KEYS_VARIABLE if keys is None else "keys"
            raise ValueError(
                f"{name}={str(file)!r} without server: pass server='host:29600', or set {SERVER_VARIABLE}. For a job"
                " that is the complete run, leave the keys out."
            )
        return None
    if not file:
        raise ValueError(
            f"server={text!r} without keys: pass keys='us-east.pem', or set {KEYS_VARIABLE}, to the file that"
            " `lightning-halos keys region` has made for this region."
        )
    try:
        address = parse_server(str(text))
    except ValueError as error:
        raise ValueError(f"server={text!r}: {error}") from None
    return ServerSettings(address, Path(file).expanduser(), streams)


def check_suits_server(algorithm: Algorithm, settings: ServerSettings, simulates: bool, regions: Any) -> None:
    """Refuses what cannot work in a job that is one region of a run.

    Raises:
        ValueError: If the algorithm, or an argument of the strategy, does not suit a global server of its own.
    """
    where = f"server={settings.server!r} (or {SERVER_VARIABLE})"
    if simulates:
        raise ValueError(f"{where} with simulate=...: a simulation is one job. Leave one of the two out.")
    if not isinstance(algorithm, ServerAlgorithm) or not algorithm.has_global_server:
        raise ValueError(
            f"{where} with {algorithm.title}: its workers or servers wait for each other, so they have to be one job."
            f" Use HalosStrategy, or leave the server out (unset {SERVER_VARIABLE})."
        )
    if regions is not None:
        raise ValueError(
            f"regions={regions!r} with {where}: a job is one region there, with the name in its certificate. Start a"
            " job for each region."
        )
    servers = getattr(algorithm, "servers_per_region", 1)
    if servers not in (1, [1], (1,)):
        raise ValueError(
            f"servers_per_region={servers!r} with {where}: a job has one local server there. Start one job per local"
            " server, each with keys of its own."
        )
    numbers_of_global_optimizer(algorithm)


def numbers_of_global_optimizer(algorithm: ServerAlgorithm) -> dict[str, float] | None:
    """Returns the arguments of the :class:`DelayedNesterov` that a user has chosen for the global server.

    Nothing is unpickled there, so only its numbers are sent. Plain ``SGD`` is a ``DelayedNesterov`` without momentum.

    Returns:
        The arguments; ``None`` for the algorithm's default.

    Raises:
        ValueError: If it is another optimizer.
    """
    factory: Callable[[Iterable[nn.Parameter]], Optimizer] | None = getattr(algorithm, "global_optimizer", None)
    if factory is None:
        return None
    optimizer = factory([nn.Parameter(torch.zeros(1))])
    settings = optimizer.param_groups[0]
    if type(optimizer) is DelayedNesterov:
        names = [name for name in inspect.signature(DelayedNesterov).parameters if name != "params"]
        return {name: settings[name] for name in names}
    if type(optimizer) is SGD and not any(settings[n] for n in ("momentum", "dampening", "weight_decay", "maximize")):
        return {"lr": settings["lr"], "momentum": 0.0, "delay": 1, "activation": 0.0}
    raise ValueError(
        f"global_optimizer makes {type(optimizer).__name__}, but the global server is a process of its own, which"
        " only has DelayedNesterov (and torch.optim.SGD without momentum and weight decay). Pass"
        " global_optimizer=lambda params: DelayedNesterov(params, lr=..., momentum=..., delay=...)."
    )
