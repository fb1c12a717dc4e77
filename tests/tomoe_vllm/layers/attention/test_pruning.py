"""A pruned head is rotated exactly as the whole head is."""

import pytest
import torch

from tests.helpers.compare import assert_close, is_close
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations
from tomoe_vllm.hf.tomoe_math import head_units


@pytest.fixture(autouse=True)
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def kept_dims(head_dim: int, rotary_dim: int, units: list[int]) -> torch.Tensor:
    return torch.isin(head_units(head_dim, rotary_dim), torch.tensor(units)).to(torch.uint8)


CASES = [
    pytest.param(32, 32, [15, 3, 4], {}, id="pairs"),
    pytest.param(32, 32, list(range(16)), {}, id="all"),
    pytest.param(80, 32, [0, 7, 15, 16, 20, 63], {}, id="partial: pairs and an even number of single dims"),
    pytest.param(80, 32, [0, 7, 15, 16, 17, 63, 40, 41, 42], {}, id="partial, even"),
    pytest.param(80, 32, [0, 7, 20, 63, 40], {}, id="partial, odd"),
    pytest.param(80, 32, [20, 63, 40], {}, id="single dims alone"),
    pytest.param(
        32,
        32,
        [1, 9],
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        id="llama3",
    ),
    pytest.param(
        32,
        32,
        [1, 9],
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        id="yarn scales cos and sin",
    ),
]


def rotate(head_dim, rotary_dim, units, parameters, num_own_rows=None):
    """Expected: whole heads rotated, then pruned. Returns the inputs of pruned heads and their rotary embedding too."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from tomoe_vllm.layers.attention.pruning import SelectedRotaryEmbedding, is_plain_rotary, rotation_order

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotary_dim / head_dim} | parameters
    base = get_rope(head_dim, max_position=256, rope_parameters=rope, dtype=torch.float32)
    assert is_plain_rotary(base)
    order = rotation_order(kept_dims(head_dim, rotary_dim, units), rotary_dim)
    selected = SelectedRotaryEmbedding(base, len(order), num_own_rows=num_own_rows)
    selected.select(order)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 3, 100, 255])
    heads = torch.randn(4, 3, head_dim, generator=generator)
    pruned = heads[..., order]
    expected = base.forward_native(positions, heads.flatten(1), None)[0].view(4, 3, -1)[..., order]
    return positions, pruned.flatten(1), expected.flatten(1), selected


@pytest.mark.parametrize("num_own_rows", [None, 256])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "units", "parameters"), CASES)
def test_pruned_heads_are_rotated_like_whole_heads(head_dim, rotary_dim, units, parameters, num_own_rows):
    positions, pruned, expected, selected = rotate(head_dim, rotary_dim, units, parameters, num_own_rows)
    for forward in (selected.forward_native, selected.forward_cpu, selected.forward_cuda):
        queries, keys = forward(positions, pruned.clone(), pruned.clone())
        assert_close(queries, expected)
        assert_close(keys, expected)


def test_look_up_in_the_shared_table_is_compiled_without_a_graph_break():
    positions, pruned, expected, selected = rotate(*CASES[3].values)
    compiled = torch.compile(selected.forward_native, backend="eager", fullgraph=True, dynamic=True)
    assert_close(compiled(positions, pruned, None)[0], expected)


def test_tolerance_catches_a_neighbouring_frequency():
    positions, pruned, expected, selected = rotate(32, 32, [15, 3, 4], {})
    selected.select(torch.tensor([3, 5, 15, 19, 21, 31]))
    assert not is_close(selected.forward_native(positions, pruned, None)[0], expected)


def test_rotated_width_depends_only_on_the_number_of_kept_dims():
    """Compiled graphs contain the width as a constant, and vLLM's compile cache depends on the config, not on masks."""
    for units in ([0, 1, 2, 3], [0, 1, 2, 20, 21], [0, 20, 21, 22, 23, 24, 25]):
        positions, _, _, selected = rotate(80, 32, units, {})
        assert selected.cos_sin(positions)[0].shape == (4, 8)


def test_layers_share_one_table_of_131072_positions():
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from tomoe_vllm.layers.attention.pruning import SelectedRotaryEmbedding, rotation_order

    rope = {"rope_type": "default", "rope_theta": 5e5}
    whole = get_rope(128, max_position=131_072, rope_parameters=rope, dtype=torch.bfloat16)
    layers = torch.nn.ModuleList(SelectedRotaryEmbedding(whole, 64) for _ in range(32))
    positions = torch.tensor([0, 1, 70_000, 131_071])
    for i, layer in enumerate(layers):
        units = torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32].tolist()
        order = rotation_order(kept_dims(128, 128, units), 128)
        layer.select(order)
        cos, sin = whole.cos_sin_cache.chunk(2, dim=-1)  # the table that each layer would have of its own
        own = torch.cat([cos[:, order[:32]], sin[:, order[:32]]], dim=-1)
        assert torch.equal(layer.cos_sin(positions)[0], own[positions])
    table = 131_072 * 128 * 2
    assert whole.cos_sin_cache.nbytes == table
    assert table <= stored_bytes(layers) <= table + 32 * 1024


@pytest.mark.process  # compiles the pretended GPU on first use
def test_selection_and_rotation_obey_the_rules_of_a_gpu():
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from tomoe_vllm.layers.attention.pruning import SelectedRotaryEmbedding, rotation_order

    positions, pruned, expected, on_cpu = rotate(*CASES[3].values)
    whole = on_cpu.whole
    with pretended_gpu() as device:
        with device:
            table = RotaryEmbedding(80, 32, 256, whole.base, True, torch.float32)
            selected = SelectedRotaryEmbedding(table, on_cpu.head_size)
        mask = kept_dims(80, 32, CASES[3].values[2]).to(device)
        selected.select(rotation_order(mask, 32))
        positions, pruned = positions.to(device), pruned.to(device)
        with record_synchronizations() as waits:
            queries, keys = selected.forward_native(positions, pruned, pruned)
        assert len(waits) == 0, str(waits)
        assert_close(queries.cpu(), expected)
        assert_close(keys.cpu(), expected)


def test_a_table_of_a_layer_is_as_long_as_a_sequence_may_be():
    from tomoe_vllm.layers.attention.pruning import SelectedRotaryEmbedding

    whole = rotate(32, 32, [0], {})[3].whole
    before = stored_bytes(whole)
    assert stored_bytes(SelectedRotaryEmbedding(whole, 8, num_own_rows=100)) - before < 100 * 8 * 4 + 1024
    assert SelectedRotaryEmbedding(whole, 8, num_own_rows=10_000).own_table.shape == (256, 8)


def stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of all buffers, shared memory once."""
    storages = [tensor.untyped_storage() for tensor in module.buffers()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("width", "head_dim", "rotary_dim"), [(6, 32, 32), (32, 32, 32), (33, 80, 32), (61, 80, 32)])
def test_initial_dims_are_whole_pairs_of_the_right_number(width, head_dim, rotary_dim):
    from tomoe_vllm.layers.attention.head_mask import _initial_dims
    from tomoe_vllm.layers.attention.pruning import rotation_order

    kept = _initial_dims(width, head_dim, rotary_dim)
    assert int(kept.sum()) == width
    assert torch.equal(kept[: rotary_dim // 2], kept[rotary_dim // 2 : rotary_dim])
    assert sorted(rotation_order(kept, rotary_dim).tolist()) == kept.nonzero().flatten().tolist()
