"""Latent generative memory as a learner."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import importance
from ..nn import FeatureCritic, FeatureGenerator, class_loss, critic_loss, frozen, mlp
from ..ops._state import load_optimizer
from .method import Batches, Method, entropy_within_tasks

if TYPE_CHECKING:
    from ..streams import Stream, Task


class LatentGenerativeMemory(Method):
    r"""Latent generative memory (Skorokhodov 2019): the generator lives in the classifier's deep layers.

    The classifier is head(embedder(x)). From the second task on, features of old classes are hallucinated by the
    generator as the last task left it, and the head learns on them and on the new images' embeddings, every class alike
    often. The generator (AC-WGAN-GP) learns the embeddings in the same steps. So that old features keep their meaning
    the embedder is held by an importance penalty, and (`prototypes`) hallucinations follow what drift there is.

    Args:
        model: Sequential(embedder, head); the embedder's features are not negative, the head has an output for every
            class of the stream.
        hold: the embedder by ``ewc`` (Fisher of the labels' likelihood), ``mas`` (of its own features, before their
            ReLU) or ``none``.
        strength: lambda of that penalty.
        replay: how the generator keeps old classes: ``joint``, hallucinations count as real, or ``align``,
            :math:`\frac{\alpha}{2}\lVert G-G_{t-1}\rVert^2` with alpha = `alignment`.
        prototypes: keep each class's mean feature, and move its hallucinations by the drift that the new images show
            near it (Yu et al. 2020).
        generator_lr: Adam's, of generator and critic. penalty: of the critic's gradient.
        critic_steps: for one step of the generator.
        finish: steps at a task's end, in the setting ``class``, in which the head learns on hallucinations of every
            class, old and new (ours: beside real new features it tells hallucinated from real, and takes real old ones
            for new).

    Raises:
        ValueError: an unknown `hold` or `replay`; numbers out of range.

    Example:
        >>> learner = LatentGenerativeMemory.build(stream, hold="mas"); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """

    name = "latent-generative-memory"
    paper = "Skorokhodov 2019, Generative memory for continual learning (slides)"
    seed = "generative-memory"
    settings = ("task", "class")
    epochs: ClassVar[dict[str, int]] = {"digits": 40}

    def __init__(
        self,
        model: nn.Sequential,
        *,
        hold: str = "mas",
        strength: float = 100.0,
        replay: str = "joint",
        alignment: float = 1.0,
        prototypes: bool = False,
        generator_lr: float = 2e-3,
        penalty: float = 10.0,
        critic_steps: int = 1,
        latent: int = 64,
        width: int = 256,
        finish: int = 300,
        **options: Any,
    ) -> None:
        if hold not in ("ewc", "mas", "none") or replay not in ("joint", "align"):
            raise ValueError("hold must be ewc, mas or none, and replay joint or align")
        for name, value in (("alignment", alignment), ("penalty", penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value} but must be finite and not negative")
        if critic_steps < 1 or finish < 0:
            raise ValueError(f"critic_steps is {critic_steps} and finish {finish} but must be at least 1 and 0")
        super().__init__(model, **options)
        self.embedder, self.head = model[0], model[1]
        first = next(m for m in self.head.modules() if isinstance(m, nn.Linear))
        last = [m for m in self.head.modules() if isinstance(m, nn.Linear)][-1]
        self.generator = FeatureGenerator(first.in_features, last.out_features, width, latent)
        self.critic = FeatureCritic(first.in_features, last.out_features, width)
        betas = (0.5, 0.999)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), generator_lr, betas)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), generator_lr, betas)
        self.replay, self.alignment, self.prototypes, self.penalty = replay, alignment, prototypes, penalty
        self.hold, self.critic_steps, self.observed, self.finish = hold, critic_steps, 0, finish
        self.regulariser: importance.EWC | importance.MAS | None = None
        if hold == "mas":
            # what comes before the last ReLU: a unit that is off on all old images would be free to turn on for them
            ends_in_relu = isinstance(self.embedder, nn.Sequential) and isinstance(self.embedder[-1], nn.ReLU)
            self.regulariser = importance.MAS(self.embedder[:-1] if ends_in_relu else self.embedder, strength)
        elif hold == "ewc":
            with frozen(self.head):  # only the embedder's parameters are its own
                self.regulariser = importance.EWC(model, strength)
        self.previous: FeatureGenerator | None = None
        self.old_embedder: nn.Module | None = None  # for the drift
        self.scale = 0.0  # root mean square of features, set by the first batch: the generator's unit
        self.means: dict[int, Tensor] = {}  # prototypes
        self.moved: dict[int, Tensor] = {}  # how far each class has drifted since its hallucinations were learned

    @classmethod
    def build(cls, stream: Stream, *, hidden: tuple[int, ...] = (400, 400), seed: int = 0, **options: Any) -> Method:
        """The literature's MLP, cut before its last hidden layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = hidden[0] if len(hidden) == 1 else hidden[-2]
            embedder = nn.Sequential(mlp(stream.input_shape, hidden[: max(0, len(hidden) - 2)], width), nn.ReLU())
            head = mlp((width,), hidden[len(hidden) - 1 :] if len(hidden) > 1 else (), stream.n_outputs)
            return cls(nn.Sequential(embedder, head), setting=stream.setting, **options)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.generator.to(self._device)
        self.critic.to(self._device)
        if len(self.tasks) > 1:
            self.previous = copy.deepcopy(self.generator).eval()
            if self.prototypes:
                self.old_embedder = copy.deepcopy(self.embedder).eval()

    def observe(self, x: Tensor, y: Tensor) -> float:
        self.check_batch(x, y)
        z = self.embedder(x)
        if not self.scale:
            self.scale = max(z.detach().square().mean().sqrt().item(), 1e-6)
        old, classes = self._hallucinated(len(x))
        loss = self._classification(z, y, old, classes)
        self.optimizer.zero_grad()
        loss.backward()
        value = loss.detach()
        if self.regulariser is not None:
            value = value + self.regulariser.add_gradients()
        self.optimizer.step()
        self._learn_features(z.detach() / self.scale, y, old / self.scale, classes)
        return value.item()

    def _hallucinated(self, n: int) -> tuple[Tensor, Tensor]:
        """n features of old classes, and their classes."""
        if self.previous is None:
            return torch.empty(0, 0, device=self._device), torch.empty(0, dtype=torch.int64, device=self._device)
        past = torch.tensor(self.past)
        y = past[torch.randint(len(past), (n,))].to(self._device)
        with torch.no_grad():
            z = self.previous.sample(y) * self.scale
        if self.moved:
            z = (z + torch.stack([self.moved[c] for c in y.tolist()])).relu()
        return z, y

    def _classification(self, z: Tensor, y: Tensor, old: Tensor, classes: Tensor) -> Tensor:
        """The head's loss; of the new samples as many as each old class has."""
        if len(classes):
            now, past = len(self.tasks[-1]), len({c for task in self.tasks[:-1] for c in task})
            mine = min(len(z), max(1, round(len(z) * now / past))) if self.setting == "class" else len(z)
            z, y = torch.cat([z[:mine], old]), torch.cat([y[:mine], classes])
        if self.setting == "task":
            return entropy_within_tasks(self.head(z), y, self.tasks)
        return class_loss(self.head(z), y, self.classes)

    def _learn_features(self, z: Tensor, y: Tensor, old: Tensor, classes: Tensor) -> None:
        """A step of critic and generator on the embeddings."""
        self.observed += 1
        joint = self.replay == "joint" and len(classes) > 0
        real, told = (torch.cat([z, old]), torch.cat([y, classes])) if joint else (z, y)
        with torch.no_grad():
            fake = self.generator.sample(told)
        seen = self.seen
        self.critic_optimizer.zero_grad()
        loss = critic_loss(self.critic, real, fake, self.penalty, unit=1.0)
        (loss + class_loss(self.critic.judge(real)[1], told, seen)).backward()
        self.critic_optimizer.step()
        if self.observed % self.critic_steps:
            return
        self.generator_optimizer.zero_grad()
        with frozen(self.critic):
            value, logits = self.critic.judge(self.generator.sample(told))
        loss = class_loss(logits, told, seen) - value.mean()
        if self.replay == "align" and len(classes):
            noise = torch.randn(len(classes), self.generator.latent).to(self._device)
            with torch.no_grad():
                was = self.previous(noise, classes)
            loss = loss + self.alignment / 2 * F.mse_loss(self.generator(noise, classes), was, reduction="sum") / len(
                was
            )
        loss.backward()
        self.generator_optimizer.step()

    def end_task(self, batches: Batches) -> None:
        batches = list(batches)
        if self.setting == "class":
            self._finish(len(batches[0][1]))
        if self.hold == "ewc":
            with frozen(self.head):
                self.regulariser.consolidate(batches, classes=self.classes)
        elif self.hold == "mas":
            self.regulariser.consolidate([x for x, _ in batches])
        if self.prototypes:
            self._follow(batches)

    def _finish(self, n: int) -> None:
        """The head on hallucinated features of every class, old and new."""
        optimizer = torch.optim.Adam(self.head.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, self.finish))
        seen = torch.tensor(self.seen)
        for _ in range(self.finish):
            y = seen[torch.randint(len(seen), (n,))].to(self._device)
            with torch.no_grad():
                z = self.generator.sample(y) * self.scale
            optimizer.zero_grad()
            class_loss(self.head(z), y, self.seen).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def _follow(self, batches: Batches) -> None:
        """Moves the old prototypes by the drift of the new images near them, and takes the new ones."""
        self.embedder.eval()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        now = torch.cat([self.embedder(part) for part in x.split(1024)])
        if self.old_embedder is not None:
            was = torch.cat([self.old_embedder(part) for part in x.split(1024)])
            for c, mean in self.means.items():
                distance = (was - mean).square().sum(1)
                weight = (-distance / (2 * distance.median().clamp(min=1e-12))).exp()
                drift = weight @ (now - was) / weight.sum()
                # hallucinations are learned anew in every task, already moved: only the last drift is missing
                self.means[c], self.moved[c] = mean + drift, drift
        for c in self.tasks[-1]:
            self.means[c] = now[y == c].mean(0)
            self.moved[c] = torch.zeros_like(self.means[c])
        self.old_embedder = None
        self.embedder.train()

    def extra_state(self) -> dict[str, Any]:
        return {
            "generator": dict(self.generator.state_dict()),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic": dict(self.critic.state_dict()),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "previous": None if self.previous is None else dict(self.previous.state_dict()),
            "old_embedder": None if self.old_embedder is None else dict(self.old_embedder.state_dict()),
            "regulariser": None if self.regulariser is None else self.regulariser.state_dict(),
            "means": {str(c): m for c, m in self.means.items()},
            "moved": {str(c): m for c, m in self.moved.items()},
            "scale": self.scale,
            "observed": self.observed,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for name in ("generator", "critic"):
            getattr(self, name).to(self._device).load_state_dict(state[name])
            own = f"{name}_optimizer"
            load_optimizer(getattr(self, own), state[own], f"state.extra.{own}")
        self.previous = self.old_embedder = None
        if state["previous"] is not None:
            self.previous = copy.deepcopy(self.generator).eval()
            self.previous.load_state_dict(state["previous"])
        if state["old_embedder"] is not None:
            self.old_embedder = copy.deepcopy(self.embedder).eval()
            self.old_embedder.load_state_dict(state["old_embedder"])
        if self.regulariser is not None:
            self.regulariser.load_state_dict(state["regulariser"])
        for name in ("means", "moved"):
            setattr(self, name, {int(c): m.to(self._device) for c, m in state[name].items()})
        self.scale, self.observed = state["scale"], state["observed"]
