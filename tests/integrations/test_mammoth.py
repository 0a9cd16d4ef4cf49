"""The mix-in on a class with the attributes and calls of Mammoth's ContinualModel, which is in no package index."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastcl
from fastcl import streams
from fastcl.integrations.mammoth import RegularisedModel


class ContinualModel(nn.Module):
    """Mammoth's, as far as a model sees it: the optimizer comes after the constructor."""

    def __init__(self, backbone: nn.Module, loss: Any, args: Any) -> None:
        super().__init__()
        self.net, self.loss, self.args = backbone, loss, args

    def begin_task(self, dataset: Any) -> None:
        self.opt = torch.optim.SGD(self.net.parameters(), self.args.lr)


KINDS = {
    "ewc": lambda m: fastcl.EWC(m.net, m.args.strength),
    "mas": lambda m: fastcl.MAS(m.net, m.args.strength),
    "si": lambda m: fastcl.SI(m.net, m.args.strength),
    "rwalk": lambda m: fastcl.RWalk(m.net, m.args.strength),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.mark.parametrize("name", KINDS)
def test_a_mammoth_model_is_a_plain_loop(name: str) -> None:
    class Model(RegularisedModel, ContinualModel):
        def make_regulariser(self) -> Any:
            return KINDS[name](self)

    args = SimpleNamespace(lr=0.1, strength=0.5)
    model = Model(network(), nn.CrossEntropyLoss(), args)
    plain = SimpleNamespace(net=network(), args=args)
    own = KINDS[name](plain)
    optimizer = torch.optim.SGD(plain.net.parameters(), 0.1)
    for task in streams.make(streams.load("digits"), "split", "class", 5).tasks[:2]:
        x, y = (t[:64] for t in task.train())
        dataset = SimpleNamespace(train_loader=DataLoader(TensorDataset(x, y, x), 16))
        model.begin_task(dataset)
        for inputs, labels, not_aug in dataset.train_loader:
            found = model.observe(inputs, labels, not_aug, epoch=0)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(plain.net(inputs), labels)
            loss.backward()
            expected = loss.detach() + own.add_gradients()
            optimizer.step()
            if name in ("si", "rwalk"):
                own.after_step()
            assert found == expected.item()
        model.end_task(dataset)
        own.consolidate((a, b) for a, b, _ in dataset.train_loader)
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), plain.net.parameters(), strict=True))
    assert own.tasks == model.regulariser.tasks == 2


def test_the_regulariser_must_be_named() -> None:
    class Model(RegularisedModel, ContinualModel):
        pass

    with pytest.raises(NotImplementedError):
        Model(network(), None, None).regulariser  # noqa: B018
