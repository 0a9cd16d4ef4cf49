"""Every block of fastcl/integrations/README.md runs, and does what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import fastcl
from fastcl import streams

from ..conftest import ROOT

PAGE = ROOT / "fastcl" / "integrations" / "README.md"
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
TESTED = {"plain", "avalanche", "lightning", "lora", "fsdp", "mammoth", "sklearn"}
WORLD = 2


def run(name: str, **scope: Any) -> dict[str, Any]:
    exec(compile(BLOCKS[name], f"{PAGE.name}: {name}", "exec"), scope)
    return scope


def tasks() -> list[list[tuple[Tensor, Tensor]]]:
    stream = streams.make(streams.load("digits"), "split", "class", 5)
    return [list(zip(*(t[:64].split(16) for t in task.train()), strict=True)) for task in stream.tasks[:2]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def plain() -> dict[str, Any]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    return run("plain", model=net, tasks=tasks(), optimizer=optimizer, criterion=nn.CrossEntropyLoss())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_every_block_is_tested() -> None:
    assert set(BLOCKS) == TESTED
    assert PAGE.read_text().count("```") == 2 * len(TESTED)


def test_plain() -> None:
    scope = plain()
    assert scope["ewc"].tasks == 2
    moved = network()
    optimizer = torch.optim.SGD(moved.parameters(), 0.1)
    for task in tasks():
        for x, y in task:
            optimizer.zero_grad()
            nn.functional.cross_entropy(moved(x), y).backward()
            optimizer.step()
    anchors = scope["ewc"].anchors

    def away(net: nn.Module) -> float:
        f = scope["ewc"].importances
        return sum(float((f[n] * (p.detach() - anchors[n]).square()).sum()) for n, p in net.named_parameters())

    assert away(scope["model"]) < away(moved)


def test_mammoth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a class that has the attributes and calls of Mammoth's, the weights of the plain loop."""

    class ContinualModel(nn.Module):
        def __init__(self, backbone: nn.Module, loss: Any, args: Any) -> None:
            super().__init__()
            self.net, self.loss, self.args = backbone, loss, args

    for name in ("models", "models.utils", "models.utils.continual_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["models.utils.continual_model"].ContinualModel = ContinualModel  # type: ignore[attr-defined]
    net = network()
    model = run("mammoth", __name__="models.fast_ewc")["FastEwc"](
        net, nn.CrossEntropyLoss(), SimpleNamespace(e_lambda=1000.0, gamma=1.0)
    )
    model.opt = torch.optim.SGD(net.parameters(), 0.1)
    for task in tasks():
        for x, y in task:
            model.observe(x, y, x)
        model.end_task(SimpleNamespace(train_loader=[(x, y, x) for x, y in task]))
    assert same(net, plain()["model"])


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make integrations")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1)

    module = Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loaders = [torch.utils.data.DataLoader(task, batch_size=None) for task in tasks()]
    options = dict(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    run("lightning", fastcl=fastcl, module=module, tasks=loaders, options=options)
    assert same(module.net, plain()["model"])


@pytest.mark.filterwarnings("ignore")
def test_avalanche() -> None:
    pytest.importorskip("avalanche", reason="avalanche-lib is not installed: make integrations")
    from avalanche.benchmarks import tensors_benchmark

    data = [tuple(torch.cat(part) for part in zip(*task, strict=True)) for task in tasks()]
    benchmark = tensors_benchmark(train_tensors=data, test_tensors=data, task_labels=[0, 0])
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scope = run("avalanche", model=net, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), benchmark=benchmark)
    (plugin,) = (p for p in scope["strategy"].plugins if isinstance(p, scope["EWCPlugin"]))
    assert plugin.regulariser.tasks == 2
    assert plugin.regulariser.penalty() > 0
    assert not same(net, network())


def test_sklearn() -> None:
    pytest.importorskip("sklearn")
    latents = torch.cat([torch.randn(40, 3, generator=torch.Generator().manual_seed(k)) + 9 * k for k in range(10)])
    scope = run("sklearn", latents=latents.numpy())
    assert all(len(set(part)) == 1 for part in scope["labels"].reshape(10, 40))
    assert scope["more"].shape == (100, 3)


# ---- the language model ----


def texts(rank: int | None) -> list[list[Tensor]]:
    """Two tasks of 3 batches of 6 texts; of two processes each has half of every batch."""
    generator = torch.Generator().manual_seed(5)
    whole = [[torch.randint(11 * t, 11 * t + 11, (6, 9), generator=generator) for _ in range(3)] for t in range(2)]
    return whole if rank is None else [[text[3 * rank : 3 * rank + 3] for text in task] for task in whole]


def fine_tuned(rank: int | None, strength: float = 1000.0) -> dict[str, Any]:
    """The page's run, on `rank` of two processes or without sharding; whole tensors."""
    ten_lines = BLOCKS["fsdp"].replace("strength=1000.0", f"strength={strength}")
    scope: dict[str, Any] = {"fastcl": fastcl, "world_size": WORLD, "tasks_of_this_rank": texts(rank)}
    scope = run("lora", **scope)
    torch.manual_seed(0)
    scope["pretrained"] = scope["LanguageModel"](22).double()
    inside = scope["with_lora"]
    scope["with_lora"] = lambda model: inside(model).double()
    if rank is None:
        code = re.sub(r".*(mesh|fully_shard|for block).*\n", "", ten_lines)
        assert "fully_shard" not in code
        exec(code, scope)
    else:
        exec(ten_lines, scope)

    def whole(values: Any) -> dict[str, Tensor]:
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in values}

    return {
        "weights": whole(scope["model"].named_parameters()),
        "importances": whole(scope["ewc"].importances.items()),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = fine_tuned(rank)
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def test_lora_is_protected_and_nothing_else() -> None:
    found = fine_tuned(None)
    assert len(found["importances"]) == 8  # two layers of two blocks, two factors each
    assert all(name.endswith(("down.weight", "up.weight")) for name in found["importances"])
    assert all(float(f.max()) > 0 for f in found["importances"].values())
    torch.manual_seed(0)
    before = run("lora")["LanguageModel"](22).double()
    for name, p in before.named_parameters():  # what is not LoRA's has not moved
        kept = [n for n in found["weights"] if n.replace(".base", "") == name]
        assert torch.equal(found["weights"][kept[0]], p)
    free = fine_tuned(None, strength=0.0)["weights"]
    assert not any(torch.equal(free[n], found["weights"][n]) for n in found["importances"])


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
def test_fsdp_is_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, fine_tuned(None), rtol=1e-8, atol=1e-11)
