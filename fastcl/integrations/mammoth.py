"""Mix-ins for Mammoth's models (Buzzega et al. 2020; github.com/aimagelab/mammoth): its observe and end_task.

A model of Mammoth is a subclass of its ``ContinualModel``, which has ``self.net``, ``self.opt``, ``self.loss`` and
``self.args``. A file in Mammoth's ``models/`` is then

    from models.utils.continual_model import ContinualModel
    from fastcl.integrations.mammoth import RegularisedModel
    import fastcl

    class FastEwc(RegularisedModel, ContinualModel):
        NAME = "fast-ewc"
        COMPATIBILITY = ["class-il", "domain-il", "task-il"]

        def make_regulariser(self):
            return fastcl.EWC(self.net, self.args.e_lambda, gamma=self.args.gamma)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import importance


class RegularisedModel:
    """Mixed into Mammoth's ``ContinualModel``: trains with a regulariser and ends a task by consolidating it.

    Subclasses say which by :meth:`make_regulariser`: :class:`fastcl.EWC`, MAS, SI or RWalk of ``self.net``, SI and
    RWalk with ``self.opt`` or without an optimizer.

    Example:
        >>> class Ewc(RegularisedModel):  # and Mammoth's ContinualModel, which brings net, opt and loss
        ...     net, opt, loss = model, optimizer, staticmethod(criterion)
        ...     def make_regulariser(self): return fastcl.EWC(self.net, 100.0)
        >>> Ewc().observe(x, y, x) > 0
        True
    """

    net: Any
    opt: torch.optim.Optimizer
    loss: Any
    device: Any

    def make_regulariser(self) -> importance.Regulariser:
        raise NotImplementedError

    @property
    def regulariser(self) -> importance.Regulariser:
        """Made on first use: Mammoth builds the network's optimizer after the model."""
        made = self.__dict__.get("_regulariser")
        if made is None:
            made = self.__dict__["_regulariser"] = self.make_regulariser()
        return made

    def observe(
        self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor, epoch: int | None = None, **kwargs: Any
    ) -> float:
        """A step on a batch; the loss with the penalty's value."""
        regulariser = self.regulariser
        self.opt.zero_grad()
        loss = self.loss(self.net(inputs), labels)
        loss.backward()
        value = loss.detach() + regulariser.add_gradients()
        self.opt.step()
        if getattr(regulariser, "_names", None) is not None:  # SI and RWalk that do not watch the optimizer
            regulariser.after_step()
        return value.item()

    def end_task(self, dataset: Any) -> None:
        """Consolidates on ``dataset.train_loader``, whose batches are (inputs, labels, not augmented inputs, ...)."""
        self.regulariser.consolidate(self._batches(dataset))

    def _batches(self, dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels, *_ in dataset.train_loader:
            yield inputs, labels
