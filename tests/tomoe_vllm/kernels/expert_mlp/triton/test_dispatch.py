"""Which way the op takes on a GPU, and when the layer may use it. The kernels themselves: test_interpreted.py."""

import pytest
import torch

from tests.helpers.compare import assert_close
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton import validation as verdict
from tomoe_vllm.kernels.expert_mlp.triton.thresholds import Thresholds
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

cuda = pytest.importorskip(
    "tomoe_vllm.kernels.expert_mlp.triton.dispatch", reason="triton is not installed", exc_type=ImportError
)


def _problem(num_tokens):
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(4, 12, generator=generator) > 0.5).float()
    hidden_states = torch.randn(num_tokens, 8, generator=generator)
    expert_ids = torch.randint(0, 4, (num_tokens,), generator=generator)
    up, down = torch.randn(24, 8, generator=generator), torch.randn(12, 8, generator=generator)
    return hidden_states, expert_ids, ExpertTensors(up, None, down, masks, *neuron_lists(masks), "silu")


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, "gather"), (3, "gather"), (4, "dense"), (639, "dense"), (640, "grouped")]
)
def test_number_of_tokens_chooses_the_way(num_tokens, expected, monkeypatch):
    taken = []

    def stand_in(name):
        # Only the launch is replaced: what it is given must be what the reference needs.
        def run(x, ids, up, bias, down, neuron_ids, widths, activation):
            taken.append(name)
            masks = torch.zeros(len(widths), len(down))
            for row, (neurons, width) in enumerate(zip(neuron_ids, widths, strict=True)):
                masks[row, neurons[:width].long()] = 1
            weights = ExpertTensors(up, bias, down, masks, neuron_ids, widths, activation)
            return expert_mlp_reference(x, ids, weights)

        return run

    def masked(projected, ids, masks, activation):
        taken.append("dense")
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up * masks[ids]

    monkeypatch.setattr(cuda, "expert_mlp_gather", stand_in("gather"))
    monkeypatch.setattr(cuda, "expert_mlp_grouped", stand_in("grouped"))
    monkeypatch.setattr(cuda, "expert_activation_triton", masked)
    problem = _problem(num_tokens)
    monkeypatch.setattr(cuda, "load_thresholds", lambda: Thresholds(gather_tokens=3, grouped_tokens=640))
    out = cuda.expert_mlp_cuda(*problem)
    assert taken == [expected]
    assert_close(out, expert_mlp_reference(*problem))
    cuda.expert_mlp_cuda(*problem, "grouped")
    assert taken == [expected, "grouped"]


def test_shared_layout_waits_for_the_doctor_and_obeys_it(monkeypatch, tmp_path):
    from tomoe_vllm.layers.mlp import layout as layer

    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    assert "run: tomoe doctor" in layer.why_not_shared_on_gpu("Some GPU")
    verdict.write_verdict("Some GPU", ["gather, 3 tokens: error 0.2 of 0.01"])
    assert "gather, 3 tokens" in layer.why_not_shared_on_gpu("Some GPU")
    verdict.write_verdict("Some GPU", [])
    assert layer.why_not_shared_on_gpu("Some GPU") is None
