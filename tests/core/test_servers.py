import logging
import math
import random
from functools import partial

import pytest
import torch

from lightning_halos.core.delayed_nesterov import DelayedNesterov
from lightning_halos.core.global_server import GlobalServer, SynchronousServer
from lightning_halos.core.local_server import LocalServer, unsent_update
from lightning_halos.core.messages import GlobalModel, Push, RegionUpdate
from lightning_halos.core.parameter_server import all_finite

from .receiving import receive

plain_sgd = partial(torch.optim.SGD, lr=1.0)  # the model minus the update: numbers that can be read


def local_server(model=(0.0, 0.0), optimizer=plain_sgd, k=2, alpha=0.5, **options):
    return LocalServer(1, torch.tensor(model), optimizer, accumulate_updates=k, merge_weight=alpha, **options)


def global_server(model=(0.0, 0.0), optimizer=plain_sgd, **options):
    return GlobalServer(torch.tensor(model), optimizer, **options)


def push(*values, worker=0, version=0, steps=8, number=0):
    return Push(worker, version, steps, batches=steps, seconds=1.0, vector=torch.tensor(values), number=number)


def update(*values, server=0, version=0, steps=16, final=False):
    return RegionUpdate(server, version, steps, final, vector=torch.tensor(values))


def answer(*values, version=1):
    return GlobalModel(version, vector=torch.tensor(values))


def optimizer_state(server):
    return [
        {name: torch.as_tensor(value).clone() for name, value in state.items()}
        for state in server._optimizer.state.values()
    ]


class TestLocalServer:
    def test_applies_a_push_at_once_and_answers_with_its_model_in_the_memory_of_the_push(self):
        server = local_server(model=(10.0, 20.0))
        message = push(1.0, 2.0)
        model, sent = receive(server, message)
        assert model is message.vector
        assert model.tolist() == server.model.tolist() == [9, 18]
        assert server.version == 1
        assert sent is None

    def test_answers_with_a_copy_that_later_pushes_do_not_change(self):
        server = local_server()
        first, _ = receive(server, push(1.0, 1.0))
        receive(server, push(1.0, 1.0))
        assert first.tolist() == [-1, -1]

    def test_sends_what_has_accumulated_after_k_applied_pushes(self):
        server = local_server(model=(10.0, 20.0), k=3)
        sent = [receive(server, push(1.0, 2.0, steps=steps))[1] for steps in (8, 4, 2)]
        assert sent[:2] == [None, None]
        assert sent[2].vector.tolist() == [3, 6]
        assert (sent[2].server, sent[2].version, sent[2].steps, sent[2].final) == (1, 0, 14, False)
        assert server.exchanging

    def test_serves_but_does_not_send_again_while_the_exchange_is_unanswered(self):
        server = local_server(k=2)
        sent = [receive(server, push(1.0, 0.0))[1] for _ in range(7)]
        assert [message is not None for message in sent] == [False, True, False, False, False, False, False]
        assert server.model.tolist() == [-7, 0]
        assert sent[1].vector.tolist() == [2, 0]  # what was sent stays what it was

    def test_merges_the_global_model_by_its_weight(self):
        server = local_server(k=1, alpha=0.25)
        receive(server, push(-8.0, 4.0))
        server.merge(answer(100.0, 200.0))
        assert server.model.tolist() == [0.75 * 8 + 0.25 * 100, 0.75 * -4 + 0.25 * 200]
        assert not server.exchanging
        assert server.merges == 1
        assert server.version == 1  # a merge is no update

    @pytest.mark.parametrize(("alpha", "expected"), [(0.0, [8.0]), (1.0, [100.0])])
    def test_a_merge_may_ignore_or_replace_its_model(self, alpha, expected):
        server = local_server((0.0,), k=1, alpha=alpha)
        receive(server, push(-8.0))
        server.merge(answer(100.0))
        assert server.model.tolist() == expected

    def test_counts_the_next_k_from_the_merge_and_sends_what_was_added_to_the_merged_model(self):
        server = local_server(k=2, alpha=0.5)
        for _ in range(5):  # one exchange, and three more pushes while it is unanswered
            receive(server, push(1.0, 0.0, steps=1))
        server.merge(answer(-1.0, 0.0, version=7))
        assert receive(server, push(1.0, 2.0, steps=10))[1] is None
        sent = receive(server, push(1.0, 2.0, steps=10))[1]
        assert sent.vector.tolist() == [2, 4]
        assert sent.version == 7
        assert sent.steps == 3 + 20  # no step is forgotten

    def test_staleness_is_the_versions_between_pull_and_push(self):
        server = local_server(k=9)
        receive(server, push(1.0, 0.0, version=0))
        assert server.staleness == 0
        receive(server, push(1.0, 0.0, version=1))
        receive(server, push(1.0, 0.0, version=0))
        assert server.staleness == 2


