"""A teacher is known by its values: it starts as a copy of its student, whatever its form."""

import copy

import pytest
import torch
from torch import nn

from lightning_halos.core.buffers import find_entries
from lightning_halos.core.vector import ModelVector


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))


class Other(nn.Module):
    """The same computation as :func:`net`, in another structure and with other names."""

    def __init__(self, student):
        super().__init__()
        for number, parameter in enumerate(student.parameters()):
            self.register_parameter(f"p{number}", nn.Parameter(parameter.detach().clone(), requires_grad=False))


class Shadow(nn.Module):
    """Buffers with every second tensor of the student, as ``LitEma`` of latent diffusion has them."""

    def __init__(self, student):
        super().__init__()
        for number, parameter in enumerate(student.parameters()):
            if number % 2 == 0:
                self.register_buffer(f"x{number * 7 % 5}y", parameter.detach().clone())


def means(module):
    sent = {id(p) for p in module.parameters() if p.requires_grad}
    vector = ModelVector(module)
    return {entry.path for entry in find_entries(module, sent, teachers=vector.teachers) if entry.rule == "mean"}


@pytest.mark.parametrize("make", [Other, Shadow, lambda student: nn.ParameterList(Other(student).parameters())])
def test_a_teacher_of_another_form_is_a_mean(make):
    student = net()
    module = nn.ModuleDict({"student": student, "other": make(student)})
    for parameter in module["other"].parameters():
        parameter.requires_grad_(False)
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()] if name.startswith("other")]
    assert len(names) >= 3
    assert means(module) == set(names)
    vector = ModelVector(module)
    assert vector.num_elements - vector.num_parameters == sum(module.state_dict()[name].numel() for name in names)


def test_other_frozen_parameters_and_buffers_are_not():
    module = nn.ModuleDict({"student": net(), "frozen": net().requires_grad_(False), "list": nn.ModuleList()})
    module["frozen"][0].register_buffer("zeros", torch.zeros(3))
    module["list"].append(nn.LayerNorm(3).requires_grad_(False))  # ones and zeros, as those of the student
    assert ModelVector(module).teachers == []


def test_values_that_are_all_the_same_count_only_beside_a_copy():
    student = net()
    student[0].bias.data.zero_()
    module = nn.Module()
    module.student = student
    module.teacher = Other(student)
    module.start = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert set(ModelVector(module).teachers) == {f"teacher.p{number}" for number in range(6)}


def test_one_that_no_optimizer_has_need_not_be_frozen():
    student = net()
    module = nn.ModuleDict({"student": student, "other": Other(student)}).requires_grad_(True)
    idle = {id(p) for p in module["other"].parameters()}
    vector = ModelVector(module, idle=idle)
    assert vector.num_parameters == sum(p.numel() for p in student.parameters())
    assert vector.num_elements == 2 * vector.num_parameters


def test_a_teacher_that_is_known_needs_no_equal_values():
    student = net()
    module = nn.ModuleDict({"student": student, "other": Other(student)})
    known, before = ModelVector(module).teachers, ModelVector(module).num_elements
    for parameter in module["other"].parameters():
        parameter.data += 1
    assert ModelVector(module).teachers == []
    assert ModelVector(module, teachers=known).num_elements == before
    compiled = copy.deepcopy(module)
    compiled["other"] = torch.compile(compiled["other"])
    assert ModelVector(compiled, teachers=known).num_elements == before


def test_tied_and_other_types_are_no_copies():
    student = net()
    module = nn.ModuleDict({"student": student, "tied": nn.Linear(2, 3)})
    module["tied"].weight = student[0].weight
    module["student"].register_buffer("as_half", student[0].weight.detach().half())
    module["student"].register_buffer("as_sparse", student[0].weight.detach().to_sparse())
    assert ModelVector(module).teachers == []


@pytest.mark.filterwarnings("error")
def test_one_of_complex_parameters_is_known_without_a_warning_of_torch():
    module = nn.ParameterDict({"student": torch.randn(3, dtype=torch.complex64)})
    module["teacher"] = nn.Parameter(module["student"].detach().clone(), requires_grad=False)
    assert ModelVector(module).teachers == ["teacher"]
    assert ModelVector(module).num_teachers == 6
