"""``lightning-halos prepare-data``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_halos.cli import main
from lightning_halos.commands.inputs import given_path
from lightning_halos.data import IndexedTokens, MegatronDataModule, load_tokenizer
from tests.data.conftest import text

Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture[str]) -> Prepare:
    def prepare(*arguments: object) -> tuple[int, str, str]:
        status = main(["prepare-data", *map(str, arguments)])
        return status, *capsys.readouterr()

    return prepare


def test_a_sequence_for_each_document(prepare: Prepare, corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    status, out, err = prepare(corpus, "--tokenizer", tokenizer, "--output", tmp_path / "tokens")
    assert (status, err) == (0, "")
    encoded = [load_tokenizer(tokenizer)(text(number))["input_ids"] for number in range(12)]
    tokens = sum(len(one) + 1 for one in encoded)
    size = sum(len(text(number).encode()) for number in range(12))
    assert out.splitlines() == [
        "documents        12",
        f"tokens           {tokens:,}",
        f"bytes per token  {size / tokens:.3f}",
        "sequences        12",
        "vocabulary       300",
        "",
        f"{tmp_path}/tokens.idx, {tmp_path}/tokens.bin, {tmp_path}/tokens-tokenizer/",
    ]
    assert IndexedTokens(tmp_path / "tokens", 16).num_tokens == tokens


def test_packed_with_a_tokenizer_of_its_own(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "tokens"
    status, out, _ = prepare(corpus, "--train-tokenizer", 280, "--context", 16, "--threads", 1, "--output", prefix)
    assert status == 0
    assert " of 17 tokens\n" in out
    data = MegatronDataModule(str(prefix), context=16, batch_size=2, val_sequences=4, num_workers=0)
    data.setup("fit")
    assert data.vocab_size == 280
    assert data.bytes_per_token > 1
    written = [sequence.tolist() for sequence in IndexedTokens(prefix, 16)]
    assert f"sequences        {len(written)} of" in out
    prepare(corpus, "--tokenizer", f"{prefix}-tokenizer", "--context", 16, "--no-shuffle", "--output", tmp_path / "o")
    ordered = [sequence.tolist() for sequence in IndexedTokens(tmp_path / "o", 16)]
    assert sorted(ordered) == sorted(written)
    assert [one[-1] for one in ordered[:-1]] == [one[0] for one in ordered[1:]]
    assert ordered != written


def test_paths_may_begin_in_the_home_folder(
    prepare: Prepare, corpus: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    assert prepare(corpus, "--tokenizer", "~/tokenizer", "--output", "~/tokens")[0] == 0
    assert IndexedTokens("~/tokens", 16).num_tokens == IndexedTokens(tmp_path / "tokens", 16).num_tokens
    assert MegatronDataModule("~/tokens", context=16).vocab_size == 300
    assert given_path("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_the_prefix_may_have_the_suffix_of_a_file(
    prepare: Prepare, corpus: Path, tokenizer: str, tmp_path: Path, suffix: str
) -> None:
    status, out, _ = prepare(corpus, "--tokenizer", tokenizer, "--output", tmp_path / f"tokens{suffix}")
    assert status == 0
    assert out.endswith(f"{tmp_path}/tokens.idx, {tmp_path}/tokens.bin, {tmp_path}/tokens-tokenizer/\n")
    assert MegatronDataModule(tmp_path / "tokens", context=16).vocab_size == 300


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{corpus}", "--split", "test", "--config", "c", "--streaming"], "leave --config, --split, --streaming out"),
        (["{corpus}", "--field", "body"], "text files have no fields: leave --field out"),
        (["{rows}", "--sample-by", "line"], "--sample-by is for text files: leave --sample-by out"),
        (["--dataset", "d", "--sample-by", "line"], "--sample-by is for text files: leave --sample-by out"),
        (["{corpus}", "--seed", "3"], "only packed sequences (--context) are shuffled: leave --seed out"),
        (
            ["{corpus}", "--context", "8", "--no-shuffle", "--seed", "3"],
            "nothing is shuffled with --no-shuffle: leave --seed out",
        ),
        (["{corpus}", "--no-shuffle"], "leave --shuffle and --no-shuffle out"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(
    prepare: Prepare, corpus: Path, tokenizer: str, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    filled = [argument.format(corpus=corpus, rows=rows) for argument in arguments]
    status, out, err = prepare(*filled, "--tokenizer", tokenizer, "--output", tmp_path / "tokens")
    assert (status, out) == (2, "")
    assert problem in err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tokenizer", "t"], "give either INPUT files or --dataset NAME"),
        (["nowhere.txt", "--tokenizer", "t"], "There is no file nowhere.txt"),
        (["{corpus}", "--tokenizer", "EleutherAI/pythia-70m"], "needs the network"),
        (["--dataset", "no/such", "--train-tokenizer", "300"], "needs the network"),
        (["{corpus}", "--train-tokenizer", "3"], "must be at least 257"),
        (["{corpus}", "--train-tokenizer", "300", "--context", "0"], "--context=0 must be a whole number of at"),
        (["{corpus}", "--train-tokenizer", "300", "--context", "99999"], "Use a smaller context"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(
    prepare: Prepare, corpus: Path, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    filled = [argument.format(corpus=corpus) for argument in arguments]
    status, out, err = prepare(*filled, "--output", tmp_path / "out" / "tokens")
    assert (status, out) == (2, "")
    assert problem in err
    assert len(err.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_where_nothing_can_be_written_is_said_before_the_work(prepare: Prepare, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens-tokenizer").write_text("")
    for output, problem in (
        ("", "--output='.' must be the files' path without .idx and .bin, such as tokens/corpus"),
        (tmp_path / "tokens-tokenizer" / "tokens", "tokens-tokenizer is a file. Name a folder to write to."),
        (tmp_path / "tokens", "tokens-tokenizer is a file. Name a folder to write to."),
    ):
        status, out, err = prepare(corpus, "--train-tokenizer", "300", "--output", output)
        assert (status, out) == (2, "")
        assert "lightning-halos: error: --output" in err
        assert problem in err


@pytest.mark.slow
def test_as_a_command(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_halos.cli", "prepare-data", f"{corpus}/0*.txt"]
    options = ["--train-tokenizer", "260", "--output", tmp_path / "tokens"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    assert "documents        10\n" in done.stdout
    assert done.stderr == ""
