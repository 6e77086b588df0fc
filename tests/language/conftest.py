from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import run
from tests.language.models import source, train_tokenizer

__all__ = ["run"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tokenizer of the standard library's source."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(source()[::5]).save_pretrained(folder)
    return str(folder)
