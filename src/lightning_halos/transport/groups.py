"""Process groups of two: a worker and its leader, or a leader and rank 0. They listen on the job's interface only.

Groups are made directly, for host memory (gloo), and never as torch's default group, which is in ``process_group``.
The processes meet at the store of ``store``; those that connect with a leader, at one of the leader's own.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

from torch.distributed import DistError, PrefixStore, ProcessGroup, Store, TCPStore
from torch.distributed.elastic.utils.store import synchronize

from lightning_halos.core.compat import gloo_group
from lightning_halos.core.topology import Topology
from lightning_halos.transport.address import (
    INTERFACE_VARIABLE,
    LOOPBACK,
    interface_address,
    own_address,
    with_interface,
)
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.forks import is_store_port, noting_sockets
from lightning_halos.transport.interruption import interruptible
from lightning_halos.transport.store import host_store, listen

_PATIENCE = 2.0  # seconds for the store to answer, for an error
_LONGEST_ATTEMPT = 60.0  # seconds for a connection to a process that has come
_SAME_NETWORK = (
    "Do all of them still run, do these addresses belong to the network that connects them (else set"
    f" {INTERFACE_VARIABLE} to its interface on each machine), and does no firewall close its ports?"
)


def _meet(
    store: Store,
    name: str,
    rank: int,
    others: Sequence[int],
    host: str,
    timeout: float,
    interrupted: Callable[[], None],
    missed: str = "did not come. Do they run, and can they reach the store?",
) -> None:
    """Publishes where this process listens, and waits until the others have done so."""

    def meet() -> None:
        store.set(f"{name}/host/{rank}", host)
        if others:
            store.wait([f"{name}/host/{other}" for other in others], timedelta(seconds=timeout))

    try:
        interruptible(meet, interrupted, 2 * timeout)
    except (DistError, TimeoutError) as error:
        missing = [other for other in others if not _host_of(store, f"{name}/host/{other}")]
        _keep_store(store)
        raise PeerLostError(
            f"Rank {rank} waited for timeout={timeout:g} s for the others to connect ({name}). Rank(s)"
            f" {missing} {missed} {error}"
        ) from None


def _connect(
    store: Store, name: str, end: int, other: int, host: str, timeout: float, interrupted: Callable[[], None]
) -> ProcessGroup:
    """Makes a group of two, with a process that has come.

    Args:
        store: The store at which they have met.
        name: Name of the group, under which they have met.
        end: Rank of this process in the group, 0 or 1.
        other: Global rank of the other process.
        host: The address on which this process listens.
        timeout: Limit for connecting, in seconds.
        interrupted: Called several times a second while connecting; may raise.
    """
    # gloo waits this long while it connects to the other, and five times as long for the other to connect to it.
    limit = timedelta(seconds=min(max(timeout / 5, 1.0), _LONGEST_ATTEMPT))

    def connect() -> ProcessGroup:
        return gloo_group(PrefixStore(name, store), end, 2, limit, host)

    try:
        return interruptible(connect, interrupted)
    except RuntimeError as error:
        its = _host_of(store, f"{name}/host/{other}") or "an address that is unknown"
        _keep_store(store)
        raise PeerLostError(
            f"Process {end} of 2 of the process group {name!r} did not connect with the others within"
            f" timeout={timeout:g} s. It listens on {with_interface(host)}, the others on {its}; the one with the"
            f" higher address connects to the other, at a port that the kernel has chosen. {_SAME_NETWORK} {error}"
        ) from None


def _keep_store(store: Store) -> None:
    """Waits if this process has the store, because the others may still read it for their errors."""
    if _is_here(store):
        time.sleep(_PATIENCE)


def _is_here(store: Store) -> bool:
    """Returns whether this process has the store of all processes."""
    return is_store_port(getattr(_without_prefix(store), "port", None))


def listening_host(store: Store) -> str:
    """Returns the address on which this process listens for other processes of its job.

    It is that of the interface in ``GLOO_SOCKET_IFNAME``, else the address from which this process reaches the store.

    Args:
        store: The store of all processes.

    Raises:
        ValueError: If the interface does not exist.
    """
    plain = _without_prefix(store)
    there = plain.host if isinstance(plain, TCPStore) else LOOPBACK
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    chosen = interface_address(family)
    return own_address(family, (there, 1)) or LOOPBACK if chosen is None else chosen[1]


def _without_prefix(store: Store) -> Store:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _host_of(store: Store, key: str) -> str:
    """Returns the address on which another process listens; empty if it is unknown."""
    try:
        return interruptible(lambda: store.get(key).decode() if store.check([key]) else "", lambda: None, _PATIENCE)
    except (RuntimeError, TimeoutError):
        return ""


def connect_pairs(
    store: Store,
    name: str,
    rank: int,
    parent: int | None,
    children: Sequence[int],
    timeout: float,
    interrupted: Callable[[], None],
) -> dict[int, ProcessGroup]:
    """Connects a process with its parent and its children in a tree, and with nobody else.

    All processes of the tree must call it.

    Args:
        store: The store of all processes.
        name: A name that no other tree in the store has.
        rank: Global rank of this process.
        parent: Global rank of the parent; ``None`` at the root.
        children: Global ranks of the children.
        timeout: Limit for each wait for another process, in seconds. Operations need limits of their own.
        interrupted: Called several times a second while connecting; may raise.

    Returns:
        A process group of two for each peer, by its global rank. In each of them the parent has rank 0.

    Raises:
        PeerLostError: If the others do not come in time.
    """
    host = listening_host(store)

    def connect(near: Store, upper: int, lower: int) -> ProcessGroup:
        end, other = (0, lower) if rank == upper else (1, upper)
        pair = f"{name} of ranks {upper} and {lower}"
        # The other one has come, but may wait for a process that has not, for longer than an attempt to connect lasts.
        missed = "came, but did not connect: they waited for other ranks, or have ended."
        _meet(near, pair, rank, [other], host, timeout, interrupted, missed)
        return _connect(near, pair, end, other, host, timeout, interrupted)

    with noting_sockets():
        near, place = store, host
        if children and not _is_here(store):
            # A pair takes several round trips to a store. That of all processes may be far; the children are near.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            own = host_store(listen(family, (host, 0)), timedelta(seconds=timeout))
            near, place = own, f"{host} {own.port}"
        _meet(store, name, rank, [*children, *([] if parent is None else [parent])], place, timeout, interrupted)
        pairs = {child: connect(near, rank, child) for child in children}
        if parent is not None:
            pairs[parent] = connect(_join_parent(store, name, rank, parent, timeout, interrupted), parent, rank)
    return pairs


def _join_parent(
    store: Store, name: str, rank: int, parent: int, timeout: float, interrupted: Callable[[], None]
) -> Store:
    """Returns the store at which this process meets its parent, who has come: one of the parent's own, or ``store``."""

    def join() -> Store:
        host, _, port = store.get(f"{name}/host/{parent}").decode().partition(" ")
        limit = timedelta(seconds=timeout)
        return TCPStore(host, int(port), timeout=limit, wait_for_workers=False) if port else store

    try:
        return interruptible(join, interrupted, 2 * timeout)
    except (RuntimeError, TimeoutError) as error:
        place = _host_of(store, f"{name}/host/{parent}").replace(" ", ", port ") or "an address that is unknown"
        raise PeerLostError(
            f"Rank {rank} did not reach rank {parent} within timeout={timeout:g} s ({name}), which listens on {place}."
            f" {_SAME_NETWORK} {error}"
        ) from None


