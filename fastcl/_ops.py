"""The op namespace: written here once, in Python; csrc/ writes it once as the macro FASTCL_NS.

Loads the compiled kernels and gives the ops their schemas, references and autograd behaviour. What a stable-ABI
kernel cannot do by itself is added here for every mutating op: version counters, and refusing to write to what
autograd tracks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastcl"
LIBRARY = Path(__file__).with_name("libfastcl.so")
PURE_MARKER = Path(__file__).with_name("PURE_PYTHON")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(f"fastcl needs torch >= 2.10, found {torch.__version__}: run `pip install -U torch`")

pure_python = PURE_MARKER.exists() or os.environ.get("FASTCL_PURE_PYTHON") == "1"
if not pure_python:
    if not LIBRARY.exists():
        raise ImportError(
            "fastcl's kernels are not built: run `pip install -e . --no-build-isolation` in the source tree, "
            "or set FASTCL_PURE_PYTHON=1 to run on the plain torch references"
        )
    torch.ops.load_library(str(LIBRARY))

extension: ModuleType | None = None  # fastcl._C, of one Python version; kernels do not need it
with contextlib.suppress(ImportError):
    extension = importlib.import_module("fastcl._C")

_library = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process: its ops go with it
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView
_transforming = torch._C._are_functorch_transforms_active
_unwrap = torch._C._functorch.unwrap_if_dead  # what a function under torch.func left behind
_increment_version = torch.autograd.graph.increment_version
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_requires_grad = attrgetter("requires_grad")
_dtype = attrgetter("dtype")
_AFTER = torch._C._after_ADInplaceOrView_keyset
catalogue: dict[str, torch._ops.OpOverload] = {}


NEEDS_GRADIENT = NotImplemented  # a rule's `direct` says so of plain tensors that are tracked


class _Rule:
    """How :func:`call` calls an op."""

    __slots__ = ("direct", "lists", "node")

    def __init__(self, lists: bool) -> None:
        self.lists = lists  # whether it takes lists of tensors
        self.node: Callable[..., Any] | None = None  # a differentiable one's autograd.Function's `apply`
        # the op on plain tensors, past the dispatcher: its output, NEEDS_GRADIENT, or None where it must be called
        self.direct: Callable[[tuple[Any, ...]], Any] = lambda args: None


_rules: dict[int, _Rule] = {}  # by the op's id: its hash is a call in Python


def define(schema: str, reference: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines one op; `reference` is its plain torch form: fallback, fake kernel, oracle and baseline in one.

    A mutating op (schema with ``(a!)``; what it mutates comes first) also gets the three guards.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, on_gpu(name, reference), "CUDA")  # ROCm's key too
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if "!)" in schema:
        _library.impl(name, _guard(op, schema.count("!)")), "Autograd", with_keyset=True)
    catalogue[name] = op
    _rules[id(op)] = _Rule(any(str(argument.type) == "List[Tensor]" for argument in op._schema.arguments))
    return op


def internal(schema: str, reference: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines an op for our own layers alone: a kernel on the CPU, `reference` for all else, not in the catalogue."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _rules[id(op)] = _Rule(False)
    return op


def on_gpu(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The op's Triton half, in triton.py beside the reference: the reference's checks, then the launch."""

    check = reference.check  # type: ignore[attr-defined]
    passed: OrderedDict[tuple[Any, ...], None] = OrderedDict()
    schema = getattr(getattr(torch.ops, NAMESPACE), name).default._schema
    flags = [i for i, argument in enumerate(schema.arguments) if argument.name == "check"]

    def kernel(*args: Any) -> Any:
        launch = getattr(_triton_half(reference.__module__), name)
        if not flags or args[flags[0]]:
            check(*args)
        elif (key := _form(args)) not in passed:  # no values to look at: what passed once passes again
            check(*args)
            passed[key] = None
            if len(passed) > 16:
                passed.popitem(last=False)
        return launch(*args)

    return kernel


