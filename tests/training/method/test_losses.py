"""The four losses against numbers by hand, and the chunked ones against plain float64."""

import math

import pytest
import torch
from tomoe_training.method.losses import (
    BYTES_PER_LOGIT,
    CHUNK_BYTES,
    chunk_tokens,
    distillation_loss,
    f_reg,
    language_model_loss,
    load_balance_loss,
    parameter_loss,
    union_loss,
)
from torch import nn

from tests.helpers.compare import assert_close, is_close
from tomoe_vllm.hf.tomoe_math import BlockShape

SHAPE = BlockShape(
    hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=8, intermediate_size=20, num_mlp_matrices=3
)


@pytest.mark.parametrize(("value", "target"), [(0.25, 0.5), (1.0, 0.5), (0.5, 0.5), (0.7, 0.3)])
def test_f_reg_is_the_log_of_the_larger_over_the_smaller(value, target):
    expected = math.log(max(value, target) / min(value, target))
    assert f_reg(torch.tensor(value), target).item() == pytest.approx(expected, abs=1e-6)


def test_f_reg_of_zero_is_finite():
    assert torch.isfinite(f_reg(torch.tensor(0.0), 0.5))


def test_parameter_loss_and_its_gradient_by_hand():
    # One block has 10 * 6 * (8 + 8) + 3 * 10 * 20 = 1560 parameters; layers use 10*6*(4+3) + 30*5 = 570 and
    # 10*6*(8+8) + 30*20 = 1560: 2130 of 3120.
    widths = [[4.0, 8.0], [3.0, 8.0], [5.0, 20.0]]
    tensors = [[torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in kind] for kind in widths]
    loss, ratio = parameter_loss(*tensors, SHAPE, 0.5)
    assert ratio.item() == pytest.approx(2130 / 3120)
    assert loss.item() == pytest.approx(math.log(2130 / 3120 / 0.5))
    loss.backward()
    # d log(active) / d width: 60 per Q/K or V/O dim and 30 per neuron, over 2130.
    assert [t.grad.item() for t in tensors[0] + tensors[1]] == pytest.approx([60 / 2130] * 4)
    assert [t.grad.item() for t in tensors[2]] == pytest.approx([30 / 2130] * 2)


def test_parameter_loss_increases_widths_below_the_budget():
    width = torch.tensor(5.0, requires_grad=True)
    loss, _ = parameter_loss([torch.tensor(2.0)], [torch.tensor(2.0)], [width], SHAPE, 0.9)
    loss.backward()
    assert width.grad < 0


def test_union_loss_by_hand():
    # Layer 1: the union is 3 of 4 neurons; layer 2: all.
    first = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]])
    second = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]])
    loss, union = union_loss([first, second])
    assert union.item() == pytest.approx((3 / 4 + 1) / 2)
    assert loss.item() == pytest.approx((math.log(4 / 3) + 0) / 2, abs=1e-6)


def test_union_gradient_reaches_neurons_that_no_other_expert_keeps():
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0]], requires_grad=True)
    union_loss([masks])[0].backward()
    # d union / d mask[i, f] = prod over the others of (1 - mask), over 3 neurons; the loss is -log(union), union 2/3.
    expected = torch.tensor([[0.0, 0, 1], [0, 1, 1]]) / 3 / (-2 / 3)
    assert_close(masks.grad, expected)


def test_union_and_its_gradient_are_those_of_the_product():
    generator = torch.Generator().manual_seed(0)
    layers = [(torch.rand(5, 40, generator=generator) < 0.3).double().requires_grad_() for _ in range(3)]
    products = [(1 - torch.prod(1 - mask, dim=0)).mean() for mask in layers]
    expected = torch.autograd.grad(-torch.stack(products).log().mean(), layers)
    loss, union = union_loss(layers)
    assert union.item() == pytest.approx(torch.stack(products).mean().item())
    for mine, theirs in zip(torch.autograd.grad(loss, layers), expected, strict=True):
        assert_close(mine, theirs)


def test_union_loss_reads_no_value_from_the_device():
    mask = torch.ones(4, 8, device="meta", requires_grad=True)  # a value cannot be read from "meta"
    union_loss([mask])[0].backward()


def test_union_of_nan_is_nan():
    assert union_loss([torch.tensor([[1.0, float("nan")], [0.0, 0.0]])])[0].isnan()


def test_load_balance_is_one_over_n_at_balance_and_one_when_collapsed():
    balanced = torch.full((3, 8), 1 / 8)
    assert load_balance_loss(balanced, balanced).item() == pytest.approx(1 / 8)
    collapsed = torch.zeros(3, 8)
    collapsed[:, 2] = 1
    assert load_balance_loss(collapsed, collapsed).item() == pytest.approx(1.0)


def test_load_balance_is_the_mean_over_layers_of_sums():
    fractions, probabilities = torch.rand(3, 4), torch.rand(3, 4)
    expected = sum(
        sum(f * p for f, p in zip(fs, ps, strict=True))
        for fs, ps in zip(fractions.tolist(), probabilities.tolist(), strict=True)
    )
    assert load_balance_loss(fractions, probabilities).item() == pytest.approx(expected / 3)


