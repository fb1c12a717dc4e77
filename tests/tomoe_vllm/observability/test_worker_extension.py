"""The observer on the real class of vLLM's Model Runner V2, which is the default on CUDA and never runs on a CPU.

``execute_model`` and all that it calls for requests and batches is vLLM's code. What needs a GPU is replaced: the three
Triton kernels that fill a step's inputs, the KV cache, and the choice of a CUDA graph, which here only pads.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.states import RequestState

from tests.helpers.tiny_models import NUM_EXPERTS, VOCAB_SIZE, tiny_config
from tomoe_vllm.layers.mlp import router
from tomoe_vllm.layers.mlp.router import STATISTICS_SETTING, ToMoERouter
from tomoe_vllm.observability.worker_extension import ExpertObserver

LAYERS, MAX_TOKENS, PADDING = 3, 64, 8
CPU = torch.device("cpu")


@pytest.fixture
def vllm_config(monkeypatch):
    monkeypatch.setattr(router, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(router, "get_tensor_model_parallel_world_size", lambda: 1)
    config = VllmConfig(additional_config={STATISTICS_SETTING: True})
    config.scheduler_config.max_num_batched_tokens = MAX_TOKENS
    with set_current_vllm_config(config):
        yield config


class Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.expert_gate = ToMoERouter(tiny_config("llama"), layer_idx, f"model.layers.{layer_idx}.mlp.expert_gate")
        torch.nn.init.normal_(self.expert_gate.router.weight, generator=torch.Generator().manual_seed(layer_idx))

    def step_path(self, num_tokens: int) -> str:
        return f"padded to {num_tokens}"


class Model(nn.Module):
    """Embeddings and routers. The expert of a token depends on its id alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 128)
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
        self.is_last_stage = True

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        hidden_states = self.embedding(input_ids)
        for layer in self.layers:
            layer.expert_gate(hidden_states)
        return hidden_states if self.is_last_stage else IntermediateTensors({"hidden_states": hidden_states})

    def experts(self, token_ids: list[int]) -> np.ndarray:
        """Expected experts, [T, L]."""
        hidden_states = self.embedding.weight.detach()[token_ids].double()
        routers = [layer.expert_gate.router.weight.detach().double() for layer in self.layers]
        return torch.stack([(hidden_states @ router.T).argmax(-1) for router in routers], dim=1).numpy()


