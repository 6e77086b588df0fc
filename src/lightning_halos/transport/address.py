"""Addresses of servers as users write them, and what errors say about them. Nothing here connects."""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

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


def is_loopback(host: str) -> bool:
    """Returns whether an IP address belongs to the machine that uses it. A name is none."""
    address = _ip(host)
    return address is not None and address.is_loopback


def means_loopback(host: str) -> bool:
    """Returns whether a user who writes this host means this machine."""
    return host.lower().rstrip(".") == "localhost" or is_loopback(host)


def route_to(family: int, target: tuple[object, ...]) -> str:
    """Returns this machine's address, with its interface, on the way to a target; empty if there is no way."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent
        own = probe.getsockname()[0]
        interface = _interface_of(own)
        return f"{own} ({interface})" if interface else str(own)
    return ""


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _interface_of(own: str) -> str:
    """Returns the interface that has an address, if the system (Linux) says so."""
    address = _ip(own.partition("%")[0])
    with suppress(OSError, ImportError):
        if isinstance(address, ipaddress.IPv6Address):
            with open("/proc/net/if_inet6") as table:
                found = [line.split()[-1] for line in table if line.startswith(address.packed.hex())]
            return found[0] if found else ""
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has no IPv4 address
                    request = struct.pack("16s240x", name.encode())
                    if socket.inet_ntoa(fcntl.ioctl(asking, _GET_ADDRESS, request)[20:24]) == own:
                        return name
    return ""
