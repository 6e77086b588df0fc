"""The checks of a star notice what they are for."""

from __future__ import annotations

import pytest
import torch

from tests.star.evidence import Batch, Evidence

EPOCHS, SAMPLES = 2, 8


def batches() -> list[Batch]:
    """Two shuffled epochs of 8 samples in batches of 2."""
    order = [(0, 1), (2, 3), (4, 5), (6, 7), (1, 2), (3, 4), (5, 6), (7, 0)]
    return [Batch("one-0", float(at), at // 4, samples) for at, samples in enumerate(order)]


def test_every_sample_once_per_epoch() -> None:
    Evidence(batches()).assert_used_once(EPOCHS, SAMPLES)


def test_a_batch_that_was_lost() -> None:
    with pytest.raises(AssertionError, match="2 samples were not used 2 times"):
        Evidence(batches()[1:]).assert_used_once(EPOCHS, SAMPLES)


def test_a_batch_that_was_repeated() -> None:
    again = Batch("two-0", 10.0, 1, (7, 0))
    evidence = Evidence([again, *batches()])
    assert evidence.repeated() == [[again, batches()[-1]]]
    evidence.assert_used_once(EPOCHS, SAMPLES, lambda batch: batch.at == 10.0)
    with pytest.raises(AssertionError, match="1 batches were trained on again without a reason"):
        evidence.assert_used_once(EPOCHS, SAMPLES, lambda batch: batch.at == 6.0)


def test_a_batch_that_was_repeated_is_no_useful_step() -> None:
    evidence = Evidence([*batches(), Batch("two-0", 10.0, 1, (7, 0))])
    assert evidence.useful_steps() == 8
    assert evidence.useful_steps(2.0, 6.0) == 4
    assert evidence.useful_steps(9.0, 11.0) == 0


def test_models_that_differ() -> None:
    results = {name: {"state": {"weight": torch.tensor([value])}} for name, value in (("a", 1.0), ("b", 1.5))}
    evidence = Evidence(results=results)
    evidence.assert_same_model(["a"])
    with pytest.raises(AssertionError, match="weight of b and of a differ"):
        evidence.assert_same_model(["a", "b"])