def form(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Addresses, shapes, strides, dtypes. map() over C functions: 0.25 us a tensor, a tenth of looking in Python."""
    return (*(x for part in (Tensor.data_ptr, Tensor.size, Tensor.stride, _dtype) for x in map(part, tensors)),)


def _form(args: Sequence[Any]) -> tuple[Any, ...]:
    """All that a check without values looks at."""
    tensors, rest = [], []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors += arg
            rest.append(len(arg))
        else:
            rest.append(arg)
    return *rest, *form(tensors)


@functools.cache
def _triton_half(reference: str) -> ModuleType:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeError("fastcl needs triton for tensors on a GPU: pip install 'fastcl[gpu]'") from error
    return importlib.import_module(reference.removesuffix("reference") + "triton")


class _Kept:
    """Stands in for a Library: keeps the kernel that torch.library.register_autograd makes."""

    kernel: Callable[..., Any]

    def impl(self, _name: str, kernel: Callable[..., Any], _key: str, **_options: Any) -> None:
        self.kernel = kernel


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """torch.library.register_autograd, at the op's first call: it makes two classes an op, a third of an import."""

    @functools.cache
    def made() -> Callable[..., Any]:
        kept = _Kept()
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=kept)  # type: ignore[arg-type]
        return kept.kernel

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        return made()(keyset, *args, **kwargs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    op = catalogue[name]
    if not any(str(result.type).startswith("List") for result in op._schema.returns):
        rule = _rules[id(op)]
        rule.node = _node(op, backward, setup_context, rule)


def shortcut(op: torch._ops.OpOverload, direct: Callable[[tuple[Any, ...]], Any]) -> None:
    """Sets a rule's `direct`."""
    _rules[id(op)].direct = direct


def _node(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None], rule: _Rule
) -> Callable[..., Any]:
    """The same rule as an autograd.Function of one level, which :func:`call` uses: half the time of the dispatcher's.

    Every frame of Python counts: a small tensor's mask and its gradient take fifty microseconds, half of it the engine.
    """
    kernel = op._op  # what OpOverload.__call__ calls

    def forward(ctx: Any, *args: Any) -> Any:
        output = rule.direct(args)
        if output is None:
            with _BelowAutograd():
                output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    def forward_of_lists(ctx: Any, *flat: Any) -> Any:
        return forward(ctx, *_nested(flat[:-1], flat[-1]))

    def flat_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = backward(ctx, *grads)
        return *(g for grad in found for g in (grad if isinstance(grad, (list, tuple)) else (grad,))), None

    halves = (forward_of_lists, flat_backward) if rule.lists else (forward, backward)

    def first(*args: Any) -> Any:
        members = dict(zip(("forward", "backward"), map(staticmethod, halves), strict=True))
        function = type(op._opname, (torch.autograd.Function,), members)
        function._backward_cls.apply = halves[1]  # type: ignore[attr-defined]  # the engine's call, a frame less
        rule.node = super(torch.autograd.Function, function).apply  # Function's own asks about transforms anew: 2 us
        return rule.node(*args)

    return first


def _nested(flat: Sequence[Any], lengths: Sequence[int]) -> tuple[Any, ...]:
    """`flat` with its lists again: `lengths` has -1 for what was none."""
    values = iter(flat)
    return tuple(next(values) if n < 0 else [next(values) for _ in range(n)] for n in lengths)


def not_differentiable(name: str, why: str) -> None:
    def backward(ctx: Any, *_grads: Any) -> None:
        raise RuntimeError(f"{name} is not differentiable: {why}")

    differentiable(name, backward, lambda ctx, inputs, output: None)


def vmap_rule(name: str, rule: Callable[..., Any]) -> None:
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=_library)


def _guard(op: torch._ops.OpOverload, n_mutated: int) -> Callable[..., Any]:
    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        tensors = [t for arg in args[:n_mutated] for t in ((arg,) if isinstance(arg, Tensor) else arg)]
        if _is_grad_enabled():
            refuse_tracked(op, tensors, args[n_mutated:])
        result = op.redispatch(keyset & _AFTER, *args)
        _increment_version(tensors)
        return result

    return kernel


