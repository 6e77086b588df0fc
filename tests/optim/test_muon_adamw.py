"""MuonAdamW is torch's Muon for hidden matrices and torch's AdamW for the rest, in one optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

from lightning_halos.optim import MuonAdamW, hidden_matrices
from lightning_halos.training.step_counter import StepCounter

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x + self.layers[1](torch.relu(self.layers[0](x)))))


HIDDEN = ["layers.0.weight", "layers.1.weight"]
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05, "betas": (0.8, 0.9), "eps": 1e-7}


def train(net: nn.Module, *optimizers: Any, steps: range = range(5), then: Any = ()) -> list[Tensor]:
    """Makes steps, each with a batch of its own, and a step of each scheduler. Returns the parameters."""
    for step in steps:
        tokens = torch.randint(10, (4, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        net.zero_grad()
        loss.backward()
        for one in (*optimizers, *then):
            one.step()
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def names(net: nn.Module, optimizer: MuonAdamW) -> list[list[str]]:
    """The names of each group's parameters."""
    named = {id(p): name for name, p in net.named_parameters()}
    return [[named[id(p)] for p in group["params"]] for group in optimizer.param_groups]


class TestWhichParametersAreHiddenMatrices:
    @pytest.mark.parametrize(
        "name",
        [
            "layers.0.attention.qkv.weight",
            "blocks.3.mlp.fc.weight",
            "encoder.layer.2.output.dense.weight",  # BERT's
            "encoder.layer.2.output.weight",
            "h.0.attn.c_proj.weight",
            "sa.heads.0.key.weight",  # attention heads
            "multihead_attn.in_proj_weight",
            "remember.weight",
            "ensemble.weight",
            "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        ],
    )
    def test_these_are(self, name: str) -> None:
        assert list(hidden_matrices([(name, torch.zeros(4, 4))])) == [name]

    @pytest.mark.parametrize(
        "name",
        [
            "transformer.wte.weight",
            "transformer.wpe.weight",
            "tok_emb.weight",
            "model.embed_tokens.weight",
            "tokenEmbedding.weight",
            "pos_embedding",
            "embed_out.weight",  # GPT-NeoX's head
            "unembed.weight",
            "lm_head.weight",
            "head.weight",
            "heads.head.weight",  # torchvision's ViT
            "classifier.weight",
            "classifier.6.weight",
            "cls.predictions.decoder.weight",
            "score.weight",
            "output.weight",
            "fc.weight",
        ],
    )
    def test_these_are_not(self, name: str) -> None:
        assert not hidden_matrices([(name, torch.zeros(4, 4))])

    @pytest.mark.parametrize("shape", [(4,), (), (4, 3, 2), (4, 3, 2, 2)], ids=str)
    def test_only_matrices_are(self, shape: tuple[int, ...]) -> None:
        assert not hidden_matrices([("layers.0.weight", torch.zeros(shape))])

    def test_an_embedding_is_known_by_its_type_also_where_the_head_shares_it(self) -> None:
        net = Net()
        assert list(hidden_matrices(net)) == HIDDEN
        shared = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Embedding(10, 6))
        shared[0].weight = shared[1].weight
        assert not hidden_matrices(shared)

    def test_further_ones_can_be_named(self) -> None:
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
        assert list(hidden_matrices(net, adamw=["1", "11"])) == [f"{i}.weight" for i in (0, *range(2, 11))]
        assert not hidden_matrices([("net.4.weight", torch.zeros(4, 4))], adamw=["net.4"])


