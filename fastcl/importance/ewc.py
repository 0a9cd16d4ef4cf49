"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .distributed import local, over_shards
from .fisher import KINDS, Loss, fisher_diagonal
from .regulariser import Regulariser

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMS = ("separate", "single", "online")


class EWC(Regulariser):
    r"""Elastic weight consolidation (Kirkpatrick et al. 2017), penalty
    :math:`\frac{\lambda}{2}\sum_i F_i(\theta_i-\theta^*_i)^2`.

    Args:
        model: its trainable parameters are protected.
        strength: lambda >= 0. The Fisher is a mean over samples; the data set's size N is absorbed in lambda.
        form: ``"separate"`` one Fisher and anchor per task (Kirkpatrick et al.), collapsed exactly into two tensors:
            sum_k F_k (t - t_k)^2 = F (t - a)^2 + const with F = sum F_k, a = sum F_k t_k / F;
            ``"single"`` sum of Fishers, last anchor (Huszar 2018);
            ``"online"`` F <- gamma F + F_new, last anchor (Schwarz et al. 2018).
        kind: the Fisher's kind, see :func:`fastcl.fisher_diagonal`.
        gamma: decay of ``"online"``, in [0, 1].
        dtype: store importances in torch.float32 (default) or torch.bfloat16.

    Raises:
        ValueError: negative or infinite strength, unknown form or kind, gamma outside [0, 1].

    Example:
        >>> ewc = fastcl.EWC(model, strength=100.0)
        >>> loss = criterion(model(x), y) + ewc.penalty()   # every step; after each task: ewc.consolidate(loader)
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        form: str = "online",
        kind: str = "empirical",
        gamma: float = 1.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, strength, dtype=dtype)
        if form not in FORMS:
            raise ValueError(f"form is {form!r} but must be one of {', '.join(FORMS)}")
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r} but must be one of {', '.join(KINDS)}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma} but must lie in [0, 1]")
        self.form, self.kind, self.gamma = form, kind, gamma

    def consolidate(
        self,
        batches: Iterable[Any],
        *,
        classes: Sequence[int] | None = None,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        """Ends a task: estimates its Fisher on `batches` and anchors the parameters where they are now.

        Arguments and errors are :func:`fastcl.fisher_diagonal`'s; after an error nothing has changed.
        """
        self.merge(
            fisher_diagonal(self.model, batches, self.kind, loss, classes=classes, generator=generator, group=group)
        )

    @torch.no_grad()
    def merge(self, fisher: dict[str, Tensor]) -> None:
        """Ends a task with a Fisher computed elsewhere: name -> tensor, as :func:`fastcl.fisher_diagonal` returns."""
        params = self._params()
        if set(fisher) != set(params):
            raise ValueError(f"fisher must have the parameters {sorted(params)[:3]} ..., got {sorted(fisher)[:3]} ...")
        for name, f in fisher.items():
            self._check_new(name, f)
        if self.form != "separate":
            self._accumulate(fisher, self.gamma if self.form == "online" else 1.0)
            return
        self._aligned()  # old importances take the shape of grown parameters
        known = [name for name in fisher if name in self.importances]
        theta = [params[n].detach() for n in known]
        lists = (local([values[n] for n in known]) for values in (self.importances, self.anchors, fisher))
        self.constant += over_shards(ops.merge_anchored_(*lists, local(theta)), theta).item()
        self._begin(fisher)
        self.tasks += 1
