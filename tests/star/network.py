"""An internet in small: network namespaces that a router connects, with firewalls, NAT and cables that can be cut.

Knows nothing of training. Everything here needs root; see :data:`missing`, by which tests skip. What iptables would do,
routing rules do here where they can, because not every machine has iptables.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

RUNTIME = Path("/run/netns")
CONFIGURATION = Path("/etc/netns")  # `ip netns exec` shows what is here under /etc

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18

_CUT = "10"  # priority of the rules that cut a cable

_RELAY = """
import asyncio, sys

async def relay(reader, writer):
    async def pump(source, sink):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
        sink.close()

    try:
        there = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer), return_exceptions=True)
    writer.transport.abort()
    there[1].transport.abort()

async def main():
    server = await asyncio.start_server(relay, "0.0.0.0", int(sys.argv[2]))
    await server.serve_forever()

asyncio.run(main())
"""

_made = 0


def missing() -> str:
    """Why there can be no namespaces here; "" if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip`"
    probe = f"halos-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return "" if made.returncode == 0 else f"this machine allows no network namespaces: {made.stderr.strip()}"


needs_namespaces = pytest.mark.skipif(bool(missing()), reason=missing())


@dataclass
class Place:
    """A machine of its own, as far as the network is concerned.

    Attributes:
        namespace: Name of its network namespace.
        ipv4: Its address; "" if it has none.
        ipv6: Its address; "" if it has none.
        port: Name of the router's end of its cable.
        router: The namespace at the other end of its cable.
    """

    namespace: str
    ipv4: str
    ipv6: str
    port: str
    router: str

    def cut(self) -> None:
        """Loses all packets in both directions from now on, without a word to either end."""
        for family in ("-4", "-6"):
            address = self.ipv4 if family == "-4" else self.ipv6
            _rule(self.router, family, _CUT, "iif", self.port, "blackhole")
            if address:
                _rule(self.router, family, _CUT, "to", address, "blackhole")

    def unplug(self) -> None:
        """Takes its cable out: both ends have no carrier, and the router says that it cannot be reached."""
        _ip(self.router, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Connects it again."""
        _ip(self.router, "link", "set", self.port, "up")
        for family in ("-4", "-6"):
            while (
                subprocess.run(
                    ["ip", "-n", self.router, family, "rule", "delete", "pref", _CUT, "iif", self.port],
                    capture_output=True,
                ).returncode
                == 0
            ):
                pass
            address = self.ipv4 if family == "-4" else self.ipv6
            while (
                address
                and subprocess.run(
                    ["ip", "-n", self.router, family, "rule", "delete", "pref", _CUT, "to", address],
                    capture_output=True,
                ).returncode
                == 0
            ):
                pass

    def limit(self, rate: str) -> None:
        """Limits its cable to a rate in each direction, as ``tc`` understands it."""
        for namespace, port in ((self.router, self.port), (self.namespace, "eth0")):
            _run(
                "tc",
                "-n",
                namespace,
                "qdisc",
                "add",
                "dev",
                port,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "64kb",
                "latency",
                "100ms",
            )

    def hosts(self, *names: tuple[str, str]) -> None:
        """Names that are known here only, each with its address; a name may have several."""
        folder = CONFIGURATION / self.namespace
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "nsswitch.conf").write_text("hosts: files\n")  # there is no name server, and nobody waits for one


@dataclass
class Network:
    """The places of one test, around one router. Made by :func:`internet`."""

    prefix: str
    block: int
    router: str = ""
    places: list[Place] = field(default_factory=list)
    rules: int = 0

    def place(self, name: str, ipv4: bool = True, ipv6: bool = True, behind: Place | None = None) -> Place:
        """Adds a place.

        Args:
            name: Last part of its namespace's name.
            ipv4: Whether it has an IPv4 address.
            ipv6: Whether it has an IPv6 address.
            behind: The place through which alone it reaches anything; the internet's router by default.
        """
        number = len(self.places) + 1
        router = behind.namespace if behind else self.router
        place = Place(
            f"{self.prefix}-{name}",
            f"10.{self.block}.{number}.2" if ipv4 else "",
            f"fd00:{self.block}:{number}::2" if ipv6 else "",
            f"to-{number}",
            router,
        )
        self.places.append(place)
        place.hosts()
        _add(place.namespace)
        _run(
            "ip",
            "link",
            "add",
            place.port,
            "netns",
            router,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            place.namespace,
        )
        _ip(router, "link", "set", place.port, "up")
        _ip(place.namespace, "link", "set", "eth0", "up")
        for address, bits, gateway in ((place.ipv4, 24, _gateway4), (place.ipv6, 64, _gateway6)):
            if address:
                options = ["nodad"] if bits == 64 else []
                _ip(router, "address", "add", f"{gateway(address)}/{bits}", "dev", place.port, *options)
                _ip(place.namespace, "address", "add", f"{address}/{bits}", "dev", "eth0", *options)
                _ip(place.namespace, "route", "add", "default", "via", gateway(address), "dev", "eth0")
        return place

    def office(self, name: str, server: Place, port: int) -> tuple[Place, str]:
        """A place behind which others can be that nobody reaches: they can only dial.

        With iptables they are behind NAT. Without, the office sends on what they say to a TCP port of its own, and
        nothing else, which hides them as well.

        Returns:
            The office, and the address at which those behind it reach the server.
        """
        office = self.place(name, ipv6=False)
        if shutil.which("iptables"):
            _forward(office.namespace)
            rule = ["-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"]
            _run("ip", "netns", "exec", office.namespace, "iptables", *rule)
            return office, server.ipv4
        inside = ["ip", "netns", "exec", office.namespace, sys.executable, "-S", "-c", _RELAY]
        subprocess.Popen([*inside, server.ipv4, str(port)])  # ends with the namespace
        return office, office.ipv4

    def open_only(self, place: Place, port: int) -> None:
        """A firewall before a place: the others reach that TCP port and nothing else, and it can dial nobody."""
        for family in ("-4", "-6"):
            rules = [
                ["iif", place.port, "ipproto", "tcp", "sport", str(port), "lookup", "main"],
                ["iif", place.port, "blackhole"],
                *(
                    [
                        ["to", address, "ipproto", "tcp", "dport", str(port), "lookup", "main"],
                        ["to", address, "blackhole"],
                    ]
                    if (address := place.ipv4 if family == "-4" else place.ipv6)
                    else []
                ),
            ]
            self._rules(family, rules)

    def dials_only(self, place: Place, port: int) -> None:
        """A firewall before a place: it gets answers from that TCP port of others, and nothing else."""
        for family, address in (("-4", place.ipv4), ("-6", place.ipv6)):
            if address:
                answers = ["to", address, "ipproto", "tcp", "sport", str(port), "lookup", "main"]
                self._rules(family, [answers, ["to", address, "blackhole"]])

    def _rules(self, family: str, rules: list[list[str]]) -> None:
        """Adds rules to the router, behind those which are there and before the usual ones."""
        for rule in rules:
            self.rules += 1
            _rule(self.router, family, str(1000 + self.rules), *rule)


@contextlib.contextmanager
def internet() -> Iterator[Network]:
    """A router to which places are added. At the end, all of it is gone, with the processes that still run there."""
    global _made
    _made += 1
    # Addresses need not differ between networks, since they are not connected; names do, between processes too.
    prefix = f"h{os.getpid()}-{_made}"
    network = Network(prefix, block=77, router=f"{prefix}-router")
    _add(network.router)
    _forward(network.router)
    try:
        yield network
    finally:
        for namespace in [*(place.namespace for place in reversed(network.places)), network.router]:
            end(namespace)


def end(namespace: str) -> list[int]:
    """Kills what runs in a namespace and removes it. Returns the processes that there were."""
    pids = inhabitants(namespace)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    shutil.rmtree(CONFIGURATION / namespace, ignore_errors=True)
    return pids


def inhabitants(namespace: str) -> list[int]:
    """The processes in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def enter(namespace: str) -> None:
    """Moves this process, which must have one thread only, into a namespace, as ``ip netns exec`` would.

    For processes that are forked and so cannot be started by that command.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")

    with (RUNTIME / namespace).open() as file:
        call("setns", file.fileno(), _CLONE_NEWNET)
    call("unshare", _CLONE_NEWNS)
    call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    for path in (CONFIGURATION / namespace).iterdir():
        call("mount", bytes(path), bytes(Path("/etc", path.name)), None, ctypes.c_ulong(_MS_BIND), None)


def _add(namespace: str) -> None:
    _run("ip", "netns", "add", namespace)
    _set(namespace, "ipv6/conf/default/accept_dad", 0)  # link-local addresses are ready at once
    _ip(namespace, "link", "set", "lo", "up")


def _forward(namespace: str) -> None:
    """Makes a namespace a router."""
    _set(namespace, "ipv4/ip_forward", 1)
    _set(namespace, "ipv6/conf/all/forwarding", 1)
    _set(namespace, "ipv6/conf/all/keep_addr_on_down", 1)


def _set(namespace: str, setting: str, value: int) -> None:
    _run("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} >/proc/sys/net/{setting}")


def _rule(namespace: str, family: str, priority: str, *rule: str) -> None:
    _ip(namespace, family, "rule", "add", "pref", priority, *rule)


def _gateway4(address: str) -> str:
    return address.removesuffix(".2") + ".1"


def _gateway6(address: str) -> str:
    return address.removesuffix("::2") + "::1"


def _ip(namespace: str, *arguments: str) -> None:
    _run("ip", "-n", namespace, *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
