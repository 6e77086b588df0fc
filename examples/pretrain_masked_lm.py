"""Pre-trains a small ModernBERT on the source of Python's standard library by filling gaps, and prints an example.

Nothing is downloaded: the script first trains a byte-level BPE tokenizer on the same source, and keeps it for the next
run. It needs ``pip install "lightning-halos[lm]"``::

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
import transformers
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_halos import DelayedNesterov, HalosStrategy

CONTEXT = 64  # tokens in a window of text
MASKED = 0.3  # of the tokens, as for ModernBERT (arXiv 2412.13663)
GAPS = ("import {}\n", "    def __init__(self{} name):\n", "for i in {}(10):\n", "if value is not {}:\n")
MODULES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def get_tokenizer(folder: Path, vocab_size: int = 512) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder. If the folder has none, trains one on the standard library first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # torchrun starts all workers at once
        if not folder.exists():
            bpe = ByteLevelBPETokenizer()
            bpe.train(list(map(str, MODULES)), vocab_size, special_tokens=["<pad>", "<mask>"], show_progress=False)
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>", mask_token="<mask>"
            )
            tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def windows(tokenizer: transformers.PreTrainedTokenizerBase, paths: list[Path]) -> list[dict[str, Tensor]]:
    """Cuts the tokens of files into windows."""
    texts = tokenizer([path.read_text("utf-8") for path in paths], add_special_tokens=False, verbose=False)
    tokens = torch.tensor([token for text in texts["input_ids"] for token in text])
    return [{"input_ids": window} for window in tokens.unfold(0, CONTEXT, CONTEXT)]


def loaders(tokenizer: transformers.PreTrainedTokenizerBase, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Returns training batches, with new masks in each epoch, and batches of held-out modules, with fixed masks."""
    mask = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    train = windows(tokenizer, [path for index, path in enumerate(MODULES) if index % 20])
    held_out = windows(tokenizer, MODULES[::20])
    masked = mask(held_out[:: max(1, len(held_out) // 256)])
    val = [dict(zip(masked, window, strict=True)) for window in zip(*masked.values(), strict=True)]
    return DataLoader(train, batch_size, shuffle=True, drop_last=True, collate_fn=mask), DataLoader(val, batch_size)


class MaskedLM(L.LightningModule):
    """Trains a model of transformers to predict masked tokens, with ``lr`` as the peak of the learning rate."""

    def __init__(self, model: transformers.PreTrainedModel, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.lm = model
        self.perplexity = Perplexity(ignore_index=-100)
        self.accuracy = MulticlassAccuracy(model.config.vocab_size, average="micro", ignore_index=-100)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.lm(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        outputs = self.lm(**batch)
        self.perplexity(outputs.logits, batch["labels"])
        self.accuracy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
        self.log("val_loss", outputs.loss, prog_bar=True, sync_dist=True)
        self.log("val_perplexity", self.perplexity)
        self.log("val_masked_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Trains, validates, and shows what the model puts into gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("demo/tokenizer"), help="its folder; trained if missing")
    parser.add_argument("--strategy", default="halos", help="halos, ddp, auto or another of Lightning's")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4, help="the number of workers")
    parser.add_argument("--regions", type=int, default=2, help="the regions HALoS spreads the workers over")
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--val-every", type=int, default=100, help="the steps between validations")
    parser.add_argument("--batch-size", type=int, default=16, help="the windows of text in the batch of a worker")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the complete text is in memory
    L.seed_everything(0)
    tokenizer = get_tokenizer(args.tokenizer)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        **dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"]),
    }
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **size, **special
    )
    model = MaskedLM(transformers.ModernBertForMaskedLM(config))
    # As in train_char_lm.py. The defaults, which go by max_steps, have frequent exchanges and no momentum here, too.
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
        val_check_interval=min(args.val_every, args.max_steps),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, *loaders(tokenizer, args.batch_size))
    if trainer.is_global_zero:
        metrics = trainer.callback_metrics
        print(*(f"{name}: {metrics[name]:.3f}" for name in metrics if name.startswith("val_")), sep="\n")
        fill = transformers.pipeline("fill-mask", model=model.lm, tokenizer=tokenizer)
        for gap in GAPS:
            guesses = [guess["token_str"] for guess in fill(gap.format(tokenizer.mask_token), top_k=4)]
            print(f"{gap.format('___').strip():32} {', '.join(map(repr, guesses))}")


if __name__ == "__main__":
    main()
