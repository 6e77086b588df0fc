"""Keys for a server and some regions, and a server in this process."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_halos.serving import host
from lightning_halos.serving import server as server_module
from lightning_halos.serving.entrance import Entrance
from lightning_halos.serving.server import Rules, RunServer
from lightning_halos.serving.storage import RunDirectory
from lightning_halos.transport.address import Address
from lightning_halos.transport.certificates import make_authority, make_region
from tests.serving.region import LIMIT, Region

NAMES = ("us", "eu", "ap")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_authority(folder, ["127.0.0.1"])
    for name in NAMES:
        make_region(folder, name)
    return folder


class Server:
    """A server in a thread of this process, with the rules given."""

    def __init__(self, directory: Path, keys: Path, port: int = 0, **rules: Any) -> None:
        self.directory = RunDirectory(directory)
        self.server = RunServer(self.directory, Rules(**rules))
        self.entrance = Entrance(
            Address("127.0.0.1", port), keys / "server.pem", directory, self.server.host.admit, self.server.host.note
        )
        self.port = self.entrance.port
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.server.run(self.entrance.objection, self.entrance.renew)

    def terminate(self) -> None:
        """Ends the server as SIGTERM does, and waits for the end."""
        self.server.stop(signal.SIGTERM)
        self.wait()

    def wait(self) -> int | None:
        """Waits for the end. Returns the exit code."""
        self._thread.join(LIMIT)
        self.entrance.close()
        self.directory.close()
        return self.code

    @property
    def events(self) -> str:
        return "\n".join(sentence for _, sentence in self.server.host.events)

    def status(self) -> dict[str, Any]:
        return self.server.reporter.describe()


@pytest.fixture
def serve(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Starts servers of one run, one after the other."""
    monkeypatch.setattr(server_module, "_LEAST_LIVENESS", 0.0)
    monkeypatch.setattr(host, "RETURN", 0.0)
    servers: list[Server] = []

    def start(**rules: Any) -> Server:
        servers.append(Server(tmp_path / "run", keys, **rules))
        return servers[-1]

    yield start
    for server in servers:
        server.terminate()


@pytest.fixture
def region(keys: Path) -> Iterator[Callable[..., Region]]:
    """Makes regions."""
    regions: list[Region] = []

    def make(name: str, server: Any, **options: Any) -> Region:
        regions.append(Region(server.port, keys / f"{name}.pem", **options))
        return regions[-1]

    yield make
    for one in regions:
        if hasattr(one, "session"):
            one.cut()


def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
