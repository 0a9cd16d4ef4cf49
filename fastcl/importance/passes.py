"""One forward and one backward pass that leave every sample's squared (or absolute) gradients summed.

Forward hooks note each layer's input, tensor hooks receive the gradient at its output, and a rule (rules.py) turns
the two into the layer's importances. Only output gradients are asked from autograd: ordinary weight gradients are
never computed, which is what pays for the per-sample ones. Parameters without a rule, used twice, or used outside
their module go through torch.func (fallback.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import is_dtensor, plain_type
from .fallback import accumulate_by_vmap
from .rules import RULES, Call, Rule, Sums


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's mode and every buffer as before afterwards, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before, copy in buffers:
                if buffer._version != before:
                    buffer.copy_(copy)


@dataclass
class _Layer:
    """One module during one batch: what it was called with, and what has come back so far."""

    module: nn.Module
    rule: Rule
    names: dict[str, str]  # the module's own parameter name -> name in the model
    calls: list[Call] = field(default_factory=list)
    leaves: dict[str, int] = field(default_factory=dict)  # name in the model -> id of the tensor that the call used
    waiting: int = 0  # calls whose output gradient has not arrived
    last_pass: bool = False
    probed: list[torch.Size] = field(default_factory=list)  # input shapes for another number of samples


class ImportancePass:
    """Accumulates per-sample |gradient|^power of a model's trainable parameters, batch after batch.

    Args:
        model: any module whose output is one tensor with the samples in dimension 0. Used in eval mode.
        power: 2 (Fisher) or 1 (MAS).

    Attributes:
        sums: parameter name -> sum over samples, float32 (float64 for float64 parameters).
        count: samples seen.
    """

    def __init__(self, model: nn.Module, power: int) -> None:
        self.model, self.power, self.count = model, power, 0
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("model has no parameter that requires grad: nothing to estimate")
        self.sums: Sums = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in self.params.items()
        }
        self._sample_first: dict[nn.Module, bool] = {}
        self._calls: list[Call] = []  # of the batch under way
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"model: {name} ({type(module).__name__}) has no running statistics, so its samples are coupled "
                    "and have no gradient each: build it with track_running_stats=True"
                )

    def add(self, x: Any, cotangents: Callable[[Tensor], Iterator[Tensor]]) -> None:
        """Adds one batch. ``cotangents(output)`` yields the output gradients V, one backward pass each.

        Sample n's gradient is that of ``(output[n] * V[n]).sum()``.
        """
        n = batch_size(x)
        if n == 0:
            return
        layers, hooks = self._watch()
        try:
            if self.count == 0:
                with torch.no_grad():
                    forward(self.model, _map(x, lambda t: t[:1] if n > 1 else torch.cat([t, t])))
            with torch.enable_grad():
                output = forward(self.model, x)
            _check_output(output, n)
            graph = _Graph(output)
            covered = self._covered(layers, graph.uses, n)
            left = {name: p for name, p in self.params.items() if name not in covered}
            for layer in layers:
                if not covered.issuperset(layer.names.values()):
                    layer.calls.clear()
            self._backward([layer for layer in layers if layer.calls], output, cotangents, graph)
            if left:
                accumulate_by_vmap(self.model, x, left, output.detach(), cotangents, self.power, self.sums)
        finally:
            for hook in hooks:
                hook.remove()
            for call in self._calls:  # a node holds its hook, that the call, it the node: no collector sees that circle
                call.edge = None
            self._calls.clear()
        self.count += n

    def _watch(self) -> tuple[list[_Layer], list[Any]]:
        layers: list[_Layer] = []
        hooks: list[Any] = []
        known = {id(p): name for name, p in self.params.items()}
        for module in self.model.modules():
            rule = RULES.get(plain_type(module))
            own = {name: known[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in known}
            if rule is None or not own:
                continue
            layer = _Layer(module, rule, own)
            layers.append(layer)

            def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor, layer: _Layer = layer) -> None:
                if len(args) != 1:
                    return  # called with keywords: the graph will show a use that no call explains
                # under fully_shard the leaf of the graph is not the parameter but its gathered form
                layer.leaves = {full: id(_module._parameters[name]) for name, full in layer.names.items()}
                if not torch.is_grad_enabled():
                    layer.probed.append(args[0].shape)
                elif output.requires_grad:
                    edge = torch.autograd.graph.get_gradient_edge(output)
                    call = Call(args[0].detach(), args[0]._version, args[0].requires_grad, edge)
                    layer.calls.append(call)
                    self._calls.append(call)
                    # now, not later: an in-place activation may give this tensor another gradient
                    output.register_hook(lambda grad: self._arrived(layer, call, grad))

            # first in line, so that the caller's own hooks cannot put another tensor in the output's place
            hooks.append(module.register_forward_hook(note, prepend=True))
        return layers, hooks

    def _samples_first(self, layer: _Layer, n: int) -> bool:
        """Whether dimension 0 of the layer's inputs is the samples'.

        A size that happens to equal n does not make it so: tokens or learned queries may stand there. What changes
        with the number of samples does: `probed` are the shapes for another number, from one small forward pass.
        """
        module, calls = layer.module, layer.calls
        if module not in self._sample_first:
            self._sample_first[module] = len(layer.probed) == len(calls) and all(
                len(other) > 0 and other[0] != call.input.shape[0] and other[1:] == call.input.shape[1:]
                for call, other in zip(calls, layer.probed, strict=True)
            )
        return self._sample_first[module] and all(call.input.shape[0] == n for call in calls)

    def _covered(self, layers: list[_Layer], uses: Counter[int], n: int) -> set[str]:
        """Names whose every use in this forward pass is a call of a layer that its rule can treat."""
        owners = Counter(name for layer in layers for name in layer.names.values())
        covered: set[str] = set()
        for layer in layers:
            fits = self._samples_first(layer, n) and layer.rule.fits(layer.module, layer.calls)
            alone = all(owners[name] == 1 for name in layer.names.values())
            matches = all(uses[layer.leaves.get(name)] == len(layer.calls) for name in layer.names.values())
            if fits and alone and matches:
                covered.update(layer.names.values())
        sharded = sorted(name for name, p in self.params.items() if is_dtensor(p) and name not in covered)
        if sharded:
            raise ValueError(
                f"model: under fully_shard only layers with a fused rule are supported, and {sharded[0]} has none "
                "(or was not used): freeze it, or estimate with a model that is not sharded"
            )
        # a parameter that the output does not depend on has importance zero, whoever owns it
        covered.update(name for name, p in self.params.items() if uses[id(p)] == 0)
        return covered

    def _backward(
        self,
        layers: list[_Layer],
        output: Tensor,
        cotangents: Callable[[Tensor], Iterator[Tensor]],
        graph: _Graph,
    ) -> None:
        if not layers:
            return
        calls = [call for layer in layers for call in layer.calls]
        first = [call.edge for call in calls if not call.input_requires_grad]
        others = [call.edge for call in calls if call.input_requires_grad]
        # Asking for the first layers' gradients makes autograd pass through all that lie above them, whose gradients
        # then need not be kept. Layers fed by parameters alone lie above none: they are asked for as well.
        above = graph.above(edge.node for edge in first)
        asked = first + [edge for edge in others if edge.node not in above]
        passes = iter(cotangents(output.detach()))
        cotangent = next(passes)
        while cotangent is not None:
            following = next(passes, None)
            for layer in layers:
                layer.waiting, layer.last_pass = len(layer.calls), following is None
            torch.autograd.grad(output, asked, cotangent.to(output.dtype), retain_graph=following is not None)
            missing = [name for layer in layers if layer.waiting for name in layer.names.values()]
            if missing:
                raise RuntimeError(f"no gradient arrived at the layers of {missing}: please report this model")
            cotangent = following

    def _arrived(self, layer: _Layer, call: Call, grad: Tensor) -> None:
        if call not in layer.calls:
            return  # the layer was left to the fallback
        call.grad = grad.detach()
        layer.waiting -= 1
        if layer.waiting:
            return
        for c in layer.calls:
            c.check_unchanged(layer.names)
        layer.rule.accumulate(layer.module, layer.calls, self.power, layer.names, self.sums)
        for c in layer.calls:
            c.grad = None
            if layer.last_pass:
                c.input = None


class _Graph:
    """The autograd graph below a tensor: how often each leaf (by id) is used, and what lies above a node."""

    def __init__(self, output: Tensor) -> None:
        self.uses: Counter[int] = Counter()
        self._users: dict[Any, list[Any]] = {output.grad_fn: []}
        stack = [output.grad_fn]
        while stack:
            node = stack.pop()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if type(following).__name__ == "AccumulateGrad":
                    self.uses[id(following.variable)] += 1
                    continue
                if following not in self._users:
                    self._users[following] = []
                    stack.append(following)
                self._users[following].append(node)

    def above(self, nodes: Iterable[Any]) -> set[Any]:
        """The nodes and everything whose gradient flows down into one of them."""
        found = {node for node in nodes if node in self._users}
        stack = list(found)
        while stack:
            for user in self._users[stack.pop()]:
                if user not in found:
                    found.add(user)
                    stack.append(user)
        return found


def forward(model: nn.Module, x: Any) -> Tensor:
    """model(x), model(*x) for a tuple or list, model(**x) for a dict."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


def tensors_of(x: Any) -> list[Tensor]:
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else (x,)
    return [value for value in values if isinstance(value, Tensor)]


def batch_size(x: Any) -> int:
    tensors = tensors_of(x)
    if not tensors or any(t.dim() == 0 for t in tensors):
        raise ValueError("batches: x must be a tensor (or a tuple or dict of tensors) with samples in dimension 0")
    if len({t.shape[0] for t in tensors}) > 1:
        raise ValueError(f"batches: x has tensors of different sample counts, {[t.shape[0] for t in tensors]}")
    return tensors[0].shape[0]


def _map(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """f on every tensor of a batch's x."""
    if isinstance(x, dict):
        return {key: f(value) if isinstance(value, Tensor) else value for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(f(value) if isinstance(value, Tensor) else value for value in x)
    return f(x)


def _check_output(output: Any, n: int) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return one tensor, got {type(output).__name__}: wrap it to return its logits")
    if output.dim() == 0 or output.shape[0] != n:
        raise ValueError(f"model's output has shape {list(output.shape)} but must have the {n} samples in dimension 0")
    if not output.requires_grad:
        raise ValueError("model's output does not depend on a parameter that requires grad")
