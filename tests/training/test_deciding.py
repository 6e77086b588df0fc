"""What the job that decides gives to the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_halos.training.deciding import put_states, states_as_text


def stopping(wait: int = 0) -> EarlyStopping:
    callback = EarlyStopping("val_loss", patience=5)
    callback.wait_count = wait
    return callback


def test_another_job_goes_on_with_the_state_of_the_callbacks(tmp_path: Path) -> None:
    before, after = stopping(wait=3), stopping()
    before.best_score = torch.tensor(0.1)
    saving, resumed = ModelCheckpoint(tmp_path, monitor="val_loss"), ModelCheckpoint(tmp_path, monitor="val_loss")
    saving.best_model_path, saving.best_k_models = "best.ckpt", {"best.ckpt": torch.tensor(0.1)}
    text = states_as_text([before, saving])
    put_states([resumed, after], text)
    assert after.wait_count == 3
    assert torch.equal(after.best_score, torch.tensor(0.1))
    assert resumed.best_model_path == "best.ckpt"
    assert resumed.best_k_models == {"best.ckpt": torch.tensor(0.1)}


def test_only_the_callbacks_that_decide_are_sent() -> None:
    class Other(Callback):
        def state_dict(self) -> dict[str, int]:
            return {"number": 1}

    assert states_as_text([Other()]) == "{}"


def test_a_state_that_would_need_pickle_stays() -> None:
    callback = stopping()
    callback.best_score = object()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="stays in this job: it cannot be sent without pickling it"):
        assert states_as_text([callback]) == "{}"


@pytest.mark.parametrize("text", ['{"a": 1', "{\"EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}\": \"[]\"}"])
def test_a_state_that_does_not_suit_is_no_error(text: str) -> None:
    callback = stopping(wait=2)
    with pytest.warns(UserWarning, match="This job's callbacks begin anew"):
        put_states([callback], text)
    assert callback.wait_count == 2


def test_nothing_happens_without_a_state() -> None:
    callback = stopping(wait=2)
    put_states([callback], "")
    assert callback.wait_count == 2
