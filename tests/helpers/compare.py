"""How tensors are compared: relative RMS, over everything and for the worst row."""

import torch
from torch import Tensor

FLOAT32_LIMIT = 1e-5


def relative_rms(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """RMS of the error over the RMS of the expected values: overall, and of the worst row (last dim)."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).flatten(0, -2) if actual.dim() > 1 else (actual - expected)[None]
    rows = expected.reshape(error.shape)
    overall = error.square().mean().sqrt() / rows.square().mean().sqrt()
    worst = (error.square().mean(-1).sqrt() / rows.square().mean(-1).sqrt().clamp(min=1e-30)).max()
    return overall.item(), worst.item()


def is_close(actual: Tensor, expected: Tensor, limit: float = FLOAT32_LIMIT) -> bool:
    """Whether both relative RMS errors are within ``limit``; a NaN is not."""
    return bool(torch.isfinite(actual).all()) and max(relative_rms(actual, expected)) <= limit


def assert_close(actual: Tensor, expected: Tensor, limit: float = FLOAT32_LIMIT) -> None:
    overall, worst = relative_rms(actual, expected)
    assert is_close(actual, expected, limit), f"relative RMS {overall:.2e} overall, {worst:.2e} worst row; {limit}"
