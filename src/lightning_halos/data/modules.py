"""Lightning data modules for pre-training language models.

Each provides a training and a validation set of token sequences. Their loaders have no sampler of their own, so that
Lightning adds its samplers and the strategy its shared cursor.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_halos.core.checks import check_count, check_switch
from lightning_halos.data.corpora import Corpus, SampleBy
from lightning_halos.data.megatron import IndexedTokens, without_suffix
from lightning_halos.data.streaming import PackedStream, StreamLoader, hold_out
from lightning_halos.data.tokenization import write_tokens
from lightning_halos.data.tokenizers import load_tokenizer
from lightning_halos.extras import language_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Loader = TypeVar("_Loader", bound=DataLoader[Any])

_CACHE_VERSION = 3  # increase it when the same text and tokenizer would give different files


class TokenDataModule(pl.LightningDataModule, ABC):
    """Batches of token sequences: ``int64`` tensors of shape ``[batch, context + 1]``.

    A model predicts ``batch[:, 1:]`` from ``batch[:, :-1]``. Tokens that come from files become ``int64`` on the device
    (``on_after_batch_transfer``). If you iterate over a loader without a Trainer, call ``.long()`` on each batch.

    Args:
        tokenizer: A tokenizer's folder, or its name on the Hugging Face hub; ``None`` if it is unknown.
        context: Tokens that a model sees at once.
        batch_size: Sequences per batch and device.
        val_sequences: Number of sequences that are kept for validation, and not trained on; 0 for none.
        num_workers: Worker processes per ``DataLoader``.
        shuffle: Whether to shuffle the training sequences, differently in each epoch.

    Attributes:
        train_dataset: The training sequences of all workers, after ``setup``.
        val_dataset: The validation sequences, after ``setup``.
    """

    train_dataset: Dataset[Tensor]
    val_dataset: Dataset[Tensor]

    def __init__(
        self,
        tokenizer: str | Path | None,
        context: int,
        batch_size: int,
        val_sequences: int,
        num_workers: int,
        shuffle: bool,
    ) -> None:
        super().__init__()
        if not isinstance(tokenizer, (str, Path, NoneType)):
            raise TypeError(
                f"tokenizer=<{type(tokenizer).__name__}> must be a tokenizer's folder, or its name on the Hugging Face"
                " hub."
            )
        check_switch("shuffle", shuffle)
        check_count("context", context)
        check_count("batch_size", batch_size)
        check_count("val_sequences", val_sequences, least=0)
        check_count("num_workers", num_workers, least=0)
        self._tokenizer_name = tokenizer
        self._context = context
        self._batch_size = batch_size
        self._val_sequences = val_sequences
        self._num_workers = num_workers
        self._shuffle = shuffle

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, ``None`` if it is unknown. It is loaded on first access."""
        return None if self._tokenizer_name is None else load_tokenizer(self._tokenizer_name)

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens in the tokenizer's vocabulary, ``None`` without a tokenizer."""
        return None if self.tokenizer is None else len(self.tokenizer)

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text (UTF-8) per token of the validation set; ``None`` without a tokenizer or validation set.

        A loss in nats per token is ``loss / (bytes_per_token * ln 2)`` bits per byte. Special tokens count as no text.
        A character that is split between two sequences counts as 3 bytes in each. Available after ``setup``.
        """
        sequences: Any = self.val_dataset
        if self.tokenizer is None or not len(sequences):
            return None
        targets = [sequences[index][1:].tolist() for index in range(len(sequences))]
        texts = self.tokenizer.batch_decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode(errors="replace")) for text in texts) / (len(targets) * self._context)

    @abstractmethod
    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Returns the training set and the validation set."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "train_dataset"):
            self.train_dataset, self.val_dataset = self.load()

    def train_dataloader(self) -> DataLoader[Tensor]:
        if isinstance(self.train_dataset, PackedStream):
            # Here, because a region's job knows its place among all workers only when it has dialed the server.
            place = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
            part = self.train_dataset.part(place["rank"], place["num_replicas"])
            loader = self._loader(StreamLoader, part, drop_last=True)
            if self.trainer is not None:
                loader.progress = self.trainer.fit_loop.epoch_loop.batch_progress
            return loader
        return self._loader(FilledLoader, self.train_dataset, shuffle=self._shuffle, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        return self._loader(DataLoader, self.val_dataset) if self._val_sequences else []

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch.long()

    def _loader(self, kind: type[_Loader], dataset: Dataset[Tensor], **options: Any) -> _Loader:
        pin_memory = torch.cuda.is_available()
        return kind(dataset, self._batch_size, num_workers=self._num_workers, pin_memory=pin_memory, **options)

    def _load_files(self, prefix: str | Path, concatenate: bool | None) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Maps tokens in Megatron's format; the last sequences are for validation."""
        # Apple's devices do not support uint16.
        as_stored = not torch.backends.mps.is_available()
        sequences = IndexedTokens(prefix, self._context, as_stored, concatenate)
        first = len(sequences) - self._val_sequences
        if first < 1:
            raise ValueError(
                f"val_sequences={self._val_sequences} leaves nothing to train on: there are {len(sequences)} sequences"
                " in all."
            )
        return Subset(sequences, range(first)), Subset(sequences, range(first, len(sequences)))


