"""Any LightningModule trains unchanged: the ordered steps, one schedule, one final model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.integration.conftest import Run
from tests.integration.harness import Result
from tests.integration.toys import FEATURES, Toy, assert_trained, fit, loader
from tests.integration.virtual import simulate


def automatic() -> Result:
    return fit(Toy(), max_steps=30)


def test_automatic_optimization(run: Run) -> None:
    results = run(automatic)
    assert_trained(results, max_steps=30)
    assert not torch.equal(results[0]["start"]["net.0.weight"], results[1]["start"]["net.0.weight"])
    assert not torch.equal(results[0]["start"]["net.0.weight"], results[0]["state"]["net.0.weight"])


class Manual(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def manual() -> Result:
    return fit(Manual(), max_steps=30)


def test_manual_optimization(run: Run) -> None:
    assert_trained(run(manual), max_steps=30)


class Gan(Toy):
    """A generator that steps once per batch, a critic that steps twice."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(1, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        generator, critic = self.optimizers()  # type: ignore[misc]
        for _ in range(2):
            with critic.toggle_model():
                critic.zero_grad()
                fake, real = self.net(batch[0]).detach(), batch[1]
                self.manual_backward(self.critic(fake).square().mean() + (self.critic(real) - 1).square().mean())
                critic.step()
        with generator.toggle_model():
            generator.zero_grad()
            self.manual_backward((self.critic(self.net(batch[0])) - 1).square().mean())
            generator.step()

    def configure_optimizers(self) -> Any:
        parts = (self.net, self.critic)
        return [self.counted(torch.optim.Adam(part.parameters(), lr=1e-3)) for part in parts]


def gan() -> Result:
    return fit(Gan(), max_steps=60)


def test_two_optimizers(run: Run) -> None:
    results = run(gan)
    assert_trained(results, max_steps=60)
    for result in results:
        assert result["optimizer_steps"] == 3 * len(result["trained_on"]) / 4
        for part in ("net.0.weight", "critic.weight"):
            assert not torch.equal(result["state"][part], results[0]["start"][part])


class Accumulating(Toy):
    """Looks at its weights in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 3 == 0:
            self.windows.append([])
        self.windows[-1].append(self.net[0].weight.detach().clone())
        return super().training_step(batch, batch_idx)


def accumulating() -> Result:
    module = Accumulating()
    result = fit(module, max_steps=30, accumulate_grad_batches=3)
    return {**result, "windows": module.windows}


def test_accumulated_gradients_belong_to_one_model(run: Run) -> None:
    results = run(accumulating)
    assert_trained(results, max_steps=30)
    for result in results:
        windows = result["windows"]
        assert len(windows) == result["optimizer_steps"]
        if not windows:
            continue  # this worker was late, and found no step left
        # The last window of an epoch of 16 batches has one.
        assert {len(window) for window in windows[:-1]} <= {3, 1}
        for first, *others in windows:
            assert all(torch.equal(first, other) for other in others)
        for (before, *_), (after, *_) in itertools.pairwise(windows):
            assert not torch.equal(before, after)
    assert max(len(window) for result in results for window in result["windows"]) == 3


class Clipped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.cat(gradients).norm()))


def clipped() -> Result:
    module = Clipped()
    result = fit(module, max_steps=20, gradient_clip_val=0.01)
    return {**result, "norms": module.norms}


def test_gradients_are_clipped(run: Run) -> None:
    results = run(clipped)
    assert_trained(results, max_steps=20)
    norms = [norm for result in results for norm in result["norms"]]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


class Dtypes(Toy):
    computed_in: torch.dtype | None = None  # of a worker that is late and finds no step left

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.computed_in = self.net(batch[0]).dtype
        return super().training_step(batch, batch_idx)


def has_loss_in(dtype: torch.dtype) -> bool:
    try:
        mse_loss(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype))
    except RuntimeError:  # torch 2.4 in bfloat16 on the CPU
        return False
    return True


def in_precision(precision: Any) -> Result:
    module = Dtypes()
    result = fit(module, max_steps=20, precision=precision)
    return {**result, "computed_in": str(module.computed_in)}


@pytest.mark.parametrize(
    ("precision", "weights", "computed_in"),
    [
        ("bf16-mixed", torch.float32, "torch.bfloat16"),
        ("bf16-true", torch.bfloat16, "torch.bfloat16"),
        ("64-true", torch.float64, "torch.float64"),
    ],
)
def test_precision(run: Run, precision: str, weights: torch.dtype, computed_in: str) -> None:
    if not has_loss_in(weights):
        pytest.skip(f"this torch has no mse_loss in {weights} on the CPU")
    results = run(in_precision, precision)
    assert_trained(results, max_steps=20)
    for result in results:
        assert {tensor.dtype for tensor in result["state"].values()} == {weights}
    assert {result["computed_in"] for result in results} - {"None"} == {computed_in}


class Normalized(Toy):
    """Every worker's inputs have its own mean, its rank."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.BatchNorm1d(FEATURES, momentum=0.5), nn.Linear(FEATURES, 1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, indices = batch
        return super().training_step((inputs + self.global_rank, targets, indices), batch_idx)


def test_batch_norm_statistics_are_averaged(tmp_path: Path) -> None:
    results = simulate(tmp_path, Normalized(), loader(), max_steps=40)
    assert_trained(results, max_steps=40)
    for result in results:
        mean = result["state"]["net.0.running_mean"].mean()
        assert 0.6 < mean < 2.6, "one worker alone has its rank, the average of all is 1.5"
        assert result["state"]["net.0.num_batches_tracked"] == results[0]["optimizer_steps"]


class Frozen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


def frozen() -> Result:
    return fit(Frozen(), max_steps=20)


def test_frozen_parameters_stay(run: Run) -> None:
    results = run(frozen)
    assert_trained(results, max_steps=20)
    for result in results:
        assert torch.equal(result["state"]["net.0.weight"], results[0]["start"]["net.0.weight"])
        assert not torch.equal(result["state"]["net.1.weight"], results[0]["start"]["net.1.weight"])


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"first": nn.Linear(FEATURES, FEATURES), "last": nn.Linear(FEATURES, FEATURES)}))
        self.net["last"].weight = self.net["first"].weight

    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self.net["last"](self.net["first"](batch[0])), batch[0])


def tied() -> Result:
    module = Tied()
    result = fit(module, max_steps=20)
    return {**result, "tied": module.net["last"].weight is module.net["first"].weight}


def test_tied_weights_stay_tied(run: Run) -> None:
    results = run(tied)
    assert_trained(results, max_steps=20)
    for result in results:
        assert result["tied"]
        assert torch.equal(result["state"]["net.first.weight"], result["state"]["net.last.weight"])
        assert not torch.equal(result["state"]["net.first.weight"], results[0]["start"]["net.first.weight"])


class Compiled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.compilations = 0
        self.net = torch.compile(self.net, backend=self._compile)  # type: ignore[assignment]

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.compilations += 1
        return graph.forward


def compiled() -> Result:
    module = Compiled()
    result = fit(module, max_steps=20)
    return {**result, "compilations": module.compilations}


def test_compiled_submodule_is_compiled_once(run: Run) -> None:
    results = run(compiled)
    assert_trained(results, max_steps=20)
    for result in results:
        assert result["compilations"] == (result["optimizer_steps"] > 0)
        assert not torch.equal(result["state"]["net._orig_mod.0.weight"], results[0]["start"]["net._orig_mod.0.weight"])
