"""A data set that tokenizes and packs text while reading it, without a copy on disk.

No two ranks, and no two ``DataLoader`` workers, yield the same document. The caller passes the rank; ``datasets``
itself detects the ``DataLoader`` worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_halos.data.corpora import Corpus
from lightning_halos.data.tokenization import pack, tokenize
from lightning_halos.extras import language_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedStream(IterableDataset[Tensor]):
    """Sequences of ``context + 1`` tokens from a corpus that is read on the fly: int64, of shape ``[context + 1]``.

    Every rank and every worker of its ``DataLoader`` gets different documents and packs them on its own. If the number
    of files is a multiple of the number of ranks, each rank reads its own files; otherwise every rank reads all
    documents and drops those of other ranks. A rank's files are divided among the workers of its ``DataLoader``; with
    fewer files than workers, some workers have nothing to do.

    Args:
        corpus: The text.
        tokenizer: The tokenizer.
        context: Tokens that a model sees at once.
        rank: Rank of this process.
        world_size: Number of processes.
        shuffle_buffer: Size of the buffer from which the next document is drawn at random; 0 reads in order. Every
            pass has the same order.
        seed: Seed of the shuffling.
        leave_out: Documents that are skipped, because the validation uses them.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 0,
        seed: int = 0,
        leave_out: frozenset[str] = frozenset(),
    ) -> None:
        distributed = language_package("datasets.distributed")
        self._corpus, self._tokenizer, self._context, self._leave_out = corpus, tokenizer, context, leave_out
        documents = corpus.load()
        if shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self._documents: Any = distributed.split_dataset_by_node(documents, rank, world_size)

    def __iter__(self) -> Iterator[Tensor]:
        if get_worker_info() is not None:  # DataLoader workers are parallel already, and may be forked with threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        kept = (text for text in self._corpus.documents(self._documents) if text not in self._leave_out)
        for sequence in pack((tokens for _, tokens in tokenize(kept, self._tokenizer)), self._context):
            yield torch.from_numpy(sequence)


def hold_out(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, sequences: int
) -> tuple[list[Tensor], frozenset[str]]:
    """Returns the first sequences of a corpus for validation, and their documents, which training has to leave out.

    Raises:
        ValueError: If the corpus has fewer sequences.
    """
    used: set[str] = set()

    def noted() -> Iterator[list[int]]:
        for text, tokens in tokenize(corpus.documents(), tokenizer):
            used.add(text)
            yield tokens

    found = [torch.from_numpy(sequence.copy()) for sequence in islice(pack(noted(), context), sequences)]
    if len(found) < sequences:
        raise ValueError(f"val_sequences={sequences} is more than the {len(found)} sequences of {corpus}.")
    return found, frozenset(used)
