"""The command line: ``lightning-halos COMMAND``.

Each command is in a file of its own in ``commands``. A user's mistake prints one line on stderr, without a traceback,
and the exit status is 2.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning_halos.commands import check, evaluate, export, keys, plan, prepare_data, serve, status, tune
from lightning_halos.version import __version__

PROGRAM = "lightning-halos"


class _Parser(argparse.ArgumentParser):
    """The parser of a command. It gets its arguments when it is used, because some need slow imports.

    Args:
        arguments: Arguments of the base class.
        add: Adds the command's arguments.
        options: Arguments of the base class.
    """

    def __init__(
        self, *arguments: Any, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._add: Callable[[argparse.ArgumentParser], None] | None = add

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._add is not None:
            self._add(self)
            self._add = None
        return super().parse_known_args(args, namespace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program's name. Default: the command line of the process.

    Returns:
        The exit status: that of the command, usually 0; 1 if nobody reads its output any more, as in ``| head``; 2 if
        the input is invalid or something it needs is missing.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    namespace = make_parser().parse_args(arguments)
    namespace.command = shlex.join([PROGRAM, *arguments])
    try:
        code: int | None = namespace.run(namespace)
        sys.stdout.flush()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            return 1
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return code or 0


def _has_lost_reader() -> bool:
    """Returns whether nobody reads the output any more. If so, the rest of it is dropped."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
    return True


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(PROGRAM, description="Tools around HALoS for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in (plan, check, tune, prepare_data, export, evaluate, keys, serve, status):
        commands.add_parser(
            command.__name__.rpartition(".")[2].replace("_", "-"),
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add=command.add_arguments,
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
