"""The store that all processes of a job share: where it listens, how the others find it, and why they do not.

Rank 0 hosts it. It listens on one address only, that of the job's interface, because whoever reaches it can change it.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from lightning_halos.transport.address import (
    INTERFACE_VARIABLE,
    LOOPBACK,
    Address,
    interface_address,
    interfaces,
    is_loopback,
    means_loopback,
    own_address,
    route_to,
)
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.forks import note_store_port, noting_sockets
from lightning_halos.transport.interruption import interruptible

_stores: dict[tuple[str, int], Store] = {}  # a store lives as long as its process, for a second Trainer
_count = itertools.count()
_PLACE = "halos/place"  # key of the address and port of the store that rank 0 hosts, in torchrun's own store
_HERE = "halos/here"  # followed by a rank: the process has come
_SIZE = "halos/size"  # number of processes, as rank 0 knows it
_OTHER_SIZE = "halos/other"  # number of processes, as another process knows it, if it is not rank 0's
_CONNECT = 5.0  # seconds for an address to accept a connection
_OWN = timedelta(seconds=60)
_PAUSE = 0.2  # seconds between two attempts
_GLANCE = 0.05  # seconds between two looks at who has come
_BACKLOG = 1024


def open_store(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: float,
    interrupted: Callable[[], None],
    nodes: int = 1,
) -> Store:
    """Returns a store that all processes share, with keys of its own for every call.

    Every process must make the same calls in the same order.

    Args:
        address: Address or name of the machine with rank 0 (``MASTER_ADDR``).
        port: A free port of that machine (``MASTER_PORT``).
        rank: Global rank of this process.
        world_size: Number of processes.
        timeout: Seconds to wait for the other processes.
        interrupted: Called several times a second while waiting; may raise.
        nodes: Number of machines that the job may be on.

    Raises:
        ValueError: If the interface in ``GLOO_SOCKET_IFNAME`` does not exist, a name is one of this machine only, or
            another process knows another ``world_size``.
        PeerLostError: If not all processes connect in time. It names the addresses that were tried.
    """
    if (address, port) not in _stores:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        meeting = _Meeting(address, port, rank, world_size, timeout, nodes)
        with noting_sockets():
            _stores[address, port] = interruptible(meeting.run, interrupted)
    return PrefixStore(f"halos/{next(_count)}", _stores[address, port])


class _Meeting:
    """How one process hosts or finds the store; see :func:`open_store` for the arguments."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout: float, nodes: int) -> None:
        self._address = address
        self._port = port
        self._rank = rank
        self._size = world_size
        self._timeout = timeout
        self._limit = timedelta(seconds=timeout)
        self._deadline = time.monotonic() + timeout
        self._nodes = nodes

    def run(self) -> Store:
        interface_address(socket.AF_INET)  # an interface that does not exist is an error at once
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = self._of_this_start(self._agents_store())
        elif self._rank == 0:
            store = self._host(self._port)
        else:
            store = self._join(self._reach(self._address, self._port), self._port)
        self._meet(store)
        return store

    def _agents_store(self) -> Store:
        """Returns the store of torchrun's agent, which listens on all addresses of its machine."""
        self._reach(self._address, self._port)
        store: Store = next(rendezvous("env://", self._rank, self._size, timeout=self._limit))[0]
        return store

    def _of_this_start(self, agent: Store) -> TCPStore:
        """Returns a store that rank 0 hosts, whose place the others read from the store of torchrun's agent.

        The agent's store outlives the workers. When they start again, it would still have the entries of dead
        processes.
        """
        if self._rank == 0:
            own = self._host(0)
            agent.set(_PLACE, f"{own.port} {own.host}")
            return own
        while True:
            try:
                port, _, host = agent.get(_PLACE).decode().partition(" ")
            except DistError:
                raise self._error("Rank 0 did not come. Does it run?") from None
            if not (failures := self._try(host, int(port))):
                return self._join(host, int(port))
            if self._remaining <= 0:  # else it may be the place of an earlier process of rank 0
                raise self._error(" ".join(failures))
            time.sleep(_PAUSE)

    def _host(self, port: int) -> TCPStore:
        """Returns a store in this process, which listens on one address only."""
        listener = self._listen(port)
        if listener is None:
            note_store_port(port)
            host = str(self._targets(self._address, port)[0][1][0])
            try:  # a store that the user's script has made in this process, which can be shared
                return TCPStore(host, port, None, True, self._limit, False, multi_tenant=True)
            except RuntimeError:  # before torch 2.5 it is no DistError
                raise self._error(
                    f"Port {port} of this machine is in use by another program. Set MASTER_PORT to a free port."
                ) from None
        return host_store(listener, self._limit)

    def _listen(self, port: int) -> socket.socket | None:
        """Returns a socket that listens on this machine's address; ``None`` if the port is in use."""
        while not (targets := self._targets(self._address, port)):
            if self._remaining <= 0:
                raise self._error(self._unknown)
            time.sleep(_PAUSE)
        family, there = targets[0]
        if own := own_address(family, there):  # the address may be another machine's, which passes connections on
            targets.append((family, (own, port)))
        for its_family, target in targets:
            try:
                return listen(its_family, target)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return None
        raise self._error(f"This machine cannot listen on {Address(str(there[0]), port)}. {self._own_addresses}")

    def _reach(self, address: str, port: int) -> str:
        """Waits until the store accepts connections, and returns the address that does."""
        while True:
            targets = self._targets(address, port)
            failures = [] if targets else [self._unknown]
            for family, target in targets:
                if not (failure := _failure_of(family, target, self._remaining)):
                    return str(target[0])
                failures.append(failure)
            if self._remaining <= 0:
                raise self._error(" ".join(failures))
            time.sleep(_PAUSE)

    def _join(self, host: str, port: int) -> TCPStore:
        try:
            return TCPStore(host, port, timeout=self._limit, wait_for_workers=False)
        except DistError as error:
            raise self._error(
                f"{Address(host, port)} accepted a connection, but a store did not answer there. Does another program"
                f" use that port? {error}"
            ) from None

    def _meet(self, store: Store) -> None:
        """Says that this process has come. Rank 0 waits until all have."""
        if self._rank > 0:
            try:
                size = int(store.get(_SIZE))
            except DistError:
                raise self._error("Rank 0 did not come. Does it run?") from None
            if size != self._size:
                store.set(_OTHER_SIZE, str(self._size))
                raise self._other_size(size)
            store.set(f"{_HERE}/{self._rank}", "")
            return
        store.set(_SIZE, str(self._size))
        keys = [f"{_HERE}/{rank}" for rank in range(1, self._size)]
        deadline = time.monotonic() + max(1.0, self._remaining)
        while keys and not store.check(keys):
            if store.check([_OTHER_SIZE]):
                raise self._other_size(int(store.get(_OTHER_SIZE)))
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys, 1) if not store.check([key])]
                raise self._error(
                    f"Rank(s) {missing} did not come. Do they run, with the same MASTER_ADDR and MASTER_PORT, and can"
                    f" they reach this machine? {self._listens(store)}"
                )
            time.sleep(_GLANCE)

    def _listens(self, store: Store) -> str:
        if not isinstance(store, TCPStore):
            return self._own_addresses
        return f"The store listens on {Address(store.host, store.port)}. {self._own_addresses}"

    def _targets(self, address: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
        """Returns the family and address of each socket address of the store's machine; none if the name is unknown.

        A job on one machine needs no other interface than the loopback, whatever the machine's name means.

        Raises:
            ValueError: If the name means this machine only, and the job is on several machines.
        """

        def look_up() -> list[Any]:
            return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)

        try:
            found = interruptible(look_up, lambda: None, max(1.0, self._remaining))
        except (OSError, UnicodeError):  # also if no name server answers
            return []
        targets = list(dict.fromkeys((int(family), target) for family, *_, target in found))
        means_itself = all(is_loopback(str(target[0])) for _, target in targets) and not means_loopback(address)
        if self._nodes == 1:
            is_own = any(own_address(family, target) == target[0] for family, target in targets)
            return [(socket.AF_INET, (LOOPBACK, port))] if is_own and not interface_address(0) else targets
        if not means_itself:
            return targets
        family, own = interface_address(targets[0][0]) or (0, "")
        if not own:
            raise ValueError(
                f"MASTER_ADDR={address} is {targets[0][1][0]} on this machine, as an entry in /etc/hosts says. No other"
                f" machine can reach that, but the job is on {self._nodes} machines. Set MASTER_ADDR to the address of"
                f" rank 0's machine in the network that connects the machines, or {INTERFACE_VARIABLE} to the interface"
                f" on each of them. {self._own_addresses}"
            )
        return [(family, (own, port))]

    def _try(self, host: str, port: int) -> list[str]:
        """Returns why an address accepts no connection; nothing if it does."""
        failures = [_failure_of(family, target, self._remaining) for family, target in self._targets(host, port)]
        return failures if all(failures) else []

    @property
    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def _unknown(self) -> str:
        return f"The name {self._address} has no address here. Check its spelling and this machine's DNS."

    @property
    def _own_addresses(self) -> str:
        """A sentence with this machine's addresses."""
        known = ", ".join(f"{address} ({name})" for name, address in interfaces())
        return f"This machine has the addresses {known}." if known else ""

    def _other_size(self, size: int) -> ValueError:
        return ValueError(
            f"Rank {self._rank} is one of {self._size} process(es), but another process is one of {size}. Without a"
            " launcher for all machines, this number is num_nodes * devices, which must be the same on each of them."
            " Start machines with different numbers of devices with torchrun, with an --nproc-per-node of its own on"
            ' each machine, or with SLURM, and use Trainer(devices="auto").'
        )

    def _error(self, why: str) -> PeerLostError:
        return PeerLostError(
            f"Rank {self._rank} did not meet the other {self._size - 1} process(es) within timeout={self._timeout:g} s."
            f" Rank 0 has the store at MASTER_ADDR={self._address}, MASTER_PORT={self._port}. {why}"
        )


