import heapq
import random

import pytest

from lightning_halos.core.schedule import RoundPlanner, StepBudget, dynamic_local_steps, global_step, next_count


class TestDynamicLocalSteps:
    @pytest.mark.parametrize(
        ("speed", "steps"), [(1.0, 8), (0.99, 8), (0.875, 7), (0.5, 4), (0.126, 2), (0.125, 1), (0.001, 1)]
    )
    def test_are_proportional_to_speed_rounded_up_and_at_least_one(self, speed, steps):
        assert dynamic_local_steps(8, speed, 1.0) == steps
        assert dynamic_local_steps(8, speed * 4, 4.0) == steps  # only the ratio counts

    def test_of_the_fastest_are_all_whatever_its_speed(self):
        draw = random.Random(0)
        for _ in range(20_000):
            local_steps, speed = draw.randint(1, 100), draw.uniform(0.01, 50)
            assert dynamic_local_steps(local_steps, speed, speed) == local_steps


class TestStepBudget:
    def test_position_is_local_steps_per_worker_rounded_down(self):
        assert [StepBudget(4, total=total).position for total in (0, 3, 4, 9)] == [0, 0, 1, 2]

    def test_position_never_exceeds_max_steps(self):
        assert StepBudget(4, max_steps=10, total=47).position == 10

    def test_is_exhausted_when_all_workers_together_have_max_steps_each(self):
        assert not StepBudget(4, max_steps=10, total=39).exhausted
        assert StepBudget(4, max_steps=10, total=40).exhausted

    def test_without_limit_is_never_exhausted(self):
        assert not StepBudget(4, total=10**9).exhausted
        assert global_step(10**9, 4, None) == 10**9 // 4

    def test_of_zero_steps_is_exhausted_from_the_start(self):
        assert StepBudget(4, max_steps=0).exhausted


class TestRoundPlanner:
    def planner(self, speeds=(), **options):
        planner = RoundPlanner(**{"local_steps": 8, "dynamic": True, "workers": 4} | options)
        for worker, speed in enumerate(speeds):
            planner.measure(worker, steps=speed, seconds=1.0)
        return planner

    def test_gives_everybody_all_local_steps_before_the_first_measurement(self):
        planner = self.planner()
        assert planner.fastest == planner.fastest_here == 0
        assert [planner.local_steps(worker, total=0) for worker in range(4)] == [8] * 4

    def test_gives_slower_workers_fewer(self):
        planner = self.planner(speeds=(4, 2, 1))
        assert [planner.local_steps(worker, total=0) for worker in range(4)] == [8, 4, 2, 8]  # worker 3: not measured

    def test_gives_everybody_all_if_not_dynamic(self):
        planner = self.planner(speeds=(4, 2, 1), dynamic=False)
        assert [planner.local_steps(worker, total=0) for worker in range(3)] == [8, 8, 8]

    def test_compares_with_the_fastest_of_all_regions(self):
        planner = self.planner(speeds=(4, 2))
        planner.set_fastest_overall(8.0)
        assert [planner.local_steps(worker, total=0) for worker in range(2)] == [4, 2]
        assert (planner.fastest, planner.fastest_here) == (8.0, 4)

    def test_forgets_a_fastest_worker_elsewhere_that_became_slower(self):
        planner = self.planner(speeds=(4,))
        planner.set_fastest_overall(8.0)
        planner.set_fastest_overall(2.0)
        assert planner.fastest == 4

    def test_halves_the_effect_of_one_odd_round_and_follows_a_lasting_change(self):
        planner = self.planner(speeds=(16,))
        planner.measure(0, steps=8, seconds=1.0)
        assert planner.fastest == 12
        for _ in range(10):
            planner.measure(0, steps=8, seconds=1.0)
        assert planner.fastest == pytest.approx(8, rel=0.01)

    @pytest.mark.parametrize(("steps", "seconds"), [(0, 1.0), (8, 0.0), (0, 0.0)])
    def test_learns_nothing_from_a_round_without_steps_or_time(self, steps, seconds):
        planner = self.planner(speeds=(4,))
        planner.measure(0, steps, seconds)
        planner.measure(1, steps, seconds)
        assert planner.fastest == 4
        assert planner.local_steps(1, total=0) == 8

    @pytest.mark.parametrize(
        ("total", "steps"), [(0, 8), (4 * 92, 8), (4 * 95, 5), (4 * 99 - 1, 2), (4 * 99, 1), (4 * 100, 1), (999, 1)]
    )
    def test_gives_nobody_more_than_its_share_of_what_remains_but_at_least_one(self, total, steps):
        assert self.planner(max_steps=100).local_steps(0, total) == steps

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_ends_a_run_less_than_one_round_of_each_worker_beyond_the_budget_and_closer_with_short_last_rounds(
        self, dynamic
    ):
        short, full = 0.0, 0.0
        for seed in range(30):
            draw = random.Random(seed)
            speeds = [draw.uniform(0.1, 1.0) for _ in range(draw.choice([4, 16]))]
            max_steps = draw.randint(20, 200)
            beyond = beyond_the_budget(RoundPlanner(8, dynamic, len(speeds), max_steps), speeds, max_steps)
            assert 0 <= beyond < 8
            short += beyond
            full += beyond_the_budget(RoundPlanner(8, dynamic, len(speeds)), speeds, max_steps)
        assert short < 0.8 * full

    def test_ends_a_run_of_one_worker_exactly_at_the_budget(self):
        assert beyond_the_budget(RoundPlanner(8, True, 1, max_steps=21), [0.3], 21) == 0


