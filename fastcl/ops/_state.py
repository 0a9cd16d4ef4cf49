"""Saved states are checked before anything is taken from them; who refuses one stays as it was, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# what torch's optimizers keep for each entry of a parameter
OF_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "exp_inf")


def check_keys(state: Any, keys: Iterable[str], where: str = "state") -> None:
    """`state` must be a dict with these keys and no others."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is a {type(state).__name__} but must be a dict")
    keys = set(keys)
    if missing := keys - set(state):
        raise ValueError(f"{where} has no {sorted(missing)[0]!r}")
    if unexpected := set(state) - keys:
        raise ValueError(f"{where} has the unexpected key {sorted(map(str, unexpected))[0]!r}")


def check_method(state: Any, name: str) -> None:
    if not isinstance(state, Mapping) or state.get("method") != name:
        found = repr(state.get("method")) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state is of the method {found} but this is {name!r}")


def tasks_of(state: Mapping[str, Any]) -> list[tuple[int, ...]]:
    for task in state["tasks"]:
        if not isinstance(task, (list, tuple)) or not task or not all(type(c) is int and c >= 0 for c in task):
            raise ValueError(f"state.tasks must be lists of output units, got {task!r:.60}")
    return [tuple(task) for task in state["tasks"]]


def check_tensor(t: Any, shape: Iterable[int] | None, dtype: torch.dtype | None, where: str) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{where} is a {type(t).__name__} but must be a tensor")
    if shape is not None and list(t.shape) != list(shape):
        raise ValueError(f"{where} has shape {list(t.shape)} but must have {list(shape)}")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{where} has dtype {t.dtype} but must have {dtype}")


def check_corners(values: Iterable[Any], like: Sequence[Tensor], where: str) -> None:
    """None at all, or tensors in the leading corners of others, which have grown since."""
    values = list(values)
    if values and len(values) != len(like):
        raise ValueError(f"{where} has {len(values)} entries but must have {len(like)}")
    for i, (t, whole) in enumerate(zip(values, like, strict=bool(values))):
        at = f"{where}[{i}]"
        check_tensor(t, None, whole.dtype, at)
        if t.dim() != whole.dim() or not all(0 < a <= b for a, b in zip(t.shape, whole.shape, strict=True)):
            raise ValueError(f"{at} has shape {list(t.shape)} but must fit into {list(whole.shape)}")


def check_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise ValueError(f"{where} is {value!r:.60} but must be a finite number")


def check_module(module: nn.Module, state: Any, where: str) -> None:
    """Strict in keys, shapes and, which torch is not, in dtypes."""
    own = module.state_dict()
    check_keys(state, own, where)
    for name, t in own.items():
        if isinstance(t, Tensor):
            check_tensor(state[name], t.shape, t.dtype, f"{where}.{name}")


def misfit(state: Mapping[str, Any], like: Mapping[str, Tensor | None], prefix: str, *, strict: bool) -> str | None:
    """What a module's `_load_from_state_dict` must not begin with: a tensor of another shape or dtype, or none."""
    try:
        for name, t in like.items():
            if t is not None and (strict or prefix + name in state):
                check_keys({name: None} if prefix + name in state else {}, [name], prefix.rstrip("."))
                check_tensor(state[prefix + name], t.shape, t.dtype, prefix + name)
    except ValueError as error:
        return f"size mismatch: {error}" if "has shape" in str(error) else str(error)  # torch's word for it
    return None


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any, where: str = "state") -> None:
    """As many groups and parameters, the same options, and moments of their parameters' shapes."""
    check_keys(state, ("state", "param_groups"), where)
    groups, own = state["param_groups"], optimizer.param_groups
    if not isinstance(groups, (list, tuple)) or len(groups) != len(own):
        raise ValueError(f"{where}.param_groups must be a list of {len(own)}")
    params: dict[Any, Tensor] = {}
    for i, (group, mine) in enumerate(zip(groups, own, strict=True)):
        at = f"{where}.param_groups[{i}]"
        # schedulers add options, and a later torch may; the missing ones would fail in the next step
        if not isinstance(group, Mapping) or not set(mine) <= {*group, "initial_lr"}:
            raise ValueError(f"{at} must be a dict with {', '.join(mine)}")
        if not isinstance(group["params"], (list, tuple)) or len(group["params"]) != len(mine["params"]):
            raise ValueError(f"{at}.params must have {len(mine['params'])} parameters")
        for name, value in mine.items():
            if name != "params" and name in group:
                check_like(group[name], value, f"{at}.{name}")
        params.update(zip(group["params"], mine["params"], strict=True))
    if not isinstance(state["state"], Mapping) or not set(state["state"]) <= set(params):
        raise ValueError(f"{where}.state must be a dict over the parameters of param_groups")
    for key, values in state["state"].items():
        at = f"{where}.state[{key}]"
        if not isinstance(values, Mapping):
            raise ValueError(f"{at} is a {type(values).__name__} but must be a dict")
        for name, t in values.items():
            if name in OF_SHAPE and (t is not None or name == "exp_avg"):
                check_tensor(t, params[key].shape, params[key].dtype, f"{at}.{name}")
            elif name == "step" and not (type(t) in (int, float) or (isinstance(t, Tensor) and t.numel() == 1)):
                raise ValueError(f"{at}.step must be a number")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, where: str) -> None:
    check_optimizer(optimizer, state, where)
    optimizer.load_state_dict(state)