@needs_muon
class TestStep:
    @pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
    @pytest.mark.parametrize("nesterov", [True, False])
    def test_it_computes_what_the_two_optimizers_of_torch_compute(self, nesterov: bool, adjust: str) -> None:
        net, other = Net(), Net()
        ours = MuonAdamW(
            net, **OPTIONS, momentum=0.7, nesterov=nesterov, ns_steps=4, adjust_lr_fn=adjust, adamw_lr=0.01
        )
        hidden = hidden_matrices(other)
        muon = torch.optim.Muon(
            hidden.values(), 0.02, 0.05, momentum=0.7, nesterov=nesterov, ns_steps=4, adjust_lr_fn=adjust
        )
        rest = [p for name, p in other.named_parameters() if name not in hidden]
        adamw = torch.optim.AdamW(rest, **{**OPTIONS, "lr": 0.01})
        before = [p.detach().clone() for p in net.parameters()]
        assert_equal(train(net, ours), train(other, muon, adamw))
        assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert [group["use_muon"] for group in ours.param_groups] == [True, False]
        assert names(net, ours)[0] == HIDDEN

    def test_without_a_gradient_a_parameter_stays_and_has_no_state(self) -> None:
        net = Net()
        optimizer = MuonAdamW(net)
        net.layers[0].weight.grad = torch.ones_like(net.layers[0].weight)
        expected = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(expected, net.parameters(), strict=True)]
        assert sum(changed) == 1
        assert set(optimizer.state) == {net.layers[0].weight}

    def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned(self) -> None:
        net, calls = Net(), []
        optimizer = MuonAdamW(net)

        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = net(torch.arange(10)).square().mean()
            loss.backward()
            return loss.item()

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert calls == [True]
        assert loss > 0
        assert len(optimizer.state) == len(list(net.parameters()))

    @pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
    def test_the_kernels_of_adamw_may_be_chosen(self, options: dict[str, Any]) -> None:
        net, other = Net(), Net()
        expected = train(other, MuonAdamW(other))
        for one, two in zip(train(net, MuonAdamW(net, **options)), expected, strict=True):
            assert torch.allclose(one, two, atol=1e-3)

    @pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
    def test_a_gradient_scaler_leaves_out_a_step_with_infinite_gradients(self, options: dict[str, Any]) -> None:
        net = Net()
        optimizer, scaler = MuonAdamW(net, **options), torch.amp.GradScaler("cpu", init_scale=8.0)
        before = [p.detach().clone() for p in net.parameters()]
        for factor in (math.inf, 1.0):
            assert_equal(before, list(net.parameters()))
            optimizer.zero_grad()
            scaler.scale(net(torch.arange(10)).square().mean() * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert not torch.equal(before[1], net.layers[0].weight)
        assert not torch.equal(before[0], net.table.weight)

    def test_it_is_one_step_to_those_who_count_the_steps_of_all_optimizers(self) -> None:
        module = Module()
        module.automatic_optimization = False
        trainer: Any = type("OfModule", (), {"lightning_module": module, "global_step": 0, "validating": False})()
        counter = StepCounter(trainer, lambda: False)
        optimizer = MuonAdamW(module)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        try:
            counter.begin_batch()
            optimizer.step()
            optimizer.step()
            assert counter.end_batch() == 2
        finally:
            counter.close()


@needs_muon
class TestGroups:
    def test_names_may_come_with_the_parameters(self) -> None:
        net, other = Net(), Net()
        one, two = MuonAdamW(net), MuonAdamW(iter(other.named_parameters()))
        assert names(net, one)[0] == HIDDEN
        # Without the module the type of `table` is not known.
        assert names(other, two)[0] == ["table.weight", *HIDDEN]
        assert names(other, MuonAdamW(other.named_parameters(), adamw=["table"])) == names(net, one)

    def test_frozen_parameters_of_a_module_are_left_out(self) -> None:
        net = Net()
        net.layers[0].requires_grad_(False)
        assert names(net, MuonAdamW(net))[0] == ["layers.1.weight"]

    def test_parameters_without_names_are_refused_unless_it_is_said_what_they_are(self) -> None:
        net = Net()
        with pytest.raises(ValueError, match=r"shape \(10, 6\).*module.named_parameters\(\) instead of.*use_muon"):
            MuonAdamW(net.parameters())
        hidden = list(hidden_matrices(net).values())
        rest = [p for p in net.parameters() if all(p is not h for h in hidden)]
        groups = [{"params": hidden, "use_muon": True, "momentum": 0.5}, {"params": rest, "use_muon": False}]
        optimizer = MuonAdamW([*groups, {"params": [nn.Parameter(torch.zeros(3))]}], betas=(0.8, 0.9))
        assert [group["use_muon"] for group in optimizer.param_groups] == [True, False, False]
        assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.9), (0.8, 0.9), (0.8, 0.9)]

    def test_a_group_has_its_own_values_and_others_by_default(self) -> None:
        net = Net()
        given = {"params": net.layers.named_parameters(), "lr": 0.5, "weight_decay": 0.0, "momentum": 0.3}
        optimizer = MuonAdamW([given], lr=0.1, adamw_lr=0.2)
        optimizer.add_param_group({"params": list(net.head.named_parameters(prefix="head"))})
        optimizer.add_param_group({"params": net.norm.weight})
        kinds = [(g["use_muon"], g["lr"], g["weight_decay"], g["betas"][0]) for g in optimizer.param_groups]
        assert kinds == [(True, 0.5, 0.0, 0.3), (False, 0.5, 0.0, 0.9), (False, 0.2, 0.1, 0.9), (False, 0.2, 0.1, 0.9)]

    def test_a_group_for_muon_may_say_its_momentum_as_beta(self) -> None:
        group = {"params": nn.Parameter(torch.zeros(3, 3)), "use_muon": True, "betas": (0.5, 0.99)}
        assert MuonAdamW([group]).param_groups[0]["betas"] == (0.5, 0.99)
        assert MuonAdamW([{**group, "momentum": 0.7}]).param_groups[0]["betas"] == (0.7, 0.99)
        both = {"params": Net().named_parameters(), "betas": (0.5, 0.99)}
        assert [g["betas"] for g in MuonAdamW([both]).param_groups] == [(0.95, 0.99), (0.5, 0.99)]

    @pytest.mark.parametrize("value", ["muon", 1, 2])
    def test_what_a_group_gets_is_said_by_a_bool(self, value: Any) -> None:
        with pytest.raises(TypeError, match=f'"use_muon": {value!r} of a parameter group must be True or False'):
            MuonAdamW([{"params": nn.Parameter(torch.zeros(3, 3)), "use_muon": value}])

    @pytest.mark.parametrize("parameters", [Net, lambda: Net().named_parameters()])
    def test_a_name_that_no_parameter_has_is_refused(self, parameters: Any) -> None:
        with pytest.raises(ValueError, match=r"adamw names 'tabel', but no parameter has this name"):
            MuonAdamW(parameters(), adamw=["table", "tabel"])
        with pytest.raises(TypeError, match=r"adamw='table' must be a sequence of names: adamw=\['table'\]"):
            MuonAdamW(parameters(), adamw="table")

    def test_a_name_may_be_that_of_a_frozen_layer(self) -> None:
        net = Net()
        net.table.requires_grad_(False)
        assert names(net, MuonAdamW(net, adamw=["table"]))[0] == HIDDEN

    def test_layers_that_a_callback_unfreezes_are_recognized_without_names(self) -> None:
        net = Net()
        net.requires_grad_(False)
        net.head.requires_grad_(True)
        with pytest.warns(UserWarning, match="no matrix of a hidden layer"):
            optimizer = MuonAdamW(net)
        BaseFinetuning.unfreeze_and_add_param_group([net.table, net.layers], optimizer, lr=0.01)
        assert names(net, optimizer)[1:] == [HIDDEN, ["table.weight", "layers.0.bias", "layers.1.bias"]]
        assert [group["lr"] for group in optimizer.param_groups[1:]] == [0.01, 0.01]
        train(net, optimizer)

    bad_values = pytest.mark.parametrize(
        ("values", "error"),
        [
            ({"lr": -0.1}, r"lr=-0.1 must be a finite number >= 0"),
            ({"lr": math.nan}, r"lr=nan must be"),
            ({"weight_decay": -1}, r"weight_decay=-1 must be"),
            ({"eps": "x"}, r"eps='x' must be"),
            ({"betas": 0.9}, r"betas=0.9 must be two numbers in \[0, 1\)"),
            ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
            ({"ns_steps": 0}, r"ns_steps=0 must be"),
            ({"ns_steps": 100}, r"ns_steps=100 must be"),
            ({"adjust_lr_fn": "none"}, r"adjust_lr_fn='none' must be 'match_rms_adamw' or 'original'"),
            ({"foreach": True, "fused": True}, r"foreach=True and fused=True"),
        ],
        ids=str,
    )

    @bad_values
    def test_a_bad_value_is_refused_by_name(self, values: dict[str, Any], error: str) -> None:
        with pytest.raises(ValueError, match=error):
            MuonAdamW(Net(), **values)

    @bad_values
    def test_a_bad_value_in_an_added_group_is_refused_and_no_group_added(
        self, values: dict[str, Any], error: str
    ) -> None:
        optimizer, more = MuonAdamW(Net()), nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(ValueError, match=error):
            optimizer.add_param_group({"params": more.named_parameters(), **values})
        assert len(optimizer.param_groups) == 2

    def test_no_group_is_added_if_one_of_two_is_refused(self) -> None:
        net = Net()
        optimizer = MuonAdamW(net)
        more = [("more.weight", nn.Parameter(torch.zeros(3, 3))), ("layers.0.bias", net.layers[0].bias)]
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": more})
        assert len(optimizer.param_groups) == 2

    def test_a_bad_momentum_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"momentum=1.0 must be a number in \[0, 1\)"):
            MuonAdamW(Net(), momentum=1.0)
        with pytest.raises(ValueError, match=r"momentum=1.5 must be"):
            MuonAdamW([{"params": list(Net().named_parameters()), "momentum": 1.5}])
        group = {"params": nn.Parameter(torch.zeros(3, 3)), "use_muon": True, "betas": (1.0, 0.9)}
        with pytest.raises(ValueError, match=r"betas=\(1.0, 0.9\) must be .*the momentum"):
            MuonAdamW([group])

    def test_the_rate_of_adamw_is_refused_by_its_name(self) -> None:
        with pytest.raises(ValueError, match=r"adamw_lr=-1 must be a finite number >= 0"):
            MuonAdamW(Net(), adamw_lr=-1)

    @pytest.mark.parametrize(
        ("values", "error"),
        [
            ({"nesterov": "no"}, "nesterov='no' must be True or False"),
            ({"adamw": None}, "adamw=None must be a sequence of names"),
            ({"adamw": [3]}, r"adamw=\[3\] must be a sequence of names"),
        ],
        ids=str,
    )
    def test_a_value_of_another_type_is_refused_by_name(self, values: dict[str, Any], error: str) -> None:
        with pytest.raises(TypeError, match=error):
            MuonAdamW(Net(), **values)

    def test_parameters_without_names_are_no_hidden_matrices(self) -> None:
        with pytest.raises(TypeError, match=r"module.named_parameters\(\) instead of module.parameters\(\)"):
            hidden_matrices(Net().parameters())  # type: ignore[arg-type]

    def test_muon_is_refused_for_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match=r"use_muon=True is set for a parameter of shape \(3,\)"):
            MuonAdamW([{"params": nn.Parameter(torch.zeros(3)), "use_muon": True}])

    def test_flattened_pieces_are_refused(self) -> None:
        net = Net()
        net.layers[0].weight = nn.Parameter(torch.zeros(12))
        vars(net.layers[0].weight)["_fsdp_flattened"] = True  # as FullyShardedDataParallel marks them
        with pytest.raises(ValueError, match=r"FSDP1.*fsdp2"):
            MuonAdamW(net)


