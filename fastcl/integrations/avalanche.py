"""Plugins for Avalanche (avalanche-lib 0.6): its constructors and hooks, fastcl's kernels.

Changing the import is the whole change:

    from fastcl.integrations.avalanche import EWCPlugin      # instead of avalanche.training.plugins

What differs is the importances: exact, per sample, in eval mode, over the samples (Avalanche squares or takes the
absolute value of gradients averaged over a batch), so that the best strength is another one. The penalty's gradient is
added after ``backward()`` in one fused pass, and its value to ``strategy.loss``, which metrics read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward, is_multi_task_module
from avalanche.training.plugins.strategy_plugin import SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .. import importance
from .avalanche_replay import GenerativeReplayPlugin, TrainGeneratorAfterExpPlugin

__all__ = [
    "EWCPlugin",
    "GenerativeReplayPlugin",
    "LwFPlugin",
    "MASPlugin",
    "RWalkPlugin",
    "SynapticIntelligencePlugin",
    "TrainGeneratorAfterExpPlugin",
]


class _RegularisingPlugin(SupervisedPlugin):
    """A regulariser of fastcl, made when the first experience begins; grown heads are followed."""

    def __init__(self) -> None:
        super().__init__()
        self.regulariser: importance.Regulariser | None = None

    def make(self, strategy: Any) -> importance.Regulariser:
        raise NotImplementedError

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.regulariser is None:
            self.regulariser = self.make(strategy)
        self.regulariser.model = strategy.model

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        strategy.loss = strategy.loss.detach() + self.regulariser.add_gradients()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.regulariser.consolidate(_batches(strategy, kwargs.get("num_workers", 0)))


def _batches(strategy: Any, num_workers: int) -> Iterator[tuple[Any, Tensor]]:
    """(x, y) of the experience; ((x, task labels), y) for a model with a head for each task."""
    dataset = strategy.experience.dataset
    loader = DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
        num_workers=num_workers,
        generator=torch.Generator(),  # its seed would come from the global one: training would not be as without
    )
    tasks = is_multi_task_module(strategy.model)
    for x, y, *_, t in loader:
        yield ((x, t), y) if tasks else (x, y)


def _per_sample(criterion: Any) -> Any:
    """The strategy's criterion with a number for each sample; None for the ordinary cross-entropy.

    Raises:
        ValueError: a criterion without torch's `reduction`, which could not be asked for it.
    """
    if type(criterion) is nn.CrossEntropyLoss and criterion.weight is None and criterion.label_smoothing == 0:
        return None
    if not hasattr(criterion, "reduction"):
        raise ValueError(f"criterion is {type(criterion).__name__} but must have torch's `reduction`")
    single = copy.copy(criterion)
    single.reduction = "none"
    return single


class EWCPlugin(_RegularisingPlugin):
    r"""Elastic weight consolidation; :class:`fastcl.EWC` under Avalanche's name.

    Args:
        ewc_lambda: the loss gains ewc_lambda :math:`\sum F(\theta-\theta^*)^2`, without 1/2, as Avalanche's does.
        mode: ``separate`` (any number of experiences in two tensors) or ``online``.
        decay_factor: of ``online``.
        keep_importance_data: accepted; there is nothing more to keep.
        kind: ours: the Fisher's, as for :func:`fastcl.fisher_diagonal`.

    Raises:
        ValueError: another mode, ``online`` without a decay factor, or the other way round.

    Example:
        >>> strategy = Naive(model, optimizer, plugins=[EWCPlugin(ewc_lambda=100.0)])  # doctest: +SKIP
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: str = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        kind: str = "empirical",
    ) -> None:
        super().__init__()
        if mode not in ("separate", "online"):
            raise ValueError(f"mode is {mode!r} but must be separate or online")
        if (mode == "online") != (decay_factor is not None):
            raise ValueError(f"decay_factor is {decay_factor} but must be given with mode='online', and only then")
        importance.EWC(nn.Linear(1, 1), ewc_lambda, mode, kind, 1.0 if decay_factor is None else decay_factor)  # raises
        self.ewc_lambda, self.mode, self.decay_factor, self.kind = ewc_lambda, mode, decay_factor, kind
        self.keep_importance_data = keep_importance_data

    def make(self, strategy: Any) -> importance.Regulariser:
        gamma = 1.0 if self.decay_factor is None else self.decay_factor
        return importance.EWC(strategy.model, 2 * self.ewc_lambda, self.mode, self.kind, gamma)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        loss = _per_sample(strategy._criterion)
        self.regulariser.consolidate(_batches(strategy, kwargs.get("num_workers", 0)), loss=loss)


