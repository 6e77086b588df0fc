"""Processes of one job find each other on one interface only; errors say which addresses were tried, and what to do."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from lightning_halos.core.topology import Topology
from lightning_halos.transport.collectives import Collectives
from lightning_halos.transport.errors import PeerLostError
from lightning_halos.transport.groups import Groups
from lightning_halos.transport.store import open_store
from tests.integration.harness import context, free_port
from tests.star.network import Network, Place, internet, needs_namespaces
from tests.star.processes import Starter, starting

PORT = 29500
SHORT = 2.0  # timeout of those who do not find each other
MEDIUM = 6.0  # timeout of those who find each other, and cannot connect
LONG = 60.0  # timeout of those who connect


def ignore(*_: object) -> None: ...


def meet(address: str, port: str, rank: str, timeout: str, nodes: str) -> None:
    """A process of a job, each of which is a region. It prints how it listens, or its error, and how long it took."""
    begin, error, total = time.monotonic(), "", 0.0
    try:
        store = open_store(address, int(port), int(rank), 2, float(timeout), ignore, int(nodes))
        topology = Topology.build([[rank] for rank in range(2)], 1)
        groups = Groups(store, topology, int(rank), float(timeout), ignore)
        regions = topology.regions
        collectives = Collectives(regions, int(rank), store, ignore, topology.describe, float(timeout))
        total = collectives.reduce(torch.ones(1), "sum").item()
        assert groups.models.keys() == groups.control.keys()
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    seconds = time.monotonic() - begin
    listening = sorted({c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN})
    print("\n" + json.dumps({"error": error, "seconds": seconds, "total": total, "listening": listening}), flush=True)
    if not error:
        collectives.barrier()
    os._exit(0)  # some threads still wait for others


@dataclass
class Machines:
    """Two machines in a network, with one process of a job on each."""

    first: Place
    second: Place
    net: Network
    starter: Starter
    count: int = 0

    def meet(
        self,
        addresses: tuple[str, str],
        timeout: float,
        ports: tuple[int, int] = (PORT, PORT),
        interfaces: tuple[str, str] = ("", ""),
        nodes: int = 2,
    ) -> list[dict[str, Any]]:
        """Returns what the two processes print, given what each of them is told."""
        self.count += 1
        names, processes = [f"{self.count}-{rank}" for rank in range(2)], []
        for rank, place in enumerate((self.first, self.second if nodes == 2 else self.first)):
            environment = {"GLOO_SOCKET_IFNAME": interfaces[rank], "TORCH_CPP_LOG_LEVEL": "ERROR"}
            arguments = (addresses[rank], str(ports[rank] + self.count), str(rank), str(timeout), str(nodes))
            started = self.starter.start(meet, *arguments, name=names[rank], place=place, environment=environment)
            processes.append(started)
        for process in processes:
            process.wait(LONG + 30)
        lines = [self.starter.log(name).strip().splitlines()[-1] for name in names]
        return [json.loads(line) for line in lines]

    def fail(self, addresses: tuple[str, str], timeout: float = SHORT, **kwargs: Any) -> tuple[str, str]:
        """Returns the errors of the two processes, both of which must end in time."""
        outcomes = self.meet(addresses, timeout, **kwargs)
        assert all(outcome["error"] for outcome in outcomes), outcomes
        assert all(outcome["seconds"] < 3 * timeout + 20 for outcome in outcomes), outcomes
        return outcomes[0]["error"], outcomes[1]["error"]


def add_interface(place: Place, name: str, address: str) -> None:
    """Adds an interface that nobody else is connected with."""
    inside = ["ip", "-n", place.namespace]
    subprocess.run([*inside, "link", "add", name, "type", "veth", "peer", "name", f"{name}-end"], check=True)
    subprocess.run([*inside, "address", "add", address, "dev", name], check=True)
    subprocess.run([*inside, "link", "set", name, "up"], check=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with internet() as net, starting(tmp_path) as starter:
        yield Machines(net.place("first"), net.place("second"), net, starter)


@needs_namespaces
class TestMachines:
    def test_processes_listen_on_the_jobs_interface_only(self, machines: Machines) -> None:
        first, second = machines.first, machines.second
        by_address = [(first.ipv4, ""), (first.ipv6, ""), (first.ipv4, "eth0"), (first.ipv6, "eth0")]
        for address, interface in by_address:
            outcomes = machines.meet((address, address), LONG, interfaces=(interface, interface))
            assert [outcome["error"] for outcome in outcomes] == ["", ""]
            assert [outcome["total"] for outcome in outcomes] == [2.0, 2.0]
            is_old = address == first.ipv4
            assert outcomes[0]["listening"] == [first.ipv4 if is_old else first.ipv6]
            assert outcomes[1]["listening"] == [second.ipv4 if is_old else second.ipv6]
        # Rank 0 is reached at an address of something that passes connections on, such as a service of Kubernetes.
        outcomes = machines.meet(("10.99.0.1", first.ipv4), LONG)
        assert [outcome["error"] for outcome in outcomes] == ["", ""]
        assert outcomes[0]["listening"] == [first.ipv4]

    def test_a_job_on_one_machine_listens_on_the_loopback_only(self, machines: Machines) -> None:
        address = machines.first.ipv4
        outcomes = machines.meet((address, address), LONG, nodes=1)
        assert [outcome["total"] for outcome in outcomes] == [2.0, 2.0]
        assert [outcome["listening"] for outcome in outcomes] == [["127.0.0.1"]] * 2

    def test_a_name_that_means_the_machine_itself(self, machines: Machines) -> None:
        """Debian gives the machine's own name the address 127.0.1.1."""
        first = machines.first
        first.hosts(("node.first", "127.0.1.1"))
        machines.second.hosts(("node.first", first.ipv4))
        own, other = machines.fail(("node.first", "node.first"))
        assert own.startswith("ValueError: MASTER_ADDR=node.first is 127.0.1.1 on this machine")
        assert f"{first.ipv4} (eth0)" in own
        assert "or GLOO_SOCKET_IFNAME to the interface" in own
        assert re.search(rf"Tried {first.ipv4}:\d+ from {machines.second.ipv4} \(eth0\): nothing listens there", other)
        outcomes = machines.meet(("node.first", "node.first"), LONG, interfaces=("eth0", "eth0"))
        assert [outcome["error"] for outcome in outcomes] == ["", ""]
        assert outcomes[0]["listening"] == [first.ipv4]

    def test_a_wrong_interface(self, machines: Machines) -> None:
        address = (machines.first.ipv4, machines.first.ipv4)
        own, other = machines.fail(address, interfaces=("", "ib7"))
        assert "Rank(s) [1] did not come" in own
        assert f"The store listens on {machines.first.ipv4}:" in own
        assert other.startswith("ValueError: GLOO_SOCKET_IFNAME=ib7 is no interface of this machine with an address")
        assert f"eth0 ({machines.second.ipv4})" in other
        add_interface(machines.first, "docker0", "10.1.0.1/24")
        own, other = machines.fail(address, MEDIUM, interfaces=("docker0", ""))
        assert f"It listens on 10.1.0.1 (docker0), the others on {machines.second.ipv4};" in own
        assert f"It listens on {machines.second.ipv4} (eth0), the others on" in other
        assert "(else set GLOO_SOCKET_IFNAME to its interface on each machine)" in other

    def test_a_wrong_port(self, machines: Machines) -> None:
        first, second = machines.first.ipv4, machines.second.ipv4
        own, other = machines.fail((first, first), ports=(PORT, PORT + 100))
        assert "Rank(s) [1] did not come. Do they run, with the same MASTER_ADDR and MASTER_PORT" in own
        assert f"MASTER_ADDR={first}, MASTER_PORT={PORT + 101}." in other
        assert f"Tried {first}:{PORT + 101} from {second} (eth0): nothing listens there" in other

    def test_a_closed_firewall(self, machines: Machines) -> None:
        first, second = machines.first, machines.second
        machines.net.open_only(first, PORT + 1)
        own, other = machines.fail((first.ipv4, first.ipv4), MEDIUM)  # only the store's port is open
        assert f"listens on {first.ipv4} (eth0), the others on {second.ipv4};" in own
        assert f"listens on {second.ipv4} (eth0), the others on" in other
        assert "does no firewall close its ports?" in other
        own, other = machines.fail((first.ipv4, first.ipv4))  # no port is
        assert "Rank(s) [1] did not come" in own
        assert f"Tried {first.ipv4}:{PORT + 2} from {second.ipv4} (eth0): no answer. A firewall drops" in other

    def test_a_name_that_nobody_knows(self, machines: Machines) -> None:
        machines.second.hosts()
        _, other = machines.fail((machines.first.ipv4, "no.such.machine.invalid"))
        assert "The name no.such.machine.invalid has no address here" in other
        assert "did not meet the other 1 process(es) within timeout=2 s" in other


def test_a_port_that_another_program_uses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Exception, match=f"Port {port} of this machine is in use by another program"):
            open_store("127.0.0.1", port, 0, 1, LONG, ignore)


def test_a_store_to_which_rank_0_does_not_come() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with pytest.raises(PeerLostError, match="Rank 0 did not come"):
        open_store("127.0.0.1", store.port, 1, 2, MEDIUM, ignore)


def _beside_a_store_of_the_script(port: int, connection: Any) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    store = open_store("127.0.0.1", port, 0, 1, LONG, ignore)
    store.set("key", "value")
    connection.send(store.get("key"))


def test_a_store_that_the_script_has_made_at_the_same_port_is_shared() -> None:
    ours, theirs = context.Pipe()
    process = context.Process(target=_beside_a_store_of_the_script, args=(free_port(), theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == b"value"
    finally:
        process.kill()
        process.join()
