"""Text: its sources, its tokenizer, and the sequences made from it."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import sys
from pathlib import Path
from typing import Any

import fsspec.compression
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_halos.data import Corpus, IndexedTokens, load_tokenizer, train_tokenizer, write_tokens
from lightning_halos.data.tokenization import pack, tokenize
from tests.data.conftest import text

DOCUMENTS = [text(number) for number in range(12)]


class TestCorpus:
    def test_a_text_file_is_a_document(self, corpus: Path) -> None:
        assert list(Corpus(f"{corpus}/*.txt").documents()) == DOCUMENTS
        assert list(Corpus([f"{corpus}/03.txt", f"{corpus}/01.txt"]).documents()) == [DOCUMENTS[3], DOCUMENTS[1]]

    def test_a_folder_is_its_text_files_at_any_depth(self, tmp_path: Path) -> None:
        (tmp_path / "in" / "deep").mkdir(parents=True)
        (tmp_path / "in" / "module.py").write_text("x = 1\n")
        (tmp_path / "in" / "deep" / "module.pyc").write_bytes(b"\xff\x00")
        (tmp_path / "in" / "deep" / "notes.txt").write_text("one\n\ntwo\n")
        assert list(Corpus(str(tmp_path / "in")).documents()) == ["one\n\ntwo\n", "x = 1\n"]
        assert list(Corpus(str(tmp_path / "in/**/*.txt"), sample_by="paragraph").documents()) == ["one", "two\n"]
        assert list(Corpus(str(tmp_path / "in/**/*.txt"), sample_by="line").documents()) == ["one", "two"]

    @pytest.mark.parametrize("name", ["wiki_00", "notes.R", "notes.go", "notes.log", "notes.yaml", "notes.rst"])
    def test_what_a_folder_has_is_text_by_its_content(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("text")
        assert list(Corpus(tmp_path).documents()) == ["text"]

    def test_what_a_folder_has_that_is_not_text_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "picture.txt").write_bytes(b"\x89PNG\x00")
        (tmp_path / "koi8.txt").write_bytes("слово".encode("koi8-r"))
        (tmp_path / "__init__.py").touch()  # has no text to read
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "config").write_text("hidden")
        with pytest.raises(FileNotFoundError, match=r"has no readable file.* Not text: koi8.txt, pic"):
            Corpus(tmp_path)
        (tmp_path / "latin1.txt").write_bytes("Er aß den Käse nicht".encode("latin-1"))
        (tmp_path / "long.txt").write_text("€" * 10_000)  # the look at the beginning ends inside of a character
        with caplog.at_level(logging.INFO):
            assert [path.name for path in Corpus(tmp_path).paths] == ["latin1.txt", "long.txt"]
        assert "not read, because it is not text: koi8.txt, picture.txt" in caplog.text

    def test_paths_may_be_path_objects(self, corpus: Path) -> None:
        assert list(Corpus(corpus / "03.txt").documents()) == [DOCUMENTS[3]]
        both = Corpus([corpus / "03.txt", f"{corpus}/01.txt"])
        assert list(both.documents()) == [DOCUMENTS[3], DOCUMENTS[1]]
        assert str(both) == f"{corpus}/03.txt {corpus}/01.txt"

    def test_a_folders_text_may_be_compressed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
            (tmp_path / f"notes.txt.{suffix}").write_bytes(compress(suffix.encode()))
        assert list(Corpus(str(tmp_path)).documents()) == ["bz2", "gz", "xz"]
        (tmp_path / "notes.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x20\x03\x19\x00\x00zst")
        assert [path.suffix for path in Corpus(str(tmp_path)).paths] == [".bz2", ".gz", ".xz", ".zst"]
        monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
        with pytest.raises(ModuleNotFoundError, match="pip install zstandard"):
            Corpus(str(tmp_path)).load()

    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
    def test_json_lines_and_parquet(self, tmp_path: Path, kind: str) -> None:
        path, rows = tmp_path / f"part.{kind}", [{"body": document, "id": 1} for document in DOCUMENTS]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        assert list(Corpus(str(path), field="body").documents()) == DOCUMENTS
        with pytest.raises(ValueError, match=r"has no field='text'. It has: body, id"):
            Corpus(str(path)).load()
        with pytest.raises(ValueError, match=r"field='id' of .* holds <int>, not text: 1"):
            list(Corpus(str(path), field="id").documents())

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({}, {"id": 1}),
            ({"id": 1}, {"id": "b"}),
            ({"meta": {"url": "u"}}, {"meta": {"stars": [1]}}),
        ],
        ids=["one has more", "another type", "nested"],
    )
    def test_the_other_fields_of_files_may_differ(
        self, tmp_path: Path, kind: str, first: dict[str, Any], second: dict[str, Any]
    ) -> None:
        for name, row in (("a", {"text": "2024-01-01", **first}), ("b", {"text": "two", **second})):
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
            else:
                (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        assert list(Corpus(tmp_path).documents()) == ["2024-01-01", "two"]
        assert list(Corpus([tmp_path / f"b.{kind}", tmp_path / f"a.{kind}"]).documents()) == ["two", "2024-01-01"]

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_null_is_an_empty_document(self, tmp_path: Path, kind: str) -> None:
        rows: list[dict[str, Any]] = [{"text": None}, {"text": "one"}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert list(Corpus(tmp_path / f"a.{kind}").documents()) == ["one"]

    @pytest.mark.parametrize(
        "contents",
        [
            '{"text": "one"}\n\n{"text": "two", "id": 1}\n',
            '[{"text": "one"}, {"text": "two"}]',
            '[\n  {"text": "one"},\n  {"text": "two", "id": 1}\n]\n',
            '["one", "two"]',
        ],
    )
    def test_json_is_lines_or_an_array(self, tmp_path: Path, contents: str) -> None:
        (tmp_path / "a.json").write_text(contents)
        assert list(Corpus(tmp_path / "a.json").documents()) == ["one", "two"]
        (tmp_path / "b.json").write_text('{\n  "text": "three"\n}\n')
        assert list(Corpus(tmp_path).documents()) == ["one", "two", "three"]

    @pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.json.GZ"])
    def test_suffixes_of_json_lines(self, tmp_path: Path, name: str) -> None:
        lines = b'{"text": "one"}'
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("GZ") else lines)
        assert list(Corpus(tmp_path / name).documents()) == ["one"]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, name: str) -> None:
        contents = '{"text": "naïve"}' if name == "a.jsonl" else "naïve"
        (tmp_path / name).write_text(contents, encoding="utf-8-sig")
        assert list(Corpus(tmp_path / name).documents()) == ["naïve"]

    def test_text_that_is_not_utf8_is_warned_of(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        (tmp_path / "utf8.txt").write_text("a" + "€" * 10_000)  # the look at the beginning ends inside of a character
        assert Corpus(tmp_path / "utf8.txt").is_text
        assert not recwarn
        (tmp_path / "latin1.txt").write_bytes("Er aß den Käse nicht".encode("latin-1"))
        with pytest.warns(UserWarning, match=r"What is not UTF-8 is replaced, also in .*/latin1.txt"):
            assert Corpus([tmp_path / "latin1.txt", tmp_path / "utf8.txt"]).is_text

    @pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
    def test_a_damaged_file_is_named(self, tmp_path: Path, suffix: str, compress: Any) -> None:
        contents = bytearray(compress(b'{"text": "one"}' * 100))
        contents[len(contents) // 2] ^= 0xFF
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=f"Cannot read {path}: "):
            list(Corpus(path).documents())

    def test_half_of_a_surrogate_pair_in_json_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "cut off: \\ud83d"}')
        assert list(Corpus(tmp_path).documents()) == ["cut off: ?"]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
    @pytest.mark.parametrize("sample_by", ["document", "line"])
    def test_an_empty_file_has_no_documents(self, tmp_path: Path, name: str, sample_by: Any) -> None:
        (tmp_path / name).touch()
        assert list(Corpus(tmp_path / name, sample_by=sample_by).documents()) == []

    @pytest.mark.parametrize(
        ("contents", "problem"),
        [
            ('{"text": "one"}\n{"text": "tw', "Cannot read .*a.jsonl: what begins in line 2 is no JSON"),
            ('{"text": "one"}\n{"body": "two"}', "a.jsonl: it has no field='text'. It has: body"),
            ('{"text": "one"}\n2', "a.jsonl: it has a row that is no object: 2"),
        ],
    )
    def test_a_wrong_row_is_said_with_its_file(self, tmp_path: Path, contents: str, problem: str) -> None:
        (tmp_path / "a.jsonl").write_text(contents)
        with pytest.raises(ValueError, match=problem):
            list(Corpus(tmp_path).documents())

    def test_what_is_wrong_is_said(self, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="give exactly one"):
            Corpus()
        with pytest.raises(ValueError, match="give exactly one"):
            Corpus("a.txt", "wikitext")
        with pytest.raises(FileNotFoundError, match=r"There is no file nowhere/\*\.txt"):
            Corpus("nowhere/*.txt")
        with pytest.raises(ValueError, match="sample_by='word' must be one of document, paragraph, line"):
            Corpus(str(corpus), sample_by="word")  # type: ignore[arg-type]
        (tmp_path / "a.jsonl").write_text("{}")
        with pytest.raises(ValueError, match=r"several kinds: text \(11.txt\), json \(a.jsonl\)"):
            Corpus([str(corpus), str(tmp_path / "a.jsonl")])

    def test_a_folder_of_rows_may_have_a_license(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
        (tmp_path / "LICENSE").write_text("Do what you like.")
        assert list(Corpus(tmp_path).documents()) == ["one"]
        (tmp_path / "b.txt").write_text("two")
        with pytest.raises(ValueError, match=r"several kinds: json \(a.jsonl\), text \(b.txt\)"):
            Corpus(tmp_path).load()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_dataset_of_the_hub_needs_the_network(self, streaming: bool) -> None:
        with pytest.raises(ValueError, match=r"Cannot load EleutherAI/lambada_openai:test.*needs the network"):
            Corpus(dataset="EleutherAI/lambada_openai", split="test", streaming=streaming).load()

    def test_a_dataset_in_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "test.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
        corpus = Corpus(dataset=tmp_path / "set", split="test")
        assert list(corpus.documents()) == ["one", "two"]
        assert corpus.key() == Corpus(dataset=str(tmp_path / "set"), split="test").key()
        with pytest.raises(ValueError, match=r"Cannot load .*:nothing"):
            Corpus(dataset=str(tmp_path / "set"), split="nothing").load()


class TestTokenizer:
    def test_any_text_comes_back(self, tokenizer: str) -> None:
        loaded = load_tokenizer(tokenizer)
        for original in [*DOCUMENTS, " a\n\n\tb ,c  !", "🤗\x00é"]:
            assert loaded.decode(loaded(original)["input_ids"]) == original
        assert len(loaded) == 300
        assert loaded.eos_token == "<|endoftext|>"

    def test_a_text_that_spells_a_special_token_does_not_become_it(self, tokenizer: str) -> None:
        loaded = load_tokenizer(tokenizer)
        original = "a<|endoftext|>b"
        ((_, tokens),) = tokenize([original], loaded)
        assert tokens.count(loaded.eos_token_id) == 1
        assert loaded.decode(tokens[:-1]) == original

    def test_training_makes_it_shorter(self, tokenizer: str) -> None:
        assert len(load_tokenizer(tokenizer)(DOCUMENTS[0])["input_ids"]) < len(DOCUMENTS[0]) / 2

    def test_what_is_wrong_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
            train_tokenizer(DOCUMENTS, 256)
        with pytest.raises(ValueError, match=r"Cannot load the tokenizer EleutherAI/pythia-70m: .* needs the network"):
            load_tokenizer("EleutherAI/pythia-70m")
        with pytest.raises(ValueError, match=r"Cannot load the tokenizer .*A folder must hold a tokenizer"):
            load_tokenizer(tmp_path)

    def test_one_without_end_of_text_is_refused(self, tokenizer: str, tmp_path: Path) -> None:
        loaded = load_tokenizer(tokenizer)
        loaded.eos_token = None
        loaded.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no end-of-text token"):
            load_tokenizer(tmp_path)


def stream(tokenizer: str) -> list[int]:
    """All documents' tokens with an end-of-text token after each."""
    loaded: Any = load_tokenizer(tokenizer)
    return [token for one in DOCUMENTS for token in [*loaded(one)["input_ids"], loaded.eos_token_id]]