class TestFlush:
    def test_holds_what_was_added_since_the_merge(self):
        server = local_server(k=2)
        receive(server, push(1.0, 1.0))
        receive(server, push(1.0, 1.0))
        server.merge(answer(5.0, 5.0, version=3))
        receive(server, push(1.0, 2.0, steps=4))
        last = server.flush(stop=True)
        assert last.vector.tolist() == [1, 2]
        assert (last.version, last.steps, last.final, last.stop) == (3, 4, True, True)

    def test_holds_only_what_the_unanswered_exchange_does_not(self):
        server = local_server(k=4)
        sent = [receive(server, push(1.0, 0.0, steps=steps))[1] for steps in (1, 2, 4, 8, 16, 32)]
        last = server.flush()
        assert (sent[3].vector.tolist(), sent[3].steps) == ([4, 0], 15)
        assert (last.vector.tolist(), last.steps) == ([2, 0], 48)

    def test_counts_for_no_more_pushes_than_every_other_update_has(self):
        server = local_server(k=2)
        for _ in range(10):
            receive(server, push(1.0, 3.0, steps=1))
        unsent = unsent_update(0, server.state_dict())
        last = server.flush()
        assert (last.vector.tolist(), last.steps) == ([2, 6], 8)
        assert (unsent.vector.tolist(), unsent.steps) == ([2, 6], 8)

    def test_of_an_earlier_checkpoint_is_sent_in_full(self):
        server, resumed = local_server(k=2), local_server(k=2)
        for _ in range(6):
            receive(server, push(1.0, 0.0))
        state = {k: v for k, v in server.state_dict().items() if k not in ("base_version", "accumulate_updates")}
        resumed.load_state_dict(state)
        assert unsent_update(0, state).vector.tolist() == [4, 0]
        assert resumed.flush().vector.tolist() == [4, 0]

    def test_counts_for_its_pushes_since_the_last_merge(self):
        server = local_server(k=2, alpha=0.0)
        for _ in range(10):
            receive(server, push(1.0, 0.0))
        server.merge(answer(0.0, 0.0))
        receive(server, push(1.0, 0.0))
        assert server.flush().vector.tolist() == [1, 0]

    def test_is_empty_if_everything_was_sent(self):
        server = local_server(k=1)
        receive(server, push(1.0, 0.0))
        last = server.flush()
        assert (last.vector.tolist(), last.steps, last.final, last.stop) == ([0, 0], 0, True, False)

    @pytest.mark.parametrize("seed", range(20))
    def test_no_local_step_is_lost_whenever_the_answers_come(self, seed):
        draw = random.Random(seed)
        servers = [local_server(k=draw.randint(1, 4), alpha=draw.random()) for _ in range(3)]
        for index, server in enumerate(servers):
            server.index = index
        center = global_server(servers=3)
        traveling, done = [], 0
        for _ in range(200):
            if traveling and draw.random() < 0.2:
                sent = traveling.pop(draw.randrange(len(traveling)))
                servers[sent.server].merge(center.receive(sent))
            steps = draw.randint(0, 8)
            done += steps
            # One in ten is dropped: its steps were done all the same.
            message = push(draw.choice([0.1] * 9 + [float("nan")]), 0.0, steps=steps)
            sent = receive(draw.choice(servers), message)[1]
            traveling += [sent] if sent else []
        for sent in traveling + [server.flush() for server in servers]:
            center.receive(sent)
        assert center.steps == done

    @pytest.mark.parametrize("seed", range(20))
    def test_no_update_is_lost_or_sent_twice_if_no_push_comes_during_an_exchange_but_the_last(self, seed):
        draw = random.Random(seed)
        server, center = local_server(k=3), global_server()
        pushes = [draw.randint(-9, 9) for _ in range(20)]
        for number, value in enumerate(pushes):
            sent = receive(server, push(float(value), 0.0))[1]
            if sent is not None:
                reply = center.receive(sent)
                if number < 16:
                    server.merge(reply)
        assert server.exchanging
        center.receive(server.flush())
        assert center.model.tolist() == [-sum(pushes), 0]


