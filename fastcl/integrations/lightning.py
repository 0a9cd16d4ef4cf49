"""A callback for Lightning (lightning 2): a regulariser in a Trainer that fits task after task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .. import importance

Batches = Callable[[Trainer], Iterable[Any]]


class ContinualCallback(Callback):
    """Adds the penalty's gradients before every optimizer step and ends the task when `fit` ends.

    The gradients are added after GradScaler has unscaled them and before they are clipped or stepped; with accumulated
    batches once a step. The penalty's value is logged as ``penalty``.

    Args:
        regulariser: :class:`fastcl.EWC`, MAS, SI or RWalk of the network whose parameters the optimizer has; SI and
            RWalk without an optimizer of their own.
        batches: what to consolidate on, from the trainer; default its training loader, whose batches are (x, y).
        options: for the regulariser's ``consolidate``, ``classes=`` for one.

    Example:
        >>> trainer = Trainer(max_epochs=1, callbacks=[ContinualCallback(fastcl.EWC(net, 100.0))])  # doctest: +SKIP
    """

    def __init__(self, regulariser: importance.Regulariser, batches: Batches | None = None, **options: Any) -> None:
        self.regulariser, self.batches, self.options = regulariser, batches, options
        self._stepped = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        value = self.regulariser.add_gradients()
        pl_module.log("penalty", value, on_step=True, on_epoch=False)
        self._stepped = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._stepped and hasattr(self.regulariser, "after_step"):
            self.regulariser.after_step()
        self._stepped = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        given = trainer.train_dataloader if self.batches is None else self.batches(trainer)
        self.regulariser.consolidate(given, **self.options)

    def state_dict(self) -> dict[str, Any]:
        return self.regulariser.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.regulariser.load_state_dict(state_dict)
