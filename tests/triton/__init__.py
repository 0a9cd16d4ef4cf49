"""Triton kernels without a GPU: run in the interpreter, and compiled for real GPUs. tests/test_triton.py starts both,
in processes of their own."""

from __future__ import annotations

import warnings

import torch

from fastcl import _ops

from ..test_catalogue import reference

_overrides = torch.library.Library(_ops.NAMESPACE, "IMPL")


def answer_on_the_cpu() -> None:
    """From now on every op of the catalogue runs its Triton half on CPU tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden
        for name in _ops.catalogue:
            _overrides.impl(name, _ops.on_gpu(name, reference(name)), "CPU")