NOT_FINITE = "it has NaN or infinite values"
BAD_VECTORS = {
    "too short": (torch.zeros(3), "its shape is (3,), the model's is (4,)"),
    "too long": (torch.zeros(5), "its shape is (5,), the model's is (4,)"),
    "another shape": (torch.zeros(2, 2), "its shape is (2, 2), the model's is (4,)"),
    "another dtype": (torch.zeros(4, dtype=torch.float64), "its dtype is torch.float64, the model's is torch.float32"),
    "NaN": (torch.tensor([1.0, torch.nan, 1.0, 1.0]), NOT_FINITE),
    "infinity": (torch.tensor([1.0, torch.inf, 1.0, 1.0]), NOT_FINITE),
    "both infinities": (torch.tensor([-torch.inf, torch.inf, 1.0, 1.0]), NOT_FINITE),
    "NaN in a buffer": (torch.tensor([1.0, 1.0, 1.0, torch.nan]), NOT_FINITE),
}


def bad_push(kind):
    return Push(5, 0, 8, 8, 1.0, vector=BAD_VECTORS[kind][0].clone())


class TestRejection:
    @pytest.fixture
    def server(self):
        options = {"optimizer": partial(torch.optim.Adam, lr=0.5), "shapes": [torch.Size([3])]}
        server = local_server((1.0, 2.0, 3.0, 4.0), k=3, **options)
        receive(server, push(1.0, 1.0, 1.0, 8.0))
        return server

    @pytest.mark.parametrize("kind", BAD_VECTORS)
    def test_changes_nothing(self, server, kind):
        model, state, version = server.model.clone(), optimizer_state(server), server.version
        receive(server, bad_push(kind))
        assert torch.equal(server.model, model)
        assert server.version == version
        after = optimizer_state(server)
        assert [s.keys() for s in after] == [s.keys() for s in state]
        assert state
        assert all(torch.equal(a[name], b[name]) for a, b in zip(after, state, strict=True) for name in a)

    @pytest.mark.parametrize("kind", BAD_VECTORS)
    def test_gives_the_worker_the_model_of_the_server(self, server, kind):
        model, _ = receive(server, bad_push(kind))
        assert torch.equal(model, server.model)
        assert model.dtype == server.model.dtype
        assert model.data_ptr() != server.model.data_ptr()

    @pytest.mark.parametrize("kind", BAD_VECTORS)
    def test_is_counted_and_warned_about_by_name(self, server, kind, caplog):
        with caplog.at_level(logging.WARNING):
            receive(server, bad_push(kind))
        assert server.rejected == 1
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"update of worker 5 was rejected: {BAD_VECTORS[kind][1]}" in record.getMessage()

    def test_does_not_count_towards_k(self, server):
        bad = [receive(server, push(torch.nan, 0.0, 0.0, 0.0))[1] for _ in range(5)]
        assert bad == [None] * 5
        assert receive(server, push(1.0, 0.0, 0.0, 0.0))[1] is None
        assert receive(server, push(1.0, 0.0, 0.0, 0.0))[1] is not None

    def test_leaves_the_staleness_of_the_last_applied_push(self, server):
        receive(server, push(1.0, 0.0, 0.0, 0.0, version=0))
        assert server.staleness == 1
        receive(server, push(torch.nan, 0.0, 0.0, 0.0, version=2))
        assert server.staleness == 1

    def test_later_pushes_give_what_they_would_have_given_without_it(self):
        servers = [local_server((1.0, 2.0), partial(DelayedNesterov, lr=0.5, delay=2), k=99) for _ in range(2)]
        torch.manual_seed(0)
        for number in range(8):
            values = torch.randn(2).tolist()
            for server in servers:
                receive(server, push(*values))
            if number % 3 == 0:
                receive(servers[0], push(torch.inf, 0.0))
        assert torch.equal(servers[0].model, servers[1].model)
        assert servers[0].rejected == 3

    def test_spares_huge_finite_values_whose_sum_overflows(self):
        server = local_server(optimizer=partial(torch.optim.SGD, lr=1e-30))
        receive(server, push(3e38, 3e38))
        assert server.rejected == 0
        torch.testing.assert_close(server.model, torch.tensor([-3e8, -3e8]))

    def test_of_a_region_names_its_local_server(self, caplog):
        server = global_server()
        reply = server.receive(update(torch.nan, 0.0, server=2))
        assert "update of the local server 2 was rejected" in caplog.text
        assert reply.vector.tolist() == [0, 0]
        assert (server.version, server.rejected, server.staleness) == (0, 1, 0)
        assert server.steps == 16  # the workers did them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_finite_is_exact(dtype):
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    good = torch.randn(1000, dtype=dtype)
    good[:3] = largest
    assert all_finite(good)
    assert all_finite(torch.zeros(0, dtype=dtype))
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 500, 999):
            bad = good.clone()
            bad[place] = value
            assert not all_finite(bad)


