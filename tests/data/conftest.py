from __future__ import annotations

from pathlib import Path

import pytest

from lightning_halos import data
from tests.integration.conftest import run

__all__ = ["run"]

WORDS = ["region", "worker", "server", "gradient", "naïve", "step", "merge", "momentum", "日本"]


def text(number: int) -> str:
    """A document whose words all say its number."""
    return " ".join(f"{WORDS[(number * place) % len(WORDS)]}<{number:02d}>" for place in range(1, 40))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(text(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data.train_tokenizer((text(number) for number in range(12)), vocab_size=300).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
