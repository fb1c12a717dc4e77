"""The rivals: budgets counted from what tokens really use, masks against cases written out by hand."""

import math

import pytest
import torch

from tests.helpers.compare import assert_close
from tests.helpers.dense_models import dense_model, word_tokenizer
from tests.helpers.students import SETTINGS
from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of
from tomoe_vllm.hf.tomoe_math import BlockShape
from training.compare import METHODS
from training.config import RunConfig
from training.data import InterleavedBlocks, load_documents, pack
from training.losses import distillation_loss
from training.rivals.cmoe import CMoEGate, balanced_assignment, carve, cmoe
from training.rivals.magnitude import magnitude
from training.rivals.protocol import Contest
from training.rivals.random_experts import RandomExpertGate, random_experts, split_at_random, train_routers
from training.rivals.static_mask import static_settings
from training.rivals.structured import InputNorms, StaticHeadGate, prune, unit_scores
from training.rivals.wanda import input_norms
from training.rivals.widths import OutOfBudgetError, equal_experts, mlp_width, uniform_widths

SMOLLM2 = BlockShape(
    hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, rotary_dim=64, intermediate_size=1536, num_mlp_matrices=3
)
LLAMA3 = BlockShape(
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    intermediate_size=14336,
    num_mlp_matrices=3,
)
PHI2 = BlockShape(
    hidden_size=2560, num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=32, intermediate_size=10240,
    num_mlp_matrices=2,
)  # fmt: skip


@pytest.fixture
def contest(dense_folder, text_file, tmp_path):
    """``contest(family, active_ratio=0.7)``: a fresh tiny model and its text."""

    def make(family="llama", **fields):
        folder = dense_folder(family)
        settings = {"sequence_length": 32, "batch_size": 2, "steps": 3, "warm_start_tokens": 256, "dtype": "float32"}
        config = RunConfig(
            base=str(folder), data=[str(text_file)], tensorboard=False, **(SETTINGS | settings | fields)
        )  # fmt: skip
        blocks = pack(load_documents(str(text_file)), word_tokenizer(), config.sequence_length)
        return Contest(
            base=dense_model(family).requires_grad_(False),
            config=config,
            blocks=InterleavedBlocks([blocks], config.seed),
            work=tmp_path,
        )

    return make


# ----------------------------------------------------------------------------------------- the budget
@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA3, PHI2])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.7, 0.9, 1.0])
def test_mlp_takes_all_that_the_budget_leaves_and_no_more(shape, p):
    for attention_ratio in (p, 1.0):
        widths = uniform_widths(shape, 2, p, attention_ratio)
        assert widths.active_ratio(shape) <= p
        one_more = shape.active_parameters(widths.qk_dims[0], widths.vo_dims[0], widths.experts[0] + 1)
        assert one_more > p * shape.total_parameters or widths.experts[0] == shape.intermediate_size
        assert widths.qk_dims[0] % 2 == 0


def test_mlp_width_of_a_known_model():
    # SmolLM2: attention 576 * 12 * 128 = 884,736 of 3,538,944; half of all leaves as much again for the MLP.
    assert mlp_width(SMOLLM2, 0.5, 64, 64) == 884_736 // (3 * 576) == 512


def test_attention_over_the_budget_is_an_error():
    with pytest.raises(OutOfBudgetError, match=r"attention alone uses 0\.250 of the block parameters"):
        mlp_width(SMOLLM2, 0.25, 64, 64)


@pytest.mark.parametrize(
    ("num_neurons", "width", "expected"),
    [
        (1536, 512, (12, 4)),  # 12 and 24 experts are exact: the fewer
        (1536, 921, (32, 19)),  # 912 of 921: nothing is nearer
        (1536, 1536, (8, 8)),  # all of them
        (96, 7, (16, 1)),  # 8 to 12 experts have more than 7 neurons each: 6, or twice 3 of 32
        (11008, 5504, (8, 4)),
    ],
)
def test_experts_come_nearest_to_the_width_from_below(num_neurons, width, expected):
    assert equal_experts(num_neurons, width) == expected


