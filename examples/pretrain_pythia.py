r"""Pre-trains a language model of the Pythia suite (GPT-NeoX) under HALoS.

All settings are in the YAML files of ``examples/pythia``, and can be overridden on the command line::

    python examples/pretrain_pythia.py fit --config examples/pythia/tiny.yaml
    python examples/pretrain_pythia.py fit --config examples/pythia/paper.yaml --config examples/pythia/70m.yaml \
        --data.prefix /data/pile/document

Models that do not fit into a GPU, with every 4 GPUs a worker, which divide the model among them
(docs/large-models.md)::

    python examples/pretrain_pythia.py fit --config ... --trainer.strategy.worker 4 --trainer.strategy.inner fsdp2

``--help`` lists them all. docs/pretraining.md goes from a corpus to an evaluated model.
"""

import math
import time
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM


class Pythia(L.LightningModule):
    """A GPT-NeoX language model, trained to predict the next token.

    A batch holds tokens, of shape ``[batch, context + 1]``.

    Args:
        architecture: Arguments of ``transformers.GPTNeoXConfig``, for a model from scratch.
        pretrained: Name or folder of a model to continue from instead, as in ``AutoModelForCausalLM.from_pretrained``.
        revision: Revision of ``pretrained``, such as ``"step0"`` for Pythia's own initial weights.
        lr: Peak learning rate.
        betas: AdamW's betas.
        weight_decay: AdamW's weight decay, for matrices only: not for biases and LayerNorm.
        warmup_steps: Global steps in which the learning rate rises to its peak; 0 for none. Default: a hundredth of
            all.
        final_lr: The final learning rate, at the end of a cosine, as a share of ``lr``.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them in memory.
        compile: Compile the model with ``torch.compile``.
        attention: Transformers' implementation of attention.

    Raises:
        ValueError: Unless there is either an architecture or a pretrained model.
    """

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        pretrained: str | None = None,
        revision: str = "main",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int | None = None,
        final_lr: float = 0.1,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    ) -> None:
        super().__init__()
        if (architecture is None) == (pretrained is None):
            raise ValueError(
                f"architecture={architecture!r} and pretrained={pretrained!r}: give one of them, the architecture of a"
                " new model or the name of one to go on from."
            )
        self.save_hyperparameters()
        if pretrained is not None:
            self.model = AutoModelForCausalLM.from_pretrained(
                pretrained, revision=revision, attn_implementation=attention, dtype=torch.float32
            ).train()  # loaded models are in evaluation mode, without dropout and gradient checkpointing
        else:
            self.model = GPTNeoXForCausalLM(GPTNeoXConfig(**(architecture or {}), attn_implementation=attention))
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if compile:
            self.model.compile()
        self.val_loss = MeanMetric()
        self.val_perplexity = Perplexity()

    def configure_model(self) -> None:
        """Divides the parameters among the processes of a worker, if its strategy is FSDP2."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard  # since torch 2.6

        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.gpt_neox.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits, of shape ``[batch, context, vocabulary]``, in float32."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.float()

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()
        self.val_perplexity.reset()

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        logits, targets = self(tokens[:, :-1]), tokens[:, 1:]
        self.val_loss.update(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), targets.numel())
        self.val_perplexity.update(logits, targets)
        self.log("val_loss", self.val_loss, prog_bar=True)
        self.log("val_perplexity", self.val_perplexity, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if bytes_per_token:
            self.log("val_bits_per_byte", self.val_loss.compute() / math.log(2) / bytes_per_token, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate warmed up and then lowered by a cosine."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=self.hparams["betas"])
        steps = int(self.trainer.estimated_stepping_batches)
        given: int | None = self.hparams["warmup_steps"]
        warmup = max(1, steps // 100) if given is None else given
        final: float = self.hparams["final_lr"]

        def factor(step: int) -> float:
            progress = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
            return (step + 1) / warmup if progress < 0 else final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TokensPerSecond(L.Callback):
    """Logs how many tokens all workers together train on per second, validation included."""

    def __init__(self) -> None:
        self._tokens = self._step = 0
        self._since = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        # In regions with jobs of their own, a global step has a step of every worker of every job.
        processes = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        self._tokens = batch[:, 1:].numel() * trainer.accumulate_grad_batches * processes
        if not self._since or trainer.global_step - self._step >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            now, step = time.perf_counter(), trainer.global_step
            if self._since:
                rate = (step - self._step) * self._tokens / (now - self._since)
                pl_module.log("tokens_per_second", rate, prog_bar=True, rank_zero_only=True)
            self._since, self._step = now, step


def main() -> None:
    """Runs the command line."""
    torch.set_float32_matmul_precision("high")
    LightningCLI(
        Pythia,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [TokensPerSecond()]},
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
