"""A page for a browser that shows the state of a run. It is rendered here, needs no script, and changes nothing."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import Any

_REFRESH = 2  # seconds
_LIMIT = 10.0  # seconds for a request
_UNITS = ("B", "kB", "MB", "GB", "TB")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; --good: #1a7f37; --bad: #cf222e; --wait: #9a6700; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.dim { color: var(--dim); } .scroll { overflow-x: auto; }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; } dt { color: var(--dim); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
progress { width: 100%; height: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: normal; font-size: .8rem; }
th:first-child, td:first-child { text-align: left; }
.active { color: var(--good); } .lost { color: var(--bad); } .disconnected, .joining { color: var(--wait); }
ul { list-style: none; padding: 0; }
li { border-bottom: 1px solid var(--line); padding: .25rem 0; overflow-wrap: anywhere; }
"""


class Dashboard:
    """Serves the page, and the same as JSON at ``/status.json``, until the process ends.

    Args:
        host: The address to listen on. An address that others can reach shows them the page: it asks for no password.
        port: The port; 0 for any free one.
        describe: Returns the state of the run; see :meth:`Reporter.describe`.
        text: Returns it as JSON.

    Attributes:
        port: The port.

    Raises:
        OSError: If the address cannot be used.
    """

    def __init__(self, host: str, port: int, describe: Callable[[], dict[str, Any]], text: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _LIMIT

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/":
                        self._answer(page(describe()), "text/html")
                    case "/status.json":
                        self._answer(text(), "application/json")
                    case _:
                        self.send_error(HTTPStatus.NOT_FOUND)

            do_HEAD = do_GET  # noqa: N815

            def _answer(self, body: str, kind: str) -> None:
                data = body.encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Writes no line for each request."""

        class Server(ThreadingHTTPServer):
            address_family = AF_INET6 if ":" in host else AF_INET
            daemon_threads = True

        self._server = Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="halos dashboard", daemon=True).start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()


def page(status: dict[str, Any]) -> str:
    """Returns the page for the state of a run."""
    run, rates, now = status["run"], status["rates"], status["time"]
    ordered = run["max_steps"]
    facts = [
        ("state", run["state"]),
        ("global step", f"{run['global_step']:,}" + (f" of {ordered:,}" if ordered else "")),
        ("epoch", str(run["epoch"]) + (f" of {run['epochs']}" if run["epochs"] else "")),
        ("global steps per second", f"{rates['global_steps']:.3g}"),
        ("updates of the global model", f"{run['version']:,}"),
        ("received", f"{amount(rates['bytes_received'])}/s"),
        ("sent", f"{amount(rates['bytes_sent'])}/s"),
        ("decides", run["decider"] or "nobody"),
        ("last snapshot", _snapshot(status["snapshot"], now)),
    ]
    done = f'<progress max="{ordered}" value="{run["global_step"]}"></progress>' if ordered else ""
    heads = (
        "region",
        "state",
        "workers",
        "local steps",
        "updates",
        "staleness",
        "received",
        "sent",
        "last heard",
        "address",
    )
    rows = [_row(name, member) for name, member in status["members"].items()]
    events = [
        f"<li><span class=dim>{_clock(at)}</span> {html.escape(text)}</li>" for at, text in status["events"][::-1]
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(status["directory"])} - lightning-halos</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{_REFRESH}">
<style>{_STYLE}</style></head><body>
<h1>{html.escape(status["directory"])}</h1>
<div class="dim">{_clock(now)}, up for {span(now - status["started"])}, lightning-halos {status["version"]}</div>
<dl>{"".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)}</dl>
{done}
<h2>Regions</h2>
<div class="scroll"><table><thead>{_cells("th", heads)}</thead><tbody>{"".join(rows)}</tbody></table></div>
<h2>Latest events</h2>
<ul>{"".join(events)}</ul>
</body></html>
"""


def amount(size: float) -> str:
    """Returns a number of bytes as people read it."""
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    """Returns a time span as people read it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _row(name: str, member: dict[str, Any]) -> str:
    silence = member.get("silence")
    cells = [
        name,
        member["state"],
        str(member["workers"]),
        f"{member['steps']:,}",
        f"{member['updates']:,}",
        f"{member['staleness']:.3g}",
        amount(member.get("bytes_received", 0)),
        amount(member.get("bytes_sent", 0)),
        "" if silence is None else f"{span(silence)} ago",
        member.get("address") or "",
    ]
    return f'<tr class="{html.escape(member["state"])}">{_cells("td", cells)}</tr>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _snapshot(snapshot: dict[str, float] | None, now: float) -> str:
    if snapshot is None:
        return "none yet"
    return f"{span(now - snapshot['time'])} ago ({amount(snapshot['bytes'])}, {snapshot['seconds']:.2g} s)"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
