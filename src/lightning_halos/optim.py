"""Muon and AdamW as one optimizer, for a module's ``configure_optimizers``: an inner optimizer, which workers step.

The server optimizer is in ``core/delayed_nesterov.py``. What Muon and AdamW compute is torch's; this file decides which
parameters each of them gets.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_halos.core.checks import check_count, check_switch, is_number
from lightning_halos.core.compat import is_flattened

# Parts of parameters' names, between their dots: of embeddings (`wte`, `tok_emb`, `embed_tokens`, `unembed`) ...
_EMBEDDING = re.compile(r"(^|_)(un)?emb|Emb|^w[tp]e$")
# ... of output layers, and of those that are only output layers outside of a list of layers (`layers.3.mlp.output`).
_HEAD = re.compile(r"^(.*_)?head$|^(classifier|cls|score|qa_outputs|logits)$")
_HEAD_OUTSIDE_LISTS = re.compile(r"^(output|fc)$")


class MuonAdamW(Optimizer):
    """Muon for the matrices of hidden layers, AdamW for all other parameters.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that all its directions are learned
    equally fast (``torch.optim.Muon``; needs torch 2.9 or newer). This suits layers that multiply vectors by a matrix.
    It does not suit embeddings, whose rows are looked up one by one, nor output layers, whose rows are classes of
    unequal frequency. With the rule of the Muon authors, these get AdamW (``torch.optim.AdamW``), and so do all
    parameters that are not matrices: biases, norms, convolutions. :func:`hidden_matrices` says which parameters are
    matrices of hidden layers.

    It is one optimizer with at least two parameter groups, so schedulers, gradient clipping, checkpoints and automatic
    optimization work as with AdamW. All groups share one learning rate by default: Muon's updates are scaled to the
    root mean square of AdamW's (``adjust_lr_fn="match_rms_adamw"``). So a rate that was tuned for AdamW is a good
    start.

    The first of a group's ``betas`` is the momentum of Muon or of AdamW. So schedules that also change the momentum,
    such as ``OneCycleLR``, change that of both. A group with ``"use_muon": True`` may have ``betas``
    of its own; else those that are given are AdamW's, and ``momentum`` is Muon's.

    In a module that FSDP2 (``fully_shard``) has divided, momenta stay divided. A step gathers one matrix at a time, and
    computes what it would compute with the complete module. Modules of ``FullyShardedDataParallel`` (FSDP1) have
    flattened pieces instead of matrices, and are refused.

    Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
    (https://kellerjordan.github.io/posts/muon/), and Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982,
    for the scale of the updates. "MuLoCo", arXiv 2505.23725, reports Muon as inner optimizer of DiLoCo.

    Args:
        params: A module, of which it takes the trainable parameters; pairs of names and parameters, as
            ``module.named_parameters()`` yields them; or groups of these as dicts with values of their own, where
            ``"use_muon"`` may say for a group which optimizer it gets. Parameters without names need ``"use_muon"``.
        lr: Learning rate, >= 0.
        weight_decay: Decoupled weight decay of all parameters, >= 0; a step takes ``lr * weight_decay`` of each value.
        momentum: Muon's momentum, in [0, 1).
        betas: AdamW's betas, each in [0, 1).
        eps: AdamW's epsilon, >= 0.
        nesterov: Whether Muon uses Nesterov momentum.
        ns_steps: Iterations by which Muon finds the orthogonal matrix, from 1 to 99.
        adjust_lr_fn: How Muon scales its updates by the shape of a matrix: ``"match_rms_adamw"``, or ``"original"``,
            whose updates are smaller for most matrices, so that they need a higher rate.
        adamw_lr: Learning rate of AdamW. Default: ``lr``.
        adamw: Further parts of names, between dots, whose parameters get AdamW, such as ``["out_layer"]``.
        foreach: As in ``torch.optim.AdamW``.
        fused: As in ``torch.optim.AdamW``.

    Raises:
        ValueError: If a value is out of range, here or in :meth:`add_param_group`; if it is not known whether a
            parameter is the matrix of a hidden layer; if ``"use_muon"`` is set for a parameter that is no matrix; or
            if ``adamw`` names a part that no parameter of the module, or of the pairs, has in its name.
        TypeError: If ``adamw`` is no sequence of names, or ``nesterov`` or ``"use_muon"`` is no bool.
        RuntimeError: If torch is older than 2.9.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | Tensor | None = None,
        adamw: Sequence[str] = (),
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"MuonAdamW needs torch 2.9 or newer, which has torch.optim.Muon; this is torch {torch.__version__}."
            )
        _check_rate("lr", lr)
        if adamw_lr is not None:
            _check_rate("adamw_lr", adamw_lr)
        _check_momentum(momentum)
        _check_betas(betas)
        self._adamw_names = adamw
        # Whether a parameter is a hidden matrix. Callbacks that unfreeze layers add parameters without their names.
        self._is_hidden: Any = WeakIdKeyDictionary()
        self._muon_lr, self._momentum = lr, momentum
        if isinstance(params, nn.Module):
            hidden = hidden_matrices(params, adamw)
            self._is_hidden.update({p: name in hidden for name, p in params.named_parameters()})
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        else:
            params = list(params)
            _refuse_bad_names(adamw, [one[0] for one in params if isinstance(one, tuple)])
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self._make_torch_optimizers()
        defaults = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "eps": eps,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(groups, defaults)
        if not any(group["use_muon"] for group in self.param_groups):
            warnings.warn(
                "MuonAdamW has found no matrix of a hidden layer, so it trains all parameters with AdamW.", stacklevel=2
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, in a group for each of the two optimizers. Missing values default to the constructor's.

        Args:
            param_group: As in the constructor. Parameters of the module that the optimizer was made from need no names.

        Raises:
            ValueError: As in the constructor. Then no group is added.
        """
        own = dict(param_group)
        given = own.pop("params")
        each = [given] if isinstance(given, Tensor) else given
        parameters = [one if isinstance(one, tuple) else (None, one) for one in each]
        use_muon = own.pop("use_muon", None)
        if not (use_muon is None or isinstance(use_muon, bool)):
            raise TypeError(f'"use_muon": {use_muon!r} of a parameter group must be True or False.')
        if "momentum" in own:
            _check_momentum(own["momentum"])
        if "betas" in own:
            _check_betas(own["betas"], use_muon is True)
        kinds = [self._gets_muon(name, p) if use_muon is None else use_muon for name, p in parameters]
        groups = []
        for kind in (True, False):
            chosen = [p for (_, p), its_kind in zip(parameters, kinds, strict=True) if its_kind == kind]
            if not chosen:
                continue
            values = {**self.defaults, **({"lr": self._muon_lr} if kind else {}), **own, "use_muon": kind}
            betas = values["betas"]
            momentum = values.pop("momentum", betas[0] if use_muon and "betas" in own else self._momentum)
            if kind:
                values["betas"] = (momentum, *betas[1:])
            _refuse_bad_values(chosen, values)
            groups.append({"params": chosen, **values})
        before = len(self.param_groups)
        try:
            for group in groups:
                super().add_param_group(group)
        except Exception:
            del self.param_groups[before:]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step with every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients first; called with gradients enabled.

        Returns:
            The return value of the closure, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    # A compiled step would not see that torch's optimizers get other groups, and would train nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_all(self) -> None:
        muon, adamw = [], []
        for group in self.param_groups:
            if not group["use_muon"]:
                adamw.append(group)
            elif any(hasattr(p, "full_tensor") for p in group["params"]):
                self._step_divided(group)
            else:
                muon.append(_for_muon(group))
        _step(self._muon, muon, self.state)
        _step(self._adamw, adamw, self.state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state of ``state_dict``.

        Raises:
            ValueError: If the state is of other groups.
        """
        kinds = [group.get("use_muon") for group in state_dict["param_groups"]]
        if kinds != (own := [group["use_muon"] for group in self.param_groups]):
            raise ValueError(
                f"The optimizer's state is of parameter groups with use_muon={kinds}, but this optimizer's groups have"
                f" {own}. Make the optimizer as it was made when the state was saved."
            )
        super().load_state_dict(dict(state_dict))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_adamw_names", "_muon_lr", "_momentum")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_is_hidden", WeakIdKeyDictionary())  # an unpickled copy has other parameters
        self._make_torch_optimizers()

    def _make_torch_optimizers(self) -> None:
        """Makes the two optimizers of torch. At each step they get the groups of that step, and the common state."""
        self._muon = torch.optim.Muon([torch.zeros(1, 1)])
        self._adamw = torch.optim.AdamW([torch.zeros(1)])

    def _gets_muon(self, name: str | None, parameter: Tensor) -> bool:
        if parameter in self._is_hidden:
            return bool(self._is_hidden[parameter])
        _refuse_flattened(parameter)
        if parameter.ndim != 2:
            return False
        if name is None:
            raise ValueError(
                f"It is not known whether a parameter of shape {tuple(parameter.shape)} is the matrix of a hidden"
                " layer, which gets Muon, or an embedding or output layer, which gets AdamW. Give MuonAdamW the"
                ' module, or module.named_parameters() instead of module.parameters(), or say "use_muon": True or'
                " False in the parameter group."
            )
        self._is_hidden[parameter] = _is_hidden_name(name, self._adamw_names)
        return bool(self._is_hidden[parameter])

    @torch.no_grad()
    def _step_divided(self, group: dict[str, Any]) -> None:
        """Makes a step of Muon with the matrices of a divided module.

        ``torch.optim.Muon`` would compute the same with a dozen collectives for each matrix, because it multiplies
        divided matrices. Here there is one.
        """
        from torch.distributed.tensor import distribute_tensor

        momentum = group["betas"][0]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            buffer = state["momentum_buffer"]
            buffer.lerp_(p.grad, 1 - momentum)
            direction = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
            gathered = direction.full_tensor()
            change = torch.zeros_like(gathered)
            change.grad = gathered
            alone = {**group, "params": [change], "betas": (0.0, 0.0), "weight_decay": 0.0}
            _step(self._muon, [_for_muon(alone)], {change: {}})
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(distribute_tensor(change, p.device_mesh, p.placements, src_data_rank=None))


