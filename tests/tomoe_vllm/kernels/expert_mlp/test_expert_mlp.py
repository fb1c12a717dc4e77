"""The expert MLP in C++, in each regime, against the plain-torch reference in float64."""

import pytest
import torch

from tests.helpers.compare import assert_close, relative_rms
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_activation.reference import ACTIVATIONS
from tomoe_vllm.kernels.expert_mlp import ExpertWeights, expert_mlp
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_lists, neuron_order
from tomoe_vllm.kernels.ops import ExpertTensors


@pytest.fixture(autouse=True, scope="module")
def compiled():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert build.load()


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_case(
    tokens, hidden, neurons, experts, *, is_gated=True, has_bias=False, expert=None, keep=0.5, seed=0, is_ordered=False
):
    """Hidden states, expert ids, and the fields of ExpertTensors up to the activation. Experts differ in width."""
    generator = torch.Generator().manual_seed(seed)
    rows = neurons * (1 + is_gated)
    masks = (torch.rand(experts, neurons, generator=generator) < keep).float()
    if is_ordered:
        masks = masks[:, neuron_order(masks)]
    ids = torch.randint(experts, (tokens,), generator=generator)
    if expert is not None:
        ids.fill_(expert)
    return [
        torch.randn(tokens, hidden, generator=generator),
        ids,
        torch.randn(rows, hidden, generator=generator) * hidden**-0.5,
        torch.randn(rows, generator=generator) if has_bias else None,
        torch.randn(neurons, hidden, generator=generator) * neurons**-0.5,
        masks,
        *neuron_lists(masks),
    ]


def run(case, activation="silu"):
    return expert_mlp(*case[:2], ExpertWeights(*case[2:], activation))


def expected_output(case, activation="silu"):
    """[T, D] float64."""
    return expert_mlp_reference(case[0].double(), case[1], ExpertTensors(*case[2:], activation).to(torch.float64))


CASES = [
    pytest.param({"tokens": 1, "hidden": 64, "neurons": 96, "experts": 8}, id="one token"),
    pytest.param({"tokens": 7, "hidden": 50, "neurons": 77, "experts": 8}, id="sizes that fill no vector"),
    pytest.param({"tokens": 3, "hidden": 13, "neurons": 5, "experts": 8}, id="smaller than a vector; empty experts"),
    pytest.param({"tokens": 40, "hidden": 72, "neurons": 300, "experts": 8}, id="tiles with tails; several blocks"),
    pytest.param({"tokens": 33, "hidden": 64, "neurons": 96, "experts": 16}, id="16 experts"),
    pytest.param({"tokens": 37, "hidden": 64, "neurons": 96, "experts": 8, "expert": 7}, id="all on the last expert"),
    pytest.param({"tokens": 9, "hidden": 64, "neurons": 96, "experts": 1}, id="one expert"),
    pytest.param({"tokens": 300, "hidden": 64, "neurons": 96, "experts": 2}, id="more tokens than a block"),
    pytest.param({"tokens": 1100, "hidden": 32, "neurons": 40, "experts": 3}, id="more tokens than a pass"),
    pytest.param({"tokens": 64, "hidden": 50, "neurons": 77, "experts": 1}, id="transposed tokens, no remainder"),
    pytest.param({"tokens": 151, "hidden": 2100, "neurons": 90, "experts": 2}, id="transposed tokens and a remainder"),
    pytest.param({"tokens": 200, "hidden": 64, "neurons": 700, "experts": 4}, id="some experts transposed, some not"),
    pytest.param({"tokens": 19, "hidden": 2100, "neurons": 40, "experts": 3}, id="more columns than a slice of k"),
    pytest.param({"tokens": 5, "hidden": 64, "neurons": 96, "experts": 8, "keep": 1.0}, id="every neuron kept"),
    pytest.param({"tokens": 17, "hidden": 96, "neurons": 700, "experts": 4}, id="many blocks, the next one prefetched"),
    *(
        pytest.param(
            {"tokens": tokens, "hidden": 96, "neurons": 700, "experts": 5, "is_ordered": True},
            id=f"experts without a neuron in some blocks, {tokens} tokens",
        )
        for tokens in (1, 4, 17, 150, 400)
    ),
    pytest.param({"tokens": 1, "hidden": 2100, "neurons": 40, "experts": 3}, id="one token, two slices of columns"),
    pytest.param({"tokens": 9, "hidden": 4100, "neurons": 30, "experts": 2}, id="three slices of columns"),
]


@pytest.mark.parametrize("shape", CASES)
def test_equals_the_reference(shape, threads):
    case = make_case(**shape)
    before = [t.clone() if t is not None else None for t in case]
    actual = run(case)
    assert actual.is_contiguous()
    assert actual.dtype == torch.float32
    assert_close(actual, expected_output(case), 1e-5)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, case, strict=True)), "the inputs must not change"


