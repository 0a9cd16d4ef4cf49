"""The diagonal Fisher information of a classifier, exact per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import distributed
from .passes import ImportancePass, batch_size, evaluating, tensors_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = ("exact", "sample", "empirical", "map", "batched")
Loss = Callable[[Tensor, Tensor], Tensor]


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    kind: str = "empirical",
    loss: Loss | None = None,
    *,
    classes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    r"""Diagonal Fisher information :math:`F_i = \frac{1}{N}\sum_n (\partial \ell_n / \partial \theta_i)^2`, exactly.

    EWC (Kirkpatrick et al. 2017); the kinds are those of van de Ven 2025 (arXiv 2502.11756). The square is taken per
    sample, not of the batch's mean gradient, at about the cost of an ordinary backward pass.

    Args:
        model: maps a batch to logits [N, C] (any [N, ...] with `loss`). Estimated in eval mode; the mode of every
            module, buffers, ``.grad`` and hooks are afterwards as before, also after an exception.
        batches: iterable of (x, y) or, for the kinds that need no label, of x. x: a tensor, or a tuple or dict of
            tensors, samples in dimension 0; y: int64 [N]. Moved to the model's device. The batch size does not matter.
        kind: ``"empirical"`` the given label; ``"exact"`` the expectation over all C labels (C backward passes);
            ``"sample"`` one label drawn from the model; ``"map"`` the most probable label; ``"batched"`` the square of
            the batch-mean gradient averaged over batches, which is what most libraries compute and is *not* the
            Fisher: for comparison only.
        loss: ``loss(output, y) -> [N]``, one number a sample; default cross-entropy. Not for kind ``"exact"``.
        classes: the output columns that the softmax runs over (a single head that has seen these classes so far).
        generator: for kind ``"sample"``.
        group: processes that hold the same model and other data: the mean is over all of theirs. Found by itself for a
            DistributedDataParallel model and for one under ``fully_shard`` (which gets importances sharded likewise).

    Returns:
        name -> importance of the parameter's shape, for every parameter that requires grad; float32 (float64 for
        float64 parameters). Parameters that the output does not depend on get zeros.

    Raises:
        ValueError: unknown kind, no batches, labels missing or outside `classes`, a loss that is not per sample.

    Cost: one forward and one backward; memory of that backward plus the result.

    Example:
        >>> F = fastcl.fisher_diagonal(model, loader)
        >>> F["0.weight"].shape == model[0].weight.shape
        True
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r} but must be one of {', '.join(KINDS)}")
    if kind == "exact" and loss is not None:
        raise ValueError("loss cannot be given with kind='exact', which is the expectation of the log-likelihood")
    groups, (inner, prefix) = distributed.groups_of(model, group), distributed.unwrapped(model)
    if kind == "batched":
        return {prefix + name: f for name, f in _batched(inner, batches, loss, classes, groups).items()}
    estimate = ImportancePass(inner, power=2)
    with evaluating(model):
        for x, y in labelled(model, batches, required=kind == "empirical"):
            estimate.add(x, lambda output, y=y: _cotangents(output, y, kind, loss, classes, generator))
    return mean(estimate, prefix, groups)


def mean(estimate: ImportancePass, prefix: str, groups: Sequence[ProcessGroup]) -> dict[str, Tensor]:
    """Sums divided by the number of samples, never by the number of batches; both over all processes."""
    count = distributed.add_up(list(estimate.sums.values()), estimate.count, groups)
    if count == 0:
        raise ValueError("batches is empty: importances need at least one sample")
    return {
        prefix + name: distributed.sharded_like(total.div_(count), estimate.params[name])
        for name, total in estimate.sums.items()
    }


def labelled(model: nn.Module, batches: Iterable[Any], *, required: bool) -> Iterator[tuple[Any, Tensor | None]]:
    """(x, y) on the model's device; y None where a batch has none."""
    device = next(model.parameters()).device
    for batch in distributed.in_step(batches, model):
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        x, y = batch if pair else (batch, None)
        if required and y is None:
            raise ValueError("batches must yield (x, y): this kind of importance needs the label y")
        n = batch_size(x)
        if y is not None and (not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != n):
            raise ValueError(f"batches: y must be a tensor with one label for each of the {n} samples of x")
        yield _to(x, device), None if y is None else y.to(device)


