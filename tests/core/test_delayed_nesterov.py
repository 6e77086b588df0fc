import io
import math
from itertools import pairwise

import pytest
import torch

from lightning_halos.core.delayed_nesterov import DelayedNesterov

LARGE = 300_007  # elements: several blocks, the last of them not full


def reference(p, grads, lr, momentum, delay, activation):
    """The formulas as documented, in float64. `lr`, `momentum` and `activation` may be lists: one value per update."""
    d, p = delay, p.double()
    m, total = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads):
        g = g.double()
        rate, beta, c = (x[t] if isinstance(x, list) else x for x in (lr, momentum, activation))
        total = total + g
        if (t + 1) % d != 0:
            p = p - rate * d * (c * beta * m + g / d)
        else:
            m = beta * m + total / d
            p = p - rate * d * ((1 - c * d + c) * beta * m + g / d)
            total = torch.zeros_like(p)
    return p


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape, seed=0, dtype=torch.float64):
    return torch.nn.Parameter(noise(*shape, seed=seed, dtype=dtype))


def gradients(updates, *shape, dtype=torch.float64):
    return [noise(*shape, seed=1 + t, dtype=dtype) for t in range(updates)]


def train(optimizer, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimizer.step()


def assert_agrees(actual, expected, tolerance=1e-12):
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def threads():
    """Sets the number of threads that torch uses; resets it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class TestFormula:
    def test_two_windows_worked_out_by_hand(self):
        p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = DelayedNesterov([p], lr=0.1, momentum=0.5, delay=2)
        path = []
        for _ in range(4):
            p.grad = torch.ones_like(p)
            optimizer.step()
            path.append(p.item())
        # 1 - 0.1;  m = 1: - 0.2 * (0.5 * 1 + 0.5);  - 0.1;  m = 1.5: - 0.2 * (0.5 * 1.5 + 0.5)
        assert path == pytest.approx([0.9, 0.7, 0.6, 0.35], abs=1e-15)

    @pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("spread", [0.0, 0.3, 1.0], ids=lambda s: f"c={s}/d")
    @pytest.mark.parametrize("delay", [1, 2, 3, 16])
    def test_hundreds_of_updates_agree_with_the_formulas(self, delay, spread, momentum):
        p, grads = parameter(50), gradients(400, 50)
        expected = reference(p.detach(), grads, 0.2, momentum, delay, spread / delay)
        train(DelayedNesterov([p], 0.2, momentum, delay, spread / delay), p, grads)
        assert_agrees(p, expected)

    @pytest.mark.parametrize("activation", [0.0, 0.1])
    @pytest.mark.parametrize("delay", [1, 4])
    def test_the_rate_may_change_between_updates_and_the_momentum_between_windows(self, delay, activation):
        p, grads = parameter(50), gradients(300, 50)
        values = {
            "lr": [0.2 * 0.99**t for t in range(300)],
            "momentum": [0.9 if t < 100 or t >= 160 else 0.0 if t < 120 else 0.5 for t in range(300)],
        }
        expected = reference(p.detach(), grads, delay=delay, activation=activation, **values)
        optimizer = DelayedNesterov([p], delay=delay, activation=activation)
        for t, g in enumerate(grads):
            optimizer.param_groups[0].update({name: value[t] for name, value in values.items()})
            train(optimizer, p, [g])
        assert_agrees(p, expected)

    def test_the_activation_may_change_between_windows(self):
        p, grads = parameter(50), gradients(80, 50)
        activations = [0.0 if t < 40 else 0.2 if t < 60 else 0.0 for t in range(80)]
        expected = reference(p.detach(), grads, 0.2, 0.9, 4, activations)
        optimizer = DelayedNesterov([p], delay=4)
        for g, activation in zip(grads, activations, strict=True):
            optimizer.param_groups[0]["activation"] = activation
            train(optimizer, p, [g])
        assert_agrees(p, expected)

    def test_a_learning_rate_scheduler_changes_the_rate_only(self):
        p, grads = parameter(50), gradients(100, 50)
        expected = reference(p.detach(), grads, [0.2 * 0.5 ** (t // 10) for t in range(100)], 0.9, 16, 0.0)
        optimizer = DelayedNesterov([p], lr=0.2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        for g in grads:
            train(optimizer, p, [g])
            scheduler.step()
        assert_agrees(p, expected)

    @pytest.mark.parametrize("activation", [0.0, 0.4, 1.0])
    def test_without_delay_it_is_nesterov_sgd_whatever_the_activation(self, activation):
        ours, theirs = parameter(50), parameter(50)
        grads = gradients(200, 50)
        train(DelayedNesterov([ours], lr=0.1, momentum=0.9, delay=1, activation=activation), ours, grads)
        train(torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True), theirs, grads)
        assert_agrees(ours, theirs.detach())

    @pytest.mark.parametrize(
        ("activation", "moved"),
        [(0.0, [0, 0, 0, 1.0]), (0.25, [0.5, 0.5, 0.5, 0.25]), (0.125, [0.25, 0.25, 0.25, 0.625])],
    )
    def test_the_activation_spreads_the_momentum_over_the_window(self, activation, moved):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = DelayedNesterov([p], lr=1.0, momentum=0.5, delay=4, activation=activation)
        train(optimizer, p, [torch.full_like(p, 1.0)] * 4)
        assert optimizer.state[p]["momentum"].item() == 1
        path = [p.item()]
        for _ in range(4):  # only the momentum moves the parameter now: 1, and 0.5 in the last update of the window
            train(optimizer, p, [torch.zeros_like(p)])
            path.append(p.item())
        assert [before - after for before, after in pairwise(path)] == moved


class TestTensors:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
    )
    @pytest.mark.parametrize("elements", [10, LARGE])
    def test_every_precision_agrees_with_the_formulas_as_far_as_it_goes(self, elements, dtype, tolerance):
        p, grads = parameter(elements, dtype=dtype), gradients(9, elements, dtype=dtype)
        expected = reference(p.detach(), grads, 0.05, 0.9, 4, 0.1)
        train(DelayedNesterov([p], lr=0.05, delay=4, activation=0.1), p, grads)
        assert p.dtype == dtype
        assert_agrees(p, expected, tolerance)

    @pytest.mark.parametrize("delay", [1, 3])
    @pytest.mark.parametrize("shape", [(LARGE,), (1, LARGE), (7, 5, 10_001)], ids=str)
    def test_a_large_parameter_gets_what_its_pieces_would_get(self, shape, delay):
        whole = parameter(*shape)
        grads = gradients(2 * delay + 1, *shape)
        pieces = [torch.nn.Parameter(piece.clone()) for piece in whole.detach().view(-1).split(10_000)]
        options = {"lr": 0.1, "delay": delay, "activation": 0.5 / delay}
        train(DelayedNesterov([whole], **options), whole, grads)
        optimizer = DelayedNesterov(pieces, **options)
        for g in grads:
            for piece, part in zip(pieces, g.view(-1).split(10_000), strict=True):
                piece.grad = part.clone()
            optimizer.step()
        assert_agrees(whole.view(-1), torch.cat([piece.detach() for piece in pieces]), 1e-15)

    def test_the_number_of_threads_does_not_change_a_bit(self, threads):
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            p = parameter(LARGE, dtype=torch.float32)
            train(DelayedNesterov([p], delay=2, activation=0.2), p, gradients(5, LARGE, dtype=torch.float32))
            results.append(p.detach())
        assert all(torch.equal(results[0], other) for other in results[1:])

    @pytest.mark.parametrize("size", [6, 600], ids=["small", "large"])
    @pytest.mark.parametrize(
        "layout", [lambda t: t.t(), lambda t: t.repeat_interleave(2, dim=1)[:, ::2]], ids=["transposed", "strided"]
    )
    def test_parameters_need_not_be_contiguous(self, layout, size):
        values, grads = noise(size, size), gradients(5, size, size)
        p = torch.nn.Parameter(layout(values.clone()))
        assert not p.is_contiguous()
        expected = reference(p.detach(), grads, 0.2, 0.9, 2, 0.3)
        train(DelayedNesterov([p], delay=2, activation=0.3), p, grads)
        assert_agrees(p, expected)

    def test_gradients_need_not_be_contiguous(self):
        p = parameter(600, 600)
        grads = [g.t() for g in gradients(5, 600, 600)]
        expected = reference(p.detach(), grads, 0.2, 0.9, 2, 0.0)
        optimizer = DelayedNesterov([p], delay=2)
        for g in grads:
            p.grad = g
            optimizer.step()
        assert_agrees(p, expected)

    @pytest.mark.parametrize("elements", [10, LARGE])
    def test_gradients_stay_as_they_are_and_parameters_where_they_are(self, elements):
        p, (g,) = parameter(elements), gradients(1, elements)
        p.grad = g.clone()
        optimizer = DelayedNesterov([p], delay=2)
        places = [p.data_ptr(), p.grad.data_ptr()]
        for _ in range(4):
            optimizer.step()
        assert torch.equal(p.grad, g)
        assert [p.data_ptr(), p.grad.data_ptr()] == places

    @pytest.mark.parametrize("delay", [1, 2])
    def test_an_update_allocates_no_memory_once_the_buffers_exist(self, delay, threads):
        threads(1)  # the profiler sees the calling thread only
        p = parameter(LARGE)
        optimizer = DelayedNesterov([p], delay=delay, activation=0.5 / delay)
        train(optimizer, p, gradients(delay, LARGE))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in range(2 * delay):
                optimizer.step()
        assert any("add_" in event.name for event in profile.events())
        assert max(event.self_cpu_memory_usage for event in profile.events()) < 1000

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_on_cuda_it_agrees_with_the_formulas_and_never_waits_for_the_device(self):
        p = torch.nn.Parameter(noise(LARGE).cuda())
        grads = [g.cuda() for g in gradients(9, LARGE)]
        expected = reference(p.detach(), grads, 0.2, 0.9, 4, 0.1)
        optimizer = DelayedNesterov([p], delay=4, activation=0.1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(optimizer, p, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_agrees(p, expected)


class TestStep:
    def test_a_closure_runs_with_gradients_and_its_loss_is_returned(self):
        p = torch.nn.Parameter(torch.tensor([3.0]))
        optimizer = DelayedNesterov([p], lr=0.1, momentum=0.0)

        def closure():
            optimizer.zero_grad()
            loss = (p**2).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 9
        assert p.item() == pytest.approx(3 - 0.1 * 6)

    def test_without_closure_there_is_no_loss(self):
        p = parameter(3)
        p.grad = torch.ones_like(p)
        assert DelayedNesterov([p]).step() is None

    def test_a_parameter_without_gradient_is_skipped_and_its_window_stands_still(self):
        always, sometimes = parameter(5), parameter(5, seed=9)
        grads = gradients(6, 5)
        expected = reference(always.detach(), grads, 0.2, 0.9, 2, 0.0)
        expected_sometimes = reference(sometimes.detach(), grads[::2], 0.2, 0.9, 2, 0.0)
        optimizer = DelayedNesterov([always, sometimes], delay=2)
        for t, g in enumerate(grads):
            always.grad = g
            sometimes.grad = g if t % 2 == 0 else None
            optimizer.step()
        assert_agrees(always, expected)
        assert_agrees(sometimes, expected_sometimes)
        assert [optimizer.state[p]["step"] for p in (always, sometimes)] == [6, 3]

    def test_a_sparse_gradient_is_refused_before_anything_changes(self):
        dense, sparse = parameter(3), parameter(4, 2)
        before = dense.detach().clone(), sparse.detach().clone()
        dense.grad = torch.ones_like(dense)
        sparse.grad = torch.eye(4, 2, dtype=torch.float64).to_sparse()
        optimizer = DelayedNesterov([dense, sparse])
        with pytest.raises(RuntimeError, match=r"needs dense gradients.*\(4, 2\).*sparse_coo"):
            optimizer.step()
        assert torch.equal(dense, before[0])
        assert torch.equal(sparse, before[1])
        assert not optimizer.state


class TestGroups:
    def test_every_group_has_its_own_hyperparameters(self):
        ps, grads = [parameter(5, seed=seed) for seed in range(3)], gradients(30, 5)
        given = [
            {"lr": 0.3, "delay": 5, "activation": 0.2},
            {"momentum": 0.4},
            {"delay": 1, "activation": 1.0},
        ]
        defaults = {"lr": 0.1, "momentum": 0.8, "delay": 3, "activation": 0.1}
        expected = [reference(p.detach(), grads, **{**defaults, **own}) for p, own in zip(ps, given, strict=True)]
        optimizer = DelayedNesterov(
            [{"params": p, **own} for p, own in zip(ps[:2], given[:2], strict=True)], **defaults
        )
        optimizer.add_param_group({"params": ps[2], **given[2]})
        for g in grads:
            for p in ps:
                p.grad = g
            optimizer.step()
        for p, value in zip(ps, expected, strict=True):
            assert_agrees(p, value)

    bad_values = pytest.mark.parametrize(
        ("name", "value", "wanted"),
        [
            *[("lr", value, "a finite number >= 0") for value in (-0.1, math.nan, math.inf, "0.1", torch.tensor(0.1))],
            *[("momentum", value, r"a number in \[0, 1\)") for value in (-0.1, 1.0, math.nan, None)],
            *[("delay", value, "an int >= 1") for value in (0, -1, 2.0, True, "16")],
            *[("activation", value, r"\[0, 1/delay\] = \[0, 0.25\]") for value in (-0.01, 0.26, math.nan, None)],
        ],
    )

    @bad_values
    def test_a_bad_value_is_refused_by_name_with_what_would_be_right(self, name, value, wanted):
        with pytest.raises(ValueError, match=rf"{name} must be .*{wanted}.*, got ") as caught:
            DelayedNesterov([parameter(2)], **{"delay": 4, name: value})
        assert repr(value) in str(caught.value)

    @bad_values
    def test_a_bad_value_in_an_added_group_is_refused_and_no_group_added(self, name, value, wanted):
        optimizer = DelayedNesterov([parameter(2)], delay=4)
        with pytest.raises(ValueError, match=rf"{name} must be .*{wanted}"):
            optimizer.add_param_group({"params": [parameter(3)], name: value})
        assert len(optimizer.param_groups) == 1

    def test_the_activation_of_a_group_is_held_against_the_delay_of_that_group(self):
        DelayedNesterov([{"params": parameter(2), "delay": 2, "activation": 0.5}], delay=16)
        with pytest.raises(ValueError, match=r"activation must be a number in \[0, 1/delay\] = \[0, 0.125\], got 0.25"):
            DelayedNesterov([{"params": parameter(2), "delay": 8}], delay=4, activation=0.25)

    @pytest.mark.parametrize(
        "values",
        [{"lr": 0}, {"momentum": 0}, {"delay": 1, "activation": 1}, {"delay": 3, "activation": 1 / 3}],
        ids=str,
    )
    def test_the_ends_of_the_ranges_are_allowed(self, values):
        p, grads = parameter(5), gradients(7, 5)
        expected = reference(
            p.detach(), grads, **{"lr": 0.2, "momentum": 0.9, "delay": 16, "activation": 0.0, **values}
        )
        train(DelayedNesterov([p], **values), p, grads)
        assert_agrees(p, expected)


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("delay", [1, 4])
    def test_a_saved_and_loaded_optimizer_continues_bit_for_bit_inside_a_window(self, delay, dtype):
        grads = gradients(20, 50, dtype=dtype)
        p = parameter(50, dtype=dtype)
        optimizer = DelayedNesterov([p], lr=0.3, momentum=0.7, delay=delay, activation=0.1)
        train(optimizer, p, grads[:10])
        file = io.BytesIO()
        torch.save({"model": p.detach(), "optimizer": optimizer.state_dict()}, file)
        train(optimizer, p, grads[10:])

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed_p = torch.nn.Parameter(saved["model"])
        resumed = DelayedNesterov([resumed_p])
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, resumed_p, grads[10:])
        assert torch.equal(resumed_p, p)

    def test_a_scheduler_that_changed_the_rate_needs_no_other_state_to_continue(self):
        grads = gradients(20, 50)

        def fresh():
            p = parameter(50)
            optimizer = DelayedNesterov([p], delay=4)
            return p, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def run(p, optimizer, scheduler, grads):
            for g in grads:
                train(optimizer, p, [g])
                scheduler.step()

        p, optimizer, scheduler = fresh()
        run(p, optimizer, scheduler, grads[:10])
        file = io.BytesIO()
        torch.save([p.detach(), optimizer.state_dict(), scheduler.state_dict()], file)
        run(p, optimizer, scheduler, grads[10:])

        file.seek(0)
        values, *states = torch.load(file, weights_only=True)
        resumed_p, *resumed = fresh()
        with torch.no_grad():
            resumed_p.copy_(values)
        for part, state in zip(resumed, states, strict=True):
            part.load_state_dict(state)
        run(resumed_p, *resumed, grads[10:])
        assert torch.equal(resumed_p, p)

    @pytest.mark.parametrize(("delay", "activation"), [(1, 0.0), (1, 0.5), (4, 0.0)])
    def test_without_activation_the_momentum_is_the_only_buffer(self, delay, activation):
        p = parameter(5)
        optimizer = DelayedNesterov([p], delay=delay, activation=activation)
        train(optimizer, p, gradients(6, 5))
        assert set(optimizer.state[p]) == {"step", "momentum"}

    @pytest.mark.parametrize("delay", [1, 2])
    def test_without_momentum_there_are_no_buffers(self, delay):
        p = parameter(5)
        optimizer = DelayedNesterov([p], momentum=0.0, delay=delay, activation=0.5)
        train(optimizer, p, gradients(3, 5))
        assert optimizer.state[p] == {"step": 3}

    def test_a_finished_window_leaves_the_mean_in_the_momentum_and_an_empty_sum(self):
        p, grads = parameter(5), gradients(4, 5)
        optimizer = DelayedNesterov([p], delay=4, activation=0.25)
        train(optimizer, p, grads)
        state = optimizer.state[p]
        assert state["step"] == 4
        assert_agrees(state["momentum"], sum(grads) / 4)
        assert state["delta"].tolist() == [0] * 5
