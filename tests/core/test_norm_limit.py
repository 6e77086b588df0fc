"""An update far larger than the others is rejected, but no worker is rejected for ever."""

import logging
from functools import partial

import pytest
import torch

from lightning_halos.core.local_server import LocalServer
from lightning_halos.core.messages import Push
from lightning_halos.core.norm_limit import NormLimit
from lightning_halos.core.vector import PART

from .receiving import receive

plain_sgd = partial(torch.optim.SGD, lr=1.0)


def verdicts(limit, norms):
    return [limit.fault(norm) is None for norm in norms]


class TestNormLimit:
    def test_refuses_nothing_before_it_has_seen_enough(self):
        norms = [1.0, 1e9] * (NormLimit.ENOUGH // 2)
        assert all(verdicts(NormLimit(10.0), norms))

    def test_refuses_what_is_more_than_so_many_times_the_median(self):
        limit = NormLimit(10.0)
        assert all(verdicts(limit, [1.0, 2.0, 3.0] * 8))
        assert verdicts(limit, [20.0, 20.1, 19.9, float("inf")]) == [True, False, True, False]

    def test_says_what_it_compares(self):
        limit = NormLimit(5.0)
        verdicts(limit, [2.0] * 20)
        assert limit.fault(60.0) == "its norm of 60 is 30 times the median of the last 20 here (max_norm_ratio=5)"

    def test_one_sender_of_several_stays_refused_as_long_as_it_sends_what_is_too_large(self):
        limit = NormLimit(10.0)
        assert all(verdicts(limit, [1.0] * NormLimit.WINDOW))
        assert verdicts(limit, [1.0, 1e6] * 1000) == [True, False] * 1000

    @pytest.mark.parametrize("rise", [11.0, 1e9])
    def test_takes_larger_updates_in_again_once_most_of_the_last_are_as_large(self, rise):
        limit = NormLimit(10.0)
        assert all(verdicts(limit, [1.0] * 100))
        later = verdicts(limit, [rise] * 100)
        refused = later.index(True)
        assert refused == NormLimit.WINDOW // 2 + 1
        assert all(later[refused:])

    @pytest.mark.parametrize("rate", [1 / 100, 1 / 1000])
    def test_a_learning_rate_that_warms_up_from_0_is_no_outlier(self, rate):
        limit = NormLimit(3.0)
        assert all(verdicts(limit, [0.0] * 20 + [rate * step for step in range(1000)]))

    def test_updates_that_become_smaller_are_taken_in(self):
        limit = NormLimit(10.0)
        assert all(verdicts(limit, [0.9**step for step in range(500)]))


def server(**options):
    options = {"accumulate_updates": 99, "merge_weight": 0.5, "max_norm_ratio": 10.0, **options}
    return LocalServer(0, torch.zeros(3), plain_sgd, shapes=[torch.Size([2])], workers=4, **options)


def push(*values, worker=0):
    return Push(worker, 0, 8, 8, 1.0, vector=torch.tensor(values))


def warm(to_warm):
    for _ in range(NormLimit.ENOUGH):
        receive(to_warm, push(0.6, 0.8, 0.0))
    return to_warm


class TestServer:
    def test_drops_counts_and_reports_it_and_answers_with_its_model(self, caplog):
        warmed = warm(server(describe="rank {} (region eu)".format))
        model, version = warmed.model.clone(), warmed.version
        answer, _ = receive(warmed, push(60.0, 80.0, 1.0, worker=3))
        assert torch.equal(warmed.model, model)
        assert torch.equal(answer, model)
        assert (warmed.version, warmed.rejected, warmed.rejections) == (version, 1, {3: 1})
        assert "The update of rank 3 (region eu) was rejected: its norm of 100 is 100 times the median" in caplog.text
        assert warmed.flush().steps == 8 * (NormLimit.ENOUGH + 1)  # its steps were done all the same

    def test_has_no_limit_by_default(self):
        free = warm(server(max_norm_ratio=None))
        receive(free, push(1e9, 0.0, 0.0))
        assert free.rejected == 0

    def test_buffers_do_not_count(self):
        warmed = warm(server())
        receive(warmed, push(0.6, 0.8, 1e9))
        assert warmed.rejected == 0

    def test_what_has_nan_is_no_norm_to_compare_with(self):
        warmed = warm(server())
        for _ in range(100):
            receive(warmed, push(float("nan"), 0.0, 0.0, worker=1))
        receive(warmed, push(0.6, 0.8, 0.0))
        assert warmed.rejections == {1: 100}

    def test_goes_on_from_its_state_with_the_same_verdicts(self):
        first, second = warm(server()), server()
        second.load_state_dict(first.state_dict())
        for one in (first, second):
            receive(one, push(7.0, 0.0, 0.0))
            receive(one, push(20.0, 0.0, 0.0, worker=2))
        assert first.rejections == second.rejections == {2: 1}
        assert torch.equal(first.model, second.model)

    def test_names_a_worker_that_is_dropped_again_and_again_at_doubling_counts(self, caplog):
        one = server(describe="rank {} (region eu)".format)
        with caplog.at_level(logging.WARNING):
            for _ in range(30):
                receive(one, push(float("nan"), 0.0, 0.0, worker=2))
                receive(one, push(1.0, 0.0, 0.0, worker=1))
        said = [record.getMessage() for record in caplog.records]
        assert [text.split(" were all rejected, this one because it has NaN")[0] for text in said[2:]] == [
            f"The last {count} updates of rank 2 (region eu)" for count in (3, 6, 12, 24)
        ]
        assert all("clip gradients" in text for text in said[2:])
        assert [text.startswith("The update of rank 2 (region eu) was rejected") for text in said[:2]] == [True, True]

    def test_counts_in_a_row_from_the_last_good_update(self, caplog):
        one = server()
        for values in ((float("nan"),) * 3, (1.0, 0.0, 0.0)) * 2 + ((float("nan"),) * 3,):
            receive(one, push(*values))
        assert one.rejected == 3
        assert "were all rejected" not in caplog.text


class TestInspect:
    @pytest.mark.parametrize(
        "parts", [None, [PART, 2 * PART, 2 * PART + 70], [5, PART + 1, 2 * PART + 60, 2 * PART + 70]]
    )
    def test_the_norm_is_that_of_the_parameters_in_however_many_parts_they_come(self, parts):
        size = 2 * PART + 60
        vector = torch.randn(size + 10, generator=torch.Generator().manual_seed(0))
        one = LocalServer(0, torch.zeros(size + 10), plain_sgd, 1, 0.5, shapes=[torch.Size([size])])
        fault, norm, _ = one.inspect(vector, parts)
        assert fault is None
        assert norm == pytest.approx(float(vector[:size].double().norm()), rel=1e-4)

    @pytest.mark.parametrize("place", [0, PART, 2 * PART - 1, 2 * PART + 5])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_finds_what_is_not_finite_anywhere(self, place, value):
        vector = torch.zeros(2 * PART + 10)
        vector[place] = value
        one = LocalServer(0, torch.zeros(2 * PART + 10), plain_sgd, 1, 0.5, shapes=[torch.Size([2 * PART])])
        assert one.inspect(vector, [PART, 2 * PART + 3, 2 * PART + 10]).fault == "it has NaN or infinite values"
