"""What a peer does again and again fills neither the log nor the status."""

from __future__ import annotations

import logging

import pytest

from lightning_halos.serving import journal
from lightning_halos.serving.journal import Journal


def sentences(found: Journal) -> list[str]:
    return [sentence for _, sentence in found.latest]


def test_an_event_that_happens_again_is_shown_once_with_its_last_address() -> None:
    found = Journal()
    found.note("The run begins.", logging.INFO)
    for port in range(100):
        found.note(f"us (127.0.0.1:{port}) is connected.", logging.INFO, "us", f"127.0.0.1:{port}")
        found.note(f"us (127.0.0.1:{port}) is refused: no.", logging.WARNING, "us", f"127.0.0.1:{port}")
    assert sentences(found) == [
        "The run begins.",
        "us (127.0.0.1:99) is connected. (100 times)",
        "us (127.0.0.1:99) is refused: no. (100 times)",
    ]


def test_a_peer_whose_events_differ_leaves_those_of_others() -> None:
    found = Journal()
    found.note("eu (1.2.3.4:5) is connected.", logging.INFO, "eu", "1.2.3.4:5")
    for number in range(100):
        found.note(f"us (1.2.3.4:6) is refused: {number}.", logging.WARNING, "us", "1.2.3.4:6")
    assert len(sentences(found)) == 11
    assert sentences(found)[0] == "eu (1.2.3.4:5) is connected."
    assert sentences(found)[-1] == "us (1.2.3.4:6) is refused: 99."


def test_a_peer_has_a_limited_number_of_lines_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    found = Journal()
    for number in range(30):
        found.note(f"us is refused: {number}.", logging.WARNING, "us")
        found.note("A snapshot could not be written.", logging.ERROR)
    assert caplog.text.count("us is refused") == 20
    assert caplog.text.count("A snapshot") == 30, "the server's own lines are all there"
    monkeypatch.setattr(journal, "_MINUTE", -1.0)  # it has passed
    found.note("us is refused: again.", logging.WARNING, "us")
    assert "10 more lines about us were left out." in caplog.text
    assert "us is refused: again." in caplog.text


def test_long_and_unprintable_texts_are_made_harmless() -> None:
    found = Journal()
    found.note("\x1b[31m" + "x" * 10_000, logging.INFO)
    (sentence,) = sentences(found)
    assert sentence.startswith("?[31m")
    assert len(sentence) == 2000
