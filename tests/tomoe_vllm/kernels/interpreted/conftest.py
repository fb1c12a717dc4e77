"""These tests are collected only with TRITON_INTERPRET=1, which must be set before a kernel is imported."""

import os

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Fill new tensors with NaN (integers with -1), so that unwritten outputs are detected."""

    def poisoned(make):
        def make_poisoned(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Let the interpreter multiply bfloat16: it stores them as uint16, and its ``tl.dot`` multiplies these integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *others):
        return create_dot(self, widened(a), widened(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
