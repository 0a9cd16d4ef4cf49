"""Memory aware synapses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import distributed
from .fisher import labelled, mean
from .passes import ImportancePass, evaluating
from .regulariser import Regulariser

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = ("norm", "vector")


def mas_importance(
    model: nn.Module, batches: Iterable[Any], output: str = "norm", *, group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    r"""MAS importances :math:`\Omega_i = \frac1N\sum_n |\partial \|F(x_n)\|_2^2 / \partial\theta_i|`, exactly.

    Memory aware synapses (Aljundi et al. 2018). The absolute value is taken per sample; no labels are used.

    Args:
        model: maps a batch to [N, C]. Eval mode inside; afterwards everything is as it was.
        batches: iterable of x or (x, y), as for :func:`fastcl.fisher_diagonal`; y is ignored.
        output: ``"norm"`` the squared length of the output (the paper's practical form); ``"vector"`` the length of
            each output's gradient, :math:`\sum_c|\partial F_c/\partial\theta_i|` (C backward passes).
        group: of :func:`fastcl.fisher_diagonal`.

    Returns:
        name -> importance of the parameter's shape; float32 (float64 for float64 parameters).

    Raises:
        ValueError: another `output`, no batches.

    Cost: one forward and one backward, as for the Fisher.

    Example:
        >>> omega = fastcl.mas_importance(model, loader)
    """
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r} but must be one of {', '.join(OUTPUTS)}")
    groups, (inner, prefix) = distributed.groups_of(model, group), distributed.unwrapped(model)
    estimate = ImportancePass(inner, power=1)
    with evaluating(model):
        for x, _ in labelled(model, batches, required=False):
            estimate.add(x, _norm if output == "norm" else _vector)
    return mean(estimate, prefix, groups)


def _norm(output: Tensor) -> Iterator[Tensor]:
    yield 2 * output


def _vector(output: Tensor) -> Iterator[Tensor]:
    for c in range(output.shape[1]):
        v = torch.zeros_like(output)
        v[:, c] = 1
        yield v


class MAS(Regulariser):
    r"""Memory aware synapses (Aljundi et al. 2018), penalty
    :math:`\frac{\lambda}{2}\sum_i\Omega_i(\theta_i-\theta^*_i)^2`.

    Args:
        model: its trainable parameters are protected.
        strength: lambda >= 0.
        merge: ``"sum"`` over tasks (the paper), or ``"ema"``, alpha * old + (1 - alpha) * new (Avalanche, FACIL).
        alpha: of ``"ema"``, in [0, 1].
        half: the factor 1/2 of the seed document; False gives the authors' code, 2 lambda Omega (theta - theta*).
        output: of :func:`fastcl.mas_importance`.
        dtype: store importances in torch.float32 (default) or torch.bfloat16.

    Raises:
        ValueError: a strength or alpha out of range, an unknown `merge` or `output`.

    Example:
        >>> mas = fastcl.MAS(model, strength=1.0)
        >>> loss.backward(); value = mas.add_gradients(); optimizer.step()   # after each task: mas.consolidate(loader)
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        merge: str = "sum",
        alpha: float = 0.5,
        *,
        half: bool = True,
        output: str = "norm",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, strength, dtype=dtype)
        if merge not in ("sum", "ema"):
            raise ValueError(f"merge is {merge!r} but must be sum or ema")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha} but must lie in [0, 1]")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r} but must be one of {', '.join(OUTPUTS)}")
        self.merge_by, self.alpha, self.output = merge, alpha, output
        if not half:
            self.strength *= 2

    def consolidate(self, batches: Iterable[Any], *, group: ProcessGroup | None = None) -> None:
        """Ends a task: estimates Omega on `batches` and anchors the parameters; after an error nothing has changed."""
        self.merge(mas_importance(self.model, batches, self.output, group=group))

    @torch.no_grad()
    def merge(self, omega: dict[str, Tensor]) -> None:
        """Ends a task with importances computed elsewhere, as :func:`fastcl.mas_importance` returns them."""
        old_share, new_share = (1.0, 1.0) if self.merge_by == "sum" else (self.alpha, 1 - self.alpha)
        self._accumulate(omega, old_share, new_share)