class Runner:
    """Drives one observed runner of the real class. ``texts``: token ids of each request, prompt and output."""

    def __init__(self, monkeypatch, vllm_config) -> None:
        self.texts: dict[str, list[int]] = {}
        self.model = Model()
        self.runner = runner = v2.GPUModelRunner.__new__(v2.GPUModelRunner)
        monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
        states = RequestState(8, 256, MAX_TOKENS, 0, VOCAB_SIZE, CPU)
        monkeypatch.setattr(states, "apply_staged_writes", lambda: None)
        nothing = SimpleNamespace(**dict.fromkeys(NOT_ON_A_CPU, lambda *args, **kwargs: None))
        without_forward = SimpleNamespace(
            no_forward=lambda output: SimpleNamespace(ec_connector_output=None), pre_forward=nothing.pre_forward,
            finish_forward=nothing.finish_forward,
        )  # fmt: skip
        model_state = SimpleNamespace(
            prepare_attn=lambda *args, **kwargs: None,
            prepare_inputs=lambda batch, states: {},
            preprocess_state=nothing.preprocess_state,
            add_request=nothing.add_request,
            remove_request=nothing.remove_request,
            apply_staged_writes=nothing.apply_staged_writes,
            num_new_sampled_tokens_per_step=1,
        )
        vars(runner).update(
            vllm_config=vllm_config, model=self.model, req_states=states, device=CPU, max_num_reqs=8,
            input_buffers=InputBuffers(8, MAX_TOKENS, CPU), execute_model_state=None, model_state=model_state,
            kv_connector=without_forward, ec_connector=without_forward, block_tables=nothing, lora_state=nothing,
            eplb=nothing, step_timing=nothing, sampler=nothing, prompt_logprobs_worker=nothing, kv_cache_config=None,
            attn_groups=[], model_config=SimpleNamespace(rswa_window=None),
            observability_config=SimpleNamespace(cudagraph_metrics=False), parallel_config=vllm_config.parallel_config,
            cudagraph_manager=SimpleNamespace(dispatch=self._pad), decode_query_len=1,
            is_first_pp_rank=True, is_last_pp_rank=True, use_pp=False, dcp_size=1,
            is_encoder_decoder=False, uses_inputs_embeds=False, use_aux_hidden_state_outputs=False,
            **dict.fromkeys(
                ("pooling_runner", "pp_handler", "encoder_cache", "adaptive_verification", "aux_output_connector",
                 "pcp_manager", "lora_config", "ubatch_runner", "fast_prefill")
            ),
        )  # fmt: skip
        monkeypatch.setattr(type(runner), "dp_size", 1)
        monkeypatch.setattr(type(runner), "dp_rank", 0)
        monkeypatch.setattr(runner, "prepare_attn", lambda batch: ((), ()))
        monkeypatch.setattr(runner, "_merge_ec_connector_no_forward", lambda so, output: "no tokens")
        monkeypatch.setattr(v2, "build_slot_mappings_by_layer", lambda *args: {})
        monkeypatch.setattr(v2, "prepare_prefill_inputs", lambda *args: None)
        monkeypatch.setattr(v2, "prepare_pos_seq_lens", lambda *args: None)
        monkeypatch.setattr(v2, "combine_sampled_and_draft_tokens", self._fill_input_ids)
        self.observer = ExpertObserver(runner, vllm_config)

    @staticmethod
    def _pad(num_reqs, num_tokens, *args, **kwargs) -> BatchExecutionDescriptor:
        padded = -(-num_tokens // PADDING) * PADDING
        return BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=padded, num_reqs=None)

    def _fill_input_ids(self, input_ids, idx_mapping, last_sampled, query_start_loc, *args) -> None:
        input_ids.fill_(1)
        for row, index in enumerate(idx_mapping.tolist()):
            start, end = query_start_loc[row : row + 2].tolist()
            position = int(self.runner.req_states.num_computed_tokens_np[index])
            text = self.texts[self.runner.req_states.index_to_req_id[index]]
            input_ids[start:end] = torch.tensor(text[position : position + end - start])

    def step(self, *, new=(), running=(), tokens=None, finished=(), preempted=(), **arguments):
        """One step. ``new``: (name, trace id, computed tokens); ``running``: (name, position); ``tokens``: by name."""
        tokens = tokens or {}
        cached = CachedRequestData.make_empty()
        cached.req_ids = [name for name, _ in running]
        cached.num_computed_tokens = [position for _, position in running]
        cached.new_block_ids = [None] * len(cached.req_ids)
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = [self._new(*request) for request in new]
        output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens, output.total_num_scheduled_tokens = tokens, sum(tokens.values())
        output.finished_req_ids, output.preempted_req_ids = set(finished), set(preempted)
        result = self.runner.execute_model(output, **arguments)
        self.runner.execute_model_state = None  # as sample_tokens does
        return result

    def _new(self, name: str, trace_id: str | None, num_computed: int) -> NewRequestData:
        extra = {"tomoe_trace": trace_id} if trace_id else None
        text = self.texts[name]
        return NewRequestData(
            req_id=name, prompt_token_ids=text[:4], prefill_token_ids=text, mm_features=[], pooling_params=None,
            sampling_params=SamplingParams(max_tokens=8, extra_args=extra), block_ids=([],), lora_request=None,
            num_computed_tokens=num_computed,
        )  # fmt: skip

    def counts(self):
        self.observer.recorder.count_pending()
        return self.observer.recorder.counts

    def expected(self, computed: dict[str, range]) -> np.ndarray:
        """Tokens per layer and expert, [L, N], if the positions of ``computed`` ran."""
        token_ids = [self.texts[name][position] for name, positions in computed.items() for position in positions]
        experts = self.model.experts(token_ids)
        return np.stack([np.bincount(experts[:, i], minlength=NUM_EXPERTS) for i in range(LAYERS)])


