"""The reference model against explicit experts: weights sliced per expert and head, loops over tokens.

The reference masks dense results (the pseudo-MoE); here the same tokens go through small dense experts
(eq. 12 and 13, appendix B.3), and attention runs on the kept dims alone.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.helpers.compare import assert_close, is_close
from tests.helpers.tiny_models import FAMILY_FIELDS, UNUSED_EXPERT, tiny_model
from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES, ToMoELlamaForCausalLM

FAMILIES = list(FAMILY_FIELDS)
VO_MODES = ["dynamic", "static", "none"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def _tokens(num_tokens=13, batch=2, seed=5):
    return torch.randint(2, 96, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model, ids):
    return model(ids, use_cache=False).logits


# ------------------------------------------------------------------------------ explicit experts
def _activation(config):
    return {"silu": F.silu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}[config.hidden_act]


def _expert_mlp(mlp, config):
    """Eq. 13: each token through the sliced weights of the expert with the largest router logit."""
    gate = mlp.expert_gate
    is_gated = config.model_type != "tomoe_phi"
    act = _activation(config)

    def neurons(expert):
        byte, bit = divmod(expert, 8)
        return [f for f, row in enumerate(gate.signature.tolist()) if row[byte] >> bit & 1]

    def linear(layer, x, rows=slice(None), columns=slice(None)):
        bias = 0 if layer.bias is None else layer.bias[rows]
        return layer.weight[rows][:, columns] @ x + bias

    def forward(hidden):
        out = torch.empty_like(hidden)
        for b, t in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
            x = hidden[b, t]
            scores = (gate.router.weight @ x).tolist()
            kept = neurons(scores.index(max(scores)))
            if is_gated:
                y = act(linear(mlp.gate_proj, x, kept)) * linear(mlp.up_proj, x, kept)
                out[b, t] = linear(mlp.down_proj, y, columns=kept)
            else:
                out[b, t] = linear(mlp.fc2, act(linear(mlp.fc1, x, kept)), columns=kept)
        return out

    return forward


def _sliced_attention(attention, config, layer_idx):
    """Causal attention on kept dims: Q/K without the dropped ones, V/O by the query token's own dims."""
    shape, gate = block_shape(config), attention.head_gate
    head_dim, rotary, groups = shape.head_dim, shape.rotary_dim, shape.num_heads // shape.num_kv_heads
    kept = gate.query_key_dims.nonzero().flatten().tolist()
    output = attention.dense if config.model_type == "tomoe_phi" else attention.o_proj

    def rotated(heads):  # [S, heads, A]; dims (i, i + rotary / 2) turn by position * theta ** (-2 i / rotary)
        out = heads.clone()
        theta = config.rope_parameters["rope_theta"]
        for position in range(heads.shape[0]):
            for i in range(rotary // 2):
                angle = position * theta ** (-2 * i / rotary)
                a, b = heads[position, :, i], heads[position, :, i + rotary // 2]
                out[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, i + rotary // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def value_dims(x):
        if gate.vo_mode == "none":
            return list(range(head_dim))
        if gate.vo_mode == "static":
            return gate.value_dims.nonzero().flatten().tolist()
        logits = gate.value_up(F.gelu(gate.value_norm(gate.value_down(x)))).tolist()
        width = config.vo_head_dims[layer_idx]
        return sorted(sorted(range(head_dim), key=logits.__getitem__)[head_dim - width :])

    def one_sequence(hidden):
        def heads(layer, norm=None):
            split = layer(hidden).view(len(hidden), -1, head_dim)
            return split if norm is None else norm(split)

        query = rotated(heads(attention.q_proj, getattr(attention, "q_norm", None)))
        key = rotated(heads(attention.k_proj, getattr(attention, "k_norm", None)))
        value = heads(attention.v_proj)
        out = torch.zeros(len(hidden), config.hidden_size)
        for t in range(len(hidden)):
            dims = value_dims(hidden[t])
            for head in range(shape.num_heads):
                group = head // groups
                scores = key[: t + 1, group][:, kept] @ query[t, head][kept] / math.sqrt(head_dim)
                mixed = scores.softmax(0) @ value[: t + 1, group][:, dims]
                out[t] += output.weight[:, [head * head_dim + dim for dim in dims]] @ mixed
            if output.bias is not None:
                out[t] += output.bias
        return out

    def forward(hidden_states, **kwargs):
        return torch.stack([one_sequence(sequence) for sequence in hidden_states]), None

    return forward


def _with_explicit_experts(model):
    """The same checkpoint as a Mixture-of-Experts: no gate runs, every MLP and attention is sliced."""
    explicit = MODEL_CLASSES[model.config.model_type.removeprefix("tomoe_")](model.config).eval()
    explicit.load_state_dict(model.state_dict())
    explicit.set_gates(False)
    for i, layer in enumerate(explicit.model.layers):
        layer.mlp.forward = _expert_mlp(layer.mlp, model.config)
        layer.self_attn.forward = _sliced_attention(layer.self_attn, model.config, i)
    return explicit


@pytest.mark.parametrize("vo_mode", VO_MODES)
def test_masked_model_equals_explicit_experts(family, vo_mode):
    model = tiny_model(family, vo_mode=vo_mode)
    ids = _tokens(7)
    assert_close(_logits(model, ids), _logits(_with_explicit_experts(model), ids))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "num_hidden_layers": 1},  # nothing to route
        {"num_experts": 8, "num_hidden_layers": 1},  # a full byte
        {"num_experts": 13, "num_hidden_layers": 1},  # two bytes
        {"num_experts": 24, "num_hidden_layers": 1, "num_key_value_heads": 1},  # three bytes, one KV head
    ],
)
def test_masked_model_equals_explicit_experts_for_other_expert_counts(fields):
    widths = {"expert_intermediate_sizes": [40], "qk_head_dims": [16], "vo_head_dims": [5]}
    model = tiny_model("llama", **fields, **widths)
    ids = _tokens(7)
    assert_close(_logits(model, ids), _logits(_with_explicit_experts(model), ids))


