import torch

from lightning_halos.core.messages import Pull
from lightning_halos.core.worker import WorkerRound


def pull(version=0, local_steps=8, position=0, stop=False):
    return Pull(version, local_steps, position, stop)


def test_a_round_is_over_when_it_has_its_local_steps():
    round_ = WorkerRound(0, local_steps=2)
    assert not round_.over
    round_.count(steps=1, seconds=1.0)
    assert not round_.over
    round_.count(steps=1, seconds=1.0)
    assert round_.over


def test_batches_inside_an_accumulation_window_take_time_but_are_no_steps():
    round_ = WorkerRound(0, local_steps=1)
    round_.count(steps=0, seconds=1.0)
    assert not round_.has_steps
    assert not round_.over
    round_.count(steps=1, seconds=1.5)
    assert round_.has_steps
    assert round_.over
    push = round_.push(torch.zeros(1))
    assert (push.steps, push.batches, push.seconds) == (1, 1, 2.5)


def test_several_optimizers_in_a_batch_count_as_several_steps_of_one_batch():
    round_ = WorkerRound(0, local_steps=2)
    round_.count(steps=2, seconds=1.0)
    assert not round_.over
    round_.count(steps=2, seconds=1.0)
    assert round_.over
    push = round_.push(None)
    assert (push.steps, push.batches) == (4, 2)


def test_a_push_says_whose_it_is_what_it_started_from_and_how_long_the_worker_waited():
    round_ = WorkerRound(3, local_steps=1)
    round_.receive(pull(version=17), waited=0.25)
    round_.count(steps=1, seconds=1.0)
    vector = torch.zeros(1)
    push = round_.push(vector, stop=True, final=True)
    assert (push.worker, push.version, push.waited, push.stop, push.final) == (3, 17, 0.25, True, True)
    assert push.vector is vector


def test_rounds_are_numbered_from_1():
    round_ = WorkerRound(0, local_steps=1)
    numbers = []
    for _ in range(3):
        numbers.append(round_.push(None).number)
        round_.receive(pull(), waited=0.0)
    assert numbers == [1, 2, 3]


def test_the_next_round_starts_from_nothing():
    round_ = WorkerRound(0, local_steps=1)
    round_.count(steps=1, seconds=1.0)
    round_.push(None)
    round_.receive(pull(local_steps=3, position=5), waited=0.0)
    assert (round_.batches, round_.position, round_.has_steps) == (0, 5, False)
    for over in (False, False, True):
        round_.count(steps=1, seconds=0.5)
        assert round_.over is over
    push = round_.push(None)
    assert (push.steps, push.batches, push.seconds) == (3, 3, 1.5)
    assert round_.total_steps == 4


def test_the_global_step_is_estimated_at_the_rate_of_the_round_before():
    round_ = WorkerRound(0, local_steps=4, position=10)
    round_.count(steps=1, seconds=1.0)
    assert round_.global_step == 11  # one per batch in the first round
    round_.count(steps=1, seconds=1.0)
    round_.push(None)
    round_.receive(pull(position=15), waited=0.0)  # 5 global steps in 2 batches
    assert round_.rate == 2.5
    assert [round_.global_step, *(round_.count(1, 1.0) or round_.global_step for _ in range(2))] == [15, 17, 20]


def test_a_round_without_a_step_keeps_the_rate():
    round_ = WorkerRound(0, local_steps=4)
    round_.rate = 2.0
    round_.receive(pull(position=9), waited=0.0)
    assert round_.rate == 2.0


def test_the_servers_stop_the_worker():
    round_ = WorkerRound(0, local_steps=1)
    assert not round_.stopped
    round_.receive(pull(stop=True), waited=0.0)
    assert round_.stopped


class TestTrainingOn:
    """A worker that starts its next round before its push is answered."""

    def test_the_next_round_counts_from_nothing_and_the_answer_keeps_what_it_has(self):
        round_ = WorkerRound(0, local_steps=2)
        round_.count(2, 1.0)
        round_.count(1, 1.0)
        first = round_.push(None)
        round_.train_on()
        assert not round_.is_answered
        round_.count(1, 0.5)
        round_.receive(pull(version=3, local_steps=2, position=6), waited=0.25)
        assert round_.is_answered
        assert not round_.over
        round_.count(1, 0.5)
        assert round_.over
        second = round_.push(None)
        assert [(p.steps, p.batches, p.seconds, p.waited, p.version) for p in (first, second)] == [
            (3, 2, 2.0, 0.0, None),
            (2, 2, 1.0, 0.25, 3),
        ]
        assert round_.total_steps == 5

    def test_an_answer_says_how_long_the_round_is_that_has_begun(self):
        round_ = WorkerRound(0, local_steps=4)
        round_.count(1, 1.0)
        round_.push(None)
        round_.train_on()
        round_.count(1, 1.0)
        round_.count(1, 1.0)
        assert not round_.over
        round_.receive(pull(local_steps=1), waited=0.0)
        assert round_.over

    def test_the_global_step_goes_on_from_the_push_and_not_from_the_answer(self):
        round_ = WorkerRound(0, local_steps=2, position=10)
        for _ in range(2):
            round_.count(1, 1.0)
        round_.push(None)
        round_.train_on()
        round_.count(1, 1.0)
        assert round_.global_step == 13  # nothing new is known
        round_.receive(pull(position=14), waited=0.0)  # 4 global steps in the 2 batches of the push
        assert (round_.rate, round_.position, round_.since) == (2.0, 16, 0)
        round_.count(1, 1.0)
        assert round_.global_step == 18

    def test_the_rate_is_that_between_two_answers(self):
        round_ = WorkerRound(0, local_steps=2)
        for position in (4, 8, 12):
            for _ in range(2):
                round_.count(1, 1.0)
            round_.push(None)
            round_.train_on()
            round_.count(1, 1.0)
            round_.receive(pull(position=position, local_steps=2), waited=0.0)
            round_.count(1, 1.0)
            round_.push(None)
            round_.train_on()
            round_.receive(pull(position=position + 2, local_steps=2), waited=0.0)
        assert round_.rate == 1.0

    def test_no_worker_takes_more_than_its_share_of_what_is_left_without_an_answer(self):
        round_ = WorkerRound(0, local_steps=4, share=4)
        for _ in range(4):
            assert not round_.over
            round_.count(1, 1.0)
        assert round_.over
        round_.push(None)
        round_.train_on()
        assert round_.over  # not a step before it knows how many are left
        round_.receive(Pull(1, 4, 4, False, share=6), waited=0.0)
        for _ in range(4):
            assert not round_.over
            round_.count(1, 1.0)
        round_.push(None)
        round_.train_on()
        for _ in range(2):
            assert not round_.over
            round_.count(1, 1.0)
        assert round_.over