class TestPacking:
    @pytest.mark.parametrize("context", [1, 5, 64])
    def test_nothing_is_lost_but_the_tail(self, context: int) -> None:
        lengths = [3, 1, 200, 2, 64, 65, 7]
        tokens = iter(range(sum(lengths)))
        sequences = list(pack([[next(tokens) for _ in range(length)] for length in lengths], context))
        assert {len(sequence) for sequence in sequences} == {context + 1}
        assert np.concatenate([sequence[1:] for sequence in sequences]).tolist() == [
            *range(1, (sum(lengths) - 1) // context * context + 1)
        ]

    def test_documents_are_written_one_by_one(self, tokenizer: str, tmp_path: Path) -> None:
        summary = write_tokens(DOCUMENTS, load_tokenizer(tokenizer), tmp_path / "tokens")
        expected = stream(tokenizer)
        tokens = IndexedTokens(tmp_path / "tokens", context=len(expected) - 1)
        assert tokens[0].tolist() == expected
        assert (summary.documents, summary.sequences, summary.tokens) == (12, 12, len(expected))
        assert summary.text_bytes == sum(len(document.encode()) for document in DOCUMENTS)

    def test_packed_sequences_are_shuffled_by_the_seed(self, tokenizer: str, tmp_path: Path) -> None:
        def written(name: str, seed: int | None) -> list[list[int]]:
            write_tokens(DOCUMENTS, load_tokenizer(tokenizer), tmp_path / name, context=20, seed=seed)
            return [sequence.tolist() for sequence in IndexedTokens(tmp_path / name, context=20)]

        ordered, shuffled = written("ordered", None), written("shuffled", 1)
        assert ordered == [sequence.tolist() for sequence in pack([stream(tokenizer)], 20)]
        assert shuffled != ordered
        assert sorted(shuffled) == sorted(ordered)
        assert shuffled == written("again", 1) != written("other", 2)
        assert all(not path.name.startswith(".") for path in tmp_path.iterdir())

    def test_too_little_text(self, tokenizer: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="The corpus contains no text"):
            write_tokens([], load_tokenizer(tokenizer), tmp_path / "tokens")
        with pytest.raises(ValueError, match="tokens, too few for context=5000"):
            write_tokens(DOCUMENTS, load_tokenizer(tokenizer), tmp_path / "tokens", context=5000)
        assert not list(tmp_path.iterdir())


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-halos\[lm\]"'):
        Corpus(str(corpus)).load()