class Groups:
    """The pairs of processes for the links of one process; see :func:`connect_pairs`.

    Attributes:
        region: On a leader, the pair with each other worker of its local server; on others, that with their leader.
        models: On rank 0, the pair with each other leader, for models; on other leaders, that with rank 0.
        control: The same, on separate connections, so that a stop notice overtakes a model.
        order: The pairs with the other processes of the worker, by their lanes: on lane 0 with each other lane, on the
            others with lane 0. What is sent on them is in :mod:`lightning_halos.transport.lanes`.
        slices: On rank 0, the same for the slices of what a job exchanges with a server of its own.

    Args:
        store: The store of all processes.
        topology: The regions and servers.
        rank: Index of this process's worker.
        timeout: Limit for connecting, in seconds.
        interrupted: Called several times a second while connecting; may raise.
        lane: Lane of this process in its worker.
        lanes: Number of lanes. Each has pairs of its own between the workers.
    """

    def __init__(
        self,
        store: Store,
        topology: Topology,
        rank: int,
        timeout: float,
        interrupted: Callable[[], None],
        lane: int = 0,
        lanes: int = 1,
    ) -> None:
        own = store if lanes == 1 else PrefixStore(f"lane/{lane}", store)

        def connect(
            name: str, members: Sequence[int], number: int = rank, store: Store = own
        ) -> dict[int, ProcessGroup]:
            if number not in members:
                return {}
            parent = None if number == members[0] else members[0]
            children = members[1:] if parent is None else []
            return connect_pairs(store, name, number, parent, children, timeout, interrupted)

        group = topology.group_of(rank)
        self.region = connect(f"region/{group.index}", group.ranks)
        self.models = connect("models", topology.leaders)
        self.control = connect("control", topology.leaders)
        inside = PrefixStore(f"worker/{rank}", store)
        among = range(lanes) if lanes > 1 else range(0)
        self.order = connect("order", among, lane, inside)
        self.slices = connect("slices", among if rank == 0 else range(0), lane, inside)


def gather_through(
    store: Store, key: str, rank: int, size: int, text: str, interrupted: Callable[[], None], timeout: float
) -> list[str]:
    """Returns the texts of all processes, by rank. It needs a few round trips to the store, and no process group.

    Nothing else in the store may have the name ``key``. The wait is as for :func:`interruptible`.

    Raises:
        PeerLostError: If the store does not answer, or not all processes give their text in time.
    """
    try:
        # It also keeps rank 0, which has the store, until all others have read the texts.
        gather = partial(synchronize, store, text.encode(), rank, size, key, timeout)
        return [value.decode() for value in interruptible(gather, interrupted, 2 * timeout)]
    except DistError as error:
        missing = [other for other in range(size) if not store.check([f"{key}{other}"])]
        raise PeerLostError(
            f"Rank {rank} waited for timeout={timeout:g} s for all {size} processes to say their {key}. Rank(s)"
            f" {missing} did not. Do all of them run? {error}"
        ) from None
    except TimeoutError:
        raise PeerLostError(
            f"Rank {rank} got no answer from the store that all processes share within {2 * timeout:g} s. Rank 0, whose"
            " process has the store, is stopped or out of reach."
        ) from None