@pytest.mark.parametrize(("is_gated", "has_bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 21, 150], ids=["one token", "few tokens", "transposed"])
def test_activations_gates_and_biases(tokens, activation, is_gated, has_bias):
    case = make_case(tokens, 48, 70, 2, is_gated=is_gated, has_bias=has_bias)
    case[0] *= 3
    assert_close(run(case, activation), expected_output(case, activation), 1e-5)


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("experts", [8, 1], ids=["neuron-major", "expert-major"])
def test_a_token_does_not_depend_on_its_batch_bit_for_bit(experts, threads, is_ordered):
    """As long as its expert has fewer than kTransposedTokens tokens."""
    case = make_case(50, 2100, 130, experts, is_ordered=is_ordered)
    whole = run(case)
    for size in (1, 2, 5, 13, 50):
        parts = [run([case[0][t : t + size], case[1][t : t + size], *case[2:]]) for t in range(0, len(whole), size)]
        assert torch.equal(torch.cat(parts), whole), size


def test_experts_without_neurons_give_zero():
    assert torch.equal(run(make_case(5, 64, 96, 8, keep=0.0)), torch.zeros(5, 64))


@pytest.mark.parametrize("hidden", [576, 2048])
def test_rows_may_be_strided(hidden):
    case = make_case(6, hidden, 96, 8)
    up, down = (torch.full((len(rows), hidden + 16), torch.nan)[:, :hidden].copy_(rows) for rows in (case[2], case[4]))
    strided = [*case[:2], up, case[3], down, *case[5:]]
    assert torch.equal(run(strided), run(case))


@pytest.mark.parametrize("tokens", [1, 3, 40, 150, 400])
@pytest.mark.parametrize(("hidden", "width"), [(96, 48), (192, 64), (192, 96), (160, 32), (240, 240)])
def test_w_down_may_be_stored_in_panels(tokens, hidden, width, threads):
    case = make_case(tokens, hidden, 600, 3, is_ordered=True)
    panels = case[4].unflatten(1, (hidden // width, width)).transpose(0, 1).contiguous().transpose(0, 1)
    in_panels = [*case[:4], panels, *case[5:]]
    assert torch.equal(run(in_panels), run(case))
    assert_close(run(in_panels), expected_output(case), 1e-5)


def test_strided_input_is_taken():
    case = make_case(6, 64, 96, 8)
    wide = torch.randn(6, 128)
    wide[:, ::2] = case[0]
    assert torch.equal(run([wide[:, ::2], *case[1:]]), run(case))


def test_no_token_gives_no_row():
    case = make_case(0, 64, 96, 8)
    assert run(case).shape == (0, 64)


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda case: case[1].__setitem__(3, (case[1][3] + 1) % 8), id="one token misrouted"),
        pytest.param(lambda case: case[6][:, 0].sub_(1).clamp_(min=0), id="one wrong neuron"),
        pytest.param(lambda case: case[7].sub_(1), id="last neuron of each expert lost"),
        pytest.param(lambda case: case[2].copy_(case[2].roll(1, 0)), id="rows shifted by one"),
    ],
)
def test_tolerance_catches_small_faults(break_it):
    case = make_case(64, 96, 400, 8)
    expected = expected_output(case)
    assert max(relative_rms(run(case), expected)) < 1e-5
    broken = [t.clone() if t is not None else None for t in case]
    break_it(broken)
    assert max(relative_rms(run(broken), expected)) > 1e-3


@pytest.mark.process
@pytest.mark.parametrize("lanes", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_vectors_of_other_cpus_agree_too(monkeypatch, lanes):
    """Micro-kernels for 8 and 16 lanes in portable vectors, loaded in another process."""
    from tests.helpers.processes import environment, python

    capability = torch.backends.cpu.get_cpu_capability()
    flags = {
        8: build.ISA_FLAGS["AVX2"] if capability == "AVX512" else (),
        16: (*build.ISA_FLAGS.get(capability, ()), "-mno-avx512f", "-DTOMOE_LANES=16", "-O1"),
    }[lanes]
    monkeypatch.setitem(build.ISA_FLAGS, "another", (*flags, "-Werror"))
    code = f"""
import torch
import tests.tomoe_vllm.kernels.expert_mlp.test_expert_mlp as t
import tests.tomoe_vllm.kernels.test_route
torch.ops.load_library({str(build.build("another"))!r})
t.build.load = lambda: True
for threads in (1, 2):
    torch.set_num_threads(threads)
    for case in t.CASES:
        t.test_equals_the_reference(case.values[0], threads)
    for experts in (8, 1):
        t.test_a_token_does_not_depend_on_its_batch_bit_for_bit(experts, threads, True)
    for tokens in (1, 3, 40, 150):
        t.test_w_down_may_be_stored_in_panels(tokens, 192, 96, threads)
tests.tomoe_vllm.kernels.test_route.test_routes_are_the_argmax_of_the_logits(70, 8)
print("all")
"""
    result = python("-c", code, env=environment())
    assert result.stdout.split() == ["all"], result.stderr[-2000:]


def test_operator_registration_is_sound():
    case = make_case(5, 64, 96, 8)
    torch.library.opcheck(torch.ops.tomoe.expert_mlp.default, (*case, "silu"))
    torch.library.opcheck(torch.ops.tomoe.route.default, (case[0], torch.randn(8, 64)))
    weights = ExpertWeights(*case[2:], "silu")
    torch.library.opcheck(torch.ops.tomoe.prepared_expert_mlp.default, (*case[:2], weights.handle))
    record = torch.zeros(9, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.tomoe.route_recorded.default, (case[0], torch.randn(8, 64), record))


@pytest.mark.parametrize("is_prepared", [True, False])
def test_traces_once_for_every_number_of_tokens(monkeypatch, is_prepared):
    if not is_prepared:
        monkeypatch.setattr(build, "load", lambda: False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(expert_mlp, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 16):
        case = make_case(tokens, 48, 64, 8)
        weights = ExpertWeights(*case[2:], "silu")
        assert (weights.handle is not None) == is_prepared
        assert torch.equal(compiled(*case[:2], weights), expert_mlp(*case[:2], weights))
    assert len(graphs) == 1


def test_weights_may_change_in_place_once_they_are_prepared():
    case, other = make_case(6, 64, 96, 8), make_case(6, 64, 96, 8, seed=1)
    weights = ExpertWeights(*case[2:], "silu")
    expert_mlp(*case[:2], weights)
    for index in (2, 4):
        case[index].copy_(other[index])
    assert_close(expert_mlp(*case[:2], weights), expected_output(case), 1e-5)


@pytest.mark.parametrize(
    "change", [pytest.param(lambda t: t.bfloat16(), id="bfloat16"), pytest.param(lambda t: t.to("meta"), id="meta")]
)
def test_weights_that_the_kernel_does_not_take_are_not_prepared(change):
    case = [change(t) if t is not None and t.is_floating_point() else t for t in make_case(6, 64, 96, 8)]
    weights = ExpertWeights(*case[2:], "silu")
    assert weights.handle is None
    if not case[0].is_meta:
        assert_close(expert_mlp(*case[:2], weights).float(), expected_output(case), 2e-2)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (2, lambda t: t[:100], r"up is \[100, 64\]; .* \[192, 64\] \(gate and up\) or \[96, 64\]"),
        (5, lambda t: t[:, :90], r"masks is \[8, 90\]"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(index, change, message):
    case = make_case(5, 64, 96, 8)
    case[index] = change(case[index])
    with pytest.raises(ValueError, match=message):
        ExpertWeights(*case[2:], "silu")


def test_tokens_of_another_width_are_refused(monkeypatch):
    case = make_case(5, 64, 96, 8)
    narrow = [case[0][:, :60], *case[1:]]
    with pytest.raises(RuntimeError, match=r"hidden_states has 60 columns; the weights have 64"):
        run(narrow)
    monkeypatch.setattr(build, "load", lambda: False)
    with pytest.raises(ValueError, match=r"hidden_states has 60 columns; the weights have 64"):
        run(narrow)


def test_what_the_kernel_cannot_read_is_refused():
    case = make_case(5, 64, 96, 8)
    with pytest.raises(RuntimeError, match=r"expert_ids\[2\] is 8; there are 8 experts"):
        run([case[0], torch.tensor([0, 1, 8, 0, 0]), *case[2:]])
    with pytest.raises(RuntimeError, match="takes float32"):
        run([case[0].bfloat16(), *case[1:]])
    prepare = torch.ops.tomoe.prepare_experts
    with pytest.raises(RuntimeError, match="must have the 64 columns of up"):
        prepare(case[2], None, case[4][:, :60], *case[6:], "silu")
    with pytest.raises(RuntimeError, match=r"up has 100 rows; for the 96 neurons of down"):
        prepare(case[2][:100], None, case[4], *case[6:], "silu")
    with pytest.raises(RuntimeError, match=r"activation is 'tanh'; the CPU kernels have silu, relu, gelu,"):
        prepare(case[2], None, case[4], *case[6:], "tanh")
    with pytest.raises(RuntimeError, match=r"there are 4 expert_ids for 5 tokens"):
        run([case[0], case[1][:4], *case[2:]])


def test_neuron_lists_outside_the_weights_are_refused():
    def change(index, place, value):
        case = make_case(5, 64, 96, 8, has_bias=True)
        case[index][place] = value
        return case

    for place, value in (((2, 0), 96), ((7, 3), -1)):
        message = rf"neuron_ids\[{place[0]}, {place[1]}\] is {value}; there are 96 neurons"
        with pytest.raises(RuntimeError, match=message):
            run(change(6, place, value))
    with pytest.raises(RuntimeError, match=r"neuron_ids\[3\] is not sorted at 5"):
        run(change(6, (3, 5), 0))
    with pytest.raises(RuntimeError, match=r"widths\[1\] is 97; neuron_ids has \d+ columns"):
        run(change(7, 1, 97))
    case = make_case(5, 64, 96, 8, has_bias=True)
    case[3] = case[3].double()
    with pytest.raises(RuntimeError, match="up_bias must be contiguous and float32"):
        run(case)
