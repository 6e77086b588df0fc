"""Fine-tunes a causal language model with LoRA adapters on the source of Python's standard library.

The model's own weights are frozen. Only the adapters are trained and sent to the servers and between regions; at the
end, the script prints how many bytes were sent. It needs ``pip install "lightning-halos[lm]"``::

    python examples/finetune_lora.py --model EleutherAI/pythia-70m --lr 5e-4 --accelerator gpu

Without ``--model`` nothing is downloaded; the script uses a small GPT-NeoX with random weights and bytes as tokens::

    python examples/finetune_lora.py
"""

import argparse
import sysconfig
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedModel

from lightning_halos import DelayedNesterov, HalosMonitor, HalosStrategy


class LoraTuner(L.LightningModule):
    """A causal language model with frozen weights and trainable adapters (LoRA, arXiv 2106.09685) on its linear layers.

    Args:
        model: The language model.
        rank: The rank of the adapters.
        lr: The peak of the learning rate, which follows a one-cycle schedule.
    """

    def __init__(self, model: PreTrainedModel, rank: int = 8, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        adapters = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.lm = get_peft_model(model, adapters).train()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.lm(input_ids=batch[0], labels=batch[0]).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.lm(input_ids=batch[0], labels=batch[0]).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load_model(name: str | None) -> tuple[PreTrainedModel, Callable[[str], list[int]]]:
    """Returns the model of a folder or of the Hugging Face Hub, for ``None`` a small one, and how it encodes text."""
    if name is None:
        config = GPTNeoXConfig(
            vocab_size=256, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024
        )
        return AutoModelForCausalLM.from_config(config), lambda text: list(text.encode())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), partial(tokenizer.encode, verbose=False)
    except OSError as error:
        raise SystemExit(
            f"--model {name}: there is no folder with a model of this name, and to fetch it from the Hugging Face Hub"
            f" needs the network. Leave --model out for a small model that needs none.\n{error}"
        ) from None


def standard_library(encode: Callable[[str], list[int]], context: int) -> tuple[TensorDataset, TensorDataset]:
    """Returns the source of the standard library as windows of tokens, and held-out windows to validate on."""
    modules = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    held_out = "".join(modules[::20])
    del modules[::20]
    train, val = (torch.tensor(encode(text)) for text in ("".join(modules), held_out))
    stride = max(context, len(val) // 128)
    return TensorDataset(train.unfold(0, context, context)), TensorDataset(val.unfold(0, context, stride))


def report(trainer: L.Trainer, model: LoraTuner) -> None:
    """Prints the loss and, under HALoS, the bytes that were sent, compared with the size of the complete model."""
    trained, total = model.lm.get_nb_trainable_parameters()
    print(f"Validation loss: {trainer.callback_metrics['val_loss']:.3f} nats per token")
    print(f"Trained: {trained:,} of {total:,} parameters, {trained / total:.2%}")
    for name, where in (("within", "inside"), ("between", "between")):
        if (counter := trainer.callback_metrics.get(f"halos/bytes_{name}_regions")) is not None:
            megabytes = counter.item() / 1e6
            print(f"Traveled {where} regions: {megabytes:,.1f} MB, instead of {megabytes * total / trained:,.1f} MB")


def main() -> None:
    """Trains, validates, prints what traveled and saves the adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the Hugging Face Hub such as EleutherAI/pythia-70m")
    parser.add_argument("--rank", type=int, default=8, help="the rank of the adapters")
    parser.add_argument("--lr", type=float, default=5e-3, help="the peak learning rate")
    parser.add_argument("--strategy", default="halos", help="halos, ddp, auto or another of Lightning's")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4, help="the number of workers")
    parser.add_argument("--regions", type=int, default=2, help="the regions HALoS spreads the workers over")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--val-every", type=int, default=25, help="the steps between validations")
    parser.add_argument("--batch-size", type=int, default=8, help="the windows of text in the batch of a worker")
    parser.add_argument("--output", type=Path, default=Path("demo/lora"), help="the folder for the adapters")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the complete text is in memory
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # peft's use of transformers
    L.seed_everything(0)
    language_model, encode = load_model(args.model)
    train, val = standard_library(encode, context=64)
    model = LoraTuner(language_model, args.rank, args.lr)
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
        callbacks=[HalosMonitor()] if args.strategy == "halos" else [],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(train, args.batch_size, shuffle=True), DataLoader(val, args.batch_size))
    if trainer.is_global_zero:
        model.lm.save_pretrained(args.output)
        report(trainer, model)
        print(f"The adapters are in {args.output}, in peft's format.")


if __name__ == "__main__":
    main()