class TestState:
    """See also test_properties.py, where servers restart from their state at any moment."""

    def test_of_a_server_of_another_model_is_refused(self):
        with pytest.raises(
            ValueError, match=r"a model of 3 elements of torch.float32, but this server's model has 2 of"
        ):
            global_server().load_state_dict(global_server((0.0, 0.0, 0.0)).state_dict())

    def test_leaves_the_server_its_own_rates_and_restarts_the_windows_if_they_are_others(self):
        """A run that oscillates is resumed with a lower rate and less momentum."""
        before = local_server(optimizer=partial(DelayedNesterov, lr=0.4, momentum=0.9, delay=4))
        for _ in range(6):
            receive(before, push(1.0, 2.0))
        after = local_server(optimizer=partial(DelayedNesterov, lr=0.1, momentum=0.5, delay=2))
        after.load_state_dict(before.state_dict())
        (group,) = after._optimizer.param_groups
        assert (group["lr"], group["momentum"], group["delay"]) == (0.1, 0.5, 2)
        (new,), (old,) = optimizer_state(after), optimizer_state(before)
        assert torch.equal(new["momentum"], old["momentum"])
        assert (int(new["step"]), int(old["step"])) == (0, 6)

    def test_leaves_the_server_its_own_rates_whatever_the_signature_of_its_optimizer_says(self):
        class Wrapped(torch.optim.SGD):
            def __init__(self, params, **options):
                super().__init__(params, **options)

        before, after = (local_server(optimizer=partial(Wrapped, lr=lr)) for lr in (0.4, 0.1))
        receive(before, push(1.0, 2.0))
        after.load_state_dict(before.state_dict())
        assert after._optimizer.param_groups[0]["lr"] == 0.1

    def test_of_an_optimizer_with_state_among_its_arguments_goes_on(self):
        class Growing(torch.optim.SGD):
            """It counts its steps in its group, as schedule-free optimizers do."""

            def __init__(self, params, lr):
                super().__init__(params, lr)
                self.param_groups[0]["steps"] = 0

            def step(self, closure=None):
                self.param_groups[0]["steps"] += 1
                return super().step(closure)

        before, after = (local_server(optimizer=partial(Growing, lr=lr)) for lr in (0.4, 0.1))
        receive(before, push(1.0, 2.0))
        after.load_state_dict(before.state_dict())
        (group,) = after._optimizer.param_groups
        assert (group["lr"], group["steps"]) == (0.1, 1)

    def test_of_a_flushed_server_says_so(self):
        flushed, server = local_server(k=1), local_server(k=1)
        receive(flushed, push(1.0, 0.0))
        flushed.flush()
        server.load_state_dict(flushed.state_dict())
        assert not server.exchanging

    def test_of_a_server_that_flushed_while_it_waited_for_an_answer_has_nothing_to_send(self):
        flushed, server = local_server(k=2), local_server(k=2)
        for _ in range(5):
            receive(flushed, push(1.0, 0.0))
        flushed.flush()
        server.load_state_dict(flushed.state_dict())
        assert not server.is_due

    def test_of_the_only_server_of_a_finished_run_counts_no_steps_that_are_done(self):
        server = local_server(k=None)
        receive(server, push(1.0, 0.0, steps=8))
        server.adopt_final_model(server.model.clone())
        assert server.state_dict()["steps"] == 0