class MegatronDataModule(TokenDataModule):
    """Tokens in Megatron's memory-mapped format, such as the pre-shuffled Pile of the Pythia suite.

    By default the training sequences are read in order, because such corpora are usually shuffled already. The last
    sequences are for validation. Arguments that are not described here are those of :class:`TokenDataModule`.

    Args:
        prefix: The files' path without ``.idx`` and ``.bin``; the ``.bin`` may be sharded. See :class:`IndexedTokens`.
        context: Tokens that a model sees at once. To use sequences as they are stored, give their length minus one.
        tokenizer: The tokenizer's folder, or its name on the Hugging Face hub. Default: the folder
            ``PREFIX-tokenizer``, which ``lightning-halos prepare-data`` writes, if it exists.
        concatenate: Whether the stored sequences are documents. Default: if they are not all of the same length.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid; in ``setup``, as :class:`IndexedTokens`, or if nothing is left to train
            on.
        FileNotFoundError: In ``setup``, as :class:`IndexedTokens`.
    """

    def __init__(
        self,
        prefix: str | Path,
        context: int = 2048,
        batch_size: int = 8,
        val_sequences: int = 256,
        num_workers: int = 2,
        shuffle: bool = False,
        tokenizer: str | Path | None = None,
        concatenate: bool | None = None,
    ) -> None:
        beside = Path(f"{without_suffix(Path(prefix))}-tokenizer")
        if tokenizer is None and beside.is_dir():
            tokenizer = beside
        super().__init__(tokenizer, context, batch_size, val_sequences, num_workers, shuffle)
        if concatenate is not None:
            check_switch("concatenate", concatenate)
        self._prefix = prefix
        self._concatenate = concatenate

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        return self._load_files(self._prefix, self._concatenate)


class TextDataModule(TokenDataModule):
    """Text from local files or from a dataset on the Hugging Face hub, with an end-of-text token after each document.

    The tokens are cached in Megatron's format; see :class:`IndexedTokens`. The last sequences are for validation. With
    ``streaming=True`` nothing is cached; see :class:`PackedStream`. The first sequences are then for validation; what
    they have of a document is left out of the training, and of copies of the document, too. The strategy's shared
    cursor is not used.

    ``files``, ``dataset``, ``config``, ``split``, ``field`` and ``sample_by`` are the arguments of :class:`Corpus`; the
    others that are not described here are those of :class:`TokenDataModule`.

    Args:
        streaming: Whether to tokenize while reading.
        shuffle: Whether to shuffle: the training sequences, differently in each epoch; when streaming, the documents,
            within a buffer, in the same order in every epoch.
        shuffle_buffer: Number of documents in this buffer.
        seed: Seed of the shuffling when streaming. Otherwise Lightning's seed counts (``seed_everything``).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is invalid, or the dataset or tokenizer cannot be reached.
        FileNotFoundError: If a file does not exist.
        ModuleNotFoundError: When data is loaded, if the extra ``lm`` is not installed.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        files: str | Path | list[str | Path] | None = None,
        dataset: str | Path | None = None,
        config: str | None = None,
        split: str = "train",
        field: str = "text",
        sample_by: SampleBy = "document",
        streaming: bool = False,
        context: int = 2048,
        batch_size: int = 8,
        val_sequences: int = 256,
        num_workers: int = 2,
        shuffle: bool = True,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, context, batch_size, val_sequences, num_workers, shuffle)
        self._corpus = Corpus(files, dataset, config, split, field, sample_by, streaming)
        check_count("shuffle_buffer", shuffle_buffer, least=0)
        check_count("seed", seed, least=0)
        self._streaming = streaming
        self._shuffle_buffer = shuffle_buffer if shuffle else 0
        self._seed = seed

    def prepare_data(self) -> None:
        tokenizer: Any = self.tokenizer
        if not self._streaming and not (prefix := self._cache()).with_suffix(".idx").exists():
            write_tokens(self._corpus.documents(), tokenizer, prefix)

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        if not self._streaming:
            return self._load_files(self._cache(), concatenate=True)
        tokenizer: Any = self.tokenizer
        held_out, documents = hold_out(self._corpus, tokenizer, self._context, self._val_sequences)
        train = PackedStream(self._corpus, tokenizer, self._context, self._shuffle_buffer, self._seed, documents)
        return train, Subset(cast("Dataset[Tensor]", held_out), range(len(held_out)))

    def _cache(self) -> Path:
        """The prefix of the cached tokens: the same for the same text and tokenizer."""
        datasets = language_package("datasets")
        tokenizer: Any = self.tokenizer
        with TemporaryDirectory() as folder:  # what is saved has all settings, those of its Python code, too
            tokenizer.save_pretrained(folder)
            saved = [(file.name, file.read_bytes()) for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        key = [_CACHE_VERSION, self._corpus.key(), type(tokenizer).__name__, saved]
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return Path(datasets.config.HF_DATASETS_CACHE) / "lightning-halos" / name


class FilledLoader(DataLoader[Tensor]):
    """A loader that is an error if it has no batch, because Lightning would end the fit without a step.

    The number of batches is known when Lightning has put in its sampler, and is asked for before the first one is read.
    """

    def __len__(self) -> int:
        batches = super().__len__()
        if not batches:
            sampler: Any = self.sampler
            dataset: Any = self.dataset
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} training sequences of each process, of"
                f" {len(dataset)} in all. Use a smaller batch_size or context, fewer val_sequences or processes, or"
                " more text."
            )
        return batches
