"""CLN as a learner."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import GaussianVAE, SimpleNet, distillation, grow, jitter, learn_features, plot_growth, plot_images
from ..nn.simplenet import KERNELS
from .method import Batches, Generative, Method

if TYPE_CHECKING:
    from ..streams import Stream, Task


class CLN(Generative):
    """Continual learning with neurogenesis (Draelos et al. 2017, Neurogenesis deep learning, and the seed's algorithm).

    For a new task: (1) images of the old classes are synthesised by the VAE from each class's Gaussian, and those kept
    that the classifier gives the right class; (2) every convolution gains filters, trained by a new feature learning
    autoencoder (:func:`fastcl.nn.learn_features`) on the new data, the old ones frozen; (3) the classifier gains outputs and
    (4, `observe`) trains on new and synthesised data together; (5) the latent space gains dimensions and (6, `end_task`)
    the VAE, its encoder the classifier's trunk, trains on both, clustering its latents again and again. No old image is
    read, ever.

    A classifier that sees real new images beside synthesised old ones learns to tell real from synthesised, and takes
    real old ones for new. So by default (`show`) we take steps 5 and 6 before step 4, and show the classifier synthesised
    images of the new classes too, all moved a little (:func:`fastcl.nn.jitter`). And what a class's Gaussian gives varies
    less than the class, the less the more often the VAE has learned from itself: the classifier's old images are drawn
    from wider Gaussians (`spread`), and are to mean what they meant to the classifier before (`labels`).

    Args:
        model: a :class:`fastcl.nn.SimpleNet`; it grows.
        filters: added to each convolution for a task. latent: dimensions for the first task; latent_growth: added by each.
        grow: ``fixed``, or ``outliers``: up to `rounds` times `filters`, while the new data has reconstruction outliers.
        replay: synthesised images of each old class. sample: at most so many of the task's own images a class for the VAE.
        iterations: of clustering, each with `vae_epochs` passes but at least `vae_steps` steps.
        finish: steps of 128 images, every class alike often, in which the classifier's rate falls to 0 at a task's end.
        show: of the new classes to the classifier from the second task on: ``synthesised`` images or ``real`` ones, the
            seed's.
        spread: of the Gaussians that the classifier's old images are from; 1: the seed's. labels: of them, ``soft`` (as
            for :class:`fastcl.methods.DGR`) or ``hard``, the seed's.
        beta: weight of the KL; 1 loses the variety within a class (8 x 8 digits). vae_lr: Adam's, of the VAE. nflae_steps: of each layer's autoencoder.
        vae_from: ``classifier``, the seed's: the encoder starts from the classifier's trunk; or ``previous``.
        encoder_pools: poolings of the trunk that the encoder has; None: the whole trunk, which leaves little of an image
            to reconstruct it from.
        lr: Adam's, of the classifier. precision: of the VAE's steps, as for :func:`fastcl.nn.mixed`.

    Raises:
        ValueError: an unknown `grow`, `vae_from`, `show` or `labels`; numbers out of range.

    Example:
        >>> learner = CLN.build(stream, width=4, latent=6); learner.begin_task(stream.tasks[0])
        >>> learner.observe(*batch) > 0
        True
    """  # noqa: E501

    name = "cln"
    paper = "Draelos et al. 2017, Neurogenesis deep learning"
    seed = "neurogenesis"
    settings = ("class",)
    epochs: ClassVar[dict[str, int]] = {"digits": 6, "mnist": 1}

    def __init__(
        self,
        model: SimpleNet,
        *,
        filters: int = 3,
        latent: int = 12,
        latent_growth: int = 6,
        grow: str = "fixed",
        rounds: int = 3,
        replay: int = 1000,
        sample: int = 2000,
        iterations: int = 4,
        vae_epochs: int = 3,
        vae_steps: int = 200,
        finish: int = 200,
        show: str = "synthesised",
        spread: float = 1.3,
        labels: str = "soft",
        beta: float = 0.1,
        vae_lr: float = 1e-3,
        nflae_steps: int = 60,
        vae_from: str = "classifier",
        encoder_pools: int | None = 2,
        **options: Any,
    ) -> None:
        if grow not in ("fixed", "outliers") or vae_from not in ("classifier", "previous"):
            raise ValueError("grow must be fixed or outliers, and vae_from classifier or previous")
        for name, value, one, other in (("show", show, "synthesised", "real"), ("labels", labels, "hard", "soft")):
            if value not in (one, other):
                raise ValueError(f"{name} is {value!r} but must be {one} or {other}")
        if not 0 < spread < math.inf:
            raise ValueError(f"spread is {spread} but must be positive and finite")
        for name, value in (("latent", latent), ("replay", replay), ("sample", sample), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
        if finish < 0:
            raise ValueError(f"finish is {finish} but must not be negative")
        super().__init__(model, **options)
        self.finish = finish
        self.lr = options.get("lr", 1e-3)
        self.filters, self.latent, self.latent_growth = filters, latent, latent_growth
        self.grow, self.rounds = grow, rounds
        self.replay, self.sample, self.iterations, self.vae_epochs = replay, sample, iterations, vae_epochs
        self.show, self.spread, self.labels = show, spread, labels
        self.beta, self.vae_lr, self.nflae_steps = beta, vae_lr, nflae_steps
        self.vae_from, self.vae_steps, self.encoder_pools = vae_from, vae_steps, encoder_pools
        model.trunk(encoder_pools)  # raises what is wrong with it
        self.vae: GaussianVAE | None = None
        self.old: tuple[Tensor, Tensor] | None = None  # synthesised for the VAE: images as bytes, classes
        self.past_shown: tuple[Tensor, Tensor, Tensor] | None = None  # for the classifier; and what it made of them
        self.new_shown: tuple[Tensor, Tensor] | None = None
        self.shown: list[Tensor] = []  # a few synthesised images of every class, after each task
        self.reports: list[dict[str, Any]] = []

    @classmethod
    def build(cls, stream: Stream, *, width: int | Sequence[int] = 12, seed: int = 0, **options: Any) -> Method:
        """A SimpleNet whose head has the first task's outputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SimpleNet(stream.input_shape, max(stream.tasks[0].classes) + 1, width)
            made = cls(model, setting=stream.setting, **options)
        made.input_shape = stream.input_shape
        return made

    input_shape: tuple[int, ...] = (1, 28, 28)
    SYNTHESISED: ClassVar[tuple[str, ...]] = ("old", "past_shown", "new_shown")

    # ---- steps 1 to 3 ----

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        report: dict[str, Any] = {"task": len(self.tasks) - 1}
        if self.vae is not None:
            seen = self.past
            self.old, report["synthesised"] = self.synthesise(seen, self.replay)
            (images, labels), _ = self.synthesise(seen, self.replay, self.spread)
            self.past_shown = images, labels, self._logits(images)
            x, _ = self.training_data(task)
            x = x.to(self._device)[torch.randperm(len(x))[: self.sample]]
            rounds = self.rounds if self.grow == "outliers" else 1
            names, old = self.model.convolutions(), _floats(self.old[0])
            features = learn_features(
                self.model, x, names, filters=self.filters, old=old, rounds=rounds, steps=self.nflae_steps
            )
            report["features"] = [list(f) for f in features]
        missing = max(task.classes) + 1 - self.model.head.out_features
        if missing > 0:
            grow(self.model.head, missing)
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        report["widths"] = [self.model.get_submodule(n).out_channels for n in self.model.convolutions()]
        self.reports.append(report)
        if self.old is not None and self.show == "synthesised":
            self._learn_to_generate(*self.training_data(task))
            y = torch.tensor(task.classes, device=self._device).repeat_interleave(self.replay)
            self.new_shown = torch.cat([self._unfiltered(c, self.replay) for c in task.classes]), y

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        logits = torch.cat([self.model(_floats(part)) for part in images.split(1024)])
        self.model.train(training)
        return logits

    @torch.no_grad()
    def synthesise(
        self, classes: Sequence[int], each: int, spread: float = 1.0
    ) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
        """`each` images of every class that the classifier takes for that class, as bytes; and what share it took.

        Where the VAE does not give enough of them, those there are come again, shifted by up to two pixels.
        """
        assert self.vae is not None
        training = self.model.training
        self.model.eval()
        self.vae.eval()
        known = torch.tensor(sorted(classes), device=self._device)
        images, labels, shares = [], [], {}
        for c in classes:
            kept: list[Tensor] = []
            tried = found = 0
            for _ in range(8):
                x = self._unfiltered(c, each, spread)
                right = known[self.model(_floats(x))[:, known].argmax(1)] == c
                kept.append(x[right])
                tried, found = tried + each, found + int(right.sum())
                if found >= each:
                    break
            x = torch.cat(kept)[:each]
            if len(x) < each:
                x = self._augmented(x if len(x) else self._unfiltered(c, each, spread), each)
            images.append(x)
            labels.append(torch.full((each,), c, device=self._device))
            shares[str(c)] = found / tried
        self.model.train(training)
        return (torch.cat(images), torch.cat(labels)), shares

    def _unfiltered(self, c: int, n: int, spread: float = 1.0) -> Tensor:
        wanted = torch.full((n,), self._component(c), device=self._device)
        self.vae.eval()
        return (self.vae.sample(wanted, spread=spread) * 255).round().byte()

    @staticmethod
    def _augmented(x: Tensor, n: int) -> Tensor:
        again = x[torch.randint(len(x), (n - len(x),)).to(x.device)] if len(x) < n else x[:0]
        shifts = torch.randint(-2, 3, (len(again), 2)).tolist()
        moved = [torch.roll(image, shift, (1, 2)) for image, shift in zip(again, shifts, strict=True)]
        return torch.cat([x, torch.stack(moved)]) if moved else x

    def _component(self, c: int) -> int:
        return [k for task in self.tasks for k in task].index(c)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- step 4 ----

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The first task's: cross-entropy. Later: on as many images, every class alike often."""
        known = torch.tensor(self.classes, device=y.device)
        if self.past_shown is None:
            return F.cross_entropy(self.model(x)[:, known], torch.searchsorted(known, y))
        mine = max(1, round(len(x) * len(self.tasks[-1]) / len(self.classes)))
        images, labels, before = self.past_shown
        picked = torch.randint(len(labels), (max(1, len(x) - mine),)).to(self._device)
        if self.new_shown is not None:
            chosen = torch.randint(len(self.new_shown[1]), (mine,)).to(self._device)
            x, y = _floats(self.new_shown[0][chosen]), self.new_shown[1][chosen]
        found = self.model(jitter(torch.cat([x[:mine], _floats(images[picked])])))
        new = F.cross_entropy(found[:mine, known], torch.searchsorted(known, y[:mine]))
        if self.labels == "hard":
            old = F.cross_entropy(found[mine:, known], torch.searchsorted(known, labels[picked]))
        else:
            old = distillation(found[mine:], before[picked], self.past, self.classes)
        return (mine * new + len(picked) * old) / len(found)

    @torch.no_grad()
    def predict(self, x: Tensor, task: Task | int | None = None) -> Tensor:
        """As :meth:`Method.predict`; a task whose outputs do not exist yet gets its first class."""
        if task is not None and not isinstance(task, int) and max(task.classes) >= self.model.head.out_features:
            return torch.full((len(x),), task.classes[0], device=x.device)
        return super().predict(x, task)

    # ---- steps 5 and 6 ----

    def end_task(self, batches: Batches) -> None:
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        if self.finish:
            self._finish(x, y)
        if self.old is None or self.show == "real":
            self._learn_to_generate(x, y)
        shown, _ = self.synthesise(self.classes, 10)
        self.shown.append(shown[0].cpu())
        self.old = self.past_shown = self.new_shown = None

    def generate(self, n: int) -> tuple[Tensor, Tensor]:
        y = self._evenly(n)
        wanted = torch.tensor([self._component(c) for c in y.tolist()], device=self._device)
        return self.vae.sample(wanted), y

    def _finish(self, x: Tensor, y: Tensor) -> None:
        """The classifier alone."""
        optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.finish)
        for _ in range(self.finish):
            picked = torch.randint(len(y), (128,)).to(y.device)
            optimizer.zero_grad()
            self.loss(x[picked], y[picked]).backward()
            optimizer.step()
            schedule.step()

    def _learn_to_generate(self, x: Tensor, y: Tensor) -> None:
        """Steps 5 and 6 on the task's images and the synthesised ones of earlier classes."""
        x, y = self._chosen(x.to(self._device), y.to(self._device))
        if self.old is not None:
            x, y = torch.cat([x, _floats(self.old[0])]), torch.cat([y, self.old[1]])
        self._train_vae(x, self._components(y))
        self.reports[-1]["latent"] = self.vae.latent

    def _chosen(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """At most `sample` images of each of the task's classes."""
        picked = torch.cat([(y == c).nonzero().flatten()[: self.sample] for c in self.tasks[-1]])
        return x[picked], y[picked]

    def _components(self, y: Tensor) -> Tensor:
        order = torch.tensor([c for task in self.tasks for c in task], device=y.device)
        return (y.unsqueeze(1) == order).int().argmax(1)

    def _train_vae(self, x: Tensor, y: Tensor) -> None:
        n_classes = sum(len(task) for task in self.tasks)
        trunk, features = self.model.trunk(self.encoder_pools), self.model.features(self.encoder_pools)
        if self.vae is None:
            self.vae = GaussianVAE(trunk, features, self.latent, n_classes, self.input_shape).to(self._device)
        else:
            self._renew_vae(trunk, features, n_classes)
        vae = self.vae
        vae.train()
        optimizer = torch.optim.Adam(vae.parameters(), self.vae_lr)
        epochs = max(self.vae_epochs, -(-self.vae_steps // -(-len(x) // 128)))
        for i in range(self.iterations):
            for _ in range(epochs):
                for part in torch.randperm(len(x)).split(128):
                    part = part.to(x.device)
                    optimizer.zero_grad()
                    with self.mixed():
                        loss = vae.loss(x[part], y[part], self.beta)
                    loss.backward()
                    optimizer.step()
            vae.cluster(x, y)
            if i == self.iterations // 2:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.3

    def _renew_vae(self, trunk: nn.Module, features: int, n_classes: int) -> None:
        """The grown VAE: decoder as it was, encoder the classifier's (or the old one's), more latents and classes."""
        vae = self.vae
        wider = features - vae.mean.in_features
        if self.vae_from == "classifier":
            vae.encoder = copy.deepcopy(trunk)
            if wider:
                for layer in (vae.mean, vae.log_var):
                    grow(layer, 0, inputs=wider)
        if self.latent_growth:
            vae.grow_latent(self.latent_growth)
        vae.grow_classes(n_classes)

    # ---- pictures and state ----

    def plot_generated(self, path: str | Path) -> None:
        """Ten synthesised images of every class after each task."""
        plot_images({f"after task {t + 1}": x.float() / 255 for t, x in enumerate(self.shown)}, path, columns=10)

    def plot_growth(self, path: str | Path) -> None:
        """Filters of the first, a middle and the last convolution, and latents, by the task that added them."""
        series = {f"conv{i + 1}": [r["widths"][i] for r in self.reports] for i in (0, 6, 12)}
        series["latent"] = [r.get("latent", 0) for r in self.reports]
        rows = {}
        for name, values in series.items():
            added = [values[0], *(b - a for a, b in pairwise(values))]
            rows[name] = [added[: t + 1] for t in range(len(values))]
        plot_growth(rows, path)

    def extra_state(self) -> dict[str, Any]:
        vae = self.vae
        return {
            "widths": [self.model.get_submodule(n).out_channels for n in self.model.convolutions()],
            "outputs": self.model.head.out_features,
            "vae": None if vae is None else dict(vae.state_dict()),
            "vae_widths": None if vae is None else [m.out_channels for m in vae.encoder if isinstance(m, nn.Conv2d)],
            "latent": None if vae is None else vae.latent,
            "classes": None if vae is None else vae.classes.n_components,
            **{name: None if (t := getattr(self, name)) is None else list(t) for name in self.SYNTHESISED},
            "shown": self.shown,
            "reports": self.reports,
        }

    def _load(self, state: dict[str, Any]) -> None:
        extra = state["extra"]
        self._rebuild(extra["widths"], extra["outputs"])
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.lr)
        self.vae = None
        if extra["vae"] is not None:
            widths = extra["vae_widths"]
            net = SimpleNet(self.input_shape, 1, [*widths, *[1] * (len(KERNELS) - len(widths))])
            trunk, features = net.trunk(self.encoder_pools), net.features(self.encoder_pools)
            self.vae = GaussianVAE(trunk, features, extra["latent"], extra["classes"], self.input_shape).to(
                self._device
            )
            self.vae.load_state_dict(extra["vae"])
        for name in self.SYNTHESISED:
            setattr(self, name, None if extra[name] is None else tuple(t.to(self._device) for t in extra[name]))
        self.shown, self.reports = list(extra["shown"]), list(extra["reports"])
        super()._load(state)

    def _rebuild(self, widths: Sequence[int], outputs: int) -> None:
        """The classifier in the saved sizes; its weights come from the state."""
        made = SimpleNet(self.input_shape, outputs, widths).to(self._device)
        for name, child in made.named_children():
            setattr(self.model, name, child)


def _floats(x: Tensor) -> Tensor:
    return x.float() / 255
