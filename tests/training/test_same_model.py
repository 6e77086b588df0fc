import pytest
import torch
from torch import nn

from lightning_halos.training.same_model import check_initialized, names_in_state


@pytest.mark.parametrize("layer", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_module_is_refused_until_a_batch_has_run_through_it(layer):
    module = nn.Sequential(nn.Linear(1, 1), layer)
    with pytest.raises(
        RuntimeError, match=r"not initialized: 1\.\w+.*run a batch through the module before trainer.fit"
    ):
        check_initialized(module)
    module(torch.zeros(2, 1))
    check_initialized(module)


def test_entries_of_a_state_dict_are_known_by_their_memory():
    module = nn.BatchNorm1d(2)
    state = {f"new.{name}": tensor for name, tensor in module.state_dict().items()}
    assert names_in_state(module, state) == {key: key.removeprefix("new.") for key in state}
    assert names_in_state(module, {**state, "sum": module.weight + module.bias}) is None


@pytest.mark.parametrize("view", [torch.Tensor.t, torch.Tensor.conj, lambda weight: weight.view(torch.int64)])
def test_a_view_of_a_parameter_is_not_the_parameter(view):
    module = nn.Linear(2, 2, dtype=torch.complex64)
    assert names_in_state(module, {"weight": module.weight.detach()}) == {"weight": "weight"}
    assert names_in_state(module, {"view": view(module.weight.detach())}) is None
