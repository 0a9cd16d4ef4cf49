"""An op that cannot get its memory raises, and every argument is as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs resource.RLIMIT_AS")

# Each line makes a call that needs more than SPARE bytes beyond its arguments. `gaps` makes tensors that are worked on
# in a copy; the group lasso's norms of the second, wide tensor are larger than all that is left.
CALLS = {
    "annealed_mask": "x = [torch.randn(N)]; call = lambda: ops.annealed_mask(x[0], 3.0)",
    "compensated_mask": "x = [torch.randn(N)]; call = lambda: ops.compensated_mask(x[0], 3.0, 7.0)",
    "masked_weight": "x = [torch.randn(N), torch.randn(N)]; call = lambda: ops.masked_weight(*x, 3.0)",
    "masked_weight_kept": "x = [torch.randn(N), torch.randn(N)]; call = lambda: ops.masked_weight_kept(*x, 3.0)",
    "quadratic_penalty": "x = [gaps(), torch.randn(N), torch.rand(N)]; "
    "call = lambda: ops.quadratic_penalty([x[0]], [x[1]], [x[2]], 2.0)",
    "quadratic_penalty_grad_": "x = [torch.randn(N), gaps(), torch.randn(N), torch.rand(N)]; "
    "call = lambda: ops.quadratic_penalty_grad_([x[0]], [x[1]], [x[2]], [x[3]], 2.0)",
    "gmm_sample": "x = [torch.zeros(N // 8, dtype=torch.int64), torch.randn(1, 256), torch.rand(1, 256)]; "
    "call = lambda: ops.gmm_sample(*x)",
    "gmm_log_prob": "x = [torch.randn(N // 8, 1), torch.randn(64, 1), torch.rand(64, 1)]; "
    "call = lambda: ops.gmm_log_prob(*x)",
    "gmm_statistics": "x = [torch.randn(4, 2048), torch.rand(4, 8), torch.randn(8, 2048)]; "
    "call = lambda: ops.gmm_statistics(*x)",
    "unpack_mask": "x = [torch.zeros(N, dtype=torch.uint8)]; "
    "call = lambda: ops.unpack_mask(x[0], x[0].view(-1, 1).expand(-1, 8))",
    "masked_grad_": "x = [torch.randn(64), gaps(), torch.rand(64) > 0.5, torch.rand(N) > 0.5]; "
    "call = lambda: ops.masked_grad_(x[:2], x[2:])",
    "masked_sgd_": "x = [torch.randn(64), gaps(), torch.randn(64), torch.randn(N), torch.randn(64), torch.randn(N)]; "
    "call = lambda: ops.masked_sgd_(x[:2], x[2:4], x[4:], [], [], 0.1, 0.9)",
    "masked_adam_": "x = [torch.randn(64), gaps(), *(torch.rand(n) for _ in range(3) for n in (64, N)), "
    "torch.ones(()), torch.ones(())]; "
    "call = lambda: ops.masked_adam_(x[:2], x[2:4], x[4:6], [], x[8:], x[6:8], [], [], 0.1)",
    "soft_threshold_": "x = [torch.randn(64), gaps()]; call = lambda: ops.soft_threshold_(x, 0.5)",
    "group_soft_threshold_": "x = [torch.randn(64, 1), torch.randn(N, 1)]; "
    "call = lambda: ops.group_soft_threshold_(x, 0.5, 0)",
    "merge_importances_": "x = [torch.rand(64), gaps().abs_(), torch.rand(64), torch.rand(N)]; "
    "call = lambda: ops.merge_importances_(x[:2], x[2:])",
    "merge_anchored_": "x = [torch.rand(64), gaps().abs_(), torch.randn(64), torch.randn(N), torch.rand(64), "
    "torch.rand(N), torch.randn(64), torch.randn(N)]; call = lambda: ops.merge_anchored_(x[:2], x[2:4], x[4:6], x[6:])",
    "accumulate_path_": "x = [torch.rand(64), gaps(), *(torch.randn(n) for _ in range(3) for n in (64, N))]; "
    "call = lambda: ops.accumulate_path_(x[:2], x[2:4], x[4:6], x[6:])",
    "accumulate_conv_": "x = [torch.zeros(2048, 4096, 1, 2).transpose(2, 3), torch.randn(1, 2048, 1, 1), "
    "torch.randn(1, 4096, 2, 1)]; call = lambda: ops.accumulate_conv_(*x, [1, 1], [0, 0], [1, 1], 1, 2)",
    "accumulate_outer_": "x = [torch.zeros(4096, 4096).t(), torch.randn(3, 4096), torch.randn(3, 4096)]; "
    "call = lambda: ops.accumulate_outer_(*x, 2)",
}

PROGRAM = """
import resource, sys, torch
from fastcl import ops
torch.set_num_threads(1)  # a thread that cannot start ends the process, in torch's ops too
torch.manual_seed(0)
N, SPARE = 1 << 23, 24 << 20  # 32 MiB of float32

def gaps():
    return torch.randn(N, 2)[:, 0]

call = None
{line}
warm = [torch.randn(8) for _ in range(8)]
ops.soft_threshold_(warm, 0.1)
before = [t.clone() for t in x]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, resource.RLIM_INFINITY))
try:
    call()
except (RuntimeError, MemoryError, ValueError) as error:
    said = f"{{type(error).__name__}}: {{error}}"
else:
    said = None
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if said is None:
    sys.exit("it got its memory: the test is not one")
assert all(torch.equal(a, b) for a, b in zip(x, before)), "arguments changed: " + said
assert "alloc" in said or "memory" in said, said
call()  # and with the memory it works
print(said.splitlines()[0])
"""


@pytest.mark.parametrize("name", CALLS)
def test_arguments_stay_when_memory_runs_out(name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(line=CALLS[name])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