# ---------------------------------------------------------------------------- chunked, through lm_head
@pytest.fixture(params=[False, True], ids=["no-bias", "bias"])
def lm_head(request):
    torch.manual_seed(0)
    return nn.Linear(12, 40, bias=request.param).requires_grad_(False)


def _hidden(num_tokens=23):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_tokens, 12, generator=generator) * 2 for _ in range(2)]


def _dense_kl(student, teacher, lm_head):
    """Mean over tokens of sum p (log p - log q), all at once in float64."""
    weight = lm_head.weight.double()
    bias = 0 if lm_head.bias is None else lm_head.bias.double()
    p = torch.softmax(teacher.double() @ weight.T + bias, -1)
    q = torch.softmax(student @ weight.T + bias, -1)
    return (p * (p.log() - q.log())).sum(-1).mean()


# Chunks that divide the tokens, that leave one over, that are one token, that hold them all.
@pytest.mark.parametrize(("num_tokens", "chunk"), [(24, 8), (25, 8), (5, 1), (7, 128), (1, 8)])
def test_distillation_loss_and_gradient_equal_the_dense_ones(num_tokens, chunk, lm_head):
    student, teacher = _hidden(num_tokens)
    exact = student.double().requires_grad_()
    expected = 3 * _dense_kl(exact, teacher, lm_head)
    expected.backward()
    student.requires_grad_()
    loss = distillation_loss(student, teacher, lm_head, chunk=chunk)
    (3 * loss).backward()
    assert 3 * loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(student.grad, exact.grad)


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "num_tokens", "device", "expected"),
    [
        (32000, 4096, 2048, "meta", 512),  # LLaMA-2 7B on a GPU: for a full GEMM
        (32000, 4096, 16384, "meta", 2048),  # Liger's example: as much memory as the hidden states
        (128256, 4096, 2048, "meta", 512),
        (152064, 3584, 100_000, "meta", 882),  # at most 2 GiB
        (49152, 576, 1024, "cpu", 128),
        (32000, 4096, 100, "meta", 100),  # no more than there are
        (93, 64, 1, "cpu", 1),
    ],
)
def test_chunk_follows_vocabulary_and_hidden_size(vocab_size, hidden_size, num_tokens, device, expected):
    with torch.device("meta"):
        head = nn.Linear(hidden_size, vocab_size, bias=False)
    chunk = chunk_tokens(torch.empty(num_tokens, hidden_size, device=device), head)
    assert chunk == expected
    assert chunk * vocab_size * BYTES_PER_LOGIT <= CHUNK_BYTES


def test_distillation_loss_reads_no_value_from_the_device():
    with torch.device("meta"):  # a value cannot be read from it
        head = nn.Linear(12, 40).requires_grad_(False)
        student, teacher = torch.empty(300, 12, requires_grad=True), torch.empty(300, 12)
    loss = distillation_loss(student, teacher, head, chunk=128)
    loss.backward()
    assert loss.device.type == student.grad.device.type == "meta"


def test_distillation_loss_of_the_teacher_is_zero(lm_head):
    student, _ = _hidden()
    student.requires_grad_()
    loss = distillation_loss(student, student.detach(), lm_head)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-7


def test_tolerance_catches_a_reversed_kl_and_a_lost_token():
    torch.manual_seed(0)
    lm_head = nn.Linear(12, 40)
    student, teacher = _hidden()
    student.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, student)[0]

    exact = gradient(_dense_kl(student.double(), teacher, lm_head))
    right = gradient(distillation_loss(student, teacher, lm_head, chunk=8))
    assert is_close(right, exact)
    lost = right.clone()
    lost[-1] = 0
    assert not is_close(lost, exact)
    log_p = torch.log_softmax(lm_head(teacher), -1)
    log_q = torch.log_softmax(lm_head(student), -1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    assert not is_close(gradient(reverse), exact)
    other = nn.Linear(12, 40, bias=False)
    other.weight = lm_head.weight
    assert not is_close(gradient(distillation_loss(student, teacher, other)), exact)


@pytest.mark.parametrize(("num_tokens", "chunk"), [(24, 8), (25, 8), (1, 8)])
def test_language_model_loss_and_gradient_equal_the_dense_ones(num_tokens, chunk, lm_head):
    student, _ = _hidden(num_tokens)
    labels = torch.randint(0, 40, (num_tokens,), generator=torch.Generator().manual_seed(2))
    exact = student.double().requires_grad_()
    bias = 0 if lm_head.bias is None else lm_head.bias.double()
    probabilities = torch.softmax(exact @ lm_head.weight.double().T + bias, -1)
    expected = -probabilities[range(num_tokens), labels.tolist()].log().mean()
    expected.backward()
    student.requires_grad_()
    loss = language_model_loss(student, labels, lm_head, chunk=chunk)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close(student.grad, exact.grad)
