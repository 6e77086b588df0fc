"""The test internet does what its names say, seen by plain sockets."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.star.network import Network, Place, inhabitants, internet, needs_namespaces
from tests.star.processes import wait_until

pytestmark = needs_namespaces

PORT, OTHER = 5000, 5001
LIMIT = 60.0
SHORT = 0.5  # seconds for an answer that does not come

LISTEN = """
import socket, sys
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    peer, (address, *_) = listener.accept()
    peer.sendall(address.encode())
    peer.close()
"""
DIAL = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
print(peer.recv(100).decode().removeprefix("::ffff:"))
"""


def listen(place: Place, port: int = PORT) -> None:
    """Starts a process that tells everybody who dials from which address they came."""
    inside = ["ip", "netns", "exec", place.namespace]
    subprocess.Popen([*inside, sys.executable, "-S", "-c", LISTEN, str(port)])
    query = [*inside, "cat", "/proc/net/tcp6"]
    wait_until(lambda: f":{port:04X} " in subprocess.run(query, capture_output=True, text=True).stdout, LIMIT)


def dial(place: Place, address: str, port: int = PORT, timeout: float = LIMIT) -> str:
    """From which address the other end says that we came, or the last word of the error."""
    inside = ["ip", "netns", "exec", place.namespace]
    done = subprocess.run(
        [*inside, sys.executable, "-S", "-c", DIAL, address, str(port), str(timeout)], capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr.split()[-1]


def test_places_reach_each_other_by_the_addresses_that_they_have(net: Network) -> None:
    server, old, new = net.place("server"), net.place("old", ipv6=False), net.place("new", ipv4=False)
    listen(server)
    assert dial(old, server.ipv4) == old.ipv4
    assert dial(new, server.ipv6) == new.ipv6
    assert dial(old, server.ipv6) == dial(new, server.ipv4) == "unreachable"


def test_a_firewall_lets_through_its_port_alone(net: Network) -> None:
    server, region = net.place("server"), net.place("region")
    for place, port in ((server, PORT), (server, OTHER), (region, PORT)):
        listen(place, port)
    net.open_only(server, PORT)
    net.dials_only(region, PORT)
    for here, there in ((region.ipv4, server.ipv4), (region.ipv6, server.ipv6)):
        assert dial(region, there) == here
        assert dial(region, there, OTHER, SHORT) == "out"  # timed out
        assert dial(server, here, timeout=SHORT) == "out"


@pytest.mark.parametrize("cut", [Place.cut, Place.unplug])
def test_a_cable_that_is_cut_and_mended(net: Network, cut: object) -> None:
    server, region = net.place("server"), net.place("region")
    listen(server)
    cut(region)  # type: ignore[operator]
    assert dial(region, server.ipv4, timeout=SHORT) == dial(region, server.ipv6, timeout=SHORT) == "out"
    region.mend()
    wait_until(lambda: (dial(region, server.ipv4), dial(region, server.ipv6)) == (region.ipv4, region.ipv6), LIMIT)


@pytest.mark.parametrize("has_iptables", [True, False])
def test_two_behind_one_office_look_like_one_and_cannot_be_dialled(
    net: Network, monkeypatch: pytest.MonkeyPatch, has_iptables: bool
) -> None:
    if not has_iptables:
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif shutil.which("iptables") is None:
        pytest.skip("NAT needs iptables")
    server = net.place("server")
    listen(server)
    office, address = net.office("office", server, PORT)
    first, second = (net.place(name, ipv6=False, behind=office) for name in ("first", "second"))
    listen(first)
    wait_until(lambda: dial(first, address) == office.ipv4, LIMIT)
    assert dial(second, address) == office.ipv4
    assert dial(server, first.ipv4) == "unreachable"


def test_names_of_one_place(net: Network) -> None:
    place, other = net.place("place"), net.place("other")
    place.hosts(("halos.test", "127.0.1.1"))
    other.hosts(("halos.test", place.ipv4))
    listen(place)
    assert dial(place, "halos.test") == "127.0.0.1"
    assert dial(other, "halos.test") == other.ipv4


def test_nothing_is_left() -> None:
    with internet() as network:
        place = network.place("place")
        listen(place)
        assert inhabitants(place.namespace)
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    assert network.prefix not in found.stdout