def hidden_matrices(module: nn.Module | Iterable[tuple[str, Tensor]], adamw: Sequence[str] = ()) -> dict[str, Tensor]:
    """Returns the matrices of hidden layers, by name: the parameters that :class:`MuonAdamW` trains with Muon.

    These are the parameters with two dimensions, except

    - weights of ``nn.Embedding`` and ``nn.EmbeddingBag``, also where an output layer shares them;
    - embeddings by name: a part of the name (between its dots) has a word that starts with ``emb`` or ``unemb``, as in
      ``tok_emb`` and ``embed_tokens``, or is ``wte`` or ``wpe``;
    - output layers by name: a part of the name is ``head``, ends with ``_head``, or is ``classifier``, ``cls``,
      ``score``, ``qa_outputs`` or ``logits``; ``output`` and ``fc`` only outside of lists of layers, because a layer
      such as ``layers.3.output`` is hidden;
    - what ``adamw`` names.

    An output layer with another name, such as the last one in an ``nn.Sequential``, is not recognized: name it in
    ``adamw``, for example as ``"net.4"``.

    Args:
        module: A module, or pairs of names and parameters.
        adamw: Further parts of names, between dots, that are no hidden layers.

    Returns:
        The matrices, by the names that the module or the pairs have for them.

    Raises:
        TypeError: If ``adamw`` is no sequence of names, or the parameters have no names.
        ValueError: If ``adamw`` names a part that no name has, or FSDP1 has flattened the parameters, so that no
            matrices are left.
    """
    by_type: set[int] = set()
    if isinstance(module, nn.Module):
        embeddings = (m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
        by_type = {id(embedding.weight) for embedding in embeddings}
        module = module.named_parameters()
    module = list(module)
    if not all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in module):
        raise TypeError(
            "hidden_matrices takes a module, or pairs of names and parameters: module.named_parameters() instead of"
            " module.parameters()."
        )
    _refuse_bad_names(adamw, [name for name, _ in module])
    hidden = {}
    for name, parameter in module:
        _refuse_flattened(parameter)
        if parameter.ndim == 2 and id(parameter) not in by_type and _is_hidden_name(name, adamw):
            hidden[name] = parameter
    return hidden


