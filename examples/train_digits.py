"""Trains an image classifier with batch normalization on scikit-learn's handwritten digits, and tests the best model.

Run it with HALoS, or with any other strategy of Lightning's::

    python examples/train_digits.py
    python examples/train_digits.py --strategy ddp
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import lightning_halos  # noqa: F401 - registers strategy="halos" with Lightning


class ConvNet(L.LightningModule):
    """Two convolutions with batch normalization and a linear classifier, trained by SGD on a one-cycle schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_acc(self.net(images), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self.net(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Trains, tests and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="halos", help="halos, ddp, auto or another of Lightning's")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4, help="the number of workers")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32, help="the images in the batch of a worker")
    args = parser.parse_args()

    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train, val, test = random_split(digits, [0.6, 0.2, 0.2])
    trainer = L.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.max_steps,
        val_check_interval=min(20, args.max_steps),
        check_val_every_n_epoch=None,
        callbacks=ModelCheckpoint(monitor="val_acc", mode="max"),
        default_root_dir="demo",
        logger=False,
    )
    train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True)
    trainer.fit(ConvNet(), train_loader, DataLoader(val, args.batch_size))
    (metrics,) = trainer.test(ckpt_path="best", dataloaders=DataLoader(test, args.batch_size))
    if trainer.is_global_zero:
        print(f"Test accuracy: {metrics['test_acc']:.1%}")


if __name__ == "__main__":
    main()
