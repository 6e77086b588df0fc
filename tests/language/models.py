"""A language model small enough to train in seconds, its tokenizer, and a module around it. Few lines, real parts."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
VOCABULARY, CONTEXT = 1024, 128


def source() -> list[str]:
    """Files of the standard library that the tasks' questions are not from."""
    return [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


def train_tokenizer(files: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train(files, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def config(tied: bool = False, width: int = 16) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        hidden_dropout=0.1,
    )


class LanguageModule(pl.LightningModule):
    """Wraps the model as users do, under a name of their own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.lm = GPTNeoXForCausalLM(config(tied))

    def training_step(self, tokens: Tensor, batch_idx: int) -> Any:
        return self.lm(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(sequences: int = 256, length: int = 16) -> DataLoader[Any]:
    tokens = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(3))
    return DataLoader(tokens, batch_size=4)  # type: ignore[arg-type]