@pytest.mark.parametrize(("num_neurons", "width"), [(97, 50), (1536, 47)])
def test_neurons_that_do_not_split_are_an_error(num_neurons, width):
    with pytest.raises(OutOfBudgetError, match="equal experts"):
        equal_experts(num_neurons, width)


class _Used:
    """What tokens of one layer use, counted at the linears behind the gates: zeros are unused."""

    def __init__(self, layer, family, head_dim):
        self.head_dim = head_dim
        layer.get_submodule(family.query).register_forward_hook(self._see("qk", is_output=True))
        layer.get_submodule(family.key).register_forward_hook(self._see("qk_of_keys", is_output=True))
        layer.get_submodule(family.attention_out).register_forward_hook(self._see("vo"))
        layer.get_submodule(family.mlp_out).register_forward_hook(self._see("mlp"))

    def _see(self, name, is_output=False):
        def hook(module, args, output):
            used = (output if is_output else args[0]) != 0
            if name != "mlp":
                used = used.reshape(*used.shape[:2], -1, self.head_dim).any(dim=2)
            setattr(self, name, used[0])

        return hook


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "p"), [("llama", 0.6), ("qwen3", 0.6), ("phi", 0.8)])
def test_no_token_uses_more_than_the_budget(name, family, p, contest):
    game = contest(family, active_ratio=p)
    gates = METHODS[name](game)
    gates.attach(game.base)
    gates.set_on(True)
    used = [_Used(layer, game.family, game.shape.head_dim) for layer in game.layers]
    game.base(torch.randint(3, 90, (1, 50), generator=torch.Generator().manual_seed(1)))
    config, total, active = game.base.config, 0, torch.zeros(50)
    for layer in used:
        assert torch.equal(layer.qk, layer.qk_of_keys)
        matrices = 2 if family == "phi" else 3
        heads = config.hidden_size * (config.num_attention_heads + config.num_key_value_heads)
        active += heads * (layer.qk.sum(-1) + layer.vo.sum(-1))
        active += matrices * config.hidden_size * layer.mlp.sum(-1)
        total += 2 * heads * game.shape.head_dim + matrices * config.hidden_size * config.intermediate_size
    assert active.max().item() == gates.widths.active_parameters(game.shape) <= p * total
    assert active.max().item() > (p - 0.08) * total  # and the budget is spent


@pytest.mark.parametrize("name", ["magnitude", "wanda", "cmoe", "static_mask"])
def test_gates_switched_off_leave_the_dense_model(name, contest):
    game = contest()
    ids = torch.randint(3, 90, (1, 20))
    expected = game.base(ids).logits
    gates = METHODS[name](game)
    gates.attach(game.base)
    assert torch.equal(game.base(ids).logits, expected)
    gates.set_on(True)
    assert not torch.equal(game.base(ids).logits, expected)


