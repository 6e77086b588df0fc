"""Training sequences from a corpus that is read on the fly, and their loader."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_halos.data.corpora import Corpus
from lightning_halos.data.tokenization import pack, tokenize
from lightning_halos.extras import language_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedStream(IterableDataset[Tensor]):
    """Sequences of ``context + 1`` tokens from a corpus that is read on the fly: int64, of shape ``[context + 1]``.

    It can be divided among ranks; see :meth:`part`. A rank's files are divided among the workers of its ``DataLoader``,
    which ``datasets`` itself detects, and each packs its documents on its own; with fewer files than workers, some
    workers have nothing to do.

    Args:
        corpus: The text.
        tokenizer: The tokenizer.
        context: Tokens that a model sees at once.
        shuffle_buffer: Size of the buffer from which the next document is drawn at random; 0 reads in order. Every
            pass has the same order.
        seed: Seed of the shuffling.
        leave_out: Documents that the validation uses, with the number of tokens at their beginning that are left out.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
        leave_out: Mapping[str, int] | None = None,
    ) -> None:
        self.corpus, self.context = corpus, context
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.rank, self.world_size = 0, 1
        self.leave_out = dict(leave_out or {})
        self._tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        self._documents: Any = corpus.load()
        if shuffle_buffer:
            self._documents = self._documents.shuffle(seed=seed, buffer_size=shuffle_buffer)

    def part(self, rank: int, world_size: int) -> PackedStream:
        """Returns a rank's part of the stream: different documents for each.

        If the number of files is a multiple of the number of ranks, each rank reads its own files; otherwise every rank
        reads all documents and drops those of other ranks.
        """
        part = copy.copy(self)
        part.rank, part.world_size = rank, world_size
        part._documents = language_package("datasets.distributed").split_dataset_by_node(
            self._documents, rank, world_size
        )
        return part

    def __iter__(self) -> Iterator[Tensor]:
        if get_worker_info() is not None:  # DataLoader workers are parallel already, and may be forked with threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        documents = tokenize(self.corpus.documents(self._documents), self._tokenizer)
        kept = (tokens[self.leave_out.get(text, 0) :] for text, tokens in documents)
        for sequence in pack(kept, self.context):
            yield torch.from_numpy(sequence)


class StreamLoader(DataLoader[Tensor]):
    """Loads a rank's part of a stream. A pass without a batch is an error, because training would never end.

    Its state is the number of batches that were used in the present pass. All passes are alike, so a resumed one reads
    these batches again and leaves them out.

    Attributes:
        progress: The ``batch_progress`` of the Trainer that uses it, which may have read a batch ahead. Without it, a
            batch counts as used when the next one is asked for.
    """

    dataset: PackedStream
    progress: Any = None
    _first = _used = 0  # batches that were used when the present pass began, in this process, and now
    _begin = 0  # those that the Trainer had processed when it began
    _resumed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"used": self._used if self.progress is None else self._processed, "of": self._division}

    @property
    def _processed(self) -> int:
        current = self.progress.current
        if self.progress.is_last_batch and current.processed == current.ready:
            return 0
        return int(self._first + self.progress.total.processed - self._begin)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        changes = [
            f"{name} was {was} and is {is_now}"
            for name, is_now in self._division.items()
            if (was := state["of"].get(name, is_now)) != is_now  # older checkpoints have fewer of them
        ]
        if changes:
            rank_zero_warn(f"The stream of {self.dataset.corpus} begins again: {', '.join(changes)}.")
        self._first = self._used = self._resumed = 0 if changes else state["used"]

    @property
    def _division(self) -> dict[str, Any]:
        """What the batches of a pass depend on."""
        stream = self.dataset
        return {
            "text": stream.corpus.extent,
            "vocabulary": stream.vocabulary,
            "world_size": stream.world_size,
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "context": stream.context,
            "shuffle_buffer": stream.shuffle_buffer,
            "seed": stream.seed,
            "tokens for validation": sum(stream.leave_out.values()),
        }

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        first, self._resumed, self._used = self._resumed, 0, 0
        self._first, self._begin = first, 0 if self.progress is None else self.progress.total.processed
        for batch in super().__iter__():
            if self._used >= first:
                yield batch
            self._used += 1
        is_empty, self._used = not self._used, 0
        if is_empty:
            stream = self.dataset
            raise ValueError(
                f"Rank {stream.rank} of {stream.world_size} has no batch in a complete pass over {stream.corpus}:"
                f" it gets less than batch_size={self.batch_size} sequences of context={stream.context}. The validation"
                f" uses {len(stream.leave_out)} document(s), the last one in part. Use more or smaller documents"
                " (sample_by='paragraph' or 'line' divides text files), a smaller batch_size, context or val_sequences,"
                " or fewer workers; or streaming=False, with which the workers share all sequences."
            )


def hold_out(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, sequences: int
) -> tuple[list[Tensor], dict[str, int]]:
    """Returns the first sequences of a corpus for validation, and what training has to leave out.

    That is the number of tokens, by document, at the beginning of the documents that the sequences come from. It counts
    for a copy of the document, too.

    Raises:
        ValueError: If the corpus has fewer sequences.
    """
    used: dict[str, int] = {}
    missing = sequences * context + 1  # each sequence begins with the last token of the previous one

    def noted() -> Iterator[list[int]]:
        nonlocal missing
        for text, tokens in tokenize(corpus.documents(), tokenizer):
            used[text] = max(used.get(text, 0), min(len(tokens), missing))
            missing -= len(tokens)
            yield tokens

    found = [torch.from_numpy(sequence.copy()) for sequence in islice(pack(noted(), context), sequences)]
    if len(found) < sequences:
        raise ValueError(f"val_sequences={sequences} is more than the {len(found)} sequences of {corpus}.")
    return found, used