def test_tolerance_catches_one_wrong_neuron_one_wrong_dim_and_one_misrouted_token(family):
    model = tiny_model(family)
    ids = _tokens(7)
    expected = _logits(model, ids)
    mlp = model.model.layers[1].mlp.expert_gate
    signature = mlp.signature.clone()
    mlp.signature[0] ^= 0b11111
    assert not is_close(_logits(model, ids), expected)
    mlp.signature.copy_(signature)
    head = model.model.layers[0].self_attn.head_gate
    head.query_key_dims[-1] ^= 1
    assert not is_close(_logits(model, ids), expected)
    head.query_key_dims[-1] ^= 1
    assert torch.equal(_logits(model, ids), expected)
    neuron_mask = mlp.neuron_mask

    def misroute_last_token(hidden):
        mask = neuron_mask(hidden)
        mask[0, -1] = ~mask[0, -1]
        return mask

    mlp.neuron_mask = misroute_last_token
    assert not is_close(_logits(model, ids), expected)


# ----------------------------------------------------------------------------------- the gates
@pytest.mark.parametrize("vo_mode", VO_MODES)
def test_gates_off_is_bit_identical_to_the_dense_model(family, vo_mode):
    model = tiny_model(family, vo_mode=vo_mode)
    fields = model.config.to_dict()
    for key in ("model_type", "architectures", "dtype"):
        fields.pop(key, None)
    dense = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).float().eval()
    own = dense.state_dict().keys()
    dense.load_state_dict({name: t for name, t in model.state_dict().items() if name in own})
    ids = _tokens()
    model.set_gates(False)
    assert torch.equal(_logits(model, ids), _logits(dense, ids))
    model.set_gates(True)
    assert not is_close(_logits(model, ids), _logits(dense, ids), limit=0.05)