class TestBuffers:
    """Two parameters, then two buffers."""

    shapes = (torch.Size([2]),)

    def test_of_a_push_enter_with_the_share_of_one_worker(self):
        server = local_server((0.0, 0.0, 10.0, 20.0), shapes=self.shapes, workers=4)
        model, _ = receive(server, push(1.0, 2.0, 14.0, 12.0))
        assert model.tolist() == [-1, -2, 11, 18]

    def test_are_no_pseudo_gradients(self):
        server = local_server((0.0, 0.0, 10.0, 20.0), partial(DelayedNesterov, lr=1.0), shapes=self.shapes)
        receive(server, push(0.0, 0.0, 14.0, 12.0))
        assert server.model.tolist() == [0, 0, 14, 12]
        assert sum(p.numel() for group in server._optimizer.param_groups for p in group["params"]) == 2

    def test_travel_to_the_global_server_as_they_are(self):
        server = local_server((0.0, 0.0, 10.0, 20.0), k=1, shapes=self.shapes)
        _, sent = receive(server, push(1.0, 2.0, 14.0, 12.0))
        assert sent.vector.tolist() == [1, 2, 14, 12]
        assert server.flush().vector.tolist() == [0, 0, 14, 12]

    def test_are_averaged_by_the_global_server_over_the_local_servers(self):
        server = global_server((0.0, 0.0, 10.0, 20.0), shapes=self.shapes, servers=2)
        reply = server.receive(update(1.0, 2.0, 14.0, 12.0))
        assert reply.vector.tolist() == [-1, -2, 12, 16]

    def test_merge_like_parameters(self):
        server = local_server((0.0, 0.0, 10.0, 20.0), k=1, alpha=0.25, shapes=self.shapes)
        receive(server, push(0.0, 0.0, 10.0, 20.0))
        server.merge(answer(0.0, 4.0, 14.0, 20.0))
        assert server.model.tolist() == [0, 1, 11, 20]