NOT_ON_A_CPU = (
    "apply_staged_writes", "append_block_ids", "add_request", "remove_request", "prepare_forward", "record_batch",
    "forward_start", "pre_forward", "finish_forward", "preprocess_state",
)  # fmt: skip
"""Methods of a runner's parts that are replaced by nothing."""


@pytest.fixture
def runner(monkeypatch, vllm_config):
    runner = Runner(monkeypatch, vllm_config)
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        runner.texts[name] = torch.randint(2, VOCAB_SIZE, (30,), generator=generator).tolist()
    return runner


def test_the_class_has_no_batch_of_its_own():
    assert not hasattr(v2.GPUModelRunner, "input_batch")


def test_a_step_without_tokens_after_the_last_request_is_observed(runner):
    runner.step(new=[("a", "t", 0)], tokens={"a": 4})
    assert runner.step(finished=["a"]) == "no tokens"
    assert runner.observer.traces.get("t").is_finished
    assert (runner.counts().num_steps, runner.counts().num_tokens) == (1, 4)


def test_a_first_step_without_tokens_is_observed(runner):
    assert runner.step() == "no tokens"
    assert runner.counts().num_steps == 0


def test_counts_and_traces_follow_the_order_of_the_batch_and_leave_out_its_padding(runner):
    # the runner sorts decodes before prefills, and short prefills before long ones
    runner.step(new=[("a", "ta", 0), ("b", "tb", 0)], tokens={"a": 7, "b": 4})
    runner.step(new=[("c", "tc", 2)], running=[("a", 7), ("b", 4)], tokens={"c": 5, "a": 1, "b": 1})
    runner.step(running=[("a", 8), ("b", 5), ("c", 7)], tokens={"a": 1, "b": 1, "c": 1})
    counts = runner.counts()
    computed = {"a": range(9), "b": range(6), "c": range(2, 8)}
    np.testing.assert_array_equal(counts.tokens, runner.expected(computed))
    assert (counts.num_steps, counts.num_tokens) == (3, 21)
    assert counts.step_paths == {"padded to 16": 1, "padded to 8": 2}
    for name, positions in computed.items():
        trace = runner.observer.traces.get(f"t{name}")
        assert (trace.num_cached_tokens, trace.num_tokens) == (positions.start, positions.stop)
        expected = runner.model.experts([runner.texts[name][position] for position in positions])
        np.testing.assert_array_equal(trace.experts[positions.start : positions.stop], expected)


def test_a_preempted_request_comes_back_as_a_new_one_and_its_trace_goes_on(runner):
    runner.step(new=[("a", "t", 0), ("b", None, 0)], tokens={"a": 4, "b": 4})
    runner.step(running=[("b", 4)], tokens={"b": 1}, preempted=["a"])
    assert not runner.observer.traces.get("t").is_finished
    runner.step(new=[("a", "t", 0)], running=[("b", 5)], tokens={"a": 6, "b": 1})
    assert runner.counts().num_tokens == 8 + 1 + 7
    trace = runner.observer.traces.get("t")
    assert trace.num_tokens == 6
    np.testing.assert_array_equal(trace.experts[:6], runner.model.experts(runner.texts["a"][:6]))


def test_a_pipeline_stage_that_does_not_sample_is_counted(runner):
    runner.runner.is_last_pp_rank = runner.model.is_last_stage = False
    runner.runner.pp_handler = SimpleNamespace(
        get_prev_sampled_outputs=lambda draft: None,
        relay_aux_hidden_states=lambda received, output: output,
        on_req_idx_freed=lambda index: None,
    )
    result = runner.step(new=[("a", None, 0)], tokens={"a": 4})
    assert isinstance(result, IntermediateTensors)
    np.testing.assert_array_equal(runner.counts().tokens, runner.expected({"a": range(4)}))


def test_dummy_runs_are_not_counted(runner):
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"x": 4}, 4
    runner.runner.execute_model(output, dummy_run=True, skip_attn_for_dummy_run=True, is_profile=True)
    assert runner.counts().num_steps == 0