# ------------------------------------------------------------------------ magnitude and Wanda, by hand
@pytest.fixture
def layer_by_hand():
    """One layer of 4 neurons and 2 heads of 4 dims (one K/V head); Q/K units are the pairs (0, 2) and (1, 3)."""
    model = dense_model(
        "llama", hidden_size=2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    layer = model.model.layers[0]
    weights = {
        "mlp.down_proj": [[1, -5, 0, 2], [-1, 2, 4, 2]],  # column sums of |W|: 2, 7, 4, 4
        "self_attn.o_proj": [[1, 2, 0, 0, 3, 0, 0, 1], [0, 0, -1, 0, 0, 0, 1, 0]],
        "self_attn.q_proj": [[1, 0], [2, 0], [0, 3], [0, 0], [0, -1], [1, 0], [0, 0], [2, 0]],
        "self_attn.k_proj": [[2, 0], [1, 0], [1, 0], [0, 2]],
    }
    with torch.no_grad():
        for name, rows in weights.items():
            layer.get_submodule(name).weight.copy_(torch.tensor(rows, dtype=torch.float32))
    return model


def _norms(attention_in=(1, 1), attention_out=(1,) * 8, mlp_out=(1,) * 4):
    return InputNorms(
        attention_in=torch.tensor(attention_in).float(),
        attention_out=torch.tensor(attention_out).float(),
        mlp_out=torch.tensor(mlp_out).float(),
    )


def test_unit_scores_are_sums_of_weights(layer_by_hand):
    config = layer_by_hand.config
    scores = unit_scores(layer_by_hand.model.layers[0], family_of(config), block_shape(config), _norms())
    assert scores.neurons.tolist() == [2, 7, 4, 4]
    assert scores.value.tolist() == [1 + 3, 2, 1 + 1, 1]
    # Rows of q over both heads: [1 + 1, 2 + 1, 3 + 0, 0 + 2]; of k: [2, 1, 1, 2]. Products 4, 3, 3, 4.
    assert scores.query_key.tolist() == [4 + 3, 3 + 4]


def test_unit_scores_are_scaled_by_the_inputs_norms(layer_by_hand):
    config = layer_by_hand.config
    norms = _norms(attention_in=(1, 10), attention_out=(1, 1, 1, 9, 1, 1, 1, 9), mlp_out=(3, 1, 0.5, 1))
    scores = unit_scores(layer_by_hand.model.layers[0], family_of(config), block_shape(config), norms)
    assert scores.neurons.tolist() == [6, 7, 2, 4]
    assert scores.value.tolist() == [4, 2, 2, 9]
    # q: [1 + 10, 2 + 1, 30 + 0, 0 + 2]; k: [2, 1, 1, 20]. Products 22, 3, 30, 40.
    assert scores.query_key.tolist() == [22 + 30, 3 + 40]


@pytest.mark.parametrize(
    ("norms", "neurons", "query_key", "value"),
    [
        (_norms(mlp_out=(1, 1, 1.1, 1)), [0, 1, 1, 0], None, [1, 0, 0, 0]),
        (
            _norms(attention_in=(1, 10), attention_out=(1, 1, 1, 9, 1, 1, 1, 9), mlp_out=(3, 1, 0.5, 1)),
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 0, 0, 1],
        ),
    ],
)
def test_pruning_keeps_the_best_scored(norms, neurons, query_key, value, layer_by_hand):
    # 6 parameters per head dim and per neuron, 72 in all. Half of the head dims use 24 of 36: 2 neurons are left.
    game = _game(layer_by_hand, active_ratio=0.5)
    gates = prune(game, [norms], attention_ratio=0.5, tokens=0)
    assert gates.experts[0].neurons.int().tolist() == neurons
    head = gates.heads[0]
    assert isinstance(head, StaticHeadGate)
    assert head.value_dims.sum() == 2
    assert (head.value_dims.int() >= torch.tensor(value)).all()
    if query_key is not None:
        assert head.query_key_dims.int().tolist() == query_key


def _game(model, **fields):
    return Contest(
        base=model, config=RunConfig(**fields), blocks=InterleavedBlocks([torch.zeros(4, 4).long()], 0), work=None
    )


def test_magnitude_needs_no_text(layer_by_hand):
    gates = magnitude(_game(layer_by_hand, active_ratio=0.5))
    assert gates.tokens == 0
    assert gates.experts[0].neurons[1]
    assert not gates.experts[0].neurons[0]


def test_wanda_norms_are_those_of_the_dense_activations(contest):
    game = contest()
    norms, tokens = input_norms(game)
    ids = torch.stack([game.blocks.block(i) for i in range(8)])
    assert tokens == ids.numel() == 256
    seen = {}
    for i, layer in enumerate(game.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: seen.__setitem__(i, args[0]))
    game.base(ids)
    first = game.layers[0].input_layernorm(game.base.model.embed_tokens(ids)).flatten(0, 1)
    assert_close(norms[0].attention_in, first.norm(dim=0))
    for i, layer in enumerate(game.layers):
        neurons = torch.nn.functional.silu(layer.mlp.gate_proj(seen[i])) * layer.mlp.up_proj(seen[i])
        assert_close(norms[i].mlp_out, neurons.flatten(0, 1).norm(dim=0))


# ------------------------------------------------------------------------------------- random experts
def _random_gate(top_k=2):
    """4 experts of 2 neurons on 4 hidden dims, whose router passes the hidden state on as logits."""
    gate = RandomExpertGate(4, torch.tensor([3, 0, 1, 2, 0, 1, 2, 3]), 4, top_k)
    with torch.no_grad():
        gate.router.weight.copy_(torch.eye(4))
    return gate


def test_random_experts_weigh_the_neurons_of_the_top_k():
    hidden = torch.tensor([[0.0, 2.0, 1.0, -1.0], [5.0, 0.0, 0.0, 5.0]])
    high, low = (2 * math.exp(v) / (math.exp(2) + math.exp(1)) for v in (2, 1))
    expected = [[0, 0, high, low, 0, high, low, 0], [1, 1, 0, 0, 1, 0, 0, 1]]
    assert_close(_random_gate().neuron_mask(hidden), torch.tensor(expected))


def test_gradient_does_not_change_the_weights_and_reaches_every_expert():
    hidden = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    for top_k in (1, 2):
        gate = _random_gate(top_k)
        with torch.no_grad():
            expected = gate.neuron_mask(hidden)
        mask = gate.neuron_mask(hidden)
        assert torch.equal(mask, expected)
        (mask * torch.arange(8.0)).sum().backward()
        assert (gate.router.weight.grad.abs().sum(dim=1) > 0).all()


def test_router_learns_at_k_1_from_the_experts_it_did_not_choose():
    gate, logits = _random_gate(top_k=1), [0.0, 2.0, 1.0, -1.0]
    (gate.neuron_mask(torch.tensor([logits])) * torch.arange(8.0)).sum().backward()
    values = [1 + 4, 2 + 5, 3 + 6, 0 + 7]  # of the experts' neurons under this loss; expert 1 is chosen
    soft = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
    others = sum(s * v for i, (s, v) in enumerate(zip(soft, values, strict=True)) if i != 1)
    expected = [s * ((v if i != 1 else 0) - others) for i, (s, v) in enumerate(zip(soft, values, strict=True))]
    assert_close(gate.router.weight.grad, torch.outer(torch.tensor(expected), torch.tensor(logits)) + 0.0)


def test_random_experts_are_disjoint_equal_and_random(contest):
    game = contest(active_ratio=0.6)
    splits = [gate.expert_of_neuron for gate in split_at_random(game).experts]
    again = [gate.expert_of_neuron for gate in split_at_random(game).experts]
    for split, same in zip(splits, again, strict=True):
        assert torch.equal(split, same)
        assert split.bincount().tolist() == [8] * 12  # 96 neurons, each in one expert
        assert not torch.equal(split, split.sort().values)
    assert not torch.equal(splits[0], splits[1])


@torch.no_grad()
def _distillation(game, gates) -> float:
    ids = torch.stack([game.blocks.block(i) for i in range(150, 180)])  # past what few steps train on
    gates.set_on(False)
    teacher = game.base.model(ids).last_hidden_state.flatten(0, 1)
    gates.set_on(True)
    student = game.base.model(ids).last_hidden_state.flatten(0, 1)
    return distillation_loss(student, teacher, game.base.lm_head).item()


def test_trained_router_beats_an_untrained_one(contest):
    game = contest(active_ratio=0.6, steps=60, learning_rate=1e-2, gamma=0.1)
    untrained = split_at_random(game)
    untrained.attach(game.base)
    before = _distillation(game, untrained)
    untrained.set_on(False)
    trained = random_experts(game)
    trained.attach(game.base)
    assert trained.tokens == 60 * 2 * 32
    assert _distillation(game, trained) < 0.9 * before


def test_micro_batches_do_not_change_the_trained_router(contest):
    whole, halves = (split_at_random(contest()) for _ in range(2))
    train_routers(contest(gamma=0.0), whole)
    train_routers(contest(gamma=0.0, micro_batch_size=1), halves)
    for one, other in zip(whole.experts, halves.experts, strict=True):
        assert_close(one.router.weight.detach(), other.router.weight.detach(), 1e-4)


def test_training_leaves_the_dense_weights_alone(contest, dense_folder):
    game = contest()
    before = {name: p.clone() for name, p in game.base.named_parameters()}
    random_experts(game)
    assert all(torch.equal(p, before[name]) for name, p in game.base.named_parameters())


# ------------------------------------------------------------------------------------------------ CMoE
MARKERS = torch.tensor(
    [
        # tokens 0 1 2 3 4 5
        [1, 1, 1, 1, 1, 1],  # 0: always active
        [1, 1, 0, 0, 0, 0],  # 1: with 4
        [0, 0, 1, 1, 0, 0],  # 2: with 6
        [0, 0, 0, 0, 1, 1],  # 3: with 7
        [1, 0, 0, 0, 0, 0],  # 4
        [1, 1, 1, 1, 1, 0],  # 5: nearly always active
        [0, 0, 1, 0, 0, 0],  # 6
        [0, 0, 0, 0, 0, 1],  # 7
    ]
).float()


def test_cmoe_shares_the_most_active_and_clusters_the_rest():
    experts, representatives = carve(MARKERS, num_experts=4, num_shared=1)
    assert experts.tolist() == [-1, 0, 1, 2, 0, -1, 1, 2]
    # Both neurons of a pair are equally far from their centroid: the first in order of activity.
    assert representatives.tolist() == [1, 2, 3]


def test_cmoe_representative_is_the_nearest_to_the_centroid():
    # Experts of 3: neurons 0 to 2 agree but for 0, neurons 3 to 5 but for 5.
    markers = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0],
         [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    ).float()  # fmt: skip
    experts, representatives = carve(markers, num_experts=2, num_shared=0)
    assert experts[:3].unique().numel() == experts[3:].unique().numel() == 1
    assert experts[0] != experts[5]
    assert sorted(representatives.tolist())[0] in (1, 2)
    assert sorted(representatives.tolist())[1] in (3, 4)


def test_cmoe_routes_by_the_representatives_activation():
    gate = CMoEGate(torch.tensor([-1, 0, 1, 2, 0, -1, 1, 2]), torch.tensor([1, 2, 3]), 1)
    neurons = torch.tensor([[9.0, 0.1, -3.0, 2.0, 9.0, 9.0, 9.0, 9.0], [0.0, 0.3, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0]])
    expected = [[1, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]]  # experts 1 and 0, and the shared ones
    assert gate.neuron_mask(neurons).int().tolist() == expected


def test_cmoe_experts_of_a_model_are_equal_and_half_of_the_active_are_shared(contest):
    gates = cmoe(contest(active_ratio=0.6))  # 12 experts of 8 neurons, 4 active
    for gate in gates.experts:
        assert gate.expert_of_neuron.add(1).bincount().tolist() == [16] + [8] * 10
        assert gate.num_active == 2
        assert gate.expert_of_neuron[gate.representatives].tolist() == list(range(10))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[9, 1], [8, 2], [3, 7], [1, 6]], [0, 0, 1, 1]),  # nobody is refused
        ([[9, 8], [8, 1], [7, 6], [6, 5]], [0, 0, 1, 1]),  # all want cluster 0: the best two have it
        ([[5, 0], [9, 0], [8, 0], [7, 0]], [1, 0, 0, 1]),
    ],
)
def test_full_clusters_keep_their_best(scores, expected):
    assert balanced_assignment(torch.tensor(scores).float()).tolist() == expected


def test_balanced_assignment_is_stable():
    scores = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    labels = balanced_assignment(scores)
    assert labels.bincount().tolist() == [10] * 6
    for point, label in enumerate(labels.tolist()):
        for cluster in range(6):
            if scores[point, cluster] > scores[point, label]:  # it would rather go there: they are all better
                assert (scores[labels == cluster, cluster] >= scores[point, cluster]).all()


# ----------------------------------------------------------------------------------------- static mask
def test_static_mask_is_one_expert_for_all_tokens(contest):
    game = contest()
    settings = static_settings(game.config)
    assert (settings.num_experts, settings.vo_mode) == (1, "static")
    assert (settings.steps, settings.active_ratio) == (game.config.steps, game.config.active_ratio)
    gates = METHODS["static_mask"](game)
    hidden = torch.randn(1, 9, 64)
    for head, expert in zip(gates.heads, gates.experts, strict=True):
        assert head.value_mask(hidden).dim() == 1
        masks = expert.neuron_mask(hidden)[0]
        assert (masks == masks[0]).all()