class TestTeachers:
    """One parameter, then a teacher, then a buffer."""

    def local(self, **options):
        server = local_server((0.0, 10.0, 20.0), shapes=(torch.Size([1]),), **options)
        server.num_teachers = 1
        return server

    def test_move_as_far_as_their_workers_move_them_however_old_the_model_is_that_a_push_began_from(self):
        server = self.local(workers=2)
        for worker in (0, 1, 0, 1):
            receive(server, push(0.0, -1.0, 20.0, worker=worker))
        assert server.model.tolist() == [0, 12, 20]

    def test_travel_to_the_global_server_as_differences(self):
        server = self.local(k=1)
        _, sent = receive(server, push(1.0, -4.0, 14.0))
        assert sent.vector.tolist() == [1, -4, 14]
        assert server.flush().vector.tolist() == [0, 0, 14]

    def test_are_moved_by_the_mean_of_the_local_servers(self):
        server = global_server((0.0, 10.0, 20.0), shapes=(torch.Size([1]),), servers=2)
        server.num_teachers = 1
        assert server.receive(update(1.0, -4.0, 14.0)).vector.tolist() == [-1, 12, 17]

    def test_lose_nothing_of_pushes_during_an_exchange(self):
        server = self.local(k=1, alpha=0.25)
        receive(server, push(1.0, -4.0, 20.0))
        receive(server, push(1.0, -2.0, 20.0))
        server.merge(answer(0.0, 12.0, 20.0))
        assert server.model[1] == 15  # 16, and a quarter of the way to 12
        _, sent = receive(server, push(1.0, -1.0, 20.0))
        assert sent.vector.tolist() == [1, -3, 20]

    def test_are_in_the_last_update_in_full(self):
        server = self.local(k=1)
        for _ in range(4):
            receive(server, push(1.0, -1.0, 20.0))
        state = server.state_dict()
        assert server.flush().vector.tolist() == [1, -3, 20]  # the parameter for as many pushes as other updates have
        assert unsent_update(1, state, teachers=1).vector.tolist() == [1, -3, 20]

    def test_of_synchronous_rounds_are_the_mean_of_the_workers(self):
        server = SynchronousServer(torch.tensor([0.0, 10.0, 20.0]), plain_sgd, (torch.Size([1]),))
        server.num_teachers = 1
        mean = torch.tensor([1.0, -2.0, 14.0])
        server.receive(mean)
        assert mean.tolist() == [-1, 12, 14]


