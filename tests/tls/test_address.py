"""Addresses as users write them."""

from __future__ import annotations

import socket

import pytest

from lightning_halos.transport import address
from lightning_halos.transport.address import (
    Address,
    is_loopback,
    means_loopback,
    network_of,
    parse_address,
    route_to,
    unused_port,
)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("halos.example.org:29600", Address("halos.example.org", 29600)),
        (" 10.0.0.5:1 ", Address("10.0.0.5", 1)),
        ("[2001:db8::1]:29600", Address("2001:db8::1", 29600)),
        ("[::]:29600", Address("::", 29600)),
        (":29600", Address("", 29600)),
    ],
)
def test_addresses(text: str, parsed: Address) -> None:
    assert parse_address(text) == parsed
    assert parse_address(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("halos.example.org", "has no port"),
        ("halos.example.org:", "has no port"),
        ("halos.example.org:x", "has no port"),
        ("halos.example.org:65536", "has no port"),
        ("halos.example.org:-1", "has no port"),
        ("halos.example.org:٣", "has no port"),
        ("2001:db8::1:29600", r"Write an IPv6 address in brackets: \[2001:db8::1\]:29600"),
        ("[halos]:29600", "no IPv6 address in its brackets"),
        ("https://halos.example.org:29600", "Write HOST:PORT alone"),
        ("a host:29600", "Write HOST:PORT alone"),
    ],
)
def test_what_is_no_address_says_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_address(text)


def test_what_means_this_machine() -> None:
    assert is_loopback("127.0.1.1")
    assert is_loopback("::1")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("localhost")  # a name: what it means is for the resolver
    assert means_loopback("localhost")
    assert means_loopback("127.0.0.1")
    assert not means_loopback("halos.example.org")


def test_a_port_that_is_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("", 0))
        other.bind(("", 0))
        ports = taken.getsockname()[1], other.getsockname()[1]
        monkeypatch.setattr(address, "_PORTS", ports)
        other.close()
        assert unused_port() == ports[1]


def test_the_way_to_an_address_names_the_interface() -> None:
    assert route_to(socket.AF_INET, ("127.0.0.1", 29600)) in ("127.0.0.1 (lo)", "127.0.0.1 (lo0)", "127.0.0.1")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("203.0.113.9", "203.0.113.9", True),
        ("203.0.113.9", "203.0.113.10", False),
        ("203.0.113.9", "::ffff:203.0.113.9", True),
        ("2001:db8:0:1::5", "2001:db8:0:1:a:b:c:d", True),
        ("2001:db8:0:1::5", "2001:db8:0:2::5", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_one_machine_may_have_all_addresses_of_a_64_bit_network(one: str, other: str, is_same: bool) -> None:
    """So a stranger with IPv6 has no more places among the peers that are not authenticated than one with IPv4."""
    assert (network_of(one) == network_of(other)) is is_same
