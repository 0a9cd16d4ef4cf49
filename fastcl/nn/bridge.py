"""Bridges between latent spaces (latent space alignment)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bridge(nn.Module):
    r"""Maps features of a later embedder to those of an earlier one, :math:`g: Z_t\to Z_{t-1}`.

    Args:
        later, earlier: dimensions of the spaces.
        hidden: None: affine, :math:`z W^\top + b`, fitted in closed form; else one layer of that width between.

    Example:
        >>> z = torch.randn(50, 4); g = fastcl.nn.Bridge(4, 3).fit(z, z @ torch.ones(4, 3) + 1)
        >>> g(torch.zeros(1, 4)).detach().round().abs()
        tensor([[1., 1., 1.]])
    """

    def __init__(self, later: int, earlier: int, hidden: int | None = None) -> None:
        super().__init__()
        self.affine = nn.Linear(later, earlier) if hidden is None else None
        self.layers = (
            None if hidden is None else nn.Sequential(nn.Linear(later, hidden), nn.ReLU(), nn.Linear(hidden, earlier))
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.affine(z) if self.affine is not None else self.layers(z)

    def fit(self, z: Tensor, target: Tensor, ridge: float = 1e-3, steps: int = 500, lr: float = 1e-3) -> Bridge:
        r"""Least squares of g(z) against `target`.

        Affine: :math:`W^\top=(Z^\top Z/N+\alpha\bar v I)^{-1}Z^\top T/N` of the centred features in float64, with
        :math:`\bar v` their mean variance and :math:`\alpha` = `ridge`; the mean is not penalised. With a hidden
        layer: `steps` of Adam on batches of 256.

        Raises:
            ValueError: no samples, different lengths, or a negative ridge.
        """
        if len(z) == 0 or len(z) != len(target):
            raise ValueError(f"z has {len(z)} samples and target {len(target)} but both must have as many, at least 1")
        if not ridge >= 0:
            raise ValueError(f"ridge is {ridge} but must not be negative")
        z, target = z.detach(), target.detach()
        if self.affine is not None:
            a, b = z.double(), target.double()
            mean, goal = a.mean(0), b.mean(0)
            a, b = a - mean, b - goal
            covariance = a.T @ a / len(a)
            added = max(ridge * covariance.diagonal().mean().item(), 1e-12)
            weight = torch.linalg.solve(
                covariance + added * torch.eye(len(covariance), dtype=a.dtype, device=a.device), a.T @ b / len(a)
            ).T
            with torch.no_grad():
                self.affine.weight.copy_(weight)
                self.affine.bias.copy_(goal - weight @ mean)
            return self
        optimizer = torch.optim.Adam(self.layers.parameters(), lr)
        with torch.enable_grad():
            for _ in range(steps):
                part = torch.randint(len(z), (min(256, len(z)),)).to(z.device)
                optimizer.zero_grad()
                F.mse_loss(self(z[part]), target[part]).backward()
                optimizer.step()
        return self


def compose(bridges: Sequence[Bridge]) -> Bridge:
    """One affine bridge for a chain of them, the latest space's first.

    Raises:
        ValueError: no bridges, or one that is not affine.

    Example:
        >>> first, second, z = Bridge(3, 3), Bridge(3, 2), torch.ones(1, 3)
        >>> torch.allclose(compose([first, second])(z), second(first(z)))
        True
    """
    if not bridges or any(g.affine is None for g in bridges):
        raise ValueError("compose: bridges must be affine, and at least one")
    weight, bias = bridges[0].affine.weight.detach().double(), bridges[0].affine.bias.detach().double()
    for g in bridges[1:]:
        weight, bias = g.affine.weight.double() @ weight, g.affine.weight.double() @ bias + g.affine.bias.double()
    made = Bridge(weight.shape[1], weight.shape[0]).to(bridges[0].affine.weight.device)
    with torch.no_grad():
        made.affine.weight.copy_(weight)
        made.affine.bias.copy_(bias)
    return made
