"""Small models with every layer and every awkward use of a parameter that importances must get right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tied(nn.Module):
    """A layer called twice, a weight used outside its module, a parameter of no module, a layer fed by parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.shared, self.fed = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 6)
        self.scale, self.query = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.relu(self.twice(x))) * self.scale)
        return self.shared(h + self.fed(self.query).sum(0)) + F.linear(x, self.shared.weight)


class FedByParameters(nn.Module):
    """A Linear whose input is a parameter only, expanded over the samples: it lies above no first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.fed, self.out = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * torch.tanh(self.fed(self.query.expand(len(x), -1))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_a(self.a(x)), inplace=True)
        h = self.norm_b(self.b(h))
        h += x
        return F.relu(h, inplace=True)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.out = cell(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class LoRA(nn.Module):
    """A frozen weight with a trainable low-rank update, as adapters write it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 8), nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.head = nn.Linear(8, 4)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + 0.5 * self.up(self.down(x))))


class SequenceFirst(nn.Module):
    """Tokens in dimension 0 inside, as many as samples: only the graph knows which axis is which."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.embed(x)).transpose(0, 1)
        return self.out(torch.tanh(self.mix(h)).mean(0))


def _flat(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 4))


def _images(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
MODELS: dict[str, Case] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(inplace=True), nn.Linear(20, 4)),
        lambda: torch.randn(13, 6),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Linear(6, 20),
            nn.BatchNorm1d(20),
            nn.ReLU(inplace=True),
            nn.GroupNorm(4, 20),
            nn.LayerNorm(20),
            nn.RMSNorm(20),
            nn.Linear(20, 4, bias=False),
        ),
        lambda: torch.randn(13, 6),
    ),
    "tokens": (
        lambda: _flat(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5), features=25),
        lambda: torch.randn(9, 5, 8),
    ),
    "tied": (Tied, lambda: torch.randn(13, 6)),
    "fed by parameters": (FedByParameters, lambda: torch.randn(13, 6)),
    "lora": (LoRA, lambda: torch.randn(13, 6)),
    "conv1d": (
        lambda: _flat(nn.Conv1d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(8, 6, 3, dilation=2), features=24),
        lambda: _images(9, 3, 15),
    ),
    "conv2d": (
        lambda: _flat(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, (3, 2), stride=(2, 1), groups=2, bias=False),
            nn.GroupNorm(2, 6),
            features=60,
        ),
        lambda: _images(9, 3, 6, 6),
    ),
    "conv2d 1x1 and depthwise": (
        lambda: _flat(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding="same"), features=200),
        lambda: _images(7, 4, 5, 5),
    ),
    "conv2d channels_last": (
        lambda: _flat(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), features=24),
        lambda: _images(9, 3, 8, 8).contiguous(memory_format=torch.channels_last),
    ),
    "conv2d reflect padding": (
        lambda: _flat(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), features=64),
        lambda: _images(7, 3, 4, 4),
    ),
    "conv3d": (
        lambda: _flat(nn.Conv3d(2, 5, (2, 3, 2), padding=(0, 1, 0), stride=(1, 2, 1)), features=60),
        lambda: _images(7, 2, 3, 4, 4),
    ),
    "transposed": (
        lambda: _flat(
            nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=2, bias=False),
            features=128,
        ),
        lambda: _images(7, 3, 3, 3),
    ),
    "transposed 1d and 3d": (
        lambda: _flat(
            nn.ConvTranspose1d(2, 4, 4, stride=2, padding=1),
            nn.Unflatten(1, (1, 2, 2)),
            nn.ConvTranspose3d(1, 2, 2),
            features=162,
        ),
        lambda: _images(7, 2, 4),
    ),
    "residual": (
        lambda: _flat(nn.Conv2d(3, 4, 3, padding=1), Residual(), Residual(), nn.AvgPool2d(2), features=36),
        lambda: _images(7, 3, 6, 6),
    ),
    "embedding": (
        lambda: _flat(nn.Embedding(11, 8, padding_idx=3), nn.Linear(8, 5), nn.ReLU(), features=25),
        lambda: torch.randint(0, 11, (9, 5)),
    ),
    "transformer": (
        lambda: _flat(
            nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), features=40
        ),
        lambda: torch.randint(0, 11, (9, 5)),
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(7, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(7, 5, 8)),
    "sequence first": (SequenceFirst, lambda: torch.randn(9, 5, 8)),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in training mode with uneven running statistics, its inputs, its labels."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        for p in module.parameters(recurse=False):
            if p.dim() == 1:
                p.data += 0.3 * torch.randn_like(p)  # norm weights at 1 and biases at 0 would hide mistakes
    return model.train(), x, torch.randint(0, 4, (len(x),))
