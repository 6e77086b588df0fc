"""From documents to tokens, and from tokens to sequences of a fixed length.

Rules of this room: one document after the other, and never all of them in memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_halos.data.megatron import IndexedTokens, IndexedTokensWriter, smallest_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1 << 20  # of text in a batch of documents: bounds the memory


@dataclass(frozen=True)
class Summary:
    """What was written.

    Attributes:
        documents: Documents that were read, without empty ones.
        text_bytes: Their bytes in UTF-8.
        tokens: Their tokens, with an end-of-text token for each document.
        sequences: Sequences that were written.
    """

    documents: int
    text_bytes: int
    tokens: int
    sequences: int


def tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Yields each document and its tokens, the last of which is the end-of-text token.

    A fast tokenizer works on the documents of a batch in parallel, with all cores.
    """
    for texts in _batches(documents):
        encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for text, tokens in zip(texts, encoded["input_ids"], strict=True):
            yield text, [*tokens, tokenizer.eos_token_id]


def pack(documents: Iterable[list[int]], context: int) -> Iterator[NDArray[np.int64]]:
    """Yields the documents' tokens, one after the other, in sequences of ``context + 1``.

    Each begins with the last token of the one before, so that a model predicts every token once, except the very first.
    The tail that does not fill a context is left out.
    """
    rest: list[int] = []
    for tokens in documents:
        rest += tokens
        stop = (len(rest) - 1) // context * context
        if stop > 0:
            numbers = np.asarray(rest[: stop + 1], np.int64)
            rest = rest[stop:]
            for first in range(0, stop, context):
                yield numbers[first : first + context + 1]


def write_tokens(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    prefix: str | Path,
    context: int | None = None,
    seed: int | None = 0,
) -> Summary:
    """Writes a corpus in Megatron's format.

    Args:
        documents: The text.
        tokenizer: What makes tokens of it.
        prefix: Path of the files, without ``.idx`` and ``.bin``.
        context: To pack the documents into sequences of ``context + 1`` tokens. Default: a sequence for each document.
        seed: Of the shuffling of the packed sequences, ``None`` to leave them in order.

    Raises:
        ValueError: If there is no text, or too little to fill a context.
    """
    prefix = Path(prefix)
    read = text_bytes = made = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read, text_bytes, made
        for text, tokens in tokenize(documents, tokenizer):
            read, text_bytes, made = read + 1, text_bytes + len(text.encode(errors="replace")), made + len(tokens)
            yield tokens
        if not read:
            raise ValueError("There is no text in the corpus.")

    dtype = smallest_dtype(len(tokenizer))
    shuffle = context is not None and seed is not None
    prefix.parent.mkdir(parents=True, exist_ok=True)
    ordered = Path(tempfile.mkdtemp(prefix=".lightning-halos-", dir=prefix.parent)) / "ordered" if shuffle else prefix
    try:
        with IndexedTokensWriter(ordered, dtype) as writer:
            for tokens in counted() if context is None else pack(counted(), context):
                writer.add(tokens)
            if not writer.num_sequences:
                raise ValueError(f"The corpus has {made} tokens, too few for context={context}. Use a smaller one.")
        if context is not None and seed is not None:
            sequences = IndexedTokens(ordered, context, as_stored=True)
            order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
            with IndexedTokensWriter(prefix, dtype) as writer:
                for index in order:
                    writer.add(sequences[int(index)].numpy())
    finally:
        if shuffle:
            shutil.rmtree(ordered.parent)
    return Summary(read, text_bytes, made, writer.num_sequences)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for text in documents:
        texts.append(text)
        characters += len(text)
        if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts
