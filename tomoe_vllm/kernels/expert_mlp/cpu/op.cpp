// tomoe::prepared_expert_mlp on CPUs: the MLP of ToMoE on one copy of the weights.
//
// Scope: float32 weights and activations, float32 sums; AVX-512, AVX2 or the compiler's portable vectors. An expert is
// a list of neurons, and rows of the weights are read in place, without a copy.
//
// Accuracy: relative RMS error below 1e-5 of the masked form in float64 (tests/tomoe_vllm/kernels/expert_mlp). A
// token's result does not depend, bit for bit, on the other tokens of its batch or on the number of threads, as long as
// its expert has fewer than kTransposedTokens tokens there: transposed sums have another order.
//
// The loops and the regimes by number of tokens: kernels/README.md; the constants: simd/tuning.h.
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include <omp.h>

#include "down.h"
#include "up.h"

namespace tomoe {
namespace {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};

enum Scratch { kHidden, kSums, kPacked, kNumScratch };

// Memory of the calling thread, kept for the next call: new memory would be mapped and zeroed each time.
float* scratch(Scratch which, size_t count) {
  thread_local std::unique_ptr<float[], FreeMemory> memory[kNumScratch];
  thread_local size_t sizes[kNumScratch] = {};
  if (sizes[which] < count) {
    memory[which].reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
    sizes[which] = count;
  }
  return memory[which].get();
}

int64_t clamp_block(int64_t neurons) { return std::clamp(neurons, kMinUpBlockNeurons, kMaxUpBlockNeurons); }

// Both phases for a single token: no schedule, no reuse of weights. Its time is that of reading memory and of code and
// tables that are in no cache, so both are kept small.
void run_token(const ExpertMlpArgs& p, int64_t expert, int threads) {
  const NeuronList neurons = neurons_of(p, expert);
  const int64_t block = clamp_block(neurons.size / kMinUpBlocks);
  float* h = scratch(kHidden, p.max_width);
  std::atomic<int64_t> next_block{0}, next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    float* local = scratch(kSums, block * p.rows_per_neuron);
    for (int64_t i = block * next_block++; i < neurons.size; i = block * next_block++)
      up_of_token(p, neurons.ids + i, std::min(block, neurons.size - i), local, h + i);
#pragma omp barrier
    for (int64_t d = p.panel_columns * next_panel++; d < p.depth; d = p.panel_columns * next_panel++)
      down_of_token(p, neurons, h, d, std::min(p.panel_columns, p.depth - d));
  }
}

// Both phases for tokens [first, first + count).
void run_pass(const ExpertMlpArgs& p, const int64_t* expert_ids, int64_t first, int64_t count, int threads) {
  const TokenSchedule schedule = schedule_tokens(p, expert_ids, first, count);
  for (const TokenGroup& group : schedule.groups)
    if (group.neurons.size == 0)  // a rank of tensor parallelism may hold no neuron of an expert
      for (int64_t t = group.first; t < group.first + group.count; ++t)
        std::fill_n(p.out + schedule.order[t] * p.depth, p.depth, 0.0f);
  const bool has_transposed = schedule.max_tokens >= kTransposedTokens;
  float* h = scratch(kHidden, count * schedule.max_width);
  float* packed = has_transposed ? scratch(kPacked, count * p.depth) : nullptr;
  const int64_t neuron_bytes = p.depth * p.rows_per_neuron * static_cast<int64_t>(sizeof(float));
  const int64_t block = clamp_block(std::min(kUpBlockBytes / neuron_bytes, schedule.touched.size / kMinUpBlocks));
  std::atomic<int64_t> next_block{0}, next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    float* local = scratch(kSums, kUpTokens * block * p.rows_per_neuron);
    if (has_transposed) {
      pack_transposed(p, schedule, packed, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    }
    if (schedule.max_tokens >= kExpertMajorTokens) up_expert_major(p, schedule, packed, h, local, block, next_block);
    else up_neuron_major(p, schedule, h, local, block, next_block);
#pragma omp barrier
    down_panels(p, schedule, h, next_panel);
  }
}

Tensor prepared_expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor handle) {
  const std::shared_ptr<const Prepared> prepared = registry().find(handle);  // not freed before the call ends
  const Weights& weights = prepared->weights();
  STD_TORCH_CHECK(hidden_states.scalar_type() == ScalarType::Float && hidden_states.dim() == 2,
                  "tomoe::prepared_expert_mlp takes float32 hidden_states [T, D]");
  STD_TORCH_CHECK(hidden_states.size(1) == weights.depth, "hidden_states has ", hidden_states.size(1),
                  " columns; the weights have ", weights.depth);
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long && expert_ids.is_contiguous(),
                  "expert_ids must be contiguous and int64");
  const int64_t tokens = hidden_states.size(0);
  STD_TORCH_CHECK(expert_ids.numel() == tokens, "there are ", expert_ids.numel(), " expert_ids for ", tokens,
                  " tokens");
  const auto* ids = data_of<const int64_t>(expert_ids);
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < weights.experts, "expert_ids[", t, "] is ", ids[t], "; there are ",
                    weights.experts, " experts");
  const Tensor x = as_contiguous(hidden_states), out = empty({tokens, weights.depth}, aoti_torch_dtype_float32());
  const ExpertMlpArgs args{weights, data_of<const float>(x), data_of<float>(out)};
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  if (tokens == 1) run_token(args, ids[0], threads);
  else
    for (int64_t first = 0; first < tokens; first += kPassTokens)
      run_pass(args, ids, first, std::min(kPassTokens, tokens - first), threads);
  return out;
}

Tensor prepare_experts(Tensor up, std::optional<Tensor> up_bias, Tensor down, Tensor neuron_ids, Tensor widths,
                       std::string activation) {
  return registry().add(std::make_shared<const Prepared>(up, up_bias, down, neuron_ids, widths, activation));
}

void release_experts(Tensor handle) { registry().remove(handle); }

}  // namespace
}  // namespace tomoe

STABLE_TORCH_LIBRARY_IMPL(tomoe, CPU, m) {
  m.impl("prepare_experts", TORCH_BOX(&tomoe::prepare_experts));
  m.impl("prepared_expert_mlp", TORCH_BOX(&tomoe::prepared_expert_mlp));
  m.impl("release_experts", TORCH_BOX(&tomoe::release_experts));
}
