"""DGM as a learner: with masks on weights (dgm-w) and on channels (dgm-a)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import (
    Discriminator,
    DynamicGenerator,
    class_loss,
    critic_loss,
    dgm_scale,
    fixed_statistics,
    frozen,
    plot_capacity,
    plot_size,
)
from ..optim import MaskedAdam
from .method import Batches, Generative, Method
from .progress import Progress, check_training

if TYPE_CHECKING:
    from ..streams import Stream, Task


class DGM(Generative):
    r"""Dynamic generative memory (Ostapenko et al. 2019).

    A :class:`fastcl.nn.DynamicGenerator` learns each task in adversarial training on the task's own data alone, with a
    sparse mask, :math:`L_G + \lambda R` (eq. 5), annealed by eq. 3; what earlier tasks use is held to the bit inside
    the optimizer (eq. 4), and the network grows by what was used. The discriminator, made anew for every task, is the
    classifier too (AC-GAN): real images of the task and images that the generator remembers, every class alike often.
    No old image is read.

    Args:
        model: the discriminator and classifier, with an output for every class of the stream.
        generator: new.
        epochs: over a task's data, that the annealing is spread over (``fastcl run`` passes its own).
        strength: lambda, times the share by which the network has grown; 0.08 (dgm-w) and 0.01 (dgm-a) for MNIST.
        s_max: 1e4 (dgm-w), 1e5 (dgm-a).
        schedule: as for :func:`fastcl.nn.dgm_scale`.
        penalty: of the critic's gradient. betas: Adam's, of both networks.
        finish: passes over the data at a task's end in which the classifier learns alone, its rate falling to 0, on
            images moved a little (:func:`fastcl.nn.jitter`), half of the new class's generated. Ours: beside the critic
            its accuracy jumps from step to step (the authors' code picks an epoch by old images), and of old classes it
            sees generated images alone, whose faults it would learn. 0: the paper's.
        cooling: share of a task's training, its last part, over which both rates fall to 0. Ours: at a steady rate the
            generator wanders to the end, and what it makes on the last step is what is remembered. 0: the paper's.
        clamp: embeddings are kept in [-clamp, clamp] (HAT's; the paper does not say).
        lr: Adam's, of both networks. precision: of their steps, as for :func:`fastcl.nn.mixed`.

    Raises:
        ValueError: numbers out of range; an optimizer, which DGM makes itself.
    """

    paper = "Ostapenko et al. 2019, Learning to remember: a synaptic plasticity driven framework for continual learning"
    seed = "dynamic-generative-memory"
    settings = ("class",)
    mask: ClassVar[str]
    usual_lr = 2e-3
    epochs: ClassVar[dict[str, int]] = {"digits": 20, "mnist": 8}

    def __init__(
        self,
        model: Discriminator,
        generator: DynamicGenerator,
        *,
        epochs: int = 8,
        strength: float = 0.08,
        s_max: float = 1e4,
        schedule: str = "monotone",
        penalty: float = 1.0,
        betas: tuple[float, float] = (0.5, 0.999),
        clamp: float = 6.0,
        finish: int = 20,
        cooling: float = 0.5,
        **options: Any,
    ) -> None:
        for name, value in (("strength", strength), ("penalty", penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        check_training(epochs, finish, cooling)
        dgm_scale(0, 1, 0, 1, s_max, schedule)  # raises what is wrong with them
        self.lr, self.betas = options.setdefault("lr", self.usual_lr), tuple(betas)
        if options.get("optimizer") is not None:
            raise ValueError("optimizer must be left out: DGM trains with MaskedAdam, made anew for every task")
        options["optimizer"] = self._adam
        super().__init__(model, **options)
        self.generator, self.strength, self.progress = generator, strength, Progress(epochs)
        self.s_max, self.schedule, self.penalty, self.clamp, self.finish = s_max, schedule, penalty, clamp, finish
        self.cooling = cooling
        self.generator_optimizer: MaskedAdam | None = None
        self.replay: tuple[Tensor, Tensor] | None = None  # images as bytes, classes
        self.replay_seed = 0
        self.sizes = [sum(generator.initial)]  # channels before the first task and after each
        self.shown: list[Tensor] = []

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        width: int | None = None,
        discriminator_width: int = 16,
        latent: int = 128,
        mask_position: str = "activation",
        s_max: float | None = None,
        strength: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Method:
        """The paper's networks; `width` is the generator's w (6 for dgm-w, 20 for dgm-a). The discriminator's
        is 32 in the paper; half takes a CPU less than half the time."""
        weights = cls.mask == "weight"
        s_max = (1e4 if weights else 1e5) if s_max is None else s_max
        strength = (0.08 if weights else 0.01) if strength is None else strength
        width = (6 if weights else 20) if width is None else width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Discriminator(stream.input_shape, stream.n_outputs, discriminator_width)
            generator = DynamicGenerator(
                stream.input_shape, stream.n_outputs, cls.mask, width, latent, s_max, mask_position
            )
        return cls(model, generator, s_max=s_max, strength=strength, setting=stream.setting, **options)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.generator.to(self._device).train()
        _, y = self.training_data(task)
        self.progress.begin(len(y))
        if len(self.tasks) > 1:
            self.replay_seed = int(torch.randint(2**31, ()))
            self.replay = self._remember(-(-len(y) // len(task.classes)))
        self.generator.begin_task(task.classes)
        self.generator_optimizer = self._masked_adam()
        self.model.reset_parameters()
        self.optimizer = self._adam(self.model.parameters())

    def _remember(self, each: int) -> tuple[Tensor, Tensor]:
        """Images of every class of ended tasks, `each` of them: always the same for the same seed."""
        ended = [c for task in self.generator.classes[: self.generator.layers[0].tasks] for c in task]
        y = torch.tensor(ended, device=self._device).repeat_interleave(each)
        x = self.generator.generate(y, torch.Generator().manual_seed(self.replay_seed))
        return (x * 255).round().byte(), y

    def _adam(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return MaskedAdam(params, self.lr, self.betas)

    def _masked_adam(self) -> MaskedAdam:
        """Over the masked layers and this task's own BatchNorms and last layer; ended tasks' weights are held."""
        g = self.generator
        params = chain(g.layers.parameters(), g.norms[-1].parameters(), g.outputs[-1].parameters())
        return MaskedAdam(params, self.lr, self.betas, reserved=g.reserved())

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def observe(self, x: Tensor, y: Tensor) -> float:
        """One step of the discriminator and one of the generator; returns the classifier's loss."""
        self.check_batch(x, y)
        self._anneal(len(y))
        with self.mixed():  # for both: the discriminator's step leaves the generator alone
            fake = self.generator(self.generator.latents(y))
        loss = self._discriminator_step(x, y, fake.detach())
        self._generator_step(fake, y)
        return loss

    def _anneal(self, n: int) -> None:
        """The masks' scale and the optimizers' rate for the next n samples."""
        epoch, batch, batches = self.progress.at(n)
        self.generator.set_scale(dgm_scale(epoch, self.progress.epochs, batch, batches, self.s_max, self.schedule))
        self.progress.cool(n, self.cooling, self.optimizer, self.generator_optimizer)
        self.progress.advance(n)

    def _discriminator_step(self, x: Tensor, y: Tensor, fake: Tensor) -> float:
        self.optimizer.zero_grad()
        with self.mixed():
            with fixed_statistics(self.model):
                loss = critic_loss(self.model, x, fake, self.penalty)
            told = self.loss(x, y)
        (loss + told).backward()
        self.optimizer.step()
        return told.item()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The classifier's: on as many remembered images as there are new, and of the new as many as a class has."""
        if self.replay is not None:
            images, labels = self.replay
            picked = torch.randint(len(labels), (len(x),)).to(x.device)
            now, before = len(self.tasks[-1]), len(self.classes) - len(self.tasks[-1])
            mine = min(len(x), max(1, round(len(x) * now / before)))
            x = torch.cat([x[:mine], images[picked].to(x.dtype) / 255])
            y = torch.cat([y[:mine], labels[picked]])
        return class_loss(self.model(x), y, self.classes)

    def _generator_step(self, fake: Tensor, y: Tensor) -> None:
        self.generator_optimizer.zero_grad()
        with self.mixed(), frozen(self.model), fixed_statistics(self.model):
            value, logits = self.model.judge(fake)
        grown = sum(self.generator.channels) / sum(self.generator.initial)
        loss = self.strength * grown * self.generator.sparsity() - value.mean()
        if len(self.tasks[-1]) > 1:
            loss = loss + class_loss(logits, y, self.classes)
        loss.backward()
        self.generator_optimizer.step()
        with torch.no_grad():
            for layer in self.generator.layers:
                layer.embedding.clamp_(-self.clamp, self.clamp)

    def _finish(self, batches: Batches) -> None:
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        self.replay_seed = int(torch.randint(2**31, ()))
        remembered = self._remember(-(-len(y) // len(self.tasks[-1])))
        optimizer = MaskedAdam(self.model.parameters(), self.lr)
        self.learn_alone(x, y, *remembered, optimizer, self.finish, self.progress.batch or len(x))

    def end_task(self, batches: Batches) -> None:
        self.generator.end_task()
        if self.finish:
            self._finish(batches)
        self.generator_optimizer = None  # of weights that have grown
        self.replay = None
        self.sizes.append(sum(self.generator.channels))
        self.shown.append(self.generate(100)[0].cpu())

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        y = self._evenly(n).to(self._device)
        return self.generator.generate(y), y

    def plot_occupancy(self, path: str | Path) -> None:
        """What each task uses of every layer (:func:`fastcl.nn.plot_capacity`)."""
        plot_capacity(self.generator, path)

    def plot_growth(self, path: str | Path) -> None:
        """Channels of the generator over tasks (the paper's figure 2)."""
        plot_size({self.name: self.sizes}, path)

    def extra_state(self) -> dict[str, Any]:
        optimizer = self.generator_optimizer
        return {
            "shape": self.generator.shape_state(),
            "generator": dict(self.generator.state_dict()),
            "generator_optimizer": None if optimizer is None else optimizer.state_dict(),
            "remembered": None if self.replay is None else [self.replay_seed, len(self.replay[1])],
            "counts": self.progress.state(),
            "sizes": self.sizes,
            "shown": self.shown,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.to(self._device).load_shape(state["shape"])
        self.generator.load_state_dict(state["generator"])
        self.generator.train()
        self.generator_optimizer = self.replay = None
        if state["generator_optimizer"] is not None:
            self.generator_optimizer = self._masked_adam()
            self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        if state["remembered"] is not None:
            self.replay_seed, n = state["remembered"]
            self.replay = self._remember(n // sum(map(len, self.tasks[:-1])))
        self.progress.load(state["counts"])
        self.sizes, self.shown = list(state["sizes"]), list(state["shown"])


class DGMw(DGM):
    """:class:`DGM` with a mask for every weight.

    Example:
        >>> learner = DGMw.build(stream, width=4); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "dgm-w"
    mask = "weight"


class DGMa(DGM):
    """:class:`DGM` with a mask for every channel.

    Example:
        >>> learner = DGMa.build(stream, width=4); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "dgm-a"
    mask = "unit"