def _to(x: Any, device: torch.device) -> Any:
    if all(t.device == device for t in tensors_of(x)):
        return x
    if isinstance(x, dict):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(value.to(device) if isinstance(value, Tensor) else value for value in x)
    return x.to(device)


def columns(output: Tensor, classes: Sequence[int] | None) -> Tensor | None:
    """The chosen output columns as an index, None for all."""
    if output.dim() != 2:
        raise ValueError(
            f"model's output has shape {list(output.shape)} but must be logits [N, C] unless loss is given"
        )
    if classes is None:
        return None
    chosen = sorted(set(classes))
    if not chosen or chosen[0] < 0 or chosen[-1] >= output.shape[1]:
        raise ValueError(f"classes is {list(classes)} but must name output columns 0 to {output.shape[1] - 1}")
    return torch.tensor(chosen, device=output.device)


def _cotangents(
    output: Tensor,
    y: Tensor | None,
    kind: str,
    loss: Loss | None,
    classes: Sequence[int] | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The gradients of the per-sample losses at the output, one [N, C] tensor a backward pass."""
    if loss is not None:
        yield _loss_gradient(output, y, loss)
        return
    chosen = columns(output, classes)
    logits = output if chosen is None else output[:, chosen]
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = torch.softmax(logits.to(wide), 1)
    if kind == "exact":
        # E_c (e_c - p)(e_c - p)^T: one pass for each label c, its gradient weighted by sqrt(p_c)
        for c in range(p.shape[1]):
            v = -p
            v[:, c] += 1
            yield _scatter(v * p[:, c : c + 1].sqrt(), chosen, output)
        return
    if kind == "sample":
        label = torch.multinomial(p, 1, generator=generator).squeeze(1)
    elif kind == "map":
        label = p.argmax(1)
    else:
        label = _positions(y, chosen, output.shape[1])
    v = p
    v[torch.arange(len(label), device=v.device), label] -= 1
    yield _scatter(v, chosen, output)


def _positions(y: Tensor | None, chosen: Tensor | None, n_outputs: int) -> Tensor:
    """Labels as positions among the chosen columns."""
    if y is None or y.dim() != 1 or y.is_floating_point():
        raise ValueError("y must be integer labels [N]")
    valid = (y >= 0) & (y < n_outputs) if chosen is None else torch.isin(y, chosen)
    if not valid.all():
        allowed = f"0 to {n_outputs - 1}" if chosen is None else str(chosen.tolist())
        raise ValueError(f"y has the unknown label {y[~valid][0].item()}: must be one of {allowed}")
    return y.long() if chosen is None else torch.searchsorted(chosen, y.to(chosen.dtype))


def _scatter(v: Tensor, chosen: Tensor | None, output: Tensor) -> Tensor:
    if chosen is None:
        return v
    full = torch.zeros_like(output, dtype=v.dtype)
    full[:, chosen] = v
    return full


def _loss_gradient(output: Tensor, y: Tensor | None, loss: Loss) -> Tensor:
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, y)
    if losses.shape != (output.shape[0],):
        raise ValueError(
            f"loss returned shape {list(losses.shape)} but must return one number a sample, [{output.shape[0]}] "
            "(with torch's losses: reduction='none')"
        )
    return torch.autograd.grad(losses.sum(), leaf)[0]


def _batched(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    classes: Sequence[int] | None,
    groups: Sequence[ProcessGroup],
) -> dict[str, Tensor]:
    """The field's shortcut: mean over batches of (batch-mean gradient)^2."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if distributed.mesh_of(list(params.values())) is not None:
        raise ValueError("kind is 'batched' but must be another one for a model under fully_shard")
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in params.items()}
    n_batches = 0
    with evaluating(model):
        for x, y in labelled(model, batches, required=True):
            with torch.enable_grad():
                output = model(x)
            if not len(output):
                continue
            (v,) = _cotangents(output.detach(), y, "empirical", loss, classes, None)
            grads = torch.autograd.grad(
                output, list(params.values()), v / output.shape[0], allow_unused=True, materialize_grads=True
            )
            for total, g in zip(sums.values(), grads, strict=True):
                total += g.to(total.dtype).square()
            n_batches += 1
    n_batches = distributed.add_up(list(sums.values()), n_batches, groups)
    if n_batches == 0:
        raise ValueError("batches is empty: importances need at least one sample")
    return {name: total.div_(n_batches) for name, total in sums.items()}