def test_everything_kept_is_the_dense_model(family):
    model = tiny_model(
        family, expert_intermediate_sizes=None, qk_head_dims=None, vo_head_dims=None, num_experts=3, vo_mode="dynamic"
    )
    ids = _tokens()
    converted = _logits(model, ids)
    model.set_gates(False)
    assert torch.equal(converted, _logits(model, ids))


def test_unused_expert_leaves_output_unchanged(family):
    model = tiny_model(family)
    ids = _tokens(40)
    before = _logits(model, ids)
    for layer in model.model.layers:
        layer.mlp.expert_gate.signature ^= 1 << UNUSED_EXPERT
    assert torch.equal(_logits(model, ids), before)
    for layer in model.model.layers:  # and the others are used
        layer.mlp.expert_gate.signature ^= 0b11111 ^ (1 << UNUSED_EXPERT)
    assert not is_close(_logits(model, ids), before, limit=0.01)


def test_all_tokens_on_one_expert_equals_that_expert_alone():
    model, ids = tiny_model("llama"), _tokens()
    alone = tiny_model("llama", num_experts=1)
    state = model.state_dict()
    for i, layer in enumerate(model.model.layers):
        gate = layer.mlp.expert_gate
        gate.router.weight.data.zero_()  # argmax of equal logits is the first expert
        state[f"model.layers.{i}.mlp.expert_gate.router.weight"] = gate.router.weight[:1]
        state[f"model.layers.{i}.mlp.expert_gate.signature"] = gate.signature & 1
    alone.load_state_dict(state)
    assert torch.equal(_logits(model, ids), _logits(alone, ids))


@pytest.mark.parametrize("vo_mode", VO_MODES)
def test_one_token_alone_equals_the_first_of_many(family, vo_mode):
    model, ids = tiny_model(family, vo_mode=vo_mode), _tokens()
    assert_close(_logits(model, ids[:, :1]), _logits(model, ids)[:, :1])


def test_a_later_token_leaves_earlier_ones_unchanged(family):
    model, ids = tiny_model(family), _tokens()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 96
    assert torch.equal(_logits(model, changed)[:, :-1], _logits(model, ids)[:, :-1])


@pytest.mark.parametrize("vo_mode", VO_MODES)
def test_generating_with_a_cache_equals_forward_without_one(family, vo_mode):
    model, ids = tiny_model(family, vo_mode=vo_mode), _tokens(5, batch=1)
    for _ in range(8):
        ids = torch.cat([ids, _logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    out = model.generate(_tokens(5, batch=1), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out.tolist() == ids.tolist()


# --------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("vo_mode", VO_MODES)
def test_saved_model_loads_as_the_same_model(family, vo_mode, tmp_path):
    model, ids = tiny_model(family, vo_mode=vo_mode), _tokens()
    model.save_pretrained(tmp_path)
    loaded = MODEL_CLASSES[family].from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(loaded, ids), _logits(model, ids))


def test_routers_stay_float32_in_a_bfloat16_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = ToMoELlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = {n: p.dtype for n, p in model.named_parameters() if "_gate." in n}
    assert set(gates.values()) == {torch.float32}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert torch.isfinite(_logits(model.eval(), _tokens())).all()


def test_missing_gate_error_names_the_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    from tests.helpers.tiny_models import save_tiny_model

    model = save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.expert_gate.signature"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.1\.mlp\.expert_gate\.signature"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("family", MODEL_CLASSES)
def test_generic_backend_of_an_engine_is_refused_in_one_line(family):
    """vLLM calls this hook before it runs an unknown architecture with its transformers backend."""
    with pytest.raises(ImportError, match=r"this vLLM has no ToMoE plugin\. Install tomoe-vllm from") as raised:
        MODEL_CLASSES[family].is_backend_compatible()
    assert "\n" not in str(raised.value)
