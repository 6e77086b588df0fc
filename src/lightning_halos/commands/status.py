"""``lightning-halos status``: asks a global server how its run is."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import suppress

from lightning_halos.commands.inputs import check_keys, given_path
from lightning_halos.core.checks import check_seconds

SUMMARY = "Ask a global server for its members, the global step, rates, traffic and the latest failures."
EXAMPLES = """\
examples:
  lightning-halos status --server halos.example.org:29600 --keys us-east.pem
      the key of any region is enough
  lightning-halos status --server halos.example.org:29600 --keys us-east.pem --watch
      again every 2 seconds, until Ctrl-C
  lightning-halos status --json | jq .run.global_step
      with the environment variables HALOS_SERVER and HALOS_KEYS
"""

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_status)
    parser.add_argument("--server", metavar="HOST:PORT", help="the global server's address (default: $HALOS_SERVER)")
    parser.add_argument("--keys", type=given_path, metavar="FILE", help="the key of a region (default: $HALOS_KEYS)")
    parser.add_argument("--json", action="store_true", help="print all values as JSON, one line for each answer")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=2.0,
        metavar="SECONDS",
        help="ask again and again, with a pause of SECONDS (default: 2)",
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="limit for an answer (default: 10)"
    )


def _status(arguments: argparse.Namespace) -> None:
    from lightning_halos.serving.inquiry import ask_status
    from lightning_halos.transport.address import parse_server
    from lightning_halos.transport.errors import PeerLostError

    server, keys = _given(arguments, "server"), given_path(_given(arguments, "keys"))
    try:
        parse_server(server)
    except ValueError as error:
        raise ValueError(f"--server {error}") from None
    if arguments.watch is not None:
        check_seconds("--watch", arguments.watch)
    check_seconds("--timeout", arguments.timeout)
    check_keys(keys, "region")
    if arguments.watch is None:
        try:
            _show(ask_status(server, keys, arguments.timeout), arguments.json)
        except PeerLostError as error:
            raise ConnectionError(error) from None
        return
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the usual ends of watching
        while True:
            try:
                _show(ask_status(server, keys, arguments.timeout), arguments.json, is_watched=True)
            except PeerLostError as error:  # the server may come back
                print(error, file=sys.stderr)
            time.sleep(arguments.watch)


def _show(text: str, is_json: bool, is_watched: bool = False) -> None:
    from lightning_halos.serving.report import table

    status = json.loads(text)
    clear = _CLEAR if is_watched and sys.stdout.isatty() and not is_json else ""
    print(clear + (json.dumps(status) if is_json else table(status).rstrip("\n")), flush=True)


def _given(arguments: argparse.Namespace, name: str) -> str:
    variable = f"HALOS_{name.upper()}"
    value = getattr(arguments, name) or os.environ.get(variable)
    if not value:
        raise ValueError(f"--{name} is missing, and the environment variable {variable} is not set.")
    return str(value)
