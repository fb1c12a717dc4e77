"""Expert counts and traces of an engine against the Hugging Face reference, token by token."""

import numpy as np
import pytest

from tests.helpers.routes import expert_counts, reference_routes
from tests.helpers.tiny_models import NUM_EXPERTS, UNUSED_EXPERT, save_tiny_model
from tests.parity.conftest import make_prompts, start_engine
from tomoe_vllm.hf.tomoe_math import unpack_signature
from tomoe_vllm.kernels import build
from tomoe_vllm.observability.expert_statistics import UNION_STEPS
from tomoe_vllm.observability.expert_traces import NOT_COMPUTED

pytestmark = pytest.mark.engine

STATISTICS = {
    "worker_extension_cls": "tomoe_vllm.observability.worker_extension.ExpertExtension",
    "additional_config": {"tomoe_expert_statistics": True},
}
LENGTHS = (1, 40, 90, 17, 64, 33, 120, 5, 80)


def generate(engine, prompts, *, num_tokens=12, name: str | None = "trace") -> list[list[int]]:
    """Greedy tokens of all prompts in one batch. Request i has the trace id "<name>-i", or none without a name."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"tomoe_trace": f"{name}-{i}"} if name else None,
        )
        for i in range(len(prompts))
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def start(engine) -> list[str | None]:
    return engine.llm.collective_rpc("tomoe_start_experts")


def counts(engine) -> dict:
    return engine.llm.collective_rpc("tomoe_expert_counts")[0]


def trace(engine, trace_id: str, start: int = 0) -> dict | None:
    answer = engine.llm.collective_rpc("tomoe_expert_trace", args=(trace_id, start))[0]
    if answer is None:
        return None
    rows = np.frombuffer(answer["experts"], dtype=np.uint8).reshape(-1, answer["num_layers"])
    return answer | {"experts": rows}


def routes_of(model, prompts, tokens) -> list[np.ndarray]:
    """Expected experts of all computed tokens. The last generated token is never computed."""
    return [reference_routes(model, p + t[:-1]) for p, t in zip(prompts, tokens, strict=True)]


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A model and an engine with chunked prefill and prefix caching."""
    folder = tmp_path_factory.mktemp("model")
    model = save_tiny_model(folder, "llama")
    with start_engine(
        folder, enable_chunked_prefill=True, max_num_batched_tokens=32, enable_prefix_caching=True, **STATISTICS
    ) as engine:
        assert start(engine) == [None]
        yield model, engine


def test_warm_up_is_not_counted(chunked):
    assert counts(chunked[1])["num_tokens"] == 0


def test_every_token_of_a_chunked_batch_has_the_experts_of_the_reference(chunked):
    model, engine = chunked
    prompts = make_prompts(96, lengths=LENGTHS)
    before = np.array(counts(engine)["tokens"])
    tokens = generate(engine, prompts)
    routes = routes_of(model, prompts, tokens)
    for i, (prompt, expected) in enumerate(zip(prompts, routes, strict=True)):
        found = trace(engine, f"trace-{i}")
        assert found["num_prompt_tokens"] == len(prompt)
        assert found["num_cached_tokens"] == 0
        np.testing.assert_array_equal(found["experts"], expected)
    answer = counts(engine)
    found = np.array(answer["tokens"]) - before
    np.testing.assert_array_equal(found, expert_counts(routes, NUM_EXPERTS))
    assert found[:, UNUSED_EXPERT].sum() == 0
    assert sum(answer["step_paths"].values()) == answer["num_steps"] > len(LENGTHS)
    if build.compiler() is not None:
        assert set(answer["step_paths"]) == {"shared_rows"}


def test_tokens_from_the_prefix_cache_are_marked_as_not_computed(chunked):
    model, engine = chunked
    (first,) = make_prompts(96, lengths=(200,), seed=11)  # vLLM's blocks on CPUs have 128 tokens
    second = first[:180] + make_prompts(96, lengths=(20,), seed=12)[0]
    generate(engine, [first], name=None)
    before = counts(engine)["num_tokens"]
    tokens = generate(engine, [second], name="cached")
    found = trace(engine, "cached-0")
    cached = found["num_cached_tokens"]
    assert 0 < cached <= 180
    assert (found["experts"][:cached] == NOT_COMPUTED).all()
    (expected,) = routes_of(model, [second], tokens)
    np.testing.assert_array_equal(found["experts"][cached:], expected[cached:])
    assert counts(engine)["num_tokens"] - before == len(expected) - cached


