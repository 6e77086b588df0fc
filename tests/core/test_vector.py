import pytest
import torch
from torch import nn

from lightning_halos.core.vector import ModelVector


class Everything(nn.Module):
    """Trainable, frozen and tied parameters; averaged, constant and integer buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.first
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Everything()


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_trainable_parameters_come_first_then_buffers(module):
    vector = ModelVector(module)
    flat = vector.read(vector.new())
    assert flat.dtype == vector.dtype == torch.float32
    expected = [module.first.weight, module.norm.weight, module.norm.bias]
    assert vector.shapes == [p.shape for p in expected]
    assert vector.num_parameters == 6 + 2 + 2
    expected += [module.norm.running_mean, module.norm.running_var]
    assert torch.equal(flat, torch.cat([t.detach().flatten() for t in expected]))
    assert flat.numel() == vector.num_elements == 14


def test_frozen_parameters_masks_and_integer_buffers_stay_at_home(module):
    vector = ModelVector(module)
    before = snapshot(module)
    vector.write(torch.full_like(vector.new(), 7.0))
    assert changed(module, before) == {
        "first.weight", "tied.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"
    }  # fmt: skip


def test_frozen_parameters_travel_if_all_do(module):
    vector = ModelVector(module, all_parameters=True)
    assert vector.num_parameters == 6 + 4 + 2 + 2 + 2
    before = snapshot(module)
    vector.write(torch.full_like(vector.new(), 7.0))
    assert {"frozen.weight", "frozen.bias"} <= changed(module, before)


def test_a_buffer_with_nan_or_infinities_stays_at_home():
    module = nn.Linear(1, 1)
    for name, value in {"nan": torch.nan, "inf": torch.inf, "minus": -torch.inf, "finite": 1.0}.items():
        module.register_buffer(f"running_{name}", torch.tensor([0.0, value]))
    assert ModelVector(module).num_elements == 2 + 2


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no parameter with requires_grad=True.*Make at least one"):
        ModelVector(nn.Linear(1, 1).requires_grad_(False))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_a_round_trip_loses_nothing(dtype):
    torch.manual_seed(0)
    module = nn.Linear(3, 2).to(dtype)
    vector = ModelVector(module)
    assert vector.lossless
    before = snapshot(module)
    flat = vector.read(vector.new())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    vector.write(flat)
    assert not changed(module, before)


def test_large_parameters_are_like_small_ones():
    torch.manual_seed(0)
    module = nn.BatchNorm1d(2**20 + 3)
    vector = ModelVector(module)
    values = torch.randn(vector.num_elements)
    vector.write(values)
    tensors = (module.weight, module.bias, module.running_mean, module.running_var)
    assert torch.equal(torch.cat([t.detach() for t in tensors]), values)
    start = torch.randn(vector.num_elements)
    expected = torch.cat([start[: vector.num_parameters] - values[: vector.num_parameters],
                          values[vector.num_parameters :]])  # fmt: skip
    assert torch.equal(vector.pseudo_gradient_(start), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_with_in_float32_and_known_to_round(dtype):
    module = nn.Linear(3, 2).to(dtype)
    vector = ModelVector(module)
    assert vector.dtype == torch.float32
    assert not vector.lossless
    vector.write(torch.full_like(vector.new(), 1 + 2**-12))
    assert torch.equal(vector.read(vector.new()), torch.ones(8))


def test_one_float64_parameter_makes_the_vector_float64_and_the_others_round():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    vector = ModelVector(module)
    assert vector.dtype == torch.float64
    assert not vector.lossless


def test_complex_parameters_travel_as_pairs():
    module = nn.ParameterDict({"z": nn.Parameter(torch.tensor([1 + 2j, 3 + 4j]))})
    vector = ModelVector(module)
    assert vector.read(vector.new()).tolist() == [1, 2, 3, 4]
    assert vector.shapes == [torch.Size([2, 2])]


def test_the_memory_format_of_a_parameter_does_not_matter():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 2)
    vector = ModelVector(module)
    flat = vector.read(vector.new())
    module.to(memory_format=torch.channels_last)
    assert torch.equal(vector.read(vector.new()), flat)
    vector.write(flat + 1)
    assert torch.equal(vector.read(vector.new()), flat + 1)


def test_the_pseudo_gradient_is_start_minus_end_and_the_buffers_as_they_are(module):
    vector = ModelVector(module)
    start = vector.read(vector.new())
    before = start.clone()
    with torch.no_grad():
        module.first.weight += 1.0
        module.norm.bias -= 2.0
        module.norm.running_mean += 5.0
    out = vector.pseudo_gradient_(start)
    assert out is start
    expected = torch.tensor([-1.0] * 6 + [0.0] * 2 + [2.0] * 2)
    torch.testing.assert_close(out[: vector.num_parameters], expected)
    assert torch.equal(out[vector.num_parameters :], before[vector.num_parameters :] + torch.tensor([5.0, 5, 0, 0]))


def test_the_pseudo_gradient_is_computed_in_the_dtype_of_the_vector():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    vector = ModelVector(module)
    with torch.no_grad():
        module.weight.fill_(1.0)
    start = torch.tensor([1 + 2**-12])  # bfloat16 cannot hold it
    assert vector.pseudo_gradient_(start).item() == 2**-12


def test_reading_and_writing_record_no_graph(module):
    vector = ModelVector(module)
    flat = vector.read(vector.new())
    vector.write(flat)
    assert not flat.requires_grad
    assert module.first.weight.requires_grad
    assert module.first.weight.grad_fn is None


def test_parts_have_the_names_dtypes_and_shapes_of_the_state_dict_tied_ones_too(module):
    module.norm.double()
    vector = ModelVector(module)
    flat = vector.read(vector.new())
    parts = vector.named_parts(module, flat)
    assert set(parts) == {
        "first.weight", "tied.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"
    }  # fmt: skip
    for name, part in parts.items():
        assert torch.equal(part, module.state_dict()[name])
        assert part.dtype == module.state_dict()[name].dtype
    module.load_state_dict(parts, strict=False)


def test_parts_of_complex_parameters_are_complex():
    module = nn.ParameterDict({"z": nn.Parameter(torch.tensor([1 + 2j, 3 + 4j]))})
    vector = ModelVector(module)
    parts = vector.named_parts(module, vector.read(vector.new()))
    assert torch.equal(parts["z"], module["z"].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_parts_stay_on_the_host_wherever_the_module_is(dtype):
    module = nn.ParameterDict({"z": nn.Parameter(torch.empty(3, dtype=dtype, device="meta"))})
    vector = ModelVector(module)
    part = vector.named_parts(module, torch.arange(vector.num_elements, dtype=vector.dtype))["z"]
    assert (part.device.type, part.dtype) == ("cpu", dtype)
    assert torch.equal(part, torch.tensor([0 + 1j, 2 + 3j, 4 + 5j] if dtype.is_complex else [0, 1, 2], dtype=dtype))


def test_parameters_unfrozen_later_are_named(module):
    vector = ModelVector(module)
    assert vector.newly_trainable(module) == []
    module.frozen.weight.requires_grad_(True)
    assert vector.newly_trainable(module) == ["frozen.weight"]


def test_an_averaged_buffer_of_another_shape_is_named_with_the_remedy(module):
    vector = ModelVector(module)
    module.norm.running_mean = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"norm.running_mean changed its shape from \[2\] to \[3\].*: 'first'}"):
        vector.read(vector.new())


class TestProgress:
    """A module that was trained while its push was answered gets the answer plus what it has learned meanwhile."""

    def pushed(self, vector, module, **kwargs):
        """Pushes a module. Returns its push and its values at that moment."""
        base, end = vector.read(vector.new()), vector.new()
        train(module)
        return vector.pseudo_gradient_(base, end=end), end

    def test_the_push_is_the_same_and_the_end_of_the_round_is_kept(self, module):
        vector = ModelVector(module)
        base = vector.read(vector.new())
        push, end = self.pushed(vector, module)
        assert torch.equal(end, vector.read(vector.new()))
        parameters = slice(vector.num_parameters)
        assert torch.equal(push[parameters], (base - end)[parameters])
        assert torch.equal(push[vector.num_parameters :], end[vector.num_parameters :])

    def test_no_progress_is_lost_and_none_is_pushed_twice(self, module):
        vector = ModelVector(module)
        _, end = self.pushed(vector, module)
        train(module)
        progress = vector.read(vector.new()) - end
        model = torch.arange(vector.num_elements, dtype=torch.float32)
        base = model.clone()
        vector.add_progress_(base, end)
        parameters = slice(vector.num_parameters)
        assert torch.equal(base[parameters], model[parameters])
        assert torch.allclose(vector.read(vector.new())[parameters], (model + progress)[parameters])
        push = vector.pseudo_gradient_(base)
        assert torch.allclose(push[parameters], -progress[parameters], atol=1e-5)

    def test_without_a_batch_meanwhile_the_module_has_the_answer(self, module):
        vector = ModelVector(module)
        _, end = self.pushed(vector, module)
        model = torch.arange(vector.num_elements, dtype=torch.float32)
        vector.add_progress_(model.clone(), end)
        assert torch.equal(vector.read(vector.new()), model)

    def test_statistics_stay_between_its_own_and_those_of_the_answer(self, module):
        vector = ModelVector(module)
        module.norm.running_var.fill_(10.0)
        _, end = self.pushed(vector, module)
        module.norm.running_var.fill_(3.0)
        module.norm.running_mean.add_(0.5)
        model = vector.read(vector.new())
        model[-2:] = 2.0  # 2 + (3 - 10) would be negative
        model[-4:-2] += 7.0
        mean = model[-4:-2].clone()
        vector.add_progress_(model, end)
        assert torch.equal(module.norm.running_var, torch.full((2,), 2.0))
        assert torch.equal(module.norm.running_mean, mean)

    def test_values_that_are_no_numbers_are_replaced_by_the_answer(self, module):
        vector = ModelVector(module)
        _, end = self.pushed(vector, module)
        module.first.weight.data[0, 0] = torch.nan
        model = torch.arange(vector.num_elements, dtype=torch.float32)
        vector.add_progress_(model, end)
        assert torch.equal(vector.read(vector.new()), model)

    def test_rounding_is_no_progress(self, module):
        module.bfloat16()
        vector = ModelVector(module)
        _, end = self.pushed(vector, module)
        before = vector.read(vector.new())
        train(module)
        progress = vector.read(vector.new()) - end
        model = before + 1e-3
        vector.add_progress_(model, end)
        push = vector.pseudo_gradient_(model)
        parameters = slice(vector.num_parameters)
        assert torch.allclose(push[parameters], -progress[parameters], atol=1e-6)

    def test_a_frozen_parameter_keeps_its_value_and_is_not_pushed(self, module):
        vector = ModelVector(module)
        vector.begin_batch()
        vector.end_batch()
        module.first.requires_grad_(False)
        value = module.first.weight.detach().clone()
        for _ in range(2):
            vector.begin_batch()
            vector.end_batch()
        _, end = self.pushed(vector, module)
        model = torch.full_like(end, 5.0)
        vector.add_progress_(model, end)
        assert torch.equal(module.first.weight, value)
        assert torch.equal(model[:6].view(2, 3), value)


@torch.no_grad()
def train(module):
    """Changes the parameters that are trained, each of them differently."""
    for number, parameter in enumerate(module.parameters(), 1):
        if parameter.requires_grad:
            parameter.add_(0.125 * number)
