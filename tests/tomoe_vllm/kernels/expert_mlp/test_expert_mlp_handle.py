"""A handle of prepared weights owns what it points to, and names nothing outside its process and lifetime."""

import copy
import gc
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.compare import assert_close
from tests.helpers.processes import environment, python
from tests.tomoe_vllm.kernels.expert_mlp.test_expert_mlp import compiled, expected_output, make_case  # noqa: F401
from tomoe_vllm.kernels.expert_mlp import ExpertWeights, expert_mlp

UNKNOWN = r"names no prepared weights of this process"
NOT_A_HANDLE = r"a handle is an int64 tensor of one element"


def run_handle(case, handle):
    return torch.ops.tomoe.prepared_expert_mlp(*case[:2], handle)


@pytest.mark.process
def test_a_saved_handle_is_refused_in_another_process(tmp_path):
    case = make_case(3, 64, 96, 8)
    weights = ExpertWeights(*case[2:], "silu")
    torch.save((case[0], case[1], weights.handle), tmp_path / "handle.pt")
    code = f"""
import torch
from tomoe_vllm.kernels import build
assert build.load()
arguments = torch.load({str(tmp_path / "handle.pt")!r}, weights_only=True)
try:
    torch.ops.tomoe.prepared_expert_mlp(*arguments)
except RuntimeError as error:
    print(error)
"""
    result = python("-c", code, env=environment())
    assert result.returncode == 0, result.stderr[-2000:]
    assert "names no prepared weights of this process" in result.stdout


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), UNKNOWN),
        (torch.full((1,), -1), UNKNOWN),
        (torch.zeros(112, dtype=torch.uint8), NOT_A_HANDLE),
        (torch.zeros(1), NOT_A_HANDLE),
        (torch.zeros(2, dtype=torch.int64), NOT_A_HANDLE),
        (torch.zeros(0, dtype=torch.int64), NOT_A_HANDLE),
    ],
)
def test_other_bytes_are_refused(handle, message):
    with pytest.raises(RuntimeError, match=message):
        run_handle(make_case(3, 64, 96, 8), handle)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_freed_tensors_cannot_be_observed(num_tokens):
    case = make_case(num_tokens, 64, 96, 8)
    expected = expected_output(case)
    handle = torch.ops.tomoe.prepare_experts(
        *(t.clone() if t is not None else None for t in case[2:5]), *(t.clone() for t in case[6:]), "silu"
    )
    gc.collect()
    garbage = [torch.full((size,), 7.0) for t in case[2:] if t is not None for size in [t.numel()] * 20]
    assert_close(run_handle(case, handle), expected)
    torch.ops.tomoe.release_experts(handle)
    with pytest.raises(RuntimeError, match=UNKNOWN):
        run_handle(case, handle)
    torch.ops.tomoe.release_experts(handle)  # a second time: no effect
    del garbage


def test_freed_weights_release_their_handle():
    case = make_case(3, 64, 96, 8)
    weights = ExpertWeights(*case[2:], "silu")
    handle = weights.handle
    assert_close(run_handle(case, handle), expected_output(case))
    del weights
    gc.collect()
    with pytest.raises(RuntimeError, match=UNKNOWN):
        run_handle(case, handle)


@pytest.mark.parametrize("tracing", ["fake tensors", "make_fx"])
def test_weights_freed_while_torch_traces_release_their_handle(tracing):
    """A collection of garbage may happen at any time; the release must neither fail nor become part of the graph."""
    case = make_case(3, 64, 96, 8)
    layers = [ExpertWeights(*case[2:], "silu")]
    handle = layers[0].handle

    def free(x):
        layers.clear()
        gc.collect()
        return x + 1

    if tracing == "fake tensors":
        with FakeTensorMode():
            free(0)
    else:
        assert "release_experts" not in make_fx(free)(case[0]).code
    with pytest.raises(RuntimeError, match=UNKNOWN):
        run_handle(case, handle)


def test_released_memory_is_given_back():
    """The registry must not keep what nothing else refers to."""
    case = make_case(3, 64, 96, 8)
    array = np.zeros((96, 64), np.float32)
    count = sys.getrefcount(array)
    weights = ExpertWeights(case[2], None, torch.from_numpy(array), *case[5:], "silu")
    assert sys.getrefcount(array) > count
    del weights
    gc.collect()
    assert sys.getrefcount(array) == count


def test_lists_changed_after_the_check_have_no_effect():
    case = make_case(3, 64, 96, 8)
    expected = expected_output(case)
    weights = ExpertWeights(*case[2:], "silu")
    case[6].fill_(1 << 30)
    case[7].fill_(1 << 30)
    assert_close(expert_mlp(*case[:2], weights), expected)


@pytest.mark.parametrize("index", [2, 4], ids=["up", "down"])
@pytest.mark.parametrize("change", ["set_", "resize"])
def test_memory_taken_from_the_tensors_is_not_read(index, change):
    """``set_`` leaves the old memory to the registry; a storage resized to nothing is refused."""
    case = make_case(3, 64, 96, 8)
    expected = expected_output(case)
    weights = ExpertWeights(*case[2:], "silu")
    tensor = case[index]
    if change == "set_":
        tensor.set_(torch.full_like(tensor, 7))
        assert_close(expert_mlp(*case[:2], weights), expected)
    else:
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="memory of the prepared weights was moved or freed"):
            expert_mlp(*case[:2], weights)


def test_layers_do_not_mix():
    cases = [make_case(4, 64, 96, 8, seed=seed) for seed in range(3)]
    layers = [ExpertWeights(*case[2:], "silu") for case in cases]
    for _ in range(2):
        for case, weights in zip(cases, layers, strict=True):
            assert_close(expert_mlp(*case[:2], weights), expected_output(case))
    del layers[1]
    gc.collect()
    assert_close(expert_mlp(*cases[2][:2], layers[1]), expected_output(cases[2]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda weights: pickle.loads(pickle.dumps(weights))])
def test_copies_have_a_handle_of_their_own(duplicate):
    case = make_case(4, 64, 96, 8)
    original = ExpertWeights(*case[2:], "silu")
    other = duplicate(original)
    assert other.handle.item() != original.handle.item()
    del original
    gc.collect()
    assert_close(expert_mlp(*case[:2], other), expected_output(case))


def test_calls_and_releases_from_many_threads():
    """A release during a call must not free what the call reads."""
    case = make_case(3, 64, 96, 8)
    expected, errors = run_handle(case, (kept := ExpertWeights(*case[2:], "silu")).handle), []

    def work():
        for _ in range(50):
            handle = ExpertWeights(*case[2:], "silu").handle  # may be released at once
            for current, may_fail in ((handle, True), (kept.handle, False)):
                try:
                    if not torch.equal(run_handle(case, current), expected):
                        errors.append("other values")
                except RuntimeError as error:
                    if not may_fail:
                        errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