def test_reloaded_masks_and_routers_are_counted(chunked, tmp_path):
    model, engine = chunked
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    model.save_pretrained(tmp_path / "same")
    prompts = make_prompts(96, lengths=(9,), seed=13)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "other")})
    engine.llm.reset_prefix_cache()
    before = counts(engine)
    tokens = generate(engine, prompts, name="reloaded")
    after = counts(engine)
    (routes,) = routes_of(other, prompts, tokens)
    found = np.array(after["tokens"]) - np.array(before["tokens"])
    np.testing.assert_array_equal(found, expert_counts([routes], NUM_EXPERTS))
    expected = np.array(before["union_neurons"])
    masks = [unpack_signature(layer.mlp.expert_gate.signature, NUM_EXPERTS) for layer in other.model.layers]
    for i, step in enumerate([routes[:9], *routes[9:, None]]):
        unions = [int(masks[layer][np.unique(step[:, layer]).astype(int)].any(dim=0).sum()) for layer in range(3)]
        expected += (np.array(unions) - expected) / min(before["num_steps"] + i + 1, UNION_STEPS)
    np.testing.assert_allclose(after["union_neurons"], expected)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "same")})
    engine.llm.reset_prefix_cache()


def test_a_trace_id_belongs_to_its_first_request(chunked):
    _, engine = chunked
    prompts = make_prompts(96, lengths=(7, 9), seed=14)
    generate(engine, prompts[:1], name="twice")
    generate(engine, prompts[1:], name="twice")
    assert trace(engine, "twice-0")["num_prompt_tokens"] == 7
    assert trace(engine, "twice-0")["is_finished"]


def test_a_trace_can_be_read_from_a_position_on(chunked):
    _, engine = chunked
    whole = trace(engine, "trace-1")["experts"]
    np.testing.assert_array_equal(trace(engine, "trace-1", start=45)["experts"], whole[45:])
    assert trace(engine, "unknown id") is None


def test_union_of_one_step_covers_the_experts_of_its_tokens(tmp_path):
    model = save_tiny_model(tmp_path, "llama", seed=3)
    prompts = make_prompts(96, lengths=(50,))
    with start_engine(tmp_path, **STATISTICS) as engine:
        start(engine)
        generate(engine, prompts, num_tokens=1)
        answer = counts(engine)
    assert answer["num_steps"] == 1
    (routes,) = [reference_routes(model, prompts[0])]
    for layer_idx, layer in enumerate(model.model.layers):
        masks = unpack_signature(layer.mlp.expert_gate.signature, NUM_EXPERTS)
        used = sorted(set(routes[:, layer_idx].tolist()))
        assert answer["union_neurons"][layer_idx] == int(masks[used].any(dim=0).sum())


@pytest.mark.parametrize(
    ("family", "layout", "path"),
    [("phi", "masked", "masked"), pytest.param("qwen3", "fused", "fused", marks=pytest.mark.slow)],
)
def test_other_layouts_count_the_same(tmp_path, family, layout, path):
    model = save_tiny_model(tmp_path, family)
    prompts = make_prompts(96, lengths=(3, 20))
    with start_engine(tmp_path, hf_overrides={"expert_layout": layout}, **STATISTICS) as engine:
        start(engine)
        routes = routes_of(model, prompts, generate(engine, prompts))
        answer = counts(engine)
        np.testing.assert_array_equal(trace(engine, "trace-1")["experts"], routes[1])
    np.testing.assert_array_equal(answer["tokens"], expert_counts(routes, NUM_EXPERTS))
    assert set(answer["step_paths"]) == {path}


def test_statistics_are_off_by_default(tmp_path):
    save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path, worker_extension_cls=STATISTICS["worker_extension_cls"]) as engine:
        assert engine.inspect(lambda model: model.model.layers[0].mlp.expert_gate.record) is None
        (reason,) = start(engine)
        assert "--additional-config '{\"tomoe_expert_statistics\": true}'" in reason


@pytest.mark.slow
def test_two_ranks_report_equal_routes_and_split_the_neurons(tmp_path):
    model = save_tiny_model(tmp_path, "llama")
    prompts = make_prompts(96, lengths=(3, 20))
    with start_engine(tmp_path, tensor_parallel_size=2, **STATISTICS) as engine:
        assert start(engine) == [None, None]
        routes = routes_of(model, prompts, generate(engine, prompts))
        answers = engine.llm.collective_rpc("tomoe_expert_counts")
    for answer in answers:
        np.testing.assert_array_equal(answer["tokens"], expert_counts(routes, NUM_EXPERTS))
    assert [answer["tensor_parallel_rank"] for answer in answers] == [0, 1]
    assert sum(answer["num_neurons"] for answer in answers) == 96


@pytest.mark.slow
def test_compiled_model_records_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", "llama")
    prompts = make_prompts(96, lengths=(3, 20, 50))
    with start_engine(tmp_path / "model", enforce_eager=False, **STATISTICS) as engine:
        assert start(engine) == [None]
        routes = routes_of(model, prompts, generate(engine, prompts))
        found = [trace(engine, f"trace-{i}")["experts"] for i in range(len(prompts))]
        answer = counts(engine)
    for rows, expected in zip(found, routes, strict=True):
        np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(answer["tokens"], expert_counts(routes, NUM_EXPERTS))