def refuse_tracked(op: torch._ops.OpOverload, mutated: Sequence[Tensor], args: Sequence[Any]) -> None:
    for tensor in filter(_requires_grad, mutated):
        kind = "leaf" if tensor.is_leaf else "result"
        raise RuntimeError(
            f"{op._opname}: it would overwrite a {kind} that requires grad: call it under torch.no_grad()"
        )
    for arg in args:
        tensors = arg if isinstance(arg, (list, tuple)) else (arg,)
        if not tensors or not isinstance(tensors[0], Tensor):
            continue
        for tensor in filter(_requires_grad, tensors):
            if not tensor.is_leaf:
                raise RuntimeError(
                    f"{op._opname}: an input has a gradient graph, and this in-place op is not differentiable: "
                    "detach it or call under torch.no_grad()"
                )


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """A functional op with its gradient, past the dispatcher's generic autograd where nothing else watches.

    Bad input becomes ValueError (or TypeError) naming the argument.
    """
    try:
        if _is_compiling():
            return op(*args)
        rule = _rules[id(op)]
        output = rule.direct(args)
        if output is None:
            return _otherwise(op, rule, args)
        return output if output is not NEEDS_GRADIENT else rule.node(*args)  # type: ignore[misc]
    except (RuntimeError, AttributeError) as error:
        raise _explain(op, error, args) from None


def _otherwise(op: torch._ops.OpOverload, rule: _Rule, args: tuple[Any, ...]) -> Any:
    if _transforming():
        return op(*args)
    if _is_grad_enabled():
        flat = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,))] if rule.lists else args
        if any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            if rule.node is None:
                return op(*args)
            inputs = [_unwrap(t) if isinstance(t, Tensor) else t for t in flat]
            if not rule.lists:
                return rule.node(*inputs)
            return rule.node(*inputs, [len(arg) if isinstance(arg, (list, tuple)) else -1 for arg in args])
    with _BelowAutograd():
        return op._op(*args)


def call_in_place(
    op: torch._ops.OpOverload, mutated: Tensor | Sequence[Tensor], *args: Any, also: Sequence[Tensor] = ()
) -> Any:
    """Calls a mutating op: the guards it has through torch.ops, in 1 us instead of the dispatcher's 4.

    `also`: tensors among `args` that are mutated too.
    """
    if _is_compiling():
        return op(mutated, *args)
    try:
        tensors = (mutated,) if isinstance(mutated, Tensor) else (*mutated, *also)
        if _is_grad_enabled():
            refuse_tracked(op, tensors, args)
        with _BelowAutograd():
            result = op(mutated, *args)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise _explain(op, error, (mutated, *args)) from None
    _increment_version(tensors)
    return result


def _explain(op: torch._ops.OpOverload, error: Exception, args: Sequence[Any]) -> Exception:
    text = str(error)
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if wrong := _no_tensor(argument.name, str(argument.type), value):
            return TypeError(f"{op._opname}: {wrong}")
    if "API call failed" in text and any(name in text for name in ("empty", "new_empty", "contiguous")):
        # through the stable ABI of torch 2.10 the allocator's own words do not come back
        return MemoryError(f"{op._opname}: not enough memory for a result or a copy of an argument; nothing is written")
    if "Expected a value of type" in text or "Unable to cast" in text:
        return TypeError(text.split("\n", 1)[0])
    if text.startswith(f"{op._opname}: ") and "requires grad" not in text and "gradient graph" not in text:
        return ValueError(text)
    return error


def _no_tensor(name: str, kind: str, value: Any) -> str | None:
    """What is wrong with an argument that must be a tensor or a list of tensors."""
    if kind == "Tensor" and not isinstance(value, Tensor):
        return f"{name} must be a tensor, not {type(value).__name__}"
    if kind == "List[Tensor]":
        if not isinstance(value, (list, tuple)):
            return f"{name} must be a list of tensors, not {type(value).__name__}"
        for i, t in enumerate(value):
            if not isinstance(t, Tensor):
                return f"{name}[{i}] must be a tensor, not {type(t).__name__}"
    return None


def has_kernel(name: str, key: str) -> bool:
    """Whether the op has a kernel of its own under this dispatch key (the reference does not count)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
