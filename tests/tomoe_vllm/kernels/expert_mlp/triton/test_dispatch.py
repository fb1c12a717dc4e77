"""Dispatch on GPUs: thresholds, choice of the path, and the validation record."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.compare import assert_close
from tomoe_vllm import kernels
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import (
    Thresholds,
    device_name,
    load_thresholds,
    read_validation,
    validation_file,
    write_validation,
)
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

DEVICE = "NVIDIA A100-SXM4-80GB"


# ------------------------------------------------------------------------------------------------------ thresholds
@pytest.fixture
def thresholds_file(monkeypatch, tmp_path):
    """The file of this device's thresholds, in a folder of its own."""
    monkeypatch.setenv("TOMOE_TUNED_CONFIG_FOLDER", str(tmp_path))
    load_thresholds.cache_clear()
    yield tmp_path / f"{device_name()}.json"
    load_thresholds.cache_clear()


def test_thresholds_of_this_device_are_read_from_the_named_folder(thresholds_file):
    thresholds_file.write_text('{"gather_tokens": 3, "grouped_tokens": 5}')
    assert load_thresholds() == Thresholds(gather_tokens=3, grouped_tokens=5)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param('{"gather_tokens": 3}', id="a key is missing"),
        pytest.param('{"gather_tokens": 3, "grouped_tokens": -1}', id="negative"),
        pytest.param('{"gather_tokens": 3, "grouped_tokens": 1.5}', id="not an integer"),
    ],
)
def test_invalid_thresholds_are_refused(thresholds_file, content):
    thresholds_file.write_text(content)
    with pytest.raises(ValueError, match="it must hold gather_tokens, grouped_tokens"):
        load_thresholds()


# ------------------------------------------------------------------------------------------------------------- op
@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched. Each is replaced by the reference, which gets the same arguments."""
    pytest.importorskip("triton", reason="Triton is in the dev extra")
    from tomoe_vllm.kernels.expert_activation import triton as activation_triton
    from tomoe_vllm.kernels.expert_mlp.triton import gather, grouped

    names = []

    def reference_for(name):
        def run(hidden_states, expert_ids, weights):
            names.append(name)
            return expert_mlp_reference(hidden_states, expert_ids, weights)

        return run

    def activation(projected, expert_ids, masks, name):
        names.append("dense")
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up * masks[expert_ids]

    monkeypatch.setattr(gather, "expert_mlp_gather", reference_for("gather"))
    monkeypatch.setattr(grouped, "expert_mlp_grouped", reference_for("grouped"))
    monkeypatch.setattr(activation_triton, "expert_activation_triton", activation)
    monkeypatch.setattr(dispatch, "load_thresholds", lambda: Thresholds(gather_tokens=3, grouped_tokens=640))
    return names


def make_arguments(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, ExpertTensors]:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(4, 12, generator=generator) > 0.5).float()
    hidden_states = torch.randn(num_tokens, 8, generator=generator)
    expert_ids = torch.randint(0, 4, (num_tokens,), generator=generator)
    up, down = torch.randn(24, 8, generator=generator), torch.randn(12, 8, generator=generator)
    return hidden_states, expert_ids, ExpertTensors(up, None, down, masks, *neuron_lists(masks), "silu")


@pytest.mark.parametrize(
    ("num_tokens", "path"), [(1, "gather"), (3, "gather"), (4, "dense"), (639, "dense"), (640, "grouped")]
)
def test_number_of_tokens_selects_the_path(num_tokens, path, launched):
    arguments = make_arguments(num_tokens)
    output = dispatch.expert_mlp_cuda(*arguments)
    assert launched == [path]
    assert_close(output, expert_mlp_reference(*arguments))


@pytest.mark.parametrize("path", ["gather", "dense", "grouped"])
def test_an_explicit_path_overrides_the_thresholds(path, launched):
    dispatch.expert_mlp_cuda(*make_arguments(5), path)
    assert launched == [path]


def test_tensors_that_the_kernels_cannot_address_are_refused(launched):
    hidden_states, expert_ids, weights = make_arguments(3)
    with pytest.raises(AssertionError):
        dispatch.expert_mlp_cuda(hidden_states.T.contiguous().T, expert_ids, weights)
    assert launched == []


def test_the_registered_op_gets_the_fields_in_the_order_of_the_schema(launched, monkeypatch):
    registered = {}
    library = SimpleNamespace(impl=lambda op, function, key: registered.update({(op, key): function}))
    monkeypatch.setattr(dispatch, "LIBRARY", library)
    dispatch.register.__wrapped__()
    ((op, key),) = registered
    assert (op, key) == ("expert_mlp", "CUDA")
    hidden_states, expert_ids, weights = make_arguments(4)
    names = [argument.name for argument in torch.ops.tomoe.expert_mlp.default._schema.arguments]
    arguments = {"hidden_states": hidden_states, "expert_ids": expert_ids} | vars(weights)
    output = registered[op, key](*(arguments[name] for name in names))
    assert launched == ["dense"]
    assert_close(output, expert_mlp_reference(hidden_states, expert_ids, weights))


def test_a_bad_thresholds_file_is_refused_when_the_op_is_registered(tmp_path, monkeypatch):
    monkeypatch.setenv(dispatch.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / f"{dispatch.device_name()}.json").write_text('{"gather": 3}')
    monkeypatch.setattr(dispatch, "LIBRARY", None)  # it must not be reached
    dispatch.load_thresholds.cache_clear()
    try:
        with pytest.raises(ValueError, match="it must hold gather_tokens, grouped_tokens"):
            dispatch.register.__wrapped__()
    finally:
        dispatch.load_thresholds.cache_clear()


# ------------------------------------------------------------------------------------------------ validation record
@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    return tmp_path


def test_without_a_check_there_is_no_record(cache_folder):
    assert read_validation(DEVICE) is None


@pytest.mark.parametrize("failures", [[], ["gather, 1 tokens: NaN"]], ids=["agrees", "disagrees"])
def test_record_round_trip(failures, cache_folder):
    file = write_validation(DEVICE, failures)
    assert file.parent == cache_folder
    assert [path.name for path in cache_folder.iterdir()] == [file.name]
    record = read_validation(DEVICE)
    assert (record.agrees, record.failures, record.device) == (not failures, failures, DEVICE)


def test_each_kind_of_gpu_has_its_own_record(cache_folder):
    write_validation(DEVICE, ["wrong"])
    assert read_validation("NVIDIA H100 80GB HBM3") is None


def test_a_later_check_replaces_the_record(cache_folder):
    write_validation(DEVICE, ["wrong"])
    write_validation(DEVICE, [])
    assert read_validation(DEVICE).agrees


def test_changed_kernels_invalidate_the_record(cache_folder, monkeypatch):
    write_validation(DEVICE, [])
    monkeypatch.setattr(dispatch, "kernel_digest", lambda: "of another version")
    assert read_validation(DEVICE) is None


def test_the_digest_depends_on_every_file_with_a_kernel_and_on_the_dispatch(monkeypatch):
    folder = Path(kernels.__file__).parent
    files = {file for file in folder.rglob("*.py") if "\n@triton.jit" in file.read_text()}
    assert {file.name for file in files} == {"triton.py", "gather.py", "grouped.py"}
    read, read_bytes = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.add(file) or read_bytes(file))
    dispatch.kernel_digest.__wrapped__()
    assert read >= files | {Path(dispatch.__file__)}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"device": 1', '{"agrees": true}'])
def test_a_damaged_record_is_ignored(content, cache_folder):
    validation_file(DEVICE).write_text(content)
    assert read_validation(DEVICE) is None
