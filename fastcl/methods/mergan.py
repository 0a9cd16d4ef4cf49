"""MeRGAN as a learner: joint retraining with replay (mergan-joint) and replay alignment (mergan-align)."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn import DCGAN, Discriminator, class_loss, critic_loss, fixed_statistics, frozen
from ..ops._state import check_module, load_optimizer
from .method import Batches, Generative, Method
from .progress import Progress, check_training

if TYPE_CHECKING:
    from ..streams import Stream, Task


class MeRGAN(Generative):
    r"""Memory replay GAN (Wu et al. 2018): a conditional GAN remembers itself through a snapshot of its generator.

    Joint retraining: images of earlier classes that the snapshot makes count as real. Replay alignment: the critic sees
    the new classes only, and the generator's loss gains
    :math:`\frac\lambda2\sum\lVert G(z,c)-G_{t-1}(z,c)\rVert^2`, over pixels in [-1, 1], earlier classes c and the same z.
    WGAN-GP with class heads (AC-GAN); the class head, which also learns from the snapshot's images, is the classifier.
    No old image is read.

    Args:
        model: the discriminator and classifier, with an output for every class of the stream.
        generator: conditional, with as many classes.
        strength: lambda, of alignment; the paper's 1e-3 for MNIST, 1e-2 for SVHN. With one class a task 0.1 remembers
            more (``bench/results/generative.md``: 80% of ten digits, not 46%).
        critic_steps: of the discriminator for one of the generator; 5 in the paper.
        penalty: of the critic's gradient. betas: Adam's, of both networks.
        aligned: images of alignment in a step, shared by the earlier classes.
        epochs: over a task's data (``fastcl run`` passes its own).
        cooling, finish: as for :class:`fastcl.methods.DGM`; 0 and 0: the paper's. The next task goes on with the critic as
            it was before the finish.
        lr: Adam's, of both networks. The paper has 1e-4, betas (0, .9), five critic steps and 8000 steps of the generator
            for each class; the defaults here are a CPU's.
        precision: of both networks' steps, as for :func:`fastcl.nn.mixed`.

    Raises:
        ValueError: numbers out of range.
    """  # noqa: E501

    paper = "Wu et al. 2018, Memory replay GANs"
    seed = "generative-memory"
    settings = ("class",)
    joint: ClassVar[bool]
    usual_lr = 2e-3
    epochs: ClassVar[dict[str, int]] = {"digits": 40, "mnist": 8}

    def __init__(
        self,
        model: Discriminator,
        generator: DCGAN,
        *,
        strength: float = 1e-3,
        critic_steps: int = 1,
        penalty: float = 10.0,
        betas: tuple[float, float] = (0.5, 0.999),
        aligned: int = 64,
        epochs: int = 8,
        cooling: float = 0.5,
        finish: int = 20,
        **options: Any,
    ) -> None:
        for name, value in (("strength", strength), ("penalty", penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        for name, value in (("critic_steps", critic_steps), ("aligned", aligned)):
            if value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
        check_training(epochs, finish, cooling)
        lr = options.setdefault("lr", self.usual_lr)
        options["optimizer"] = options.get("optimizer") or (lambda params: torch.optim.Adam(params, lr, betas))
        super().__init__(model, **options)
        self.generator, self.strength, self.critic_steps = generator, strength, critic_steps
        self.penalty, self.aligned, self.make_optimizer = penalty, aligned, options["optimizer"]
        self.progress, self.cooling, self.finish = Progress(epochs), cooling, finish
        self.critic: dict[str, Tensor] | None = None  # the discriminator before the finish
        self.generator_optimizer = options["optimizer"](generator.parameters())
        self.previous: DCGAN | None = None  # the generator as the last task left it
        self.shown: list[Tensor] = []
        self._observed = 0

    @classmethod
    def build(
        cls,
        stream: Stream,
        *,
        width: int = 16,
        discriminator_width: int = 16,
        latent: int = 64,
        norm: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> Method:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Discriminator(stream.input_shape, stream.n_outputs, discriminator_width, norm=norm)
            generator = DCGAN(stream.input_shape, stream.n_outputs, width, latent)
        return cls(model, generator, setting=stream.setting, **options)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.generator.to(next(self.model.parameters()).device).train()
        self._observed = 0
        self.progress.begin(len(self.training_data(task)[1]))
        if self.critic is not None:
            self.model.load_state_dict(self.critic)
            self.critic = None
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.generator).eval()

    def _past(self, n: int, device: torch.device) -> Tensor:
        """n earlier classes, drawn alike often."""
        past = torch.tensor(self.past, device=device)
        return past[torch.randint(len(past), (n,)).to(device)]

    def observe(self, x: Tensor, y: Tensor) -> float:
        """A step of the discriminator and, every `critic_steps` times, one of the generator; the class head's loss."""
        self.check_batch(x, y)
        n, device = len(x), x.device
        self.progress.cool(n, self.cooling, self.optimizer, self.generator_optimizer)
        self.progress.advance(n)
        before = self._past(n, device) if self.previous is not None else y[:0]
        with torch.no_grad():
            old = self.previous(self._z(n, device), before) if len(before) else x[:0]
        real, told = (torch.cat([x, old]), torch.cat([y, before])) if self.joint else (x, y)
        with torch.no_grad(), self.mixed():
            fake = self.generator(self._z(len(real), device), told)
        self.optimizer.zero_grad()
        with self.mixed():
            with fixed_statistics(self.model):
                loss = critic_loss(self.model, real, fake, self.penalty)
            named = self._class_loss(x, y, old, before)
        (loss + named).backward()
        self.optimizer.step()
        self._observed += 1
        if self._observed % self.critic_steps == 0:
            self._generator_step(told)
        return named.item()

    def _class_loss(self, x: Tensor, y: Tensor, old: Tensor, before: Tensor) -> Tensor:
        """On every class alike often: of the new images as many as each earlier class has."""
        now, past = len(self.tasks[-1]), len(self.classes) - len(self.tasks[-1])
        mine = min(len(x), max(1, round(len(x) * now / past))) if past else len(x)
        return class_loss(self.model(torch.cat([x[:mine], old])), torch.cat([y[:mine], before]), self.classes)

    def _z(self, n: int, device: torch.device) -> Tensor:
        return torch.randn(n, self.generator.latent).to(device)

    def _generator_step(self, y: Tensor) -> None:
        n, device = len(y), y.device
        z, c = self._z(n, device), y
        align = not self.joint and self.previous is not None
        if align:  # one forward pass: BatchNorm then sees all classes, as it does when it is asked for them
            z, c = torch.cat([z, self._z(self.aligned, device)]), torch.cat([c, self._past(self.aligned, device)])
        self.generator_optimizer.zero_grad()
        with self.mixed():
            made = self.generator(z, c)
        with self.mixed(), frozen(self.model), fixed_statistics(self.model):
            value, logits = self.model.judge(made[:n])
        loss = class_loss(logits, y, self.classes) - value.mean()
        if align:
            with torch.no_grad():
                was = self.previous(z[n:], c[n:])
            # twice the difference: the papers' images are in [-1, 1]
            loss = loss + self.strength / 2 * F.mse_loss(2 * made[n:], 2 * was, reduction="sum")
        loss.backward()
        self.generator_optimizer.step()

    def end_task(self, batches: Batches) -> None:
        if self.finish:
            x, y = (torch.cat(part) for part in zip(*batches, strict=True))
            self.critic = copy.deepcopy(dict(self.model.state_dict()))
            each = -(-len(y) // len(self.tasks[-1]))
            labels = torch.tensor(self.classes, device=y.device).repeat_interleave(each)
            images = torch.cat([(self.generator.sample(part) * 255).round().byte() for part in labels.split(1024)])
            optimizer = self.make_optimizer(self.model.parameters())
            self.learn_alone(x, y, images, labels, optimizer, self.finish, self.progress.batch or len(x))
        self.shown.append(self.generate(100)[0].cpu())

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        y = self._evenly(n).to(next(self.model.parameters()).device)
        return self.generator.sample(y), y

    def extra_state(self) -> dict[str, Any]:
        return {
            "generator": dict(self.generator.state_dict()),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "previous": None if self.previous is None else dict(self.previous.state_dict()),
            "shown": self.shown,
            "observed": self._observed,
            "counts": self.progress.state(),
            "critic": self.critic,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.to(next(self.model.parameters()).device).load_state_dict(state["generator"])
        self.generator.train()
        load_optimizer(self.generator_optimizer, state["generator_optimizer"], "state.extra.generator_optimizer")
        self.previous, self.shown, self._observed = None, list(state["shown"]), state["observed"]
        self.progress.load(state["counts"])
        self.critic = None
        if state["critic"] is not None:
            check_module(self.model, state["critic"], "state.extra.critic")
            self.critic = dict(state["critic"])
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.generator).eval()
            self.previous.load_state_dict(state["previous"])


class MeRGANJoint(MeRGAN):
    """:class:`MeRGAN` with joint retraining.

    Example:
        >>> learner = MeRGANJoint.build(stream, width=4); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "mergan-joint"
    joint = True


class MeRGANAlign(MeRGAN):
    """:class:`MeRGAN` with replay alignment.

    Example:
        >>> learner = MeRGANAlign.build(stream, width=4, strength=1e-3); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "mergan-align"
    joint = False
