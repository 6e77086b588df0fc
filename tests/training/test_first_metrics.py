"""Metrics that a module of another rank reads before rank 0's have come."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch.distributed import HashStore

from lightning_halos.training.first_metrics import FirstMetrics, MetricsOfRank0, ShownMetrics


def make(timeout: float = 30.0) -> FirstMetrics:
    return FirstMetrics(HashStore(), lambda: None, timeout)


def read(answer: Mapping[str, float] | None) -> MetricsOfRank0:
    return MetricsOfRank0({"train_loss": torch.tensor(1.0)}, lambda: answer)


def test_a_worker_waits_for_the_first_metrics_and_for_no_later_ones() -> None:
    first = make()
    threading.Timer(0.1, lambda: [first.tell({"val_loss": torch.tensor(2.0)}), first.tell({"val_loss": 3.0})]).start()
    assert first.wait(may_wait=True, is_finished=False) == {"val_loss": 2.0}
    assert first.wait(may_wait=False, is_finished=False) == {"val_loss": 2.0}


def test_a_worker_does_not_wait_where_rank_0_waits_for_it() -> None:
    first = make()
    assert first.wait(may_wait=False, is_finished=False) is None
    first.end_waits()
    assert first.wait(may_wait=True, is_finished=False) is None
    threading.Timer(0.1, lambda: first.tell({})).start()  # rank 0 has validated after the end of the run, or not at all
    assert first.wait(may_wait=True, is_finished=True) == {}
    assert make(timeout=0.1).wait(may_wait=True, is_finished=True) is None


def test_metrics_are_an_ordinary_dict_until_one_is_missing() -> None:
    metrics = read({"val_loss": 2.0, "train_loss": 5.0})
    assert metrics.get("val_loss") is None
    assert "val_loss" not in metrics
    assert metrics["val_loss"] == 2.0
    assert metrics["train_loss"] == 1.0  # its own
    assert type(copy.deepcopy(metrics)) is dict
    with pytest.raises(KeyError, match="val_los"):
        metrics["val_los"]


def test_what_would_be_missing_under_ddp_is_a_key_error_and_what_cannot_come_is_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="val_loss"):
            read({})["val_loss"]
    with pytest.warns(UserWarning, match=r"callback_metrics\['val_loss'\] is NaN on this rank"):
        assert torch.isnan(read(None)["val_loss"])


def test_a_metric_that_a_logger_or_the_progress_bar_does_not_have_is_that_of_rank_0() -> None:
    shown = ShownMetrics({"train_loss": 4.0}, read({"val_loss": 2.0, "train_loss": 5.0}).__getitem__)
    assert list(shown) == ["train_loss"]
    assert shown["val_loss"] == 2.0
    assert shown["train_loss"] == 4.0  # its own
    assert type(copy.deepcopy(shown)) is dict
    with pytest.raises(KeyError, match="val_los"):
        shown["val_los"]
