"""Handshakes over real sockets: who gets in, and what the others are told."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from lightning_halos.transport.certificates import make_authority, make_region, make_server, read_keys
from lightning_halos.transport.errors import CertificateRefusedError
from lightning_halos.transport.revocations import Revocations
from lightning_halos.transport.tls import client_context, explain, peer_certificate, server_context

NOW = datetime.now(timezone.utc)
HELLO = b"hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of one run; those of another authority in ``other``, and such that are too old or too new."""
    folder = tmp_path_factory.mktemp("keys")
    for where in (folder, folder / "other"):
        make_authority(where, ["halos.example.org"], start=NOW - timedelta(days=500))
        make_region(where, "us-east")
    for name, start in (("old", NOW - timedelta(days=400)), ("new", NOW + timedelta(days=2))):
        make_region(folder, name, start=start)
        good = (folder / "server.pem").read_bytes()
        make_server(folder, ["halos.example.org"], start=start, replace=True).rename(folder / f"server-{name}.pem")
        (folder / "server.pem").write_bytes(good)
        (folder / "server.pem").chmod(0o600)
    make_server(folder, ["halos.example.org"], replace=True)
    return folder


@dataclass
class Outcome:
    """What each side saw: the peer's name, or the explanation of an error."""

    server: str = ""
    client: str = ""


@pytest.fixture
def meet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Lets a client with one file dial a server with another one."""

    def meet(server: str, client: str, revocations: Revocations | None = None, host: str = "127.0.0.1") -> Outcome:
        outcome, keys = Outcome(), [read_keys(folder / server), read_keys(folder / client)]
        with monkeypatch.context() as patch:
            # A context checks its own keys first. Here the peer has to find out.
            patch.setattr("lightning_halos.transport.tls._check_usable", lambda *_: None)
            contexts = server_context(keys[0]), client_context(keys[1])

        def serve(accepted: socket.socket) -> None:
            try:
                with contexts[0].wrap_socket(accepted, server_side=True) as secure:
                    peer = peer_certificate(secure)
                    if revocations is not None:
                        revocations.check(peer)
                    secure.sendall(HELLO)
                    outcome.server = peer.name
            except CertificateRefusedError as error:
                outcome.server = str(error)
            except OSError as error:
                outcome.server = explain(error, keys[0])

        def dial(address: tuple[str, int]) -> None:
            try:
                with (
                    socket.create_connection(address, timeout=20) as plain,
                    contexts[1].wrap_socket(plain, server_hostname=host) as secure,
                ):
                    if secure.recv(100) != HELLO:
                        raise ssl.SSLEOFError
                    assert secure.version() == "TLSv1.3"
                    outcome.client = peer_certificate(secure).name
            except OSError as error:
                outcome.client = explain(error, keys[1])

        pair(serve, dial)
        return outcome

    return meet


def pair(serve: Callable[[socket.socket], None], dial: Callable[[tuple[str, int]], None]) -> None:
    """Runs both ends of one connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=dial, args=(listener.getsockname(),))
        thread.start()
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(20)
            serve(accepted)
        thread.join(20)
        assert not thread.is_alive()


