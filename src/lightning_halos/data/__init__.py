"""Training data: the sharing of a data set among workers, and corpora for pre-training language models.

Importing this package must not import ``transformers`` or ``datasets``, which only language models need.
"""

from lightning_halos.data.corpora import Corpus
from lightning_halos.data.megatron import IndexedTokens, IndexedTokensWriter
from lightning_halos.data.modules import MegatronDataModule, TextDataModule, TokenDataModule
from lightning_halos.data.streaming import PackedStream
from lightning_halos.data.tokenization import write_tokens
from lightning_halos.data.tokenizers import load_tokenizer, train_tokenizer

__all__ = [
    "Corpus",
    "IndexedTokens",
    "IndexedTokensWriter",
    "MegatronDataModule",
    "PackedStream",
    "TextDataModule",
    "TokenDataModule",
    "load_tokenizer",
    "train_tokenizer",
    "write_tokens",
]