class TestServerOptimizer:
    @pytest.mark.parametrize(
        "optimizer",
        [
            partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
            partial(torch.optim.Adam, lr=0.1),
            partial(torch.optim.AdamW, lr=0.1, foreach=True),
            partial(DelayedNesterov, lr=0.2, momentum=0.9, delay=3),
        ],
        ids=lambda optimizer: optimizer.func.__name__,
    )
    @pytest.mark.parametrize("kind", ["local", "global"])
    def test_may_be_any_of_torch(self, optimizer, kind):
        torch.manual_seed(0)
        shapes = [torch.Size([2, 3]), torch.Size([]), torch.Size([4])]
        alone = [torch.randn(shape) for shape in shapes]
        model = torch.cat([p.flatten() for p in alone])
        if kind == "local":
            server = LocalServer(0, model, optimizer, accumulate_updates=99, merge_weight=0.5, shapes=shapes)
        else:
            server = GlobalServer(model, optimizer, shapes=shapes)
        reference = optimizer(alone)
        for _ in range(7):
            for parameter in alone:
                parameter.grad = torch.randn(parameter.shape)
            vector = torch.cat([p.grad.flatten() for p in alone])
            reference.step()
            receive(server, push(*vector.tolist())) if kind == "local" else server.receive(update(*vector.tolist()))
        torch.testing.assert_close(server.model, torch.cat([p.flatten() for p in alone]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("optimizer", [partial(DelayedNesterov, delay=2), partial(torch.optim.Adam, lr=0.1)])
    def test_steps_a_large_model_like_a_small_one(self, optimizer):
        torch.manual_seed(0)
        sizes = [2**20 + 3, 1, 2**19, 2**19, 2**20, 5]
        alone = [torch.randn(size) for size in sizes]
        model = torch.cat([*alone, torch.zeros(3)])  # and three elements of buffers
        server = LocalServer(0, model, optimizer, 99, 0.5, shapes=[p.shape for p in alone])
        reference = optimizer(alone)
        for number in range(3):
            for parameter in alone:
                parameter.grad = torch.randn(parameter.shape)
            vector = torch.cat([*(p.grad for p in alone), torch.full((3,), float(number))])
            reference.step()
            received, _ = receive(server, Push(0, 0, 1, 1, 1.0, vector=vector))
        assert torch.equal(server.model, torch.cat([*alone, torch.full((3,), 2.0)]))
        assert torch.equal(received, server.model)

    def test_sees_the_parameters_in_their_shapes(self):
        seen = []

        def factory(parameters):
            seen.extend(parameters)
            return plain_sgd(seen)

        shapes = [torch.Size([2, 3]), torch.Size([4])]
        GlobalServer(torch.zeros(12), factory, shapes=shapes)  # two elements of buffers
        assert [parameter.shape for parameter in seen] == shapes

    def test_keeps_no_memory_of_a_sender(self):
        server = local_server()
        receive(server, push(1.0, 1.0))
        assert all(p.grad is None for group in server._optimizer.param_groups for p in group["params"])


class TestGlobalServer:
    def test_applies_an_update_at_once_and_answers_with_its_model_in_the_memory_of_the_update(self):
        server = global_server((10.0, 20.0))
        message = update(1.0, 2.0)
        reply = server.receive(message)
        assert reply.vector is message.vector
        assert reply.vector.tolist() == server.model.tolist() == [9, 18]
        assert (reply.version, reply.final) == (1, False)

    def test_counts_the_local_steps_behind_all_updates(self):
        server = global_server()
        for steps in (16, 3, 5):
            server.receive(update(1.0, 1.0, steps=steps))
        assert server.steps == 24

    def test_staleness_is_the_versions_between_merge_and_arrival(self):
        server = global_server(servers=2)
        for version, staleness in ((0, 0), (0, 1), (2, 0), (1, 2)):
            server.receive(update(1.0, 1.0, version=version))
            assert server.staleness == staleness

    def test_a_last_update_without_local_steps_changes_nothing_not_even_by_momentum(self):
        server = global_server(optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9))
        server.receive(update(1.0, 1.0))
        before, state = server.model.clone(), optimizer_state(server)
        reply = server.receive(update(0.0, 0.0, steps=0, final=True))
        assert torch.equal(server.model, before)
        assert torch.equal(optimizer_state(server)[0]["momentum_buffer"], state[0]["momentum_buffer"])
        assert (server.version, reply.version) == (1, 1)
        assert torch.equal(reply.vector, before)


class TestSynchronousServer:
    def test_applies_the_mean_of_the_workers_and_gives_the_model_back(self):
        server = SynchronousServer(torch.zeros(3), partial(torch.optim.SGD, lr=0.5))
        mean = torch.tensor([1.0, 2.0, 4.0])
        server.receive(mean)
        assert server.model.tolist() == [-0.5, -1.0, -2.0]
        assert mean.tolist() == [-0.5, -1.0, -2.0]
        assert server.version == 1

    def test_buffers_are_those_of_the_workers(self):
        server = SynchronousServer(torch.zeros(4), partial(torch.optim.SGD, lr=1.0), [torch.Size([2])])
        server.receive(torch.tensor([1.0, 1.0, 5.0, 7.0]))
        assert server.model.tolist() == [-1.0, -1.0, 5.0, 7.0]

    def test_drops_what_would_poison_the_model(self, caplog):
        server = SynchronousServer(torch.ones(2), partial(torch.optim.SGD, lr=1.0))
        mean = torch.tensor([math.nan, 1.0])
        server.receive(mean)
        assert mean.tolist() == server.model.tolist() == [1.0, 1.0]
        assert (server.version, server.rejected) == (0, 1)
        assert "The update of all workers together was rejected" in caplog.text


def test_the_only_server_never_exchanges():
    server = LocalServer(0, torch.tensor([0.1, 0.2, 0.3]), partial(torch.optim.SGD, lr=0.3), None, 0.0)
    for _ in range(100):
        _, update = receive(server, push(0.01, -0.02, 0.03, steps=1))
        assert update is None
    assert not server.exchanges
    assert server.steps == 100
    assert server.state_dict()["base"] is None, "it needs no second copy of the model"
