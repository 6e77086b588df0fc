"""What happens with each buffer and frozen parameter: only what is known to be a mean is averaged."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_halos.core.buffers import find_entries, local_tensors
from lightning_halos.core.vector import ModelVector


def rules(module):
    sent = {id(p) for p in module.parameters() if p.requires_grad}
    return {entry.path: entry.rule for entry in find_entries(module, sent)}


def with_buffers(**buffers):
    module = nn.Linear(2, 2)
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_statistics_of_normalization_layers_are_means_and_their_counters_are_not(norm):
    assert rules(norm(2)) == {"running_mean": "mean", "running_var": "mean", "num_batches_tracked": "first"}


def test_scripted_statistics_are_means():
    module = nn.Sequential(torch.jit.script(nn.BatchNorm1d(2)))
    assert rules(module) == {"0.running_mean": "mean", "0.running_var": "mean", "0.num_batches_tracked": "first"}


def test_queues_pointers_codebooks_and_random_states_are_not_averaged():
    module = with_buffers(
        queue=torch.randn(2, 8),
        pointer=torch.zeros(1, dtype=torch.long),
        codebook=torch.randn(4, 2),
        cluster_size=torch.ones(4),
        random=torch.get_rng_state(),
        mask=torch.full((2, 2), -torch.inf),
        graph=torch.eye(3).to_sparse_csr(),
        edges=torch.eye(3).to_sparse(),
        running_count=torch.zeros(1, dtype=torch.long),
        running_maximum=torch.tensor(-torch.inf),
    )
    assert set(rules(module).values()) == {"first"}


class Twins(nn.Module):
    """A student, and a teacher with its form."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("wrap", [lambda teacher: teacher, AveragedModel], ids=["plain", "AveragedModel"])
def test_a_teacher_is_a_mean(wrap):
    student = net()
    found = rules(Twins(student, wrap(copy.deepcopy(student))))
    teacher = {name: rule for name, rule in found.items() if name.endswith(("weight", "bias"))}
    assert len(teacher) == 4
    assert set(teacher.values()) == {"mean"}


def test_a_teacher_that_is_not_frozen_is_a_mean_if_no_optimizer_has_it():
    module = Twins(net(), net())
    module.teacher.requires_grad_(True)
    module.head = nn.Linear(2, 2)  # no optimizer has it either, but it is no copy
    trainable = {id(p) for p in module.parameters()}
    idle = trainable - {id(p) for p in module.student.parameters()}
    found = {entry.path: entry.rule for entry in find_entries(module, trainable, idle)}
    assert found == {f"teacher.{name}": "mean" for name, _ in module.student.named_parameters()}
    assert not find_entries(module, trainable)
    vector = ModelVector(module, idle=idle)
    assert vector.num_elements == sum(p.numel() for p in module.parameters())
    assert vector.num_parameters == vector.num_elements - sum(p.numel() for p in module.teacher.parameters())
    assert vector.newly_trainable(module) == []


def test_a_teacher_may_have_a_part_of_the_student_only():
    student = nn.Sequential(*net(), nn.Linear(2, 2))
    assert set(rules(Twins(student, net())).values()) == {"mean"}


@pytest.mark.parametrize(
    ("student", "frozen"),
    [
        (nn.Linear(3, 2), nn.Linear(2, 3)),  # another shape
        (
            nn.Linear(3, 2, bias=False),
            nn.Embedding(2, 3),
        ),  # another type: an embedding, and the head of a language model
    ],
)
def test_a_frozen_part_that_is_no_copy_is_not_sent(student, frozen):
    assert set(rules(Twins(student, frozen)).values()) == {"first"}


def test_frozen_blocks_of_a_network_are_no_copies_of_the_trainable_ones():
    module = nn.Sequential(*[nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3)])
    for block in itertools.islice(module, 2):
        block.requires_grad_(False)
    assert set(rules(module).values()) == {"first"}


def test_a_module_says_otherwise_by_name_or_submodule_and_the_outer_module_decides():
    module = Twins(net(), net())
    module.student[0].register_buffer("total", torch.zeros(2))
    module.student[0].register_buffer("bank", torch.zeros(2))
    module.student[0].halos_buffers = {"total": "mean", "bank": "mean"}
    module.halos_buffers = {"teacher": "first", "teacher.1.weight": "mean", "student.0.bank": "local"}
    assert rules(module) == {
        "student.0.total": "mean",
        "student.0.bank": "local",
        "teacher.0.weight": "first",
        "teacher.0.bias": "first",
        "teacher.1.weight": "mean",
        "teacher.1.bias": "first",
    }


def test_compiled_parts_have_the_names_of_the_module_that_is_compiled():
    compiled = [torch.compile(with_buffers(queue=torch.zeros(2), bank=torch.zeros(2))) for _ in range(2)]
    module = nn.ModuleDict({"own": compiled[0], "named": compiled[1]})
    compiled[0].halos_buffers = {"queue": "local"}
    module.halos_buffers = {"named.queue": "mean", "named._orig_mod.bank": "local"}
    assert rules(module) == {
        "own._orig_mod.queue": "local",
        "own._orig_mod.bank": "first",
        "named._orig_mod.queue": "mean",
        "named._orig_mod.bank": "local",
    }
    assert [id(tensor) for tensor in local_tensors(module)] == [id(compiled[0].queue), id(compiled[1].bank)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"queu": "mean"}, r"halos_buffers has \['queu'\], but Linear has no such.*It has queue, pointer"),
        ({"queue": "average"}, r"Linear.halos_buffers=.*one of \('mean', 'first', 'local'\)"),
        (["queue"], r"Linear.halos_buffers=.*must be a dict"),
        ({"pointer": "mean"}, r"'pointer' is a torch.strided tensor of torch.int64.*Use 'first'"),
    ],
)
def test_a_wrong_rule_is_refused(asked, message):
    module = with_buffers(queue=torch.zeros(2), pointer=torch.zeros(1, dtype=torch.long))
    module.halos_buffers = asked
    with pytest.raises(ValueError, match=message):
        rules(module)
