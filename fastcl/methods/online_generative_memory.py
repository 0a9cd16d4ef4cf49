"""Online generative memory as a learner."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..nn import VAE, WGAN, Replay, layer_inputs, project_step
from .method import Replaying


class OnlineGenerativeMemory(Replaying):
    r"""Online generative memory (Skorokhodov 2019): no step may change what the network says of remembered images.

    Before each step the generator's snapshot from the last task makes a batch x'. Three modes:

    - ``lookahead``: `steps` steps down :math:`\lVert f_\theta(x')-f_{\theta-a\nabla L(\theta)}(x')\rVert_2^2`, through the
      inner gradient; then the step.
    - ``distill``: f(x') is saved, the step is taken, then one step down :math:`\lVert f(x')-saved\rVert_2^2`.
    - ``project``: what a step changes in each layer is projected so that the layer's outputs on x' stay
      (:func:`fastcl.nn.project_onto_outputs`), wholly or within a ball.

    The generator learns the new images and its own snapshot's (generative replay). No old image is read.

    Args:
        model: an output unit for each class of the stream; for ``project`` of Linear and Conv2d layers only.
        generator: of images, as for :class:`fastcl.nn.Replay`.
        mode: above.
        remembered: images in x'.
        steps: of ``lookahead``. rate: a, of its inner step and its own steps (None: lr). weight: of the loss of ``distill``.
        eps, ball, radius: of ``project``.
        generator_lr: Adam's, of the generator. critic_steps: of a WGAN.
        lr, optimizer: as for :class:`Method`. precision: of the generator, as for :func:`fastcl.nn.mixed`.

    Raises:
        ValueError: an unknown `mode` or `ball`; numbers out of range.

    Example:
        >>> learner = OnlineGenerativeMemory.build(stream, mode="distill"); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """  # noqa: E501

    name = "online-generative-memory"
    paper = "Skorokhodov 2019, Generative memory for continual learning (slides)"
    seed = "generative-memory"
    epochs: ClassVar[dict[str, int]] = {"digits": 30}

    def __init__(
        self,
        model: nn.Module,
        generator: VAE | WGAN,
        *,
        mode: str = "distill",
        remembered: int = 128,
        steps: int = 1,
        rate: float | None = None,
        weight: float = 1.0,
        eps: float = 1e-3,
        ball: str = "none",
        radius: float = 0.0,
        generator_lr: float = 1e-3,
        critic_steps: int = 1,
        **options: Any,
    ) -> None:
        if mode not in ("lookahead", "distill", "project"):
            raise ValueError(f"mode is {mode!r} but must be lookahead, distill or project")
        if ball not in ("none", "frobenius", "spectral"):
            raise ValueError(f"ball is {ball!r} but must be none, frobenius or spectral")
        for name, count in (("remembered", remembered), ("steps", steps)):
            if count < 1:
                raise ValueError(f"{name} is {count} but must be at least 1")
        for name, value in (("weight", weight), ("radius", radius)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        if not eps > 0:
            raise ValueError(f"eps is {eps} but must be positive")
        super().__init__(model, **options)
        self.mode, self.remembered, self.steps, self.weight = mode, remembered, steps, weight
        self.rate = options.get("lr", 1e-3) if rate is None else rate
        self.projection = {"eps": eps, "ball": ball, "radius": radius}
        self.memory_of = Replay(generator, generator_lr, critic_steps, self.precision)
        self.shown: list[Tensor] = []

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_batch(x, y)
        if self.memory_of.previous is None:
            value = super().observe(x, y)
            self.memory_of.learn(x, y)
            return value
        images, _ = self.memory_of.sample(self.remembered)
        value = getattr(self, f"_{self.mode}")(x, y, images)
        old = self.memory_of.sample(len(x))
        self.memory_of.learn(x, y, old, 1 / len(self.tasks))
        return value

    def _said(self, images: Tensor) -> Tensor:
        """The outputs of all classes seen: of old images also what is said of the new ones must stay."""
        return self.model(images)[:, self.seen]

    def _lookahead(self, x: Tensor, y: Tensor, images: Tensor) -> float:
        params = dict(self.model.named_parameters())
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self.loss(x, y), [*params.values()], create_graph=True)
            ahead = {name: p - self.rate * g for (name, p), g in zip(params.items(), gradients, strict=True)}
            change = self._said(images) - functional_call(self.model, ahead, (images,))[:, self.seen]
            down = torch.autograd.grad(change.square().sum(1).mean(), [*params.values()])
            with torch.no_grad():
                for p, g in zip(params.values(), down, strict=True):
                    p.sub_(g, alpha=self.rate)
        return super().observe(x, y)

    def _distill(self, x: Tensor, y: Tensor, images: Tensor) -> float:
        with torch.no_grad():
            saved = self._said(images)
        value = super().observe(x, y)
        self.optimizer.zero_grad()
        (self.weight * (self._said(images) - saved).square().sum(1).mean()).backward()
        self.optimizer.step()
        return value

    def _project(self, x: Tensor, y: Tensor, images: Tensor) -> float:
        inputs = layer_inputs(self.model, images)
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        value = super().observe(x, y)
        project_step(self.model, before, inputs, **self.projection)
        return value
