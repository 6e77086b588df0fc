"""What the job that decides gives to the next one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_halos.core.algorithms import ServerAlgorithm
from lightning_halos.core.joining import Joining
from lightning_halos.core.messages import Decide, Message, ModelCopy, Status, Welcome
from lightning_halos.training.callback_states import put_states, states_as_text
from lightning_halos.training.compat import expect_files_elsewhere
from lightning_halos.training.membership import JoiningParty
from lightning_halos.training.trainer_adapter import TrainerAdapter
from lightning_halos.training.worlds import member
from lightning_halos.transport.member_host import MemberHost
from tests.core.star import DESCRIPTION


def stopping(wait: int = 0) -> EarlyStopping:
    callback = EarlyStopping("val_loss", patience=5)
    callback.wait_count = wait
    return callback


def test_another_job_goes_on_with_the_state_of_the_callbacks(tmp_path: Path) -> None:
    before, after = stopping(wait=3), stopping()
    before.best_score = torch.tensor(0.1)
    saving, resumed = ModelCheckpoint(tmp_path, monitor="val_loss"), ModelCheckpoint(tmp_path, monitor="val_loss")
    best = str(tmp_path / "best.ckpt")
    saving.best_model_path, saving.best_k_models = best, {best: torch.tensor(0.1)}
    text = states_as_text([before, saving], validated=60)
    assert put_states([resumed, after], text) == 60
    assert after.wait_count == 3
    assert torch.equal(after.best_score, torch.tensor(0.1))
    assert resumed.best_model_path == best
    assert resumed.best_k_models == {best: torch.tensor(0.1)}


def test_only_the_callbacks_that_decide_are_sent() -> None:
    class Other(Callback):
        def state_dict(self) -> dict[str, int]:
            return {"number": 1}

    assert json.loads(states_as_text([Other()], 0))["callbacks"] == {}


def test_a_state_that_would_need_pickle_stays() -> None:
    callback = stopping()
    callback.best_score = object()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="stays in this job: it cannot be sent without pickling it"):
        assert json.loads(states_as_text([callback], 0))["callbacks"] == {}


@pytest.mark.parametrize("text", ['{"a": 1', '{"callbacks": {"' + stopping().state_key + '": "[]"}}', "[]", "{}"])
def test_a_state_that_does_not_suit_is_no_error(text: str) -> None:
    callback = stopping(wait=2)
    with pytest.warns(UserWarning, match="This job's callbacks begin anew"):
        put_states([callback], text)
    assert callback.wait_count == 2


def test_nothing_happens_without_a_state() -> None:
    callback = stopping(wait=2)
    assert put_states([callback], "") is None
    assert callback.wait_count == 2


class TestAnotherJobThatCannotBeTrusted:
    """Its state says how good models were. It does not say which files here are removed, loaded or missed."""

    def state(self, folder: Path, **changes: Any) -> str:
        sent = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2)
        sent.best_model_score = torch.tensor(0.25)
        for name, value in changes.items():
            setattr(sent, name, value)
        return states_as_text([sent], 0)

    def taken(self, folder: Path, **changes: Any) -> ModelCheckpoint:
        callback = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2)
        put_states([callback], self.state(folder, **changes))
        return callback

    @pytest.mark.parametrize(
        "path",
        [
            "/etc/passwd",
            "{folder}/../mine",
            "{folder}",
            "{folder}/link/file",
            "{folder}-other/a.ckpt",
            "https://evil.example.org/a.ckpt",
            "file://{folder}/a.ckpt",
            "relative.ckpt",
        ],
    )
    def test_does_not_name_files_outside_of_the_callbacks_folder(self, tmp_path: Path, path: str) -> None:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        (folder / "link").symlink_to("/etc")
        path = path.format(folder=folder)
        callback = self.taken(
            folder,
            best_model_path=path,
            kth_best_model_path=path,
            last_model_path=path,
            best_k_models={path: torch.tensor(0.1)},
        )
        assert path not in repr(vars(callback)).replace(f"'dirpath': '{folder}'", "")
        assert callback.best_model_path == callback.last_model_path == callback.kth_best_model_path == ""
        assert callback.best_k_models == {}
        assert callback.best_model_score == torch.tensor(0.25)  # a number does no harm

    def test_a_folder_of_another_machine_does_not_become_this_ones(self, tmp_path: Path) -> None:
        sent = ModelCheckpoint(tmp_path / "theirs", monitor="val_loss")
        sent.best_model_path, sent.best_model_score = str(tmp_path / "theirs" / "a.ckpt"), torch.tensor(0.25)
        callback = ModelCheckpoint(tmp_path / "mine", monitor="val_loss")
        put_states([callback], states_as_text([sent], 0))
        assert callback.best_model_path == ""
        assert callback.best_model_score == torch.tensor(0.25)

    def test_names_files_in_a_bucket_that_all_share(self) -> None:
        folder = "s3://bucket/run"
        paths = [f"{folder}/a.ckpt", f"{folder}/../b.ckpt", "s3://bucket/runs/c.ckpt", "https://x/d.ckpt"]
        callback = object.__new__(ModelCheckpoint)  # no connection is made
        vars(callback).update(vars(ModelCheckpoint("/tmp", monitor="val_loss", save_top_k=5)), dirpath=folder)
        sent = object.__new__(ModelCheckpoint)
        vars(sent).update(vars(callback), best_k_models={path: torch.tensor(0.1) for path in paths})
        put_states([callback], states_as_text([sent], 0))
        assert list(callback.best_k_models) == paths[:1]

    def test_keeps_the_best_models_and_knows_the_worst_of_them(self, tmp_path: Path) -> None:
        paths = [str(tmp_path / f"{number}.ckpt") for number in range(4)]
        scores = dict(zip(paths, map(torch.tensor, [0.3, 0.1, float("nan"), 0.2]), strict=True))
        callback = self.taken(tmp_path, best_k_models=scores, kth_best_model_path=str(tmp_path / "absent.ckpt"))
        assert list(callback.best_k_models) == [paths[1], paths[3]]
        assert callback.kth_best_model_path == paths[3]
        assert callback.kth_value == torch.tensor(0.2)
        assert callback.check_monitor_top_k(Trainer(logger=False), torch.tensor(0.15))
        assert not callback.check_monitor_top_k(Trainer(logger=False), torch.tensor(0.25))

    @pytest.mark.parametrize(
        "changes",
        [
            {"kth_value": torch.ones(2)},
            {"kth_value": "good"},
            {"kth_value": [1]},
            {"best_k_models": [1]},
            {"last_model_path": 3},
            {"best_model_path": {}},
        ],
    )
    def test_a_value_of_another_kind_changes_nothing(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        with pytest.warns(UserWarning, match="This job's callbacks begin anew"):
            callback = self.taken(tmp_path, **changes)
        assert callback.state_dict() == ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2).state_dict()

    @pytest.mark.parametrize("value", [torch.ones(2), "good", [1]])
    def test_a_callback_that_has_no_score_yet_takes_a_number_only(self, tmp_path: Path, value: Any) -> None:
        assert self.taken(tmp_path, best_model_score=value).best_model_score is None

    def test_text_in_the_state_of_any_callback_is_not_trusted(self) -> None:
        class Mine(EarlyStopping):
            text, more = "mine", ["a"]

            def state_dict(self) -> dict[str, Any]:
                return {**super().state_dict(), "text": self.text, "more": self.more}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                super().load_state_dict(state_dict)
                self.text, self.more = state_dict["text"], state_dict["more"]

        sent, callback = Mine("val_loss"), Mine("val_loss")
        sent.text, sent.more, sent.wait_count = "/etc/passwd", ["/etc/passwd"], 2
        put_states([callback], states_as_text([sent], 0))
        assert (callback.text, callback.more, callback.wait_count) == ("mine", ["a"], 2)


class Handover(Callback):
    """Takes the part of the job that decides at global step 55, as a worker's loop does in each of its batches."""

    def __init__(self, text: str, end: int = 89, pace: int = 1) -> None:
        self.text = text
        self.end = end
        self.pace = pace
        self.due: list[int] = []
        self.plateaus: list[int] = []
        self.passed = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.adapter = TrainerAdapter(trainer, limit=None, data=(0, 400), epoch_batches=1600, decides=False)
        while trainer.global_step < 55:  # it stops at each step at which Lightning logs
            self.adapter.set_global_step(55)
        self.adapter.set_deciding(True)
        self.adapter.follow_validations(put_states([], self.text))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        batches = trainer.fit_loop.batch_idx + 1
        position = 55 + batches // trainer.accumulate_grad_batches * self.pace
        is_due = self.adapter.set_global_step(min(position, self.end))
        is_whole = batches % trainer.accumulate_grad_batches == 0
        assert is_whole or not is_due, "a checkpoint would have half of an accumulation window"
        if is_due:
            self.due.append(trainer.global_step)
        if trainer.lr_scheduler_configs[0].frequency == batches:
            self.plateaus.append(trainer.global_step)
        self.passed = states_as_text([], self.adapter.validated)
        trainer.should_stop = trainer.global_step >= self.end


