"""A page for a browser that shows the state of a run. It is rendered here, needs no script, and changes nothing.

It asks for no password, so what it costs is limited: one time limit for a request, and a number of requests at a time.
The words are those of the table of ``lightning-halos status``, in ``report``.
"""

from __future__ import annotations

import html
import ipaddress
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lightning_halos.serving.report import COLUMNS, NOBODY, cells, clock, facts, left_out, span, warnings

log = logging.getLogger(__name__)

_REFRESH = 2  # seconds
_LIMIT = 10.0  # seconds for a request
_POLL = 0.1  # seconds between two looks whether it is closed
_MOST_REQUESTS = 16  # at a time
_MOST_EVENTS = 20
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #767676; --good: #1a7f37; --bad: #cf222e; --wait: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --dim: #999; --good: #3fb950; --bad: #f85149; --wait: #d29922; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.dim, dt, th { color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem 1.5rem; margin: 1.5rem 0; }
dt, th { font-size: .8rem; font-weight: normal; }
dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
dd, table { font-variant-numeric: tabular-nums; }
progress { width: 100%; height: .6rem; accent-color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.active td:nth-child(2) { color: var(--good); }
.lost td:nth-child(2) { color: var(--bad); }
.disconnected td:nth-child(2), .joining td:nth-child(2) { color: var(--wait); }
ul { list-style: none; margin: 0; padding: 0; }
li { border-bottom: 1px solid var(--line); padding: .3rem 0; overflow-wrap: anywhere; }
.notice { border-left: 3px solid var(--wait); padding-left: .7rem; }
"""


class Dashboard:
    """Serves the page, and the same as JSON at ``/status.json``, until :meth:`close`.

    It answers a browser only where the page was asked for by an address or by this machine's name. Otherwise a page of
    somebody else could read it, by a name of its own that it lets point to this machine.

    Args:
        host: The address to listen on. An address that others can reach shows them the page: it asks for no password.
        port: The port; 0 for any free one.
        describe: Returns the state of the run; see ``Reporter.describe``.
        text: Returns it as JSON.

    Attributes:
        port: The port.

    Raises:
        OSError: If the address cannot be used.
    """

    def __init__(self, host: str, port: int, describe: Callable[[], dict[str, Any]], text: Callable[[], str]) -> None:
        names = {host.lower(), "localhost", socket.gethostname().lower(), socket.getfqdn().lower()}

        deadlines: dict[socket.socket, float] = {}  # of the requests, by `time.monotonic`

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if not _is_asked_for(self.headers.get("Host", ""), names):
                    self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "Ask by this machine's address, or by localhost")
                elif path == "/":
                    self._answer(page(describe()), "text/html")
                elif path == "/status.json":
                    self._answer(text(), "application/json")
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

            do_HEAD = do_GET  # noqa: N815

            def _answer(self, body: str, kind: str) -> None:
                data = body.encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                for name, value in _HEADERS.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def version_string(self) -> str:
                return "lightning-halos"

            def log_message(self, *_: object) -> None:
                """Writes no line for each request."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            request_queue_size = 4 * _MOST_REQUESTS
            places = threading.BoundedSemaphore(_MOST_REQUESTS)

            def process_request(self, request: Any, client_address: Any) -> None:
                if self.places.acquire(blocking=False):
                    super().process_request(request, client_address)
                else:
                    self.shutdown_request(request)

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                deadlines[request] = time.monotonic() + _LIMIT
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    del deadlines[request]
                    self.places.release()

            def service_actions(self) -> None:
                """Cuts the connections whose time is over. A time limit of the socket would begin anew with each byte.

                It is called several times a second.
                """
                now = time.monotonic()
                for request, deadline in list(deadlines.items()):
                    if now > deadline:
                        with suppress(OSError):  # it is closed already
                            request.shutdown(socket.SHUT_RDWR)

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):  # a browser that goes away is none
                    log.exception("The dashboard could not answer %s.", client_address[0])

        self._server = Server((host, port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(_POLL,), name="halos dashboard", daemon=True).start()

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()


def page(status: dict[str, Any]) -> str:
    """Returns the page for the state of a run."""
    run, now, directory = status["run"], status["time"], html.escape(status["directory"])
    ordered = run["max_steps"]
    values = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts(status))
    done = f'<progress max="{ordered}" value="{run["global_step"]}"></progress>' if ordered and ordered > 0 else ""
    rows = "".join(_row(name, member) for name, member in status["members"].items())
    rest = "".join(f"<p class=dim>{html.escape(sentence)}</p>" for sentence in left_out(status))
    notices = "".join(f"<p class=notice>{html.escape(sentence)}</p>" for sentence in warnings(status))
    events = "".join(
        f"<li><span class=dim>{clock(at)}</span> {html.escape(text)}</li>"
        for at, text in status["events"][: -_MOST_EVENTS - 1 : -1]
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{directory} - lightning-halos</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="{_REFRESH}">
<style>{_STYLE}</style></head><body>
<h1>{directory}</h1>
<div class="dim">{clock(now)}, up for {span(now - status["started"])}, lightning-halos {html.escape(status["version"])}
</div>
<dl>{values}</dl>
{done}{notices}
<h2>Regions</h2>
<div class="scroll"><table><thead><tr>{_cells("th", ["region", "state", *COLUMNS])}</tr></thead><tbody>{rows}</tbody>
</table></div>
{"" if rows else f"<p class=dim>{NOBODY}</p>"}{rest}
<h2>Latest events</h2>
<ul>{events or "<li class=dim>none yet</li>"}</ul>
</body></html>
"""


def _row(name: str, member: dict[str, Any]) -> str:
    state = str(member["state"])
    return f'<tr class="{html.escape(state)}">{_cells("td", [name, state, *cells(member)])}</tr>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _is_asked_for(host: str, names: set[str]) -> bool:
    """Whether the ``Host`` of a request is an address or one of the names."""
    name = host.lower()
    if not name.endswith("]"):
        name = name.rpartition(":")[0] or name
    name = name.strip("[]")
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in names
