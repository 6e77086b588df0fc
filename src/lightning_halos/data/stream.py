"""Text that is tokenized and packed while it is read, without a copy on disk.

Rules of this room: nobody reads what another one reads. Which rank it is comes from outside; which of a
``DataLoader``'s workers, ``datasets`` finds out by itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
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
    """Sequences of ``context + 1`` tokens from a corpus that is read as it goes: int64, of shape ``[context + 1]``.

    Every rank and every worker of its ``DataLoader`` gets other documents and packs them by itself. If the number of
    files is a multiple of that of ranks, each rank reads its own files; otherwise every rank reads all documents and
    drops those of others. The files that a rank reads are divided among the workers of its ``DataLoader``: with fewer
    files than workers, some of these have nothing to do.

    Args:
        corpus: The text.
        tokenizer: What makes tokens of it.
        context: Tokens that a model sees at once.
        rank: Number of this process.
        world_size: Number of processes.
        shuffle_buffer: Documents from which the next one is drawn at random; 0 reads in order. Every pass is the same.
        seed: Of the drawing.
        leave_out: Documents that are for validation: a digest of each, see :func:`digest`.
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
        leave_out: frozenset[bytes] = frozenset(),
    ) -> None:
        distributed = language_package("datasets.distributed")
        self._corpus, self._tokenizer, self._context, self._leave_out = corpus, tokenizer, context, leave_out
        documents = corpus.load()
        if shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self._documents: Any = distributed.split_dataset_by_node(documents, rank, world_size)

    def __iter__(self) -> Iterator[Tensor]:
        if get_worker_info() is not None:  # one of several processes already, and maybe forked from one with threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        texts = self._corpus.documents(self._documents)
        kept = (text for text in texts if not self._leave_out or digest(text) not in self._leave_out)
        for sequence in pack((tokens for _, tokens in tokenize(kept, self._tokenizer)), self._context):
            yield torch.from_numpy(sequence)


def hold_out(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, sequences: int
) -> tuple[list[Tensor], frozenset[bytes]]:
    """Takes the first sequences of a corpus for validation.

    Returns:
        The sequences, and the digests of the documents that they are made of: to be left out of the training.

    Raises:
        ValueError: If there are not as many sequences.
    """
    used: set[bytes] = set()

    def noted() -> Iterator[list[int]]:
        for text, tokens in tokenize(corpus.documents(), tokenizer):
            used.add(digest(text))
            yield tokens

    found: list[Tensor] = []
    for sequence in pack(noted(), context):
        found.append(torch.from_numpy(sequence.copy()))
        if len(found) == sequences:
            return found, frozenset(used)
    raise ValueError(f"val_sequences={sequences} is more than the {len(found)} sequences of {corpus}.")


def digest(text: str) -> bytes:
    """Returns 16 bytes by which a document is known."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
