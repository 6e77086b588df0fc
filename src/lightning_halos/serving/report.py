"""The state of a run for people to read: the table of ``lightning-halos status``, and the words of the dashboard.

It only formats what the server's ``Reporter`` describes. Texts in it may come from members, so that none may control a
terminal. A value that is missing, as from another version, is shown as ``-``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_halos.text_tables import align

Status = Mapping[str, Any]

EXPIRES_SOON = 30 * 86400.0
"""Seconds before the end of a certificate from which on it is mentioned."""

COLUMNS = (
    "workers",
    "local steps",
    "steps/s",
    "updates",
    "staleness",
    "rejected",
    "received",
    "sent",
    "last heard",
    "address",
)
"""The names of :func:`cells`."""

NOBODY = "No region has joined yet."

_UNITS = ("B", "kB", "MB", "GB", "TB")
_MOST_EVENTS = 5


def table(status: Status) -> str:
    """Returns the state of a run as text."""
    lines = [printable(line) for line in _head(status)]
    if status["members"]:
        rows = [["region", "state", *COLUMNS]]
        rows += [[name, str(member["state"]), *cells(member)] for name, member in status["members"].items()]
        lines += ["", align([[printable(cell) for cell in row] for row in rows], left=2)]
        lines += left_out(status)
    else:
        lines += ["", NOBODY]
    notices = warnings(status)
    if notices:
        lines += ["", *map(printable, notices)]
    if status["events"]:
        lines += ["", "latest events:"]
        lines += [f"  {clock(at)}  {printable(text)}" for at, text in status["events"][-_MOST_EVENTS:]]
    return "\n".join(lines) + "\n"


def facts(status: Status) -> list[tuple[str, str]]:
    """Returns the names and values that describe the run as one."""
    run, rates = status["run"], status["rates"]
    return [
        ("state", str(run["state"])),
        ("global step", _of(run["global_step"], run["max_steps"])),
        ("epoch", _of(run["epoch"], run["epochs"])),
        ("global steps per second", f"{rates['global_steps']:.3g}"),
        ("time left", _left(status)),
        ("updates of the global model", f"{run['version']:,}"),
        ("decides", run["decider"] or "nobody"),
        ("last snapshot", _snapshot(status)),
        ("received", f"{amount(rates['bytes_received'])}/s"),
        ("sent", f"{amount(rates['bytes_sent'])}/s"),
    ]


def cells(member: Mapping[str, Any]) -> list[str]:
    """Returns the values of a member's row, in the order of ``COLUMNS``, which follow its name and state."""
    silence = member.get("silence")
    return [
        _number(member.get("workers")),
        _number(member.get("steps")),
        _number(member.get("steps_per_second")),
        _number(member.get("updates")),
        _number(member.get("staleness")),
        _number(member.get("rejected")),
        amount(member.get("bytes_received")),
        amount(member.get("bytes_sent")),
        "-" if silence is None else f"{span(silence)} ago",
        member.get("address") or "-",
    ]


def left_out(status: Status) -> list[str]:
    """Returns a sentence about the regions that are not described, if there are any."""
    count = status.get("left_out", 0)
    states = ", ".join(f"{number:,} {state}" for state, number in status.get("states", {}).items())
    return [f"{count:,} more regions are not shown; of all regions, {printable(states)}."] if count else []


def warnings(status: Status) -> list[str]:
    """Returns a sentence for each certificate that will expire soon."""
    sentences = []
    for name, member in status["members"].items():
        end = member.get("certificate_end")
        if end is not None and member["state"] not in ("left", "lost") and end - status["time"] < EXPIRES_SOON:
            left = f"expires in {span(end - status['time'])}" if end > status["time"] else "has expired"
            command = f"lightning-halos keys region FOLDER {name} --replace"
            sentences.append(f"The certificate of {name} {left}. Make a new one where the authority is: {command}")
    return sentences


def amount(size: float | None) -> str:
    """Returns a number of bytes as people read it, such as ``1.5 GB``."""
    if size is None:
        return "-"
    for unit in _UNITS:
        if size < 999.5 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"


def span(seconds: float) -> str:
    """Returns a time span as people read it, such as ``3 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def clock(at: float) -> str:
    """Returns a time by ``time.time`` in UTC, since the reader and the server may be in different time zones."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def printable(text: str) -> str:
    """Returns the text without what a terminal would obey, such as colors, new lines and the direction of writing."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _head(status: Status) -> Iterator[str]:
    since = span(status["time"] - status["started"])
    yield f"{status['directory']}: lightning-halos {status['version']}, up for {since}, {clock(status['time'])}"
    values = dict(facts(status))
    yield (
        f"{values['state']}, global step {values['global step']}, epoch {values['epoch']}, "
        f"{values['global steps per second']} global steps per second, {values['time left']} left"
    )
    yield (
        f"{values['updates of the global model']} updates of the global model; {values['decides']} decides; "
        f"last snapshot: {values['last snapshot']}; received {values['received']}, sent {values['sent']}"
    )


def _of(reached: int | None, ordered: int | None) -> str:
    return _number(reached) if ordered in (None, -1) else f"{_number(reached)} of {ordered:,}"


def _left(status: Status) -> str:
    ordered, rate = status["run"]["max_steps"], status["rates"]["global_steps"]
    if ordered in (None, -1) or not rate:
        return "-"
    return f"about {span((ordered - status['run']['global_step']) / rate)}"


def _snapshot(status: Status) -> str:
    snapshot = status["snapshot"]
    if snapshot is None:
        return "none yet"
    return f"{span(status['time'] - snapshot['time'])} ago, {amount(snapshot['bytes'])}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
