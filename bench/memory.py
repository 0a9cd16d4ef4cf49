"""Peak memory of one importance pass, each in a process of its own: python bench/memory.py > bench/results/memory.md"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
NAMES = ("4-conv net", "ResNet-18", "encoder, 64 tokens")
WAYS = ("nothing", "plain forward + backward", "fastcl", "torch.func, chunks of 16", "torch.func, whole batch")


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(name: str, way: str, batch: int) -> None:
    import torch

    import fastcl
    from bench.bench_importance import NETWORKS

    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = make().eval(), torch.randn(batch, *shape[1:])
    y = torch.randint(0, 10, (batch,))
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        net(x[:2])
    before = megabytes()
    if way == "plain forward + backward":
        loss(net(x), y).backward()
    if way == "fastcl":
        fastcl.fisher_diagonal(net, [(x, y)])
    if way.startswith("torch.func"):
        params = {k: v.detach() for k, v in net.named_parameters()}

        def one(values: dict[str, Any], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return loss(torch.func.functional_call(net, values, (a[None],)), b[None])

        chunk = 16 if way.endswith("16") else None
        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=chunk)(params, x, y)
        {k: g.square().mean(0) for k, g in grads.items()}
    params_mb = sum(p.numel() for p in net.parameters()) * 4 / 2**20
    print(f"{megabytes() - before:.0f} {params_mb:.0f}")


def main() -> None:
    print(
        "# Peak memory of the exact Fisher\n\n`python bench/memory.py`: megabytes above what the process had before.\n"
    )
    print("| network | batch | parameters | " + " | ".join(WAYS[1:]) + " |\n|---|---|---|" + "---|" * (len(WAYS) - 1))
    for name in NAMES:
        for batch in (32, 128):
            row, size = [], ""
            for way in WAYS[1:]:
                done = subprocess.run(
                    [sys.executable, __file__, name, way, str(batch)], capture_output=True, text=True, check=False
                )
                used, size = done.stdout.split() if done.returncode == 0 else ("out of memory", size)
                row.append(used)
            print(f"| {name} | {batch} | {size} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