def _has_part(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _refuse_bad_names(adamw: Sequence[str], names: Sequence[str]) -> None:
    """Refuses what cannot be parts of names, and, if the parameters have names, parts that none of them has."""
    if isinstance(adamw, str):
        raise TypeError(f"adamw={adamw!r} must be a sequence of names: adamw=[{adamw!r}].")
    if not isinstance(adamw, Collection) or not all(isinstance(part, str) for part in adamw):
        raise TypeError(f"adamw={adamw!r} must be a sequence of names, such as ['out_layer'].")
    for part in adamw if names else ():
        if not any(_has_part(name, part) for name in names):
            raise ValueError(f"adamw names {part!r}, but no parameter has this name, or part of it between dots.")


def _is_hidden_name(name: str, adamw: Sequence[str]) -> bool:
    parts = name.split(".")
    if any(_has_part(name, part) for part in adamw):
        return False
    if any(_EMBEDDING.search(part) or _HEAD.search(part) for part in parts):
        return False
    in_list = any(part.isdigit() for part in parts)
    return in_list or not any(_HEAD_OUTSIDE_LISTS.search(part) for part in parts)


def _refuse_flattened(parameter: Tensor) -> None:
    if is_flattened(parameter):
        raise ValueError(
            "MuonAdamW cannot train modules that FullyShardedDataParallel (FSDP1) has divided, because their parameters"
            ' are flattened pieces and no matrices. Use fully_shard (FSDP2, inner="fsdp2"), or torch.optim.AdamW.'
        )


def _for_muon(group: dict[str, Any]) -> dict[str, Any]:
    """Returns a group as ``torch.optim.Muon`` has it. Its epsilon has another meaning than AdamW's."""
    return {**group, "momentum": group["betas"][0], "eps": 1e-7}


def _step(optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
    """Makes a step of one of torch's optimizers with these groups and this state."""
    optimizer.param_groups = [{**optimizer.defaults, **group} for group in groups]
    optimizer.state = state
    optimizer.step()


def _refuse_unless(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {wanted}.")


def _in_range(value: Any, end: float = math.inf) -> bool:
    return is_number(value) and 0 <= value < end


def _check_rate(name: str, value: Any) -> None:
    # To read a tensor would wait for its device.
    _refuse_unless(isinstance(value, Tensor) or _in_range(value), name, value, "a finite number >= 0")


def _check_momentum(value: Any) -> None:
    _refuse_unless(_in_range(value, 1), "momentum", value, "a number in [0, 1)")


def _check_betas(betas: Any, use_muon: bool = False) -> None:
    good = isinstance(betas, Sequence) and len(betas) == 2 and all(_in_range(beta, 1) for beta in betas)
    meaning = ": with use_muon the momentum and a number that is not used" if use_muon else ""
    _refuse_unless(good, "betas", betas, f"two numbers in [0, 1){meaning}")


def _refuse_bad_values(parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
    _check_rate("lr", group["lr"])
    for name in ("weight_decay", "eps"):
        _refuse_unless(_in_range(group[name]), name, group[name], "a finite number >= 0")
    check_switch("nesterov", group["nesterov"])
    steps, adjustment = group["ns_steps"], group["adjust_lr_fn"]
    check_count("ns_steps", steps)
    _refuse_unless(steps < 100, "ns_steps", steps, "a whole number from 1 to 99")
    allowed = ("match_rms_adamw", "original")
    _refuse_unless(adjustment in allowed, "adjust_lr_fn", adjustment, " or ".join(map(repr, allowed)))
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True and fused=True cannot be used together.")
    for parameter in parameters if group["use_muon"] else ():
        if parameter.ndim != 2:
            raise ValueError(
                f"use_muon=True is set for a parameter of shape {tuple(parameter.shape)}, but Muon trains matrices"
                " only."
            )
