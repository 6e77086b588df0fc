"""Pre-trains a BERT on the source of Python's standard library by masked language modelling, and lets it fill gaps.

Nothing is downloaded: a byte-level BPE tokenizer is trained on the same source first, and kept for the next time. The
script needs ``pip install "lightning-halos[lm]"``::

    python examples/pretrain_masked_lm.py
    python examples/pretrain_masked_lm.py --strategy ddp --accelerator gpu --tokenizer path/to/a/tokenizer
"""

import argparse
import sysconfig
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import torch
from filelock import FileLock
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, pipeline

from lightning_halos import DelayedNesterov, HalosStrategy

MODULES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
GAPS = ("import {}\n", "    def __init__({}, name):\n", "for i in {}(10):\n", "if value is not {}:\n")

Batch = dict[str, Tensor]


def get_tokenizer(folder: Path, vocab_size: int = 2048) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder; trains it on the standard library first if there is none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # torchrun starts all workers at once
        if not folder.exists():
            bpe = ByteLevelBPETokenizer()
            bpe.train(list(map(str, MODULES)), vocab_size, special_tokens=["<pad>", "<mask>"], show_progress=False)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", mask_token="<mask>")
            tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class StandardLibrary(L.LightningDataModule):
    """The source of the standard library as windows of tokens, 15 % of them masked; in training anew each time.

    Args:
        tokenizer: The tokenizer.
        context: The number of tokens in a window.
        batch_size: The number of windows in a batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.context = context
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Reads the modules, holds every twentieth of them out, and masks those once and for all."""
        self.train = self._windows([path for index, path in enumerate(MODULES) if index % 20])
        self.mask = DataCollatorForLanguageModeling(self.tokenizer)
        held_out = self._windows(MODULES[::20])
        masked = DataCollatorForLanguageModeling(self.tokenizer, seed=0)(held_out[:: max(1, len(held_out) // 256)])
        self.val = [dict(zip(masked, window, strict=True)) for window in zip(*masked.values(), strict=True)]

    def _windows(self, paths: list[Path]) -> list[Batch]:
        texts = self.tokenizer([path.read_text("utf-8") for path in paths], add_special_tokens=False, verbose=False)
        tokens = torch.tensor([token for text in texts["input_ids"] for token in text])
        return [{"input_ids": window} for window in tokens.unfold(0, self.context, self.context)]

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=self.mask)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, self.batch_size)


class MaskedLM(L.LightningModule):
    """A small BERT that predicts masked tokens.

    Args:
        vocab_size: The number of tokens there are.
        context: The longest text that the model can attend to, in tokens.
        lr: The peak of the learning rate, which follows a one-cycle schedule.
    """

    def __init__(self, vocab_size: int, context: int = 64, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.lm = BertForMaskedLM(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=512,
                max_position_embeddings=context,
            )
        )
        self.perplexity = Perplexity(ignore_index=-100)
        self.accuracy = MulticlassAccuracy(vocab_size, average="micro", ignore_index=-100)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.lm(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = self.lm(**batch)
        self.perplexity(outputs.logits, batch["labels"])
        self.accuracy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
        self.log("val_loss", outputs.loss, prog_bar=True, sync_dist=True)
        self.log("val_perplexity", self.perplexity)
        self.log("val_masked_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Trains, validates, and shows what the model puts into gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("demo/tokenizer"), help="its folder; trained if missing")
    parser.add_argument("--strategy", default="halos", help="halos, ddp, auto or another of Lightning's")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4, help="the number of workers")
    parser.add_argument("--regions", type=int, default=2, help="the regions HALoS spreads the workers over")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--val-every", type=int, default=50, help="the steps between validations")
    parser.add_argument("--batch-size", type=int, default=16, help="the windows of text in the batch of a worker")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the whole text is in memory
    L.seed_everything(0)
    tokenizer = get_tokenizer(args.tokenizer)
    data, model = StandardLibrary(tokenizer, batch_size=args.batch_size), MaskedLM(len(tokenizer))
    # As in train_char_lm.py: a run of a few hundred steps wants frequent exchanges and little momentum.
    halos = HalosStrategy(
        regions=args.regions,
        local_steps=4,
        accumulate_updates=4,
        merge_weight=0.5,
        local_optimizer=partial(DelayedNesterov, lr=0.4, momentum=0.0, delay=1),
        global_optimizer=partial(DelayedNesterov, lr=0.4, momentum=0.2, delay=1),
    )
    trainer = L.Trainer(
        strategy=halos if args.strategy == "halos" else args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.max_steps,
        val_check_interval=args.val_every,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    (metrics,) = trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        print(f"Validation loss: {metrics['val_loss']:.3f} nats per masked token")
        print(f"Perplexity: {metrics['val_perplexity']:.1f}, masked tokens found: {metrics['val_masked_accuracy']:.1%}")
        fill = pipeline("fill-mask", model=model.lm, tokenizer=tokenizer)
        for gap in GAPS:
            guesses = [guess["token_str"] for guess in fill(gap.format(tokenizer.mask_token), top_k=4)]
            print(f"{gap.format('___').strip():30} {', '.join(map(repr, guesses))}")


if __name__ == "__main__":
    main()