class MASPlugin(_RegularisingPlugin):
    r"""Memory aware synapses; :class:`fastcl.MAS` under Avalanche's name.

    Args:
        lambda_reg: the loss gains lambda_reg :math:`\sum\Omega(\theta-\theta^*)^2`.
        alpha: :math:`\Omega\gets\alpha\,\Omega+(1-\alpha)\,\Omega_{new}`.
        verbose: accepted; the pass costs a backward, and shows no progress.
    """

    def __init__(self, lambda_reg: float = 1.0, alpha: float = 0.5, verbose: bool = False) -> None:
        super().__init__()
        importance.MAS(nn.Linear(1, 1), lambda_reg, "ema", alpha)  # raises what is wrong
        self.lambda_reg, self.alpha, self.verbose = lambda_reg, alpha, verbose

    def make(self, strategy: Any) -> importance.Regulariser:
        return importance.MAS(strategy.model, self.lambda_reg, "ema", self.alpha, half=False)


class _PathPlugin(_RegularisingPlugin):
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self.regulariser.after_step()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.regulariser.consolidate()


class SynapticIntelligencePlugin(_PathPlugin):
    r"""Synaptic intelligence; :class:`fastcl.SI` under Avalanche's name.

    Args:
        si_lambda: the loss gains si_lambda :math:`\sum\Omega(\theta-\theta^*)^2`; a list has one for each experience,
            its last for all that follow.
        eps: damping. Avalanche also cuts importances at .001; the paper does not, and neither do we.
        excluded_parameters: names that are not protected.
        device: accepted; everything stays on the model's.
    """

    def __init__(
        self,
        si_lambda: float | Sequence[float],
        eps: float = 1e-7,
        excluded_parameters: Sequence[str] | None = None,
        device: Any = "as_strategy",
    ) -> None:
        super().__init__()
        self.si_lambda = list(si_lambda) if isinstance(si_lambda, (list, tuple)) else [si_lambda]
        for value in self.si_lambda:
            importance.SI(nn.Linear(1, 1), value, xi=eps)  # raises what is wrong
        self.eps, self.excluded_parameters = eps, set(excluded_parameters or ())

    def make(self, strategy: Any) -> importance.Regulariser:
        made = importance.SI(strategy.model, self.si_lambda[0], xi=self.eps)
        if self.excluded_parameters:
            made.excluded = frozenset(self.excluded_parameters)
        return made

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        at = min(strategy.clock.train_exp_counter, len(self.si_lambda) - 1)
        self.regulariser.strength = 2.0 * self.si_lambda[at]


class RWalkPlugin(_PathPlugin):
    r"""Riemannian walk; :class:`fastcl.RWalk` under Avalanche's name. No second forward and backward pass a step.

    Args:
        ewc_lambda: the loss gains ewc_lambda :math:`\sum(F+s)(\theta-\theta^*)^2`.
        ewc_alpha: of the Fisher's moving average. delta_t: steps between scores.
    """

    def __init__(self, ewc_lambda: float = 0.1, ewc_alpha: float = 0.9, delta_t: int = 10) -> None:
        super().__init__()
        importance.RWalk(nn.Linear(1, 1), ewc_lambda, None, ewc_alpha, delta_t)  # raises what is wrong
        self.ewc_lambda, self.ewc_alpha, self.delta_t = ewc_lambda, ewc_alpha, delta_t

    def make(self, strategy: Any) -> importance.Regulariser:
        return importance.RWalk(strategy.model, self.ewc_lambda, None, self.ewc_alpha, self.delta_t)


class LwFPlugin(SupervisedPlugin):
    """Learning without forgetting as Avalanche's: KL at `temperature` (without its square), old classes of each task.

    Args:
        alpha: weight; a list has one for each experience after the first.
        temperature: T.
    """

    def __init__(self, alpha: float | Sequence[float] = 1, temperature: float = 2) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature} but must be positive")
        self.alpha, self.temperature = alpha, temperature
        self.previous: nn.Module | None = None
        self.classes: dict[int, set[int]] = {}  # old ones, by task label
        self.experiences = 0

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.previous is None:
            return
        listed = isinstance(self.alpha, (list, tuple))
        alpha = self.alpha[min(self.experiences, len(self.alpha)) - 1] if listed else self.alpha
        loss = strategy.loss
        x, multi = strategy.mb_x, is_multi_task_module(strategy.model)
        for task, classes in self.classes.items():
            label = torch.full((len(x),), task, device=x.device) if multi else None
            with torch.no_grad():
                before = avalanche_forward(self.previous, x, label)
            now = avalanche_forward(strategy.model, x, label) if multi else strategy.mb_output
            loss = loss + alpha * self._divergence(now, before, sorted(classes))
        strategy.loss = loss

    def _divergence(self, now: Tensor, before: Tensor, classes: list[int]) -> Tensor:
        log_p, log_q = ((out[:, classes] / self.temperature).log_softmax(1) for out in (now, before))
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.previous = copy.deepcopy(strategy.model).eval()
        self.experiences += 1
        multi = is_multi_task_module(strategy.model)
        labels = strategy.experience.task_labels if multi else [0]
        for task in labels:
            self.classes.setdefault(int(task), set()).update(strategy.experience.classes_in_this_experience)
