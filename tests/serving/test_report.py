"""The state of a run, for people to read."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_halos.serving.report import amount, cells, printable, span, table

NOW = 1_800_000_000.0


def status(**changes: Any) -> dict[str, Any]:
    """What the server's ``Reporter`` describes."""
    return {
        "version": "0.2.0",
        "time": NOW,
        "started": NOW - 3 * 3600,
        "directory": "runs/pile",
        "run": {
            "state": "running",
            "global_step": 12_345,
            "total": 197_520,
            "epoch": 1,
            "epochs": None,
            "max_steps": 100_000,
            "version": 1_543,
            "decider": "us-east",
            "workers": 16,
        },
        "rates": {
            "local_steps": 24.0,
            "global_steps": 1.5,
            "updates": 0.1,
            "bytes_sent": 11.2e6,
            "bytes_received": 12e6,
        },
        "snapshot": {"time": NOW - 12, "seconds": 0.8, "bytes": 1.1e9},
        "members": {
            "us-east": {
                "state": "active",
                "workers": 8,
                "steps": 98_760,
                "steps_per_second": 12.0,
                "updates": 772,
                "staleness": 1.25,
                "rejected": 0,
                "bytes_received": 2.5e9,
                "bytes_sent": 2.6e9,
                "silence": 0.4,
                "address": "198.51.100.4:50211",
            },
            "tokyo": {"state": "disconnected", "workers": 8, "steps": 98_760, "updates": 771, "silence": 130.0},
        },
        "events": [[NOW - 130, "The connection of tokyo (203.0.113.9:4711) is lost: closed"]],
        **changes,
    }


class TestTable:
    def test_has_the_run_its_members_and_the_latest_events(self) -> None:
        assert table(status()) == EXPECTED

    def test_before_anybody_has_joined(self) -> None:
        run = {"state": "founding", "global_step": None, "epoch": None, "version": 0, "decider": None}
        empty = status(
            run={**run, "epochs": None, "max_steps": None, "workers": None},
            rates=dict.fromkeys(status()["rates"], 0.0),
            snapshot=None,
            members={},
            events=[],
        )
        text = table(empty)
        assert "No region has joined yet." in text
        assert "global step -, epoch -, 0 global steps per second, - left" in text
        assert "nobody decides; last snapshot: none yet" in text

    def test_mentions_certificates_that_expire_soon_of_members_that_need_them(self) -> None:
        members = {
            name: {"state": state, "workers": 1, "certificate_end": NOW + days * 86400}
            for name, state, days in (
                ("soon", "active", 29.5),
                ("late", "active", 31),
                ("over", "disconnected", -1),
                ("gone", "left", 3),
            )
        }
        text = table(status(members=members))
        assert "certificate of soon expires in 30 d. Make a new one where the authority is: " in text
        assert "lightning-halos keys region FOLDER soon --replace" in text
        assert "The certificate of over has expired." in text
        assert "of late" not in text
        assert "of gone" not in text

    def test_no_text_of_a_member_controls_the_terminal(self) -> None:
        evil = "\x1b]0;title\x07\x1b[2J\r\nforged line \u202egnp"
        members = {"a" + evil: {"state": "active" + evil, "workers": 1}}
        text = table(status(members=members, events=[[NOW, "The job of a failed: " + evil]], directory="runs/" + evil))
        assert all(line.isprintable() for line in text.splitlines())
        assert len(text.splitlines()) == len(table(status()).splitlines()) - 1

    def test_shows_the_latest_events_only(self) -> None:
        text = table(status(events=[[NOW + number, f"event {number}"] for number in range(50)]))
        assert "event 44" not in text
        assert text.rstrip().endswith("event 49")


def test_what_a_member_does_not_tell_is_a_hyphen() -> None:
    assert set(cells({})) == {"-"}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1e6, "1 MB"),
        (1.234e10, "12.3 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_amounts(size: float | None, text: str) -> None:
    assert amount(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 d")]
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_letters_of_all_languages_are_printable() -> None:
    assert printable("Zürich 東京") == "Zürich 東京"


EXPECTED = """\
runs/pile: lightning-halos 0.2.0, up for 3 h, 2027-01-15 08:00:00 UTC
running, global step 12,345 of 100,000, epoch 1, 1.5 global steps per second, about 16 h left
1,543 updates of the global model; us-east decides; last snapshot: 12 s ago, 1.1 GB; received 12 MB/s, sent 11.2 MB/s

region   state         workers  local steps  steps/s  updates  staleness  rejected  received    sent  last heard             address
us-east  active              8       98,760       12      772       1.25         0    2.5 GB  2.6 GB     0 s ago  198.51.100.4:50211
tokyo    disconnected        8       98,760        -      771          -         -         -       -   2 min ago                   -

latest events:
  2027-01-15 07:57:50 UTC  The connection of tokyo (203.0.113.9:4711) is lost: closed
"""  # noqa: E501