def host_store(listener: socket.socket, limit: timedelta) -> TCPStore:
    """Returns a store in this process, which listens at the address of a socket only.

    Args:
        listener: A socket that listens.
        limit: Limit for a wait for a key.
    """
    host, port = listener.getsockname()[:2]
    note_store_port(port)
    # The newer kind of server (libuv) takes no socket in torch 2.4.
    own: dict[str, Any] = {"multi_tenant": True, "master_listen_fd": listener.detach(), "use_libuv": False}
    # Its own connection to itself waits for nobody, but a busy machine may be slow.
    store = TCPStore(host, port, None, True, max(limit, _OWN), False, **own)
    store.set_timeout(limit)
    return store


def listen(family: int, target: tuple[Any, ...]) -> socket.socket:
    """Returns a socket that listens on one address only."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _failure_of(family: int, target: tuple[Any, ...], remaining: float) -> str:
    """Tries to connect. Returns which address was tried, from where, and what happened; nothing if it succeeded."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.settimeout(max(1.0, min(_CONNECT, remaining)))
            trial.connect(target)
        return ""
    except OSError as error:
        route = route_to(family, target)
        here = f" from {route}" if route else ""
        return f"Tried {Address(str(target[0]), target[1])}{here}: {_explain(error, str(target[0]))}"


def _explain(error: OSError, host: str) -> str:
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "no answer. A firewall drops the packets, or no machine has this address."
    if isinstance(error, ConnectionRefusedError):
        where = "this machine itself" if is_loopback(host) else "that machine"
        return (
            f"nothing listens there. Does rank 0 run on {where}, with the same MASTER_PORT, and is this its address in"
            " the network that connects the machines?"
        )
    return f"{error.strerror or error}. Check the address, the interfaces and the routes of this machine."