class TestHandshake:
    def test_each_side_knows_who_the_other_is(self, meet: Callable[..., Outcome]) -> None:
        assert meet("server.pem", "us-east.pem") == Outcome("us-east", "global server")
        assert meet("server.pem", "us-east.pem", host="halos.example.org") == Outcome("us-east", "global server")

    def test_keys_of_another_authority(self, meet: Callable[..., Outcome]) -> None:
        outcome = meet("server.pem", "other/us-east.pem")
        assert re.search(
            r"server's certificate is not from the authority in .*us-east.pem \([0-9a-f]{16}\)", outcome.client
        )
        assert "keys show" in outcome.client
        assert re.search(r"client refused .*server.pem, which is not from its authority", outcome.server)

    def test_a_server_that_asks_for_keys_of_another_authority(self, meet: Callable[..., Outcome], folder: Path) -> None:
        own = (folder / "server.pem").read_text()
        parts = re.split(r"(?<=-----)\n(?=-----BEGIN)", own.strip())
        other = re.split(r"(?<=-----)\n(?=-----BEGIN)", (folder / "other" / "server.pem").read_text().strip())
        both = folder / "mixed.pem"
        both.write_text("\n".join([*parts, other[2]]))
        assert meet("mixed.pem", "us-east.pem") == Outcome("us-east", "global server")  # more than one may be trusted
        stranger = folder / "stranger.pem"  # trusts this server, which does not know it
        client = re.split(r"(?<=-----)\n(?=-----BEGIN)", (folder / "other" / "us-east.pem").read_text().strip())
        stranger.write_text("\n".join([*client, parts[2]]))
        outcome = meet("server.pem", "stranger.pem")
        assert "client's certificate is not from the authority in" in outcome.server
        assert re.search(r"The server refused .*stranger.pem, which is not from its authority", outcome.client)

    def test_an_expired_certificate(self, meet: Callable[..., Outcome]) -> None:
        outcome = meet("server.pem", "old.pem")
        assert re.search(r"client's certificate has expired. .*keys region FOLDER NAME --replace", outcome.server)
        assert re.search(r"server refused .*old.pem: by its clock, it expired at 20\d\d-", outcome.client)
        assert "keys region FOLDER old --replace" in outcome.client
        outcome = meet("server-old.pem", "us-east.pem")
        assert re.search(r"server's certificate has expired. .*keys server FOLDER --host HOST", outcome.client)
        assert "This machine's clock shows 20" in outcome.client
        assert re.search(r"client refused .*server-old.pem: by its clock, it expired", outcome.server)

    def test_a_wrong_clock(self, meet: Callable[..., Outcome]) -> None:
        outcome = meet("server.pem", "new.pem")
        assert "not valid yet, so one machine's clock is wrong. This machine's clock shows" in outcome.server
        assert re.search(r"server refused .*new.pem: by its clock, it is not valid yet \(it is from 20", outcome.client)
        outcome = meet("server-new.pem", "us-east.pem")
        assert "The server's certificate is not valid yet, so one machine's clock is wrong." in outcome.client
        assert "its clock is wrong. Its own error says which" in outcome.server

    def test_a_revoked_name_gets_in_again_with_a_new_key(
        self, meet: Callable[..., Outcome], folder: Path, tmp_path: Path
    ) -> None:
        revocations = Revocations(tmp_path / "revoked")
        make_region(folder, "lost", start=NOW - timedelta(days=1))
        assert meet("server.pem", "lost.pem", revocations).server == "lost"
        revocations.add("lost", NOW - timedelta(hours=1))
        assert "the certificate of lost" in meet("server.pem", "lost.pem", revocations).server
        assert meet("server.pem", "us-east.pem", revocations).server == "us-east"
        make_region(folder, "lost", replace=True)
        assert meet("server.pem", "lost.pem", revocations) == Outcome("lost", "global server")

    def test_a_regions_key_cannot_be_a_servers_nor_the_reverse(
        self, meet: Callable[..., Outcome], folder: Path
    ) -> None:
        shutil.copy(folder / "us-east.pem", folder / "false.pem")
        outcome = meet("false.pem", "us-east.pem", host="us-east")
        assert "shows a region's key, not the server's" in outcome.client
        assert "certificate of a region" in outcome.server
        outcome = meet("server.pem", "server.pem")
        assert "The client shows the server's key" in outcome.server

    def test_a_region_cannot_make_certificates(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "authority.pem").write_bytes((folder / "us-east.pem").read_bytes())
        with pytest.raises(ValueError, match="not an authority's file"):
            make_region(tmp_path, "forged")

    def test_another_host(self, meet: Callable[..., Outcome]) -> None:
        for host in ("elsewhere.example.org", "127.0.0.2"):
            outcome = meet("server.pem", "us-east.pem", host=host)
            assert re.search(
                rf"certificate is for other hosts \(.*{host}.*keys server FOLDER --host HOST", outcome.client
            )
            assert "it dials another host than halos.example.org, localhost" in outcome.server


class TestOtherPrograms:
    @pytest.mark.parametrize(
        "said", [b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 64, b"CONNECT x\r\n"]
    )
    def test_a_client_without_tls(self, folder: Path, said: bytes) -> None:
        keys = read_keys(folder / "server.pem")
        errors: list[str] = []

        def serve(accepted: socket.socket) -> None:
            with pytest.raises(OSError) as failure, server_context(keys).wrap_socket(accepted, server_side=True):  # noqa: PT011
                pass
            errors.append(explain(failure.value, keys))

        def dial(address: tuple[str, int]) -> None:
            with socket.create_connection(address, timeout=20) as plain:
                plain.sendall(said)
                with contextlib.suppress(OSError):  # the server has closed already
                    plain.shutdown(socket.SHUT_WR)
                    plain.recv(100)

        pair(serve, dial)
        assert errors == ["The client does not speak TLS: it is another program, such as a scanner or a health check."]

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            (
                b"SSH-2.0-OpenSSH_9.2\r\n",
                "does not speak TLS: another program listens at this port. Check host and port",
            ),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak TLS"),
            (b"", "closed before the server proved who it is"),
        ],
    )
    def test_a_server_without_tls(self, folder: Path, said: bytes, expected: str) -> None:
        errors = self.dial(folder, lambda accepted: accepted.sendall(said))
        assert expected in errors[0]

    def test_a_server_with_an_old_tls(self, folder: Path) -> None:
        def serve(accepted: socket.socket) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(folder / "server.pem")
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(accepted, server_side=True)

        assert "does not speak TLS 1.3" in self.dial(folder, serve)[0]

    def test_a_client_without_a_certificate(self, folder: Path) -> None:
        keys, errors = read_keys(folder / "server.pem"), []

        def serve(accepted: socket.socket) -> None:
            with pytest.raises(ssl.SSLError) as failure:
                server_context(keys).wrap_socket(accepted, server_side=True)
            errors.append(explain(failure.value, keys))

        def dial(address: tuple[str, int]) -> None:
            context = ssl.create_default_context(cafile=folder / "authority.pem")
            with (
                socket.create_connection(address, timeout=20) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
                pytest.raises(OSError),  # noqa: PT011
            ):
                secure.recv(1)

        pair(serve, dial)
        assert errors == ["The client showed no certificate: it is another program, such as a browser."]

    def dial(self, folder: Path, serve: Callable[[socket.socket], None]) -> list[str]:
        keys, errors = read_keys(folder / "us-east.pem"), []

        def dial(address: tuple[str, int]) -> None:
            with socket.create_connection(address, timeout=20) as plain, pytest.raises(OSError) as failure:  # noqa: PT011
                client_context(keys).wrap_socket(plain, server_hostname="localhost")
            errors.append(explain(failure.value, keys))

        pair(serve, dial)
        return errors


class TestOwnKeys:
    """Mistakes that a process finds before it opens a connection."""

    @pytest.mark.parametrize(
        ("make", "file", "text"),
        [
            (server_context, "us-east.pem", "is a region's; the global server needs server.pem"),
            (server_context, "authority.pem", "is the authority's; the global server needs"),
            (client_context, "server.pem", "is the global server's; a region needs a file of its own"),
            (client_context, "authority.pem", "is the authority's; a region needs a file of its own"),
            (client_context, "old.pem", "has expired .*keys region FOLDER old --replace"),
            (client_context, "new.pem", "is not valid yet.*clock shows"),
            (server_context, "server-old.pem", "has expired .*keys server FOLDER --host HOST --replace"),
        ],
    )
    def test_are_the_wrong_ones(self, folder: Path, make: Callable[..., ssl.SSLContext], file: str, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            make(read_keys(folder / file))

    def test_can_be_read_by_others(self, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = Path(shutil.copy(folder / "us-east.pem", tmp_path))
        path.chmod(0o644)
        with caplog.at_level(logging.WARNING):
            client_context(read_keys(path))
        assert "others can access it: chmod 600" in caplog.text
        path.chmod(0o440)
        caplog.clear()
        client_context(read_keys(path))
        assert not caplog.text