@needs_muon
def test_a_compiled_step_trains_as_any_other() -> None:
    nets, ends = [Net(), Net()], []
    for net, is_compiled in zip(nets, (False, True), strict=True):
        optimizer = MuonAdamW(net, **OPTIONS)
        if is_compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        ends.append(train(net, optimizer))
        assert len(optimizer.state) == len(list(net.parameters()))
    assert_equal(*ends)


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match=r"needs torch 2.9 or newer.*this is torch " + torch.__version__[:3]):
        MuonAdamW(Net())


@needs_muon
class TestState:
    def test_a_saved_and_loaded_optimizer_continues_bit_for_bit(self) -> None:
        net = Net()
        optimizer = MuonAdamW(net, **OPTIONS)
        train(net, optimizer)
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict()], file)
        expected = train(net, optimizer, steps=range(5, 10))
        file.seek(0)
        values, state = torch.load(file, weights_only=True)
        again = Net()
        again.load_state_dict(values)
        resumed = MuonAdamW(again, lr=1.0)
        resumed.load_state_dict(state)
        assert_equal(expected, train(again, resumed, steps=range(5, 10)))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
    )
    def test_a_copy_continues_bit_for_bit(self, copied: Any) -> None:
        net = Net()
        optimizer = MuonAdamW(net, **OPTIONS)
        train(net, optimizer)
        again, resumed = copied((net, optimizer))
        assert_equal(train(net, optimizer, steps=range(5, 10)), train(again, resumed, steps=range(5, 10)))

    def test_the_state_of_other_groups_is_refused(self) -> None:
        net = Net()
        state = MuonAdamW(net).state_dict()
        with pytest.raises(ValueError, match=r"use_muon=\[True, False\].*\[True\]"):
            MuonAdamW(hidden_matrices(net).items()).load_state_dict(state)
        with pytest.raises(ValueError, match=r"use_muon=\[None\].*\[True, False\]"):
            MuonAdamW(net).load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


