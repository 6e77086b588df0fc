"""``lightning-halos serve``: the global server, for regions that are jobs of their own."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_halos.commands.inputs import check_keys, given_path

if TYPE_CHECKING:
    from lightning_halos.transport.address import Address

SUMMARY = "Serve a run: the global server of regions that are jobs of their own. It needs no GPU and no data."
EXAMPLES = """\
examples:
  lightning-halos serve --keys keys/server.pem --directory runs/pile --min-regions 2
      serves a run, which begins when two regions have joined; typed again, it goes on from the directory
  lightning-halos serve --directory runs/pile --revoke us-east
      refuses us-east's present certificates from now on, also in a server that runs already

exit status: 0 the run is finished, 1 too few regions, or a full disk, for longer than --timeout, 2 an argument or the
  directory is wrong, 130 or 143 ended by SIGINT or SIGTERM; after 1, 130 and 143 the run goes on when the server is
  started again
"""

_PORT = 29600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_serve)
    where = parser.add_argument_group("the server")
    where.add_argument(
        "--directory",
        type=given_path,
        required=True,
        metavar="FOLDER",
        help="where the run is kept; made if it is missing",
    )
    where.add_argument("--keys", type=given_path, metavar="FILE", help="the server's keys; see lightning-halos keys")
    where.add_argument(
        "--listen",
        default=f":{_PORT}",
        metavar="HOST:PORT",
        help=f"the address to listen on (default: port {_PORT} of all addresses, IPv4 and IPv6)",
    )
    where.add_argument("--dashboard", metavar="HOST:PORT", help="also show the run on a page, to whoever can open it")
    where.add_argument("--revoke", metavar="NAME", help="refuse a region's present certificates from now on, and end")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--min-regions", type=int, default=1, metavar="N", help="regions that a run begins with, and needs (default: 1)"
    )
    run.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="workers that a global step is divided by (default: those of the regions that the run begins with)",
    )
    run.add_argument("--decider", metavar="NAME", help="the region that validates and saves, while it is present")
    run.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="end when for so long fewer than --min-regions were present, or the disk was full (default: 3600)",
    )
    run.add_argument(
        "--liveness",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="a region is lost when nothing came from it for so long (default: 30)",
    )
    run.add_argument(
        "--patience",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="the others wait so long, or longer if their rounds are long, for a region that is connected and does not"
        " do its part (default: 1800)",
    )
    run.add_argument(
        "--snapshot-every",
        type=int,
        default=1,
        metavar="N",
        help="updates between two snapshots, at most 8; writing them takes half of the time at most (default: 1)",
    )


def _revoke(arguments: argparse.Namespace) -> int:
    from lightning_halos.transport.revocations import REVOKED, Revocations

    if not arguments.directory.is_dir():  # a mistyped one would revoke nothing
        raise FileNotFoundError(
            f"--directory {arguments.directory} does not exist. Give the directory of the run's server; if it has"
            " not started yet, make the directory first."
        )
    revocations = Revocations(arguments.directory / REVOKED)
    try:
        revocations.add(arguments.revoke)
    except ValueError as error:
        raise ValueError(f"--revoke {error}") from None
    print(f"{arguments.revoke} is revoked in {arguments.directory / REVOKED}. A key made from now on is accepted.")
    known = _regions(arguments.directory)
    if known and arguments.revoke not in known:
        print(f"Note: the run in {arguments.directory} has had no such region yet, but {', '.join(sorted(known))}.")
    revocations.read()
    return 0


def _regions(directory: Path) -> set[str]:
    """Returns the names in what a run's server has written for people, without reading its snapshots themselves."""
    known: set[str] = set()
    for path in directory.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or of something else
            text = json.loads(path.read_text(encoding="utf-8"))
            known |= {*text.get("members", ()), *(region["name"] for region in text.get("regions", ()))}
    return known


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.revoke is not None:
        return _revoke(arguments)  # without torch, because there may be no time to lose

    from lightning_halos.checkpoint.errors import CheckpointError
    from lightning_halos.serving.dashboard import Dashboard
    from lightning_halos.serving.entrance import Entrance
    from lightning_halos.serving.server import Rules, RunServer
    from lightning_halos.serving.storage import RunDirectory
    from lightning_halos.transport.address import Address

    if arguments.keys is None:
        raise ValueError("give the server's keys with --keys FILE; `lightning-halos keys init` makes them.")
    rules = Rules(
        arguments.min_regions,
        arguments.workers,
        arguments.snapshot_every,
        arguments.timeout,
        arguments.liveness,
        arguments.patience,
        arguments.decider,
    )
    address = _address("--listen", arguments.listen)
    where = None if arguments.dashboard is None else _address("--dashboard", arguments.dashboard)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    directory = RunDirectory(arguments.directory)
    try:
        try:
            server = RunServer(directory, rules)
        except CheckpointError as error:
            raise ValueError(str(error)) from None

        def stop(number: int, _: object) -> None:
            server.stop(number)
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        with ExitStack() as opened:
            if where is not None:  # before regions are let in, which a mistake here would cut off again
                try:
                    page = Dashboard(where.host, where.port, server.reporter.describe, server.reporter.text)
                except OSError as error:
                    raise OSError(error.errno, f"Cannot show --dashboard {where}: {error.strerror}") from None
                opened.callback(page.close)
                server.host.note(f"The dashboard is on http://{Address(where.host or 'localhost', page.port)}/")
            check_keys(arguments.keys, "init")
            entrance = Entrance(address, arguments.keys, arguments.directory, server.host.admit, server.host.note)
            opened.callback(entrance.close)
            return server.run(entrance.objection, entrance.renew)
    finally:
        directory.close()


def _address(argument: str, text: str) -> Address:
    """Returns the address in an argument."""
    from lightning_halos.transport.address import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise ValueError(f"{argument} {error}") from None
