"""What a call costs on four numbers: the price of the dispatcher and of Python, not of the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastcl


def test_in_place_call(contest: Callable, device) -> None:
    g, r = [torch.ones(4, device=device)], [torch.zeros(4, dtype=torch.bool, device=device)]
    op = torch.ops.fastcl.masked_grad_.default

    def check(contenders: dict[str, Any]) -> None:
        for call in contenders.values():
            call()
        assert g[0].tolist() == [1.0] * 4

    with torch.no_grad():
        contest(
            {
                "fastcl": lambda: fastcl.ops.masked_grad_(g, r),
                "torch.ops, with its version counter": lambda: op(g, r),
                "kernel alone (below autograd)": _below_autograd(op, g, r),
                "g.masked_fill_(r, 0)": lambda: g[0].masked_fill_(r[0], 0),
                "_foreach_mul_": lambda: torch._foreach_mul_(g, 1.0),
            },
            check,
        )


def _below_autograd(op: Any, *args: Any) -> Callable[[], None]:
    keys = torch._C._after_ADInplaceOrView_keyset & torch._C._dispatch_keys(args[0][0])
    return lambda: op.redispatch(keys, *args)


def test_functional_call(contest: Callable, device) -> None:
    e = torch.ones(4, device=device)
    op = torch.ops.fastcl.annealed_mask.default

    def check(contenders: dict[str, Any]) -> None:
        for call in contenders.values():
            torch.testing.assert_close(call(), torch.sigmoid(2.0 * e))

    keys = torch._C._after_ADInplaceOrView_keyset & torch._C._dispatch_keys(e)
    contest(
        {
            "fastcl": lambda: fastcl.ops.annealed_mask(e, 2.0),
            "torch.ops": lambda: op(e, 2.0),
            "kernel alone (below autograd)": lambda: op.redispatch(keys, e, 2.0),
            "torch.sigmoid(s * e)": lambda: torch.sigmoid(2.0 * e),
        },
        check,
    )
