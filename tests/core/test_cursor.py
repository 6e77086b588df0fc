"""One cursor over the data: every part is leased once per epoch, and no worker waits for it."""

import random

import pytest

from lightning_halos.core.cursor import DataCursor, Lease, LeaseStock, Spans, split


def parts(leases):
    """Every (epoch, step) that leases hold."""
    return [(lease.epoch, lease.first + step) for lease in leases for step in range(lease.steps)]


def take_all(cursor, steps, sharers=1):
    return list(iter(lambda: cursor.take(steps, sharers), None))


@pytest.mark.parametrize(("size", "steps", "sharers"), [(10, 3, 1), (10, 10, 1), (10, 64, 4), (7, 2, 3), (1, 5, 2)])
def test_every_part_of_every_epoch_is_handed_out_once_and_in_order(size, steps, sharers):
    leases = take_all(DataCursor(size, epochs=3), steps, sharers)
    assert parts(leases) == [(epoch, step) for epoch in range(3) for step in range(size)]
    assert all(0 < lease.steps <= steps for lease in leases)


def test_no_range_belongs_to_two_epochs():
    assert take_all(DataCursor(5, epochs=2), 3)[:3] == [Lease(0, 0, 3), Lease(0, 3, 2), Lease(1, 0, 3)]


def test_a_later_fit_begins_where_the_data_was():
    assert DataCursor(5, epochs=4, done=Spans([(0, 10)])).take(3) == Lease(2, 0, 3)
    assert DataCursor(5, epochs=4, done=Spans([(0, 13)])).take(3) == Lease(2, 3, 2)
    assert DataCursor(5, epochs=2, done=Spans([(0, 10)])).take(3) is None


def test_what_is_done_is_not_handed_out():
    done = Spans([(0, 4), (6, 7), (10, 13), (19, 20)])
    leases = take_all(DataCursor(10, epochs=2, done=done), 4)
    assert parts(leases) == [(0, 4), (0, 5), (0, 7), (0, 8), (0, 9), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8)]


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_the_union_of_what_was_added(seed):
    dice = random.Random(seed)
    spans, expected = Spans(), set()
    for _ in range(30):
        start = dice.randrange(60)
        stop = start + dice.randint(1, 8)
        spans.add([(start, stop)])
        expected |= set(range(start, stop))
    assert {step for start, stop in spans for step in range(start, stop)} == expected
    assert all(stop < start for (_, stop), (start, _) in zip(list(spans), list(spans)[1:], strict=False))
    for first in range(70):
        start, stop = spans.missing(first)
        assert start == min(step for step in range(first, 200) if step not in expected)
        assert stop == min([step for step in expected if step > start], default=float("inf"))


def test_without_epochs_there_is_no_end():
    cursor = DataCursor(5)
    assert [cursor.take(5) for _ in range(1000)][-1] == Lease(999, 0, 5)


def test_towards_the_end_all_sharers_get_something():
    leases = take_all(DataCursor(64, epochs=1), 32, sharers=4)
    assert [lease.steps for lease in leases][:4] == [8, 7, 7, 6]
    assert leases[-1].steps == 1


def test_split_divides_at_the_ends_of_epochs():
    assert list(split(8, 15, 10)) == [Lease(0, 8, 2), Lease(1, 0, 10), Lease(2, 0, 3)]
    assert list(split(8, 0, 10)) == []


class TestStock:
    def test_orders_before_anybody_asks_and_again_when_it_runs_low(self):
        stock = LeaseStock(ahead=8)
        assert (stock.order(), stock.order()) == (8, 0)  # one order at a time
        stock.add(Lease(0, 0, 8))
        assert stock.order() == 0
        stock.ask(3, 2)
        assert stock.serve() == [(3, Lease(0, 0, 2))]
        assert stock.order() == 8

    def test_serves_in_the_order_of_asking_once_there_is_data(self):
        stock = LeaseStock(ahead=8)
        stock.ask(1, 4)
        stock.ask(0, 4)
        assert stock.serve() == []
        stock.add(Lease(0, 0, 6))
        assert stock.serve() == [(1, Lease(0, 0, 4)), (0, Lease(0, 4, 2))]

    def test_orders_more_if_workers_had_to_wait(self):
        stock = LeaseStock(ahead=8)
        stock.ask(0, 1)
        assert stock.order() == 8
        stock.add(Lease(0, 0, 8))  # for the first order somebody always waits
        stock.serve()
        assert stock.order() == 8
        stock.add(Lease(0, 8, 8))
        for _ in range(2):
            stock.ask(0, 15)
        stock.serve()
        assert stock.order() == 8
        stock.ask(0, 1)
        stock.serve()
        stock.ask(1, 1)
        stock.add(Lease(0, 16, 8))
        stock.serve()
        assert stock.order() == 16

    def test_says_when_there_is_no_more(self):
        stock = LeaseStock(ahead=8)
        stock.add(Lease(0, 0, 1))
        stock.add(None)
        for worker in range(3):
            stock.ask(worker, 4)
        assert stock.serve() == [(0, Lease(0, 0, 1)), (1, None), (2, None)]
        assert stock.order() == 0

    @pytest.mark.parametrize("seed", range(20))
    def test_several_regions_share_a_cursor_whatever_their_speeds(self, seed):
        """Workers of three regions ask in a random order, and orders arrive late: each part is used once, by one."""
        dice = random.Random(seed)
        size, epochs = dice.randint(1, 50), dice.randint(1, 4)
        cursor = DataCursor(size, epochs)
        stocks = [LeaseStock(ahead=dice.randint(1, 12)) for _ in range(3)]
        under_way, got, ended = [], {}, set()
        asking = {(region, worker) for region in range(3) for worker in range(2)}
        while len(ended) < 6:
            region = dice.randrange(3)
            if under_way and dice.random() < 0.5:
                region, steps = under_way.pop(dice.randrange(len(under_way)))
                stocks[region].add(cursor.take(steps, sharers=3))
            elif ready := sorted(pair for pair in asking if pair[0] == region):
                pair = dice.choice(ready)
                asking.remove(pair)
                stocks[region].ask(pair[1], dice.randint(1, 4))
            for worker, lease in stocks[region].serve():
                if lease is None:
                    ended.add((region, worker))
                else:
                    got.setdefault((region, worker), []).append(lease)
                    asking.add((region, worker))
            if steps := stocks[region].order():
                under_way.append((region, steps))
        assert sorted(part for leases in got.values() for part in parts(leases)) == [
            (epoch, step) for epoch in range(epochs) for step in range(size)
        ]
        for leases in got.values():
            assert parts(leases) == sorted(parts(leases))  # a worker's epochs follow each other
