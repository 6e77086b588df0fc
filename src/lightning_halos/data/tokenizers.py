"""Loads tokenizers, and trains one where none can be downloaded.

All functions return tokenizers of the ``transformers`` package, which lm-eval and the export expect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_halos.extras import language_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, or by its name on the Hugging Face hub such as ``"EleutherAI/pythia-70m"``.

    Raises:
        ValueError: If it does not exist or cannot be reached, or if it has no end-of-text token, which separates
            documents.
        ModuleNotFoundError: Without the extra ``lm``.
    """
    tokenizer = fetch_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name} has no end-of-text token (eos_token), which separates documents. Set one."
        )
    return tokenizer


def fetch_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer as :func:`load_tokenizer`, but accepts one without an end-of-text token."""
    transformers = language_package("transformers")
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Cannot load the tokenizer {name}: {reason} A folder must hold a tokenizer; a name on the Hugging Face hub"
            " needs the network, or an earlier download. To train one instead: `lightning-halos prepare-data"
            " --train-tokenizer`."
        ) from error
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, which encodes any text and decodes it byte for byte.

    Save it with ``save_pretrained(folder)``; :func:`load_tokenizer` and ``transformers.AutoTokenizer`` load the folder.

    Args:
        documents: The text. It is read once; its word counts are held in memory.
        vocab_size: Maximum number of tokens: all 256 bytes, ``<|endoftext|>``, and the tokens that training adds.

    Raises:
        ValueError: If the vocabulary is too small for the bytes.
        ModuleNotFoundError: Without the extra ``lm``.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(f"vocab_size={vocab_size!r} must be at least {_BYTES + 1}: all bytes and {END_OF_TEXT}.")
    tokenizers, transformers = language_package("tokenizers"), language_package("transformers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size, min_frequency=0, show_progress=False, special_tokens=[END_OF_TEXT])
    tokenizer: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
