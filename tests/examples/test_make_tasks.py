"""The local tasks: no passage of their questions occurs in the text that the examples train on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.examples.conftest import EXAMPLES

# By file, the text that a question was made from.
SOURCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "hellaswag": lambda row: row["endings"][int(row["label"])],
    "lambada": lambda row: row["text"],
    "winogrande": lambda row: row["sentence"].replace("_", row[f"option{row['answer']}"]),
    "mmlu_dev": lambda row: _filled(row),
    "mmlu_test": lambda row: _filled(row),
}


def _filled(row: dict[str, Any]) -> str:
    _, sentence = row["question"].split("\n")
    text: str = sentence.replace("____", row["choices"][row["answer"]])
    return text


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the questions and the text are those of Python 3.11")
def test_no_question_stands_in_the_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from make_tasks import training_text

    training = " ".join(" ".join(training_text()).split())
    for name, source in SOURCES.items():
        rows = [json.loads(line) for line in (EXAMPLES / f"tasks/{name}.jsonl").read_text().splitlines()]
        texts = [" ".join(source(row).split()) for row in rows]
        assert [text for text in texts if text in training] == [], name
