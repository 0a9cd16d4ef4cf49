"""Avalanche's generative replay; part of :mod:`fastcl.integrations.avalanche`, which is to be imported."""

from __future__ import annotations

import copy
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward, is_multi_task_module
from avalanche.training.plugins import generative_replay
from torch import Tensor

from ..nn.replay import Replay, make_generator


class GenerativeReplayPlugin(generative_replay.GenerativeReplayPlugin):
    """Generative replay (Shin et al. 2017) as Avalanche's, with a generator of its own where none is given.

    Every batch gains images of the experiences before, labelled by the model as the last experience left it. They come
    from a :class:`fastcl.nn.Replay`, which learns beside the model, from ``generator_strategy``, or from the model
    itself if it can ``generate``. With a generator strategy the weights are Avalanche's to the bit
    (``tests/integrations/test_avalanche.py``), but for ``is_weighted_replay``: Avalanche's takes the replay's loss of
    the outputs for the *new* batch, ours of those for the replay. Tasks have no labels, as there.

    Args:
        generator_strategy: an Avalanche strategy whose model has ``generate(n)``; it is trained by
            :class:`TrainGeneratorAfterExpPlugin`, which must be this module's. None: the model, if it has ``generate``,
            else `replay`.
        untrained_solver: the first experience has no replay.
        replay_size: images a batch; None: as many as are new.
        increasing_replay_size: times the number of experiences before; not with a replay_size.
        is_weighted_replay: a loss of its own instead of one for the longer batch.
        weight_replay_loss_factor: the weight is multiplied by it in each iteration.
        weight_replay_loss: the first weight.
        replay: ours: a generator with what it needs to learn; None: a `Replay` of a VAE of the data's shape, of the
            literature's widths.
        value_range: ours: the data's least and greatest value, 0 and 1 to `replay`.

    Raises:
        ValueError: sizes or weights below 0; two generators; data outside of value_range, before the step on them;
            Avalanche's own TrainGeneratorAfterExpPlugin beside a generator strategy, which it would not train; a model
            with a head for each task.

    Example:
        >>> strategy = Naive(model, optimizer, plugins=[GenerativeReplayPlugin()])  # doctest: +SKIP
    """

    def __init__(
        self,
        generator_strategy: Any = None,
        untrained_solver: bool = True,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        is_weighted_replay: bool = False,
        weight_replay_loss_factor: float = 1.0,
        weight_replay_loss: float = 0.0001,
        *,
        replay: Replay | None = None,
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if replay_size is not None and replay_size < 1:
            raise ValueError(f"replay_size is {replay_size} but must be at least 1, or None")
        for name, value in (
            ("weight_replay_loss_factor", weight_replay_loss_factor),
            ("weight_replay_loss", weight_replay_loss),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range is {value_range} but must be the least and the greatest value")
        if replay is not None and generator_strategy is not None:
            raise ValueError("replay and generator_strategy are both given but must be one or the other")
        if not untrained_solver and generator_strategy is None and replay is not None and not replay.classes:
            raise ValueError("untrained_solver is False but replay has not learned anything yet")
        super().__init__(
            generator_strategy,
            untrained_solver,
            replay_size,
            increasing_replay_size,
            is_weighted_replay,
            weight_replay_loss_factor,
            weight_replay_loss,
        )
        self.replay, self.value_range = replay, value_range
        self._new: tuple[Tensor, Tensor] | None = None
        self._old: tuple[Tensor, Tensor] | None = None  # what the last step replayed

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self.replay is None and (self.generator_strategy is not None or hasattr(strategy.model, "generate")):
            super().before_training(strategy, *args, **kwargs)
        apart = self.generator_strategy is not None and self.generator_strategy is not strategy
        if apart and any(type(p) is generative_replay.TrainGeneratorAfterExpPlugin for p in strategy.plugins):
            raise ValueError(
                "plugins: Avalanche's TrainGeneratorAfterExpPlugin trains generators of Avalanche's plugin only, and "
                "must be fastcl.integrations.avalanche's"
            )

    def before_training_exp(self, strategy: Any, num_workers: int = 0, shuffle: bool = True, **kwargs: Any) -> None:
        if is_multi_task_module(strategy.model):
            raise ValueError("model has a head for each task but must have one for all: replayed images have no task")
        if self.generator_strategy is None:
            if self.replay is None:
                if not self.untrained_solver:
                    raise ValueError("untrained_solver is False but there is no generator that has learned anything")
                shape = strategy.experience.dataset[0][0].shape
                self.replay = Replay(make_generator("vae", shape, 1).to(strategy.device))
            self.replay.begin_task(list(strategy.experience.classes_in_this_experience))
        if self.untrained_solver:
            return
        if self.replay is None:
            self.old_generator = copy.deepcopy(self.generator).eval()
        if not self.model_is_generator:
            self.old_model = copy.deepcopy(strategy.model).eval()

    @torch.no_grad()
    def _replayed(self, strategy: Any) -> tuple[Tensor, Tensor]:
        """Images of earlier experiences, and what the last model calls them."""
        n = self.replay_size or len(strategy.mb_x)
        if self.increasing_replay_size and not self.replay_size:
            n *= strategy.experience.current_experience
        if self.replay is None:
            x = self.old_generator.generate(n).to(strategy.device)
        else:
            low, high = self.value_range
            x = low + (high - low) * self.replay.sample(n)[0].to(strategy.mb_x)
        if self.model_is_generator:
            y = strategy.mb_y.new_zeros(len(x))
        else:
            y = avalanche_forward(self.old_model, x, None).argmax(-1)
        self._old = (x, y)
        return x, y

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.replay is not None:
            x, (low, high) = strategy.mb_x, self.value_range
            if not (x.amin() >= low and x.amax() <= high):
                raise ValueError(
                    f"the data have values from {x.amin().item():g} to {x.amax().item():g} but must have them in "
                    f"value_range, {low:g} to {high:g}; give theirs, or a generator_strategy"
                )
            self._new, self._old = (x, strategy.mb_y), None
        if self.is_weighted_replay or self.untrained_solver:
            return
        x, y = self._replayed(strategy)
        batch = strategy.mbatch
        batch[0], batch[1] = torch.cat([batch[0], x]), torch.cat([batch[1], y.to(batch[1])])
        batch[-1] = torch.cat([batch[-1], batch[-1][:1].expand(len(x))])

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if not self.is_weighted_replay or self.untrained_solver:
            return
        x, y = self._replayed(strategy)
        batch, output = strategy.mbatch, strategy.mb_output
        try:
            strategy.mbatch = [x, y, batch[-1][:1].expand(len(x))]
            strategy.mb_output = strategy.forward()
            strategy.loss = strategy.loss + self.weight_replay_loss * strategy.criterion()
        finally:
            strategy.mbatch, strategy.mb_output = batch, output
        self.weight_replay_loss *= self.weight_replay_loss_factor

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A step of our own generator on the images that the model has just seen."""
        if self.replay is None:
            return
        low, high = self.value_range

        def scaled(images: Tensor) -> Tensor:
            return ((images - low) / (high - low)).clamp(0, 1)  # what rounding puts outside

        x, y = self._new
        if self._old is None:
            self.replay.learn(scaled(x), y)
        else:
            old, labels = self._old
            self.replay.learn(scaled(x), y, (scaled(old), labels), len(x) / (len(x) + len(old)))


class TrainGeneratorAfterExpPlugin(generative_replay.TrainGeneratorAfterExpPlugin):
    """Trains the generator strategy of a :class:`GenerativeReplayPlugin` on each experience, after the model."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        for plugin in strategy.plugins:
            known = isinstance(plugin, generative_replay.GenerativeReplayPlugin)
            if known and plugin.generator_strategy not in (None, strategy):
                plugin.generator_strategy.train(strategy.experience)
