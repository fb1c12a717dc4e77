"""Dispatch on GPUs: thresholds, choice of the path, and the validation record."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.compare import assert_close
from tomoe_vllm import kernels
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import (
    DENSE_ONLY,
    LayerShape,
    Thresholds,
    device_name,
    load_thresholds,
    read_table,
    read_validation,
    table_file,
    validation_file,
    write_table,
    write_validation,
)
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists
from tomoe_vllm.kernels.ops import ExpertTensors

DEVICE = "NVIDIA A100-SXM4-80GB"


# ------------------------------------------------------------------------------------------------------ thresholds
SHAPE = LayerShape(hidden_size=64, num_neurons=128, num_experts=8, width=64, num_matrices=3, dtype=torch.bfloat16)
TUNED = Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """An empty folder of tuned tables."""
    monkeypatch.setenv("TOMOE_TUNED_CONFIG_FOLDER", str(tmp_path))
    load_thresholds.cache_clear()
    yield tmp_path
    load_thresholds.cache_clear()


def test_a_layer_that_was_not_tuned_uses_the_dense_path_for_every_step(tables):
    assert load_thresholds(SHAPE) == DENSE_ONLY
    assert {DENSE_ONLY.path(num_tokens) for num_tokens in (1, 3, 640, 8192, 10**8)} == {"dense"}


def test_thresholds_are_read_from_the_named_folder(tables):
    file = write_table(SHAPE, TUNED)
    assert [file] == list(tables.iterdir())
    assert load_thresholds(SHAPE) == TUNED


@pytest.mark.parametrize(
    "other",
    [
        {"hidden_size": 65},
        {"num_neurons": 64},
        {"num_experts": 4},
        {"num_matrices": 2},
        {"dtype": torch.float16},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_table_applies_to_its_own_shape_only(tables, other):
    write_table(SHAPE, TUNED)
    assert load_thresholds(replace(SHAPE, **other)) == DENSE_ONLY


def test_a_table_applies_to_its_own_device_only(tables, monkeypatch):
    write_table(SHAPE, TUNED)
    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert load_thresholds(SHAPE) == DENSE_ONLY


@pytest.mark.parametrize(
    ("width", "gather_tokens"),
    [
        pytest.param(20, 4, id="narrower than any: the narrowest"),
        pytest.param(32, 4, id="as measured"),
        pytest.param(33, 4, id="wider by less than the ranks' unevenness"),
        pytest.param(40, 2, id="in between: the next wider"),
        pytest.param(68, 2, id="wider than the widest, by the ranks' unevenness"),
        pytest.param(69, 0, id="wider than any: never"),
    ],
)
def test_a_layer_uses_the_entry_of_the_next_wider_experts(tables, width, gather_tokens):
    write_table(replace(SHAPE, width=64), replace(TUNED, gather_tokens=2))
    write_table(replace(SHAPE, width=32), replace(TUNED, gather_tokens=4))
    assert load_thresholds(replace(SHAPE, width=width)).gather_tokens == gather_tokens


def test_tables_of_other_kernels_are_ignored_and_replaced(tables, monkeypatch):
    write_table(replace(SHAPE, width=32), TUNED)
    monkeypatch.setattr(dispatch, "kernel_digest", lambda: "of another version")
    assert load_thresholds(SHAPE) == DENSE_ONLY
    write_table(SHAPE, TUNED)
    assert set(read_table(SHAPE)) == {SHAPE.width}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"gather_tokens": 3, "grouped_tokens": 5}, id="a key is missing"),
        pytest.param({"gather_tokens": 3, "grouped_tokens": -1, "max_tokens": 9}, id="negative"),
        pytest.param({"gather_tokens": 3, "grouped_tokens": 1.5, "max_tokens": 9}, id="not an integer"),
        pytest.param([], id="no object"),
    ],
)
def test_invalid_tables_are_refused(tables, values):
    content = {"kernels": dispatch.kernel_digest(), "widths": {"64": values}}
    table_file(SHAPE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="it must hold kernels, and widths with gather_tokens, grouped_tokens"):
        load_thresholds(SHAPE)


def test_the_largest_checked_step_bounds_grouped():
    assert [TUNED.path(n) for n in (1, 3, 4, 639, 640, 8192, 8193)] == [
        *("gather", "gather", "dense", "dense", "grouped", "grouped", "dense"),
    ]


@pytest.mark.parametrize(
    ("smallest", "largest", "words"),
    [
        (1, 8192, "gather up to 3 tokens and grouped from 640 to 8192 tokens"),
        (1, 512, "gather up to 3 tokens"),
        (5, 2048, "grouped from 640 to 2048 tokens"),  # speculative decoding: no step is as small as gather's
        (5, 512, None),
    ],
)
def test_sparse_range_names_the_steps_that_an_engine_can_reach(smallest, largest, words):
    assert TUNED.sparse_range(smallest, largest) == words


def test_shape_of_weights_is_the_one_of_the_rank():
    _, _, weights = make_arguments(1)
    assert LayerShape.of(weights) == LayerShape(
        hidden_size=8, num_neurons=12, num_experts=4, width=weights.neuron_ids.shape[1], num_matrices=3,
        dtype=torch.float32,
    )  # fmt: skip


def test_a_mig_slice_is_a_device_of_its_own(monkeypatch):
    """Torch names the slice and NVML the whole GPU; records and tables are written and read under torch's name."""
    name = "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_name() == name
    assert "MIG_1g_10gb" in table_file(SHAPE).name


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
    monkeypatch.setattr(dispatch, "load_thresholds", lambda shape: TUNED)
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