class Plateau(BoringModel):
    def __init__(self, frequency: int) -> None:
        super().__init__()
        self.frequency = frequency

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        config = {
            "scheduler": scheduler,
            "interval": "step",
            "frequency": self.frequency,
            "monitor": "x",
            "strict": False,
        }
        return {"optimizer": optimizer, "lr_scheduler": config}


def hand_over(text: str, accumulate: int = 1, interval: int = 20, log_every: int = 50, **kwargs: int) -> Handover:
    handover = Handover(text, **kwargs)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=400,
        val_check_interval=interval * accumulate,
        log_every_n_steps=log_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        accumulate_grad_batches=accumulate,
        callbacks=[handover],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plateau(20 * accumulate), DataLoader(torch.ones(400, 32)), DataLoader(torch.ones(1, 32)))
    return handover


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    ("validated", "due"),
    [
        pytest.param(40, [60, 80], id="nothing was due since then"),
        pytest.param(20, [56, 60, 80], id="one was due and not done"),
        pytest.param(0, [56, 60, 80], id="two were due, and one makes up for them"),
        pytest.param(60, [80], id="the job before was ahead"),
    ],
)
def test_each_validation_is_done_once_by_one_of_the_jobs(validated: int, due: list[int], accumulate: int) -> None:
    handover = hand_over(states_as_text([], validated), accumulate)
    assert handover.due == due
    assert handover.plateaus == due
    assert put_states([], handover.passed) == 80, "the next job but one goes on from there"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_validations_that_fall_due_while_others_hurry_are_one(accumulate: int) -> None:
    """Also if Lightning logs at the last of these steps, for which the global step stops one step before it."""
    handover = hand_over(states_as_text([], 40), accumulate, pace=180, end=225)
    assert handover.due == [200, 220]
    assert handover.plateaus == [200, 220]


