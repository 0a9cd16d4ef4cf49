"""Changes of weights that leave a layer's outputs on given inputs alone (online generative memory)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BALLS = ("none", "frobenius", "spectral")


@torch.no_grad()
def project_onto_outputs(
    change: Tensor, inputs: Tensor, eps: float = 1e-3, ball: str = "none", radius: float = 0.0
) -> Tensor:
    r"""The part of a weight's change that does not move :math:`X W^\top`.

    .. math:: \Delta - (A - A')(XX^\top+\epsilon\bar x I)^{-1}X,\quad A=\Delta X^\top

    by the Woodbury form: a system of n x n, or of I x I where the inputs are more than their dimension. A' is 0
    (``none``), or the nearest matrix to A in a ball: of the Frobenius norm (A scaled) or of the spectral norm (singular
    values cut), so that outputs may move by `radius` in all.

    Args:
        change: :math:`\Delta` [O, I].
        inputs: X [n, I].
        eps: relative to :math:`\bar x`, the mean of the squares on the diagonal.
        ball, radius: as above.

    Raises:
        ValueError: shapes that do not fit, an unknown ball, eps not positive or a negative radius.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> fastcl.nn.project_onto_outputs(torch.tensor([[2.0, 3.0]]), x, eps=1e-9).round()
        tensor([[0., 3.]])
    """
    if change.dim() != 2 or inputs.dim() != 2 or inputs.shape[1] != change.shape[1]:
        raise ValueError(f"inputs has shape {list(inputs.shape)} but must be [n, {change.shape[-1]}]")
    if ball not in BALLS:
        raise ValueError(f"ball is {ball!r} but must be one of {', '.join(BALLS)}")
    if not eps > 0 or not radius >= 0:
        raise ValueError(f"eps is {eps} and radius {radius} but eps must be positive and radius not negative")
    if len(inputs) == 0:
        return change.clone()
    delta, x = change.double(), inputs.double()
    moved = delta @ x.T
    if ball == "frobenius":
        moved = moved * (1 - min(1.0, radius / max(moved.norm().item(), 1e-300)))
    elif ball == "spectral":
        u, s, v = torch.linalg.svd(moved, full_matrices=False)
        moved = (u * (s - s.clamp(max=radius))) @ v
    n, width = x.shape
    scale = eps * x.square().sum() / n
    if scale == 0:
        return change.clone()
    if n <= width:
        correction = torch.linalg.solve(x @ x.T + scale * torch.eye(n, dtype=x.dtype, device=x.device), x).T
        correction = moved @ correction.T
    else:  # (X X^T + e)^-1 X = X (X^T X + e)^-1
        gram = x.T @ x + scale * torch.eye(width, dtype=x.dtype, device=x.device)
        correction = torch.linalg.solve(gram, (moved @ x).T).T
    return (delta - correction).to(change.dtype)


def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every Linear and Conv2d of `model` gets when it runs on x, as rows [n, I]: patches of convolutions, and a 1
    for the bias at the end of each row.

    Raises:
        ValueError: a trainable layer of another kind, whose outputs could not be held.

    Args:
        model: Linear and Conv2d layers, and others without parameters.
        x: what the model takes, [N, ...].

    Example:
        >>> {name: rows.shape for name, rows in layer_inputs(model, x).items()}
        {'0': torch.Size([6, 5]), '2': torch.Size([6, 4])}
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def keep(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                rows = _rows(module, inputs[0].detach())
                if module.bias is not None:
                    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                found[name] = rows

            hooks.append(module.register_forward_pre_hook(keep))
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            for hook in hooks:
                hook.remove()
            raise ValueError(f"{name} is a {type(module).__name__} but only Linear and Conv2d can be projected")
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError("a Conv2d must have one group and padding by zeros to be projected")
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


@torch.no_grad()
def project_step(
    model: nn.Module, before: Mapping[str, Tensor], inputs: Mapping[str, Tensor], **options: object
) -> None:
    """Replaces what changed in every layer since `before` (parameter name to value) by its projection, in place.

    The step, not the gradient, is projected: an optimizer's moments and scaling would turn a projected gradient out of
    the subspace. `options` are :func:`project_onto_outputs`'s.

    Args:
        before: the parameters before the step.
        inputs: of :func:`layer_inputs`, what the outputs must stay on.

    Example:
        >>> before = {k: p.detach().clone() for k, p in model.named_parameters()}; said = model(x[:2]).detach()
        >>> inputs = layer_inputs(model, x[:2]); loss.backward(); optimizer.step(); project_step(model, before, inputs)
        >>> torch.allclose(model(x[:2]), said, atol=1e-3)
        True
    """
    for name, rows in inputs.items():
        layer = model.get_submodule(name)
        parts = [layer.weight, *([layer.bias] if layer.bias is not None else [])]
        olds = [before[f"{name}.weight" if name else "weight"], before.get(f"{name}.bias" if name else "bias")]
        change = [(p - old).reshape(len(layer.weight), -1) for p, old in zip(parts, olds, strict=False)]
        kept = project_onto_outputs(torch.cat(change, 1), rows, **options)  # type: ignore[arg-type]
        at = 0
        for p, old in zip(parts, olds, strict=False):
            width = p.numel() // len(p)
            p.copy_(old + kept[:, at : at + width].reshape(p.shape))
            at += width
