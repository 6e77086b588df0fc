"""``lightning-halos keys``: makes, renews and shows the keys of the global server and of the regions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_halos.commands.inputs import given_path

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

SUMMARY = "Make, renew and show the keys with which the global server and the regions know each other."
EXAMPLES = """\
examples:
  lightning-halos keys init keys --host halos.example.org
      an authority (keys/authority.pem) and the global server's key (keys/server.pem)
  lightning-halos keys region keys us-east
      a region's key (keys/us-east.pem), to be copied there
  lightning-halos keys region keys us-east --replace
      a new key in its place, before the old one expires
  lightning-halos keys server keys --host halos.example.org --host 203.0.113.7 --replace
      a new key for the server, which is known by these names
  lightning-halos keys show keys
      what each file is, and how long it is valid
"""

_DAYS = 365


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    init = _add(commands, "init", "make an authority, and the global server's key", _init)
    server = _add(commands, "server", "make another key for the global server", _server)
    region = _add(commands, "region", "make a key for a region", _region)
    show = _add(commands, "show", "say what key files are, and how long they are valid", _show)
    for command in (init, server, region):
        command.add_argument("folder", type=given_path, help="the authority's folder")
        command.add_argument(
            "--days", type=int, default=_DAYS, metavar="N", help=f"how long it is valid (default: {_DAYS})"
        )
    for command in (init, server):
        command.add_argument(
            "--host",
            action="append",
            required=True,
            metavar="HOST",
            help="name or address at which regions reach the server; may be given again",
        )
    region.add_argument("name", help="the region's name")
    for command in (server, region):
        command.add_argument("--replace", action="store_true", help="replace the file if it exists")
    show.add_argument("paths", nargs="+", type=given_path, metavar="PATH", help="files, or folders of them")


def _add(
    commands: _Commands, name: str, summary: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _init(arguments: argparse.Namespace) -> None:
    from lightning_halos.transport.certificates import make_authority

    authority, server = make_authority(arguments.folder, arguments.host, arguments.days)
    print(f"{authority}  makes keys: keep it away from the server and the regions")
    print(f"{server}  the global server's, until {_until(server)}: serve --keys {server}")
    print(f"\nNow one for each region: lightning-halos keys region {arguments.folder} NAME")


def _server(arguments: argparse.Namespace) -> None:
    from lightning_halos.transport.certificates import make_server

    path = make_server(arguments.folder, arguments.host, arguments.days, arguments.replace)
    print(f"{path}  the global server's, until {_until(path)}: copy it over the old one, which the server notices")


def _region(arguments: argparse.Namespace) -> None:
    from lightning_halos.transport.certificates import make_region

    path = make_region(arguments.folder, arguments.name, arguments.days, arguments.replace)
    print(f"{path}  of {arguments.name}, until {_until(path)}: copy it there (scp -p), then HALOS_KEYS={path.name}")


def _show(arguments: argparse.Namespace) -> None:
    paths = [one for path in arguments.paths for one in (sorted(path.glob("*.pem")) if path.is_dir() else [path])]
    if not paths:
        raise ValueError(f"no *.pem files in {', '.join(map(str, arguments.paths))}.")
    errors = []
    for number, path in enumerate(paths):
        try:
            described = _described(path)
        except (OSError, ValueError) as error:
            errors.append(str(error))
        else:
            print(("\n" if number > len(errors) else "") + described)
    if errors:
        raise ValueError("\n".join(errors))


def _described(path: Path) -> str:
    from lightning_halos.transport.certificates import read_keys

    keys = read_keys(path)
    own, now = keys.certificate, datetime.now(timezone.utc)
    if now < own.start:
        state = "not valid yet"
    elif now > own.end:
        state = "expired"
    else:
        state = f"{(own.end - now).days} days left"
    rows = {
        "file": keys.path,
        "for": {"authority": "making keys", "server": own.name, "region": f"the region {own.name}"}[own.role],
        "valid": f"{own.start:%F %T} to {own.end:%F %T} UTC, {state}",
        "hosts": ", ".join(own.hosts),
        "number": own.serial,
        "authority": keys.authority,
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items() if value)


def _until(path: Path) -> str:
    from lightning_halos.transport.certificates import read_keys

    return f"{read_keys(path).certificate.end:%F}"