def beyond_the_budget(planner, speeds, max_steps):
    """Runs workers of these speeds until the budget is exhausted; returns the local steps too many, per worker."""
    budget = StepBudget(len(speeds), max_steps)
    rounds = [(8 / speed, worker, 8) for worker, speed in enumerate(speeds)]
    heapq.heapify(rounds)
    while rounds:
        now, worker, steps = heapq.heappop(rounds)
        budget.total += steps
        planner.measure(worker, steps, steps / speeds[worker])
        if not budget.exhausted:
            steps = planner.local_steps(worker, budget.total)
            heapq.heappush(rounds, (now + steps / speeds[worker], worker, steps))
    return budget.total / len(speeds) - max_steps


class TestNextCount:
    """Lightning acts when its counter is a multiple of a period; the global step grows by more than one at a time."""

    def cases(self):
        draw = random.Random(0)
        for _ in range(2000):
            shown = draw.randint(0, 300)
            periods = [draw.choice([1, 2, 5, 7, 10, 50, 100]) for _ in range(draw.randint(0, 4))]
            yield shown, shown + draw.randint(0, 120), periods

    @pytest.mark.parametrize(
        ("shown", "target", "periods", "expected"),
        [
            (3, 9, [10], 9),  # nothing in the way
            (8, 13, [10], 10),  # stops there first
            (10, 13, [10], 13),  # and goes on
            (8, 10, [10], 10),
            (8, 35, [10], 30),  # of several, the last: the counter must not fall ever further behind
            (8, 13, [10, 12], 10),
            (10, 13, [10, 12], 12),
            (3, 9, [1], 9),
            (3, 9, [], 9),
            (9, 9, [3], 9),
            (9, 5, [2], 9),  # never back
        ],
    )
    def test_is_the_target_or_a_multiple_before_it(self, shown, target, periods, expected):
        assert next_count(shown, target, periods) == expected

    def test_reaches_the_target_and_on_the_way_a_multiple_of_every_period_that_has_one_there(self):
        for shown, target, periods in self.cases():
            visited = [shown]
            while visited[-1] < target:
                visited.append(next_count(visited[-1], target, periods))
                assert visited[-2] < visited[-1] <= target  # moves at every call
            for period in periods:
                if target // period > shown // period:
                    assert any(count % period == 0 for count in visited[1:]), (visited, period)

    def test_is_behind_by_less_than_the_longest_period(self):
        for shown, target, periods in self.cases():
            assert target - next_count(shown, target, periods) < max(periods, default=1)

    def test_stands_still_if_the_target_is_behind(self):
        for shown, target, periods in self.cases():
            assert next_count(target, shown, periods) == target


def test_known_steps_are_few_until_a_speed_is_known():
    planner = RoundPlanner(8, dynamic=True, workers=2)
    assert planner.known_steps(1) == 1
    planner.measure(0, 8, 1.0)
    planner.measure(1, 8, 4.0)
    assert (planner.known_steps(0), planner.known_steps(1)) == (8, 2)
