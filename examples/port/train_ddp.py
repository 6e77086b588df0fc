"""Trains a classifier of breast tumors on scikit-learn's Wisconsin data: a typical Lightning script.

``train_ddp.py`` and ``train_halos.py`` are the same script under DDP and under HALoS. ``diff`` shows the two changes::

    python examples/port/train_ddp.py
    python examples/port/train_halos.py
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import BinaryAccuracy


class TumorClassifier(L.LightningModule):
    """A small network with batch normalization; its learning rate is lowered when the validation loss stalls."""

    def __init__(self, features: int, width: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 1)
        )
        self.accuracy = BinaryAccuracy()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(self.net(batch[0]).squeeze(1), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0]).squeeze(1)
        self.accuracy(logits, batch[1])
        self.log("val_loss", F.binary_cross_entropy_with_logits(logits, batch[1]), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self.net(batch[0]).squeeze(1), batch[1])
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def main() -> None:
    """Trains with early stopping and tests the best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--max-epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    L.seed_everything(0)
    features, labels = load_breast_cancer(return_X_y=True)
    features = torch.tensor(StandardScaler().fit_transform(features)).float()
    train, val, test = random_split(TensorDataset(features, torch.tensor(labels).float()), [0.6, 0.2, 0.2])

    trainer = L.Trainer(
        strategy="ddp",
        accelerator=args.accelerator,
        devices=args.devices,
        max_epochs=args.max_epochs,
        callbacks=[ModelCheckpoint(monitor="val_loss"), EarlyStopping("val_loss", patience=10)],
        default_root_dir="demo",
        logger=False,
    )
    model = TumorClassifier(features.shape[1])
    trainer.fit(model, DataLoader(train, args.batch_size, shuffle=True), DataLoader(val, args.batch_size))
    trainer.test(ckpt_path="best", dataloaders=DataLoader(test, args.batch_size))


if __name__ == "__main__":
    main()