def check_like(value: Any, like: Any, where: str) -> None:
    """The same kinds where both have something; how many there are is another question."""
    if isinstance(value, Mapping) and isinstance(like, Mapping):
        for key in value.keys() & like.keys():
            check_like(value[key], like[key], f"{where}.{key}")
    elif isinstance(value, (list, tuple)) and isinstance(like, (list, tuple)):
        for i, v in enumerate(value if like else ()):
            check_like(v, like[min(i, len(like) - 1)], f"{where}[{i}]")
    else:
        check_kind(value, like, where)


def check_kind(value: Any, like: Any, where: str) -> None:
    """A number for a number, a string for a string, a list for a list; None may stand for anything and back."""
    if value is None or like is None:
        return
    for kind in (bool, (int, float, Tensor), str, (list, tuple), Mapping):
        if isinstance(like, kind):
            if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
                return
            break
    raise ValueError(f"{where} is a {type(value).__name__} but must be a {type(like).__name__}")


def load_whole(owner: Any, load: Callable[[Any, Any], None], state: Any) -> None:
    """``load(owner, state)``, if it works on a copy of the owner and the copy then gives back what it was given.

    Raises:
        ValueError: it does not: something is missing, unexpected, of another shape, dtype or kind; nothing has changed.

    Cost: the memory of a second owner while it runs. Random numbers drawn in `load` are not missed later.
    """
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(owner, _constants(owner))
        try:
            load(trial, state)
            wrong = _difference(state, trial.state_dict(), "state")
        except KeyError as error:
            raise ValueError(f"state has no {error}") from error
        except (TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"state does not fit this {type(owner).__name__}: {reason}") from error
        if wrong:
            raise ValueError(wrong)
        load(owner, state)


def _constants(owner: Any) -> dict[int, Any]:
    """What deepcopy cannot copy: results with a graph, kept from the last forward pass."""
    found: dict[int, Any] = {}
    for part in (owner, *vars(owner).values()):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for t in vars(module).values():
                if isinstance(t, Tensor) and not t.is_leaf:
                    found[id(t)] = t.detach()
    return found


def _difference(given: Any, taken: Any, where: str) -> str | None:
    """The first place where what was taken is not what was given."""
    if isinstance(given, Tensor) or isinstance(taken, Tensor):
        if not (isinstance(given, Tensor) and isinstance(taken, Tensor)):
            return f"{where} is a {type(given).__name__} but must be a {type(taken).__name__}"
        if given.shape != taken.shape:
            return f"{where} has shape {list(given.shape)} but must have {list(taken.shape)}"
        if given.dtype != taken.dtype:
            return f"{where} has dtype {given.dtype} but must have {taken.dtype}"
        there = given.to(taken.device)
        same = torch.equal(there, taken) or bool(((there == taken) | (there.isnan() & taken.isnan())).all())
        return None if same else f"{where} has values that this cannot hold"
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for key in given:
            if key not in taken:
                return f"{where} has the unexpected key {key!r}"
        for key, value in taken.items():
            if key not in given:
                return f"{where} has no {key!r}"
            if found := _difference(given[key], value, f"{where}.{key}"):
                return found
        return None
    if isinstance(given, (list, tuple)) and isinstance(taken, (list, tuple)):
        if len(given) != len(taken):
            return f"{where} has {len(given)} entries but must have {len(taken)}"
        pairs = enumerate(zip(given, taken, strict=True))
        return next((d for i, (a, b) in pairs if (d := _difference(a, b, f"{where}[{i}]"))), None)
    if isinstance(given, bool) != isinstance(taken, bool) or not (
        given == taken or (given != given and taken != taken)
    ):
        return f"{where} is {given!r:.60} but must be like {taken!r:.60}"
    return None
