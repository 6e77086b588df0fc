"""Data modules: batches, validation, the cache, streams, and the shared cursor."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from transformers import ByT5Tokenizer

from lightning_halos.checkpoint.manifest import NAME, Manifest
from lightning_halos.data import IndexedTokensWriter, MegatronDataModule, TextDataModule, load_tokenizer, modules
from tests.data.conftest import text
from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import FEATURES, Toy, assert_no_step_lost, halos, make_trainer, outcome

CONTEXT = 15
SEQUENCES = 104
PASS = 19  # batches in a pass over a stream


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """A corpus whose sequences consist of their own number."""
    with IndexedTokensWriter(tmp_path / "numbered") as writer:
        for number in range(SEQUENCES):
            writer.add(np.full(CONTEXT + 1, number))
    return str(tmp_path / "numbered")


def first_tokens(loader: Any) -> list[int]:
    return [int(token) for batch in loader for token in batch[:, 0].long()]


def set_up(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


class TestMegatron:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_reads_in_order_and_keeps_the_last_sequences_for_validation(self, numbered: str, workers: int) -> None:
        data = set_up(MegatronDataModule(numbered, CONTEXT, 8, val_sequences=5, num_workers=workers))
        assert first_tokens(data.train_dataloader()) == list(range(96))  # of 99: whole batches
        assert first_tokens(data.val_dataloader()) == list(range(99, 104))

    def test_shuffles_if_asked_to(self, numbered: str) -> None:
        data = set_up(MegatronDataModule(numbered, CONTEXT, 9, val_sequences=5, num_workers=0, shuffle=True))
        first, second = first_tokens(data.train_dataloader()), first_tokens(data.train_dataloader())
        assert sorted(first) == sorted(second) == list(range(99))
        assert first != second

    def test_batches_are_narrow_between_processes_and_int64_for_the_module(self, numbered: str) -> None:
        data = set_up(MegatronDataModule(numbered, CONTEXT, 8, val_sequences=0, num_workers=0))
        batch = next(iter(data.train_dataloader()))
        assert (batch.dtype, batch.shape) == (torch.uint16, (8, CONTEXT + 1))
        seen: list[Tensor] = []
        module = Reading(seen)
        make_trainer("auto", devices=1, max_steps=2).fit(module, datamodule=data)
        assert {batch.dtype for batch in seen} == {torch.int64}
        assert torch.equal(seen[0], batch.long())

    def test_sequences_of_one_length_are_concatenated_if_they_are_documents(self, numbered: str) -> None:
        options: dict[str, Any] = {"context": 4 * (CONTEXT + 1), "val_sequences": 0, "num_workers": 0}
        data = set_up(MegatronDataModule(numbered, batch_size=1, concatenate=True, **options))
        assert first_tokens(data.train_dataloader()) == list(range(0, 100, 4))
        with pytest.raises(ValueError, match="or concatenate=True"):
            MegatronDataModule(numbered, **options).setup("fit")

    def test_the_tokenizer_lies_beside_the_tokens(self, numbered: str, tokenizer: str) -> None:
        unknown = set_up(MegatronDataModule(numbered, CONTEXT, val_sequences=5))
        assert (unknown.tokenizer, unknown.vocab_size, unknown.bytes_per_token) == (None, None, None)
        os.symlink(tokenizer, f"{numbered}-tokenizer")
        assert MegatronDataModule(f"{numbered}.idx", CONTEXT, val_sequences=5).vocab_size == 300
        data = MegatronDataModule(numbered, CONTEXT, val_sequences=5)
        assert data.vocab_size == 300
        assert data.tokenizer.eos_token == "<|endoftext|>"

    @pytest.mark.parametrize(
        ("name", "value"), [("context", 0), ("batch_size", 0), ("val_sequences", -1), ("num_workers", 1.5)]
    )
    def test_wrong_values(self, numbered: str, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number of at least"):
            MegatronDataModule(numbered, **{name: value})

    @pytest.mark.parametrize(
        ("name", "value"), [("shuffle", "no"), ("concatenate", "no"), ("concatenate", 1), ("tokenizer", 5)]
    )
    def test_wrong_types(self, numbered: str, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{name}=.* must be"):
            MegatronDataModule(numbered, **{name: value})

    def test_a_prefix_without_a_name(self) -> None:
        with pytest.raises(ValueError, match=r"prefix='\.' must be the files' path without"):
            MegatronDataModule("")

    def test_too_many_sequences_for_validation(self, numbered: str) -> None:
        with pytest.raises(ValueError, match="val_sequences=104 leaves nothing to train on: there are 104"):
            MegatronDataModule(numbered, CONTEXT, val_sequences=104).setup("fit")

    def test_too_few_sequences_for_a_batch(self, numbered: str) -> None:
        data = MegatronDataModule(numbered, CONTEXT, batch_size=128, val_sequences=4, num_workers=0)
        with pytest.raises(ValueError, match="batch_size=128 is more than the 100 training sequences of each process"):
            make_trainer("auto", devices=1, max_steps=2).fit(Reading(), datamodule=data)

    def test_from_a_configuration_file(self, numbered: str, tmp_path: Path) -> None:
        settings = {"class_path": "lightning_halos.data.MegatronDataModule", "init_args": {"prefix": numbered}}
        (tmp_path / "config.yaml").write_text(json.dumps({"data": settings}))
        cli = LightningCLI(BoringModel, run=False, args=["--config", str(tmp_path / "config.yaml")])
        assert isinstance(cli.datamodule, MegatronDataModule)
        text_settings = ["--data=lightning_halos.data.TextDataModule", "--data.tokenizer=t", f"--data.files={__file__}"]
        cli = LightningCLI(BoringModel, run=False, args=[*text_settings, "--data.streaming=true"])
        assert isinstance(cli.datamodule, TextDataModule)


class Reading(Toy):
    """Keeps its batches, and records the first token of each of their sequences."""

    def __init__(self, seen: list[Tensor] | None = None) -> None:
        super().__init__()
        self.seen = seen

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        self.trained_on += batch[:, 0].tolist()
        if self.seen is not None:
            self.seen.append(batch)
        return self.net(batch[:, :FEATURES] / SEQUENCES).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated_on[-1] += batch[:, 0].tolist()

    def on_train_end(self) -> None:
        if hasattr(self.trainer.strategy, "round"):
            super().on_train_end()


def shared(prefix: str) -> Result:
    module, trainer = Reading(), make_trainer(max_epochs=2)
    trainer.fit(module, datamodule=MegatronDataModule(prefix, CONTEXT, 4, val_sequences=8, num_workers=1))
    return outcome(trainer, module)


def test_workers_of_halos_share_the_sequences_of_an_epoch(run: Run, numbered: str) -> None:
    results = run(shared, numbered)
    used = Counter(index for result in results for index in result["trained_on"])
    assert used == Counter(dict.fromkeys(range(96), 2))
    assert results[0]["validated_on"] == [list(range(96, 104))] * 2
    assert_no_step_lost(results)


def short_of_sequences(prefix: str) -> Result:
    """Of 32 sequences each of two workers has 16, if they are divided."""
    results: Result = {}
    for batch_size, is_divided in ((16, True), (17, True), (32, False)):
        data = MegatronDataModule(prefix, CONTEXT, batch_size, val_sequences=SEQUENCES - 32, num_workers=0)
        trainer = make_trainer(devices=2, max_steps=2, use_distributed_sampler=is_divided)
        try:
            trainer.fit(Reading(), datamodule=data)
            results[f"{batch_size}"] = trainer.global_step
        except ValueError as error:
            results[f"{batch_size}"] = str(error)
    return results


def test_workers_of_halos_need_a_batch_each(run: Run, numbered: str) -> None:
    for result in run(short_of_sequences, numbered, workers=2):
        assert result["16"] == result["32"] == 2
        assert "batch_size=17 is more than the 16 training sequences of each process, of 32 in all" in result["17"]


class TestText:
    def test_the_second_run_does_not_tokenize_again(
        self, corpus: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = Mock(wraps=modules.write_tokens)
        monkeypatch.setattr(modules, "write_tokens", write)

        def batches(context: int) -> list[list[int]]:
            data = TextDataModule(tokenizer, str(corpus), context=context, batch_size=1, val_sequences=2, num_workers=0)
            set_up(data)
            return [batch[0].tolist() for batch in [*data.train_dataloader(), *data.val_dataloader()]]

        first = batches(32)
        assert sorted(batches(32)) == sorted(first)
        batches(64)
        assert write.call_count == 1
        (corpus / "12.txt").write_text(text(12))
        try:
            assert len(batches(32)) > len(first)
        finally:
            (corpus / "12.txt").unlink()
        assert write.call_count == 2

    def test_a_setting_in_a_tokenizers_python_code_makes_other_tokens(self, corpus: Path) -> None:
        class Folding(ByT5Tokenizer):
            def __init__(self, lower: bool, **options: Any) -> None:
                super().__init__(lower=lower, **options)

        def cache(lower: bool) -> Path:
            data = TextDataModule("given below", corpus)
            data.tokenizer = Folding(lower)
            return data._cache()

        assert cache(True) == cache(True) != cache(False)

    def test_documents_of_one_length_are_concatenated_as_others_are(self, tokenizer: str, tmp_path: Path) -> None:
        (tmp_path / "dna.txt").write_text("ACGTTGCAACGTTGCAACGT\n" * 50)
        options: dict[str, Any] = {"files": str(tmp_path / "dna.txt"), "sample_by": "line", "num_workers": 0}
        tokens = 50 * 21  # with an end-of-text token each
        for context in (16, 64):
            data = set_up(TextDataModule(tokenizer, context=context, batch_size=1, val_sequences=4, **options))
            assert len(data.train_dataset) + len(data.val_dataset) == (tokens - 1) // context

    def test_bytes_per_token_of_the_validation_set(self, corpus: Path, tokenizer: str) -> None:
        data = set_up(TextDataModule(tokenizer, str(corpus), context=32, val_sequences=10, num_workers=0))
        targets = [data.val_dataset[index][1:].long() for index in range(10)]
        decode: Any = load_tokenizer(tokenizer).decode
        size = sum(len(decode(target, skip_special_tokens=True).encode()) for target in targets)
        assert data.bytes_per_token == size / (10 * 32)
        assert 1.5 < data.bytes_per_token < 5

    def test_stream_leaves_the_documents_of_the_validation_set_out(self, corpus: Path, tokenizer: str) -> None:
        data = set_up(
            TextDataModule(
                tokenizer, str(corpus), streaming=True, context=32, batch_size=1, val_sequences=3, num_workers=0
            )
        )
        validation = in_documents(tokenizer, data.val_dataloader())
        training = in_documents(tokenizer, data.train_dataloader())
        assert len(list(data.val_dataloader())) == 3
        assert validation
        # Of the last one, only the beginning is for validation.
        assert training == set(range(min(validation), 12)) - (validation - {max(validation)})

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"shuffle": "no"}, TypeError, "shuffle='no' must be True or False"),
            ({"streaming": "no"}, TypeError, "streaming='no' must be True or False"),
            ({"files": 5}, TypeError, "files=5 must be a path, a glob or a folder, or a list of these"),
            ({"files": [5]}, TypeError, r"files=\[5\] must be a path"),
            ({"files": None, "dataset": 5}, TypeError, "dataset=5 must be the name of a dataset"),
            ({"tokenizer": 5}, TypeError, "tokenizer=<int> must be a tokenizer's folder"),
            ({"shuffle_buffer": -1}, ValueError, "shuffle_buffer=-1 must be a whole number of at least 0"),
            ({"shuffle_buffer": "x"}, ValueError, "shuffle_buffer='x' must be"),
            ({"seed": "a"}, ValueError, "seed='a' must be a whole number"),
            ({"config": "x"}, ValueError, "config='x' is for a dataset, and files have none. Leave it out"),
            ({"split": "test"}, ValueError, "split='test' is for a dataset"),
        ],
        ids=str,
    )
    def test_wrong_arguments(
        self, corpus: Path, tokenizer: str, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            TextDataModule(**{"tokenizer": tokenizer, "files": str(corpus), **arguments})

    @pytest.mark.parametrize("copies", [1, 2])
    def test_stream_of_one_long_document_trains_on_its_rest(self, tokenizer: str, tmp_path: Path, copies: int) -> None:
        long = " ".join(text(number) for number in range(12))
        for copy in range(copies):
            (tmp_path / f"{copy}.txt").write_text(long)
        data = set_up(streaming(tokenizer, tmp_path, context=8, batch_size=1, val_sequences=100))
        tokens = [*load_tokenizer(tokenizer)(long)["input_ids"], 0]
        validation = [batch[0].tolist() for batch in data.val_dataloader()]
        assert validation[-1] == tokens[792:801]
        training = [token for batch in data.train_dataloader() for token in batch[0, 1:].tolist()]
        rest = tokens[801:] * copies
        assert training == rest[1 : len(training) + 1]
        assert len(rest) - len(training) <= 8

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stream_without_a_batch_is_an_error(self, tokenizer: str, tmp_path: Path, workers: int) -> None:
        (tmp_path / "one.txt").write_text(text(1))
        (tmp_path / "two.txt").write_text(text(2))
        first = len(load_tokenizer(tokenizer)(text(1))["input_ids"]) + 1
        # The complete first file, so that one of two DataLoader workers has nothing, which is no error.
        options: dict[str, Any] = {"context": 8, "val_sequences": first // 8 + 1, "num_workers": workers}
        trainer = make_trainer("auto", devices=1, max_steps=20)
        trainer.fit(Reading(), datamodule=streaming(tokenizer, tmp_path, batch_size=2, **options))
        assert trainer.global_step == 20
        data = streaming(tokenizer, tmp_path, batch_size=64, **options)
        with pytest.raises(ValueError, match=r"Rank 0 of 1 has no batch in .* batch_size=64 .* uses 2 document"):
            make_trainer("auto", devices=1, max_steps=20).fit(Reading(), datamodule=data)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_ranks_and_data_loader_workers_read_different_documents(
        self, corpus: Path, tokenizer: str, ranks: int
    ) -> None:
        found: list[set[int]] = []
        for rank in range(ranks):
            data = TextDataModule(
                tokenizer, str(corpus), streaming=True, context=8, batch_size=1, val_sequences=0, num_workers=2
            )
            data.trainer = Mock(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank})
            data.setup("fit")
            found.append(in_documents(tokenizer, data.train_dataloader()))
        assert sorted(document for documents in found for document in documents) == list(range(12))

    def test_regions_that_are_jobs_of_their_own_read_different_documents(self, corpus: Path, tokenizer: str) -> None:
        found: list[set[int]] = []
        for first in (0, 1):
            strategy = halos(regions=1)
            strategy._site = Mock(rank=0, lane=0, worker_processes=[0])
            data = streaming(tokenizer, corpus, context=8, batch_size=1, val_sequences=0)
            data.trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
            data.setup("validate")  # before the job has dialed the server
            strategy.membership = Mock(first=first, workers=2)
            found.append(in_documents(tokenizer, data.train_dataloader()))
        assert len(found[0]) == len(found[1]) == 6
        assert found[0] | found[1] == set(range(12))

    @pytest.mark.parametrize(
        ("workers", "stop", "limit"),
        [
            (0, 10, None),
            (2, 10, None),
            (0, PASS, None),
            (0, PASS + 5, None),
            (0, 10, 6),
            pytest.param(2, 10, 6, marks=pytest.mark.slow),
            (0, 12, 6),
        ],
        ids=str,
    )
    def test_stream_goes_on_where_it_was(
        self, corpus: Path, tokenizer: str, tmp_path: Path, workers: int, stop: int, limit: int | None
    ) -> None:
        """With and without a limit: only without it the Trainer reads a batch ahead."""

        def fit(steps: int, **options: Any) -> list[Tensor]:
            seen: list[Tensor] = []
            trainer = make_trainer("auto", devices=1, max_steps=steps, limit_train_batches=limit)
            stream = {"context": 64, "batch_size": 2, "val_sequences": 0, "num_workers": workers, "shuffle": True}
            trainer.fit(Reading(seen), datamodule=streaming(tokenizer, corpus, **stream), **options)
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")
            return seen

        whole, first, rest = fit(40), fit(stop), fit(40, ckpt_path=tmp_path / "stopped.ckpt")
        assert torch.equal(torch.stack(first + rest), torch.stack(whole))

    def test_stream_of_another_division_begins_again(self, corpus: Path, tokenizer: str) -> None:
        loader: Any = set_up(streaming(tokenizer, corpus, context=8, batch_size=2, val_sequences=0)).train_dataloader()
        batches = [batch.tolist() for batch in loader]
        reading = iter(loader)
        _ = next(reading), next(reading)
        state = loader.state_dict()
        list(reading)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert [batch.tolist() for batch in loader] == batches[1:]  # the second was not used up
        state["of"]["world_size"] = 2
        with pytest.warns(UserWarning, match="begins again.* world_size was 2 and is 1"):
            loader.load_state_dict(state)
        assert [batch.tolist() for batch in loader] == batches

    def test_stream_of_other_text_or_tokens_begins_again(self, tokenizer: str, tmp_path: Path) -> None:
        def loader() -> Any:
            return set_up(streaming(tokenizer, tmp_path, context=8, batch_size=2, val_sequences=0)).train_dataloader()

        (tmp_path / "a.txt").write_text(text(1))
        state = loader().state_dict()
        (tmp_path / "b.txt").write_text(text(2))
        with pytest.warns(UserWarning, match=r"begins again: text was 1 files, \d+ bytes and is 2 files"):
            loader().load_state_dict(state)
        other: Any = loader()
        state = other.state_dict()
        other.dataset.vocabulary += 1
        with pytest.warns(UserWarning, match="begins again: vocabulary was 300 and is 301"):
            other.load_state_dict(state)

    def test_stream_of_an_older_checkpoint_goes_on(
        self, corpus: Path, tokenizer: str, recwarn: pytest.WarningsRecorder
    ) -> None:
        loader: Any = set_up(streaming(tokenizer, corpus, context=8, batch_size=2, val_sequences=0)).train_dataloader()
        state = loader.state_dict() | {"used": 3}
        del state["of"]["text"], state["of"]["vocabulary"]
        loader.load_state_dict(state)
        assert loader.state_dict()["used"] == 3
        assert not recwarn

    def test_stream_is_shuffled_in_the_same_way_each_time(self, corpus: Path, tokenizer: str) -> None:
        def order(**options: Any) -> list[int]:
            data = TextDataModule(
                tokenizer,
                str(corpus),
                streaming=True,
                context=8,
                batch_size=1,
                val_sequences=0,
                num_workers=0,
                **options,
            )
            return [token for batch in set_up(data).train_dataloader() for token in batch[0, 1:].tolist()]

        assert order() == order() != order(seed=1) != order(shuffle=False)

    def test_too_many_sequences_for_validation(self, corpus: Path, tokenizer: str) -> None:
        with pytest.raises(ValueError, match="val_sequences=9999 is more than the"):
            TextDataModule(tokenizer, str(corpus), streaming=True, context=8, val_sequences=9999).setup("fit")


def streaming(tokenizer: str, folder: Path, **options: Any) -> TextDataModule:
    return TextDataModule(tokenizer, folder, streaming=True, **{"num_workers": 0, "shuffle": False, **options})


def stopped_and_resumed(tokenizer: str, corpus: Path, folder: Path) -> Result:
    first: list[Tensor] = []
    second: list[Tensor] = []
    options: dict[str, Any] = {"context": 8, "batch_size": 1, "val_sequences": 0}
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer = make_trainer(halos(regions=1), devices=2, max_steps=24, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(Reading(first), datamodule=streaming(tokenizer, corpus, **options))
    data, trainer = streaming(tokenizer, corpus, **options), make_trainer(halos(regions=1), devices=2, max_steps=48)
    saved = min(folder.glob(f"step=*/*/{NAME}")).parent.parent
    trainer.fit(Reading(second), datamodule=data, ckpt_path=saved.with_suffix(".ckpt"))
    in_order = torch.cat(list(data.train_dataloader())).tolist()
    trained = {"first": torch.cat(first).tolist(), "second": torch.cat(second).tolist(), "in_order": in_order}
    return trained | {"saved": saved.name}


def test_workers_of_halos_go_on_in_their_streams(run: Run, corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    results = run(stopped_and_resumed, tokenizer, corpus, tmp_path, workers=2)
    (path,) = tmp_path.glob(f"{results[0]['saved']}/*/{NAME}")
    pushed = 0
    for result in results:
        in_order, second = result["in_order"], result["second"]
        assert result["first"] == in_order[: len(result["first"])]
        (start,) = [start for start in range(len(in_order)) if in_order[start : start + len(second)] == second]
        pushed += start
    assert pushed == Manifest.read(path.read_text(), path).total


def out_of_text(tokenizer: str, folder: Path) -> Result:
    trainer = make_trainer(devices=2, max_steps=20)
    try:
        trainer.fit(Reading(), datamodule=streaming(tokenizer, folder, context=8, batch_size=4, val_sequences=30))
    except Exception as error:
        return {"error": str(error), "rank": trainer.global_rank}
    return {}


def test_a_worker_of_halos_without_text_ends_the_run(run: Run, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(" ".join(text(number) for number in range(12)))
    results = run(out_of_text, tokenizer, tmp_path / "text", workers=2)
    assert "Rank 1 of 2 has no batch" in results[1]["error"]
    assert results[0]["error"]


def in_documents(tokenizer: str, loader: Any) -> set[int]:
    """The numbers of the documents whose text is in the batches."""
    decoded: Any = load_tokenizer(tokenizer).batch_decode([batch[0].tolist() for batch in loader])
    return {int(number) for number in re.findall(r"<(\d\d)>", " ".join(decoded))}
