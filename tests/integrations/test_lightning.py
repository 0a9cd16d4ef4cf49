"""The callback in Lightning's own Trainer; skipped where lightning is not installed: `make integrations` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore")
lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make integrations")

import fastcl  # noqa: E402
from fastcl import streams  # noqa: E402
from fastcl.integrations.lightning import ContinualCallback  # noqa: E402

KINDS = {
    "ewc": lambda m: fastcl.EWC(m, 0.5),
    "mas": lambda m: fastcl.MAS(m, 0.5),
    "si": lambda m: fastcl.SI(m, 0.5),
    "rwalk": lambda m: fastcl.RWalk(m, 0.5),
}


class Module(lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_trainer_is_a_plain_loop(name: str, accumulate: int, tmp_path: Path) -> None:
    module, plain = Module(network()), network()
    callback, own = ContinualCallback(KINDS[name](module.net)), KINDS[name](plain)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for task in streams.make(streams.load("digits"), "split", "class", 5).tasks[:2]:
        x, y = (t[:64] for t in task.train())
        loader = DataLoader(TensorDataset(x, y), 16)
        trainer = lightning.Trainer(
            max_epochs=1,
            callbacks=[callback],
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader)
        for at, (a, b) in enumerate(loader, 1):
            (nn.functional.cross_entropy(plain(a), b) / accumulate).backward()
            if at % accumulate == 0:
                own.add_gradients()
                optimizer.step()
                if name in ("si", "rwalk"):
                    own.after_step()
                optimizer.zero_grad()
        own.consolidate(loader)
    for a, b in zip(module.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert callback.regulariser.tasks == 2
    again = ContinualCallback(KINDS[name](module.net))
    again.load_state_dict(callback.state_dict())
    assert again.regulariser.penalty() == callback.regulariser.penalty()
