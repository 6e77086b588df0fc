"""Turns documents into tokens, and tokens into sequences of a fixed length: on disk, or while they are read.

Everything here streams: a corpus may be larger than the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_halos.data.megatron import IndexedTokens, IndexedTokensWriter, smallest_dtype, without_suffix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_DOCUMENTS = 1000
_BATCH_CHARACTERS = 1 << 20  # bounds the memory of a batch of documents


@dataclass(frozen=True)
class Summary:
    """Counts of a corpus that was written."""

    documents: int  # without empty ones
    text_bytes: int  # in UTF-8
    tokens: int  # including an end-of-text token for each document
    sequences: int  # as written


def tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Yields each document and its tokens, ending with the end-of-text token.

    A fast tokenizer processes the documents of a batch in parallel on all cores.
    """
    documents = iter(documents)
    while texts := list(_batch(documents)):
        encoded: Any = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # a text about <|endoftext|> does not end there
            return_attention_mask=False,
            verbose=False,
        )
        for text, tokens in zip(texts, encoded["input_ids"], strict=True):
            yield text, [*tokens, tokenizer.eos_token_id]


def pack(documents: Iterable[list[int]], context: int) -> Iterator[NDArray[np.int64]]:
    """Concatenates the documents' tokens and yields them in sequences of ``context + 1``.

    Each sequence begins with the last token of the previous one, so that a model predicts every token once, except the
    very first. The tail that does not fill a context is left out.
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
        tokenizer: The tokenizer.
        prefix: Path of the files, without ``.idx`` and ``.bin``.
        context: Packs the documents into sequences of ``context + 1`` tokens. Default: one sequence per document.
        seed: Seed for shuffling the packed sequences; ``None`` leaves them in order.

    Raises:
        ValueError: If the corpus has no text, or too little to fill a context.
    """
    prefix = without_suffix(Path(prefix))
    read = text_bytes = made = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read, text_bytes, made
        for text, tokens in tokenize(documents, tokenizer):
            read, text_bytes, made = read + 1, text_bytes + len(text.encode(errors="replace")), made + len(tokens)
            yield tokens
        if not read:
            raise ValueError("The corpus contains no text.")

    dtype = smallest_dtype(len(tokenizer))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".lightning-halos-", dir=prefix.parent) as folder:
        ordered = prefix if context is None or seed is None else Path(folder) / "ordered"
        with IndexedTokensWriter(ordered, dtype) as writer:
            for tokens in counted() if context is None else pack(counted(), context):
                writer.add(tokens)
            if not writer.num_sequences:
                raise ValueError(f"The corpus has {made} tokens, too few for context={context}. Use a smaller context.")
        if context is not None and seed is not None:
            sequences = IndexedTokens(ordered, context, as_stored=True, concatenate=False)
            with IndexedTokensWriter(prefix, dtype) as shuffled:
                for index in torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)):
                    shuffled.add(sequences[int(index)].numpy())
    return Summary(read, text_bytes, made, writer.num_sequences)


def _batch(documents: Iterator[str]) -> Iterator[str]:
    characters = 0
    for text in islice(documents, _BATCH_DOCUMENTS):
        yield text
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            return
