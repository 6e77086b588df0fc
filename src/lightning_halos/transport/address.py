"""Addresses of servers as users write them, and what errors say about them. Nothing here connects."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from contextlib import suppress
from random import SystemRandom
from typing import NamedTuple

LOOPBACK = "127.0.0.1"

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
"""Environment variable with the name of the interface on which a job's processes listen for each other."""

# Below those that systems give to connections, and below the usual ones of torchrun and of this package's server.
_PORTS = range(20000, 29500)
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


class Address(NamedTuple):
    """A host and a port.

    Attributes:
        host: A name or an IP address without brackets. Empty: all addresses of this machine.
        port: The port; 0: any free port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Returns the address in a text such as ``halos.example.org:29600`` or ``[2001:db8::1]:29600``.

    Raises:
        ValueError: If it is none.
    """
    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} has no port. Write HOST:PORT, for example halos.example.org:29600.")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _ip(host) is None:
            raise ValueError(f"{text!r} has no IPv6 address in its brackets.")
    elif ":" in host and "://" not in host:
        raise ValueError(f"{text!r} is not clear. Write an IPv6 address in brackets: [{host}]:{port}.")
    if any(character in "/@[]" or character.isspace() for character in host):
        raise ValueError(f"{text!r} is not an address. Write HOST:PORT alone, for example halos.example.org:29600.")
    return Address(host, int(port))


def parse_server(text: str) -> Address:
    """Returns the address of a server, which has a host and a port; see :func:`parse_address`.

    Raises:
        ValueError: If it is none.
    """
    address = parse_address(text)
    if not address.host or not address.port:
        missing = "host" if not address.host else "port"
        raise ValueError(f"{text!r} names no {missing} to connect to. Write HOST:PORT, as halos.example.org:29600.")
    return address


def is_loopback(host: str) -> bool:
    """Returns whether an IP address belongs to the machine that uses it. A name is none."""
    address = _ip(host)
    return address is not None and address.is_loopback


def means_loopback(host: str) -> bool:
    """Returns whether a user who writes this host means this machine."""
    return host.lower().rstrip(".") == "localhost" or is_loopback(host)


def unused_port() -> int:
    """Returns a free port of this machine that no connection gets by itself, so that it stays free for a while.

    If two programs ask at the same time, each is likely to get another one.
    """
    while True:
        port = SystemRandom().choice(_PORTS)  # leaves the seeds of the user alone
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def network_of(host: str) -> str:
    """Returns the network that an IP address is in: all addresses that one machine may use at once.

    That is the address itself in IPv4, and the first 64 bits of it in IPv6 (RFC 4291).
    """
    address = _ip(host)
    if not isinstance(address, ipaddress.IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def own_address(family: int, target: tuple[object, ...]) -> str:
    """Returns this machine's address on the way to a target; empty if there is no way."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
    return ""


def route_to(family: int, target: tuple[object, ...]) -> str:
    """Returns this machine's address, with its interface, on the way to a target; empty if there is no way."""
    own = own_address(family, target)
    return with_interface(own) if own else ""


def with_interface(own: str) -> str:
    """Returns an address of this machine with the name of its interface, if the system (Linux) says so."""
    plain = own.partition("%")[0]
    interface = next((name for name, address in interfaces() if address == plain), "")
    return f"{own} ({interface})" if interface else own


def interfaces() -> list[tuple[str, str]]:
    """Returns the interfaces of this machine, each with its IPv4 and IPv6 addresses, as far as the system says so."""
    found = []
    with suppress(OSError, ImportError):  # it is not Linux
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has no IPv4 address
                    request = struct.pack("16s240x", name.encode())
                    found.append((name, socket.inet_ntoa(fcntl.ioctl(asking, _GET_ADDRESS, request)[20:24])))
    with suppress(OSError), open("/proc/net/if_inet6") as table:
        for line in table:
            address, *_, name = line.split()
            found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(address)))))
    return found


def interface_address(family: int) -> tuple[int, str] | None:
    """Returns the address of the interface in ``GLOO_SOCKET_IFNAME``, with its family.

    ``None`` if the variable is not set, or if the system does not say which interfaces it has (not Linux).

    Args:
        family: The family of address to prefer.

    Raises:
        ValueError: If the interface does not exist, or has no address.
    """
    name = os.environ.get(INTERFACE_VARIABLE, "").partition(",")[0]
    if not name or not interfaces():
        return None
    addresses = [
        (socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        for interface, address in interfaces()
        if interface == name
    ]
    if not addresses:
        known = ", ".join(f"{interface} ({address})" for interface, address in interfaces())
        raise ValueError(
            f"{INTERFACE_VARIABLE}={name} is no interface of this machine with an address. Set it to the one that"
            f" connects the machines, or unset it. This machine has {known}."
        )
    return min(addresses, key=lambda found: (found[0] != family, found[1].startswith("fe80")))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