def test_a_validation_in_every_step_does_not_wait_for_the_next_one() -> None:
    handover = hand_over(states_as_text([], 55), pace=4, end=90, interval=1, log_every=2)
    assert max(later - one for one, later in itertools.pairwise(handover.due)) <= 8, "at most two batches"


@pytest.mark.parametrize("validated", ["-1", "-1e300", str(10**18), str(10**400), "true", "1.5", '"60"', "null"])
def test_a_last_validation_that_cannot_be_right_is_ignored(validated: str) -> None:
    handover = hand_over(f'{{"callbacks": {{}}, "validated": {validated}}}')
    assert handover.due == [60, 80]


class Connection:
    """A connection with the global server that writes down what a job does with it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def post(self, message: Message) -> None:
        self.done.append(type(message).__name__)

    def serve(self, party: Any, goes_on: bool = False) -> None:
        self.done.append("serve")


def joining(connection: Any) -> JoiningParty:
    """A job that joins, and waits for a copy of the model."""
    party = JoiningParty(Joining("a job", 1, DESCRIPTION, lambda: torch.zeros(2)), connection)
    party.connected()
    party.receive(Welcome(0, 1, Status(0, 0.0, False), run="a run"), ())
    return party


def test_a_job_forgets_that_it_decides_with_the_connection_that_said_so() -> None:
    party = joining(Connection())
    party.receive(Decide(""), ())
    party.connected()
    party.receive(Welcome(0, 1, Status(0, 0.0, False, number=2), run="a run"), ())
    party.receive(ModelCopy(0, 0, 1, torch.zeros(2)), ())
    assert party.is_ready.is_set()
    assert party.early == []


@pytest.mark.parametrize("decides", [False, True])
def test_a_job_that_joins_knows_what_it_was_told_last_of_who_decides(decides: bool) -> None:
    party = joining(Connection())
    party.receive(Decide(""), ())
    party.receive(Status(0, 0.0, False, number=2, decides=decides), ())
    party.receive(ModelCopy(0, 0, 1, torch.zeros(2)), ())
    assert party.early == [Decide("")] * decides


def test_what_arrived_early_is_handled_before_anything_else_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    connection: Any = Connection()
    host = MemberHost.__new__(MemberHost)
    monkeypatch.setattr(MemberHost, "receive", lambda host, message, progress: connection.post(message))
    runtime = MagicMock(region_host=host)
    monkeypatch.setattr(member, "NodeRuntime", lambda *arguments, **options: runtime)
    monkeypatch.setattr(member, "_region_node", MagicMock())
    party = joining(connection)
    party.receive(Decide(""), ())
    connection.done.clear()
    start = MagicMock(algorithm=MagicMock(spec=ServerAlgorithm))
    start.trainer.num_devices = 1
    member.MemberWorld(start, MagicMock(connection=connection, joining=party))
    assert connection.done == ["Decide", "serve"]


@pytest.mark.parametrize("path", [None, "best"])
def test_a_job_whose_best_file_is_at_another_job_tests_the_model_in_memory(path: str | None, tmp_path: Path) -> None:
    data, module = DataLoader(torch.randn(4, 32)), BoringModel()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, data)
    best = Path(trainer.checkpoint_callback.best_model_path)
    expect_files_elsewhere(trainer)
    with torch.no_grad():
        module.layer.weight.zero_()
    best.rename(tmp_path / "elsewhere")
    trainer.test(dataloaders=data, ckpt_path=path, verbose=False)
    assert not module.layer.weight.any()
    with pytest.raises(FileNotFoundError):
        trainer.test(BoringModel(), data, ckpt_path="best", verbose=False)  # which nobody has trained
    (tmp_path / "elsewhere").rename(best)
    trainer.test(module, data, ckpt_path="best", verbose=False)
    assert module.layer.weight.any()