@needs_muon
class TestSchedules:
    def test_one_cycle_moves_the_rate_and_the_momentum_of_both(self) -> None:
        net = Net()
        optimizer = MuonAdamW(net)
        schedule = OneCycleLR(optimizer, [0.1, 0.05], total_steps=6, base_momentum=0.6, max_momentum=0.9)
        seen = []
        for step in range(5):
            seen.append([(group["lr"], group["betas"][0]) for group in optimizer.param_groups])
            train(net, optimizer, steps=range(step, step + 1), then=[schedule])
        assert all(muon[0] == pytest.approx(2 * adamw[0]) and muon[1] == adamw[1] for muon, adamw in seen)
        assert len({muon for muon, _ in seen}) > 3
        assert all(group["betas"][1] == 0.95 for group in optimizer.param_groups)

    def test_the_momentum_of_a_schedule_is_used(self) -> None:
        net, other = Net(), Net()
        moved, given = MuonAdamW(net), MuonAdamW(other, momentum=0.5)
        moved.param_groups[0]["betas"] = (0.5, 0.95)
        assert_equal(train(net, moved), train(other, given))

    def test_a_factor_keeps_the_ratio_of_the_rates(self) -> None:
        net = Net()
        optimizer = MuonAdamW(net, lr=0.1, adamw_lr=0.3)
        train(net, optimizer, then=[LambdaLR(optimizer, lambda step: 1 / (step + 1))])
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 6, 0.3 / 6])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch).flatten(0, 1), batch.roll(1, 1).flatten())

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(self)
        schedule = OneCycleLR(optimizer, 0.02, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, path: Path | None = None, **flags: Any) -> list[Tensor]:
    module = Module()
    batches = torch.randint(10, (32, 7), generator=torch.Generator().manual_seed(1))
    callbacks = [
        LearningRateMonitor(log_momentum=True),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=callbacks,
        max_steps=16,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **flags,
    )
    trainer.fit(module, DataLoader(batches, batch_size=4), ckpt_path=path)
    return [p.detach() for p in module.parameters()]


@needs_muon
@pytest.mark.parametrize(
    "flags", [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str
)
def test_lightning_trains_with_it_and_resumes_bit_for_bit(tmp_path: Path, flags: dict[str, Any]) -> None:
    expected = fit(tmp_path, **flags)
    assert all(p.isfinite().all() for p in expected)
    assert_equal(expected, fit(tmp_path / "again", tmp_path / "step=8.ckpt", **flags))
