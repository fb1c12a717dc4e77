// The MLP of ToMoE on one copy of the weights, float32, for CPUs: tomoe::expert_mlp.
//
// Tokens are sorted by expert (schedule.h); an expert is a list of row numbers, and rows are read where they lie.
// Phase 1 is h = act(gate) * up (up_dot.h; up_transposed.h for experts with many tokens), phase 2 the sums of W_down's rows
// (down.h). Where memory is the limit the experts take turns at blocks of neurons and each row is read once; where
// arithmetic is, the tokens of one expert stay near while its rows pass by. A token alone goes its own way through both
// phases (decode.h).
//
// A token's output does not depend, not even in its last bit, on what else is in the batch, as long as its expert has
// fewer than kLaneTokens tokens there: in lanes, sums over the columns have another order.
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include <omp.h>

#include "../../simd/tensors.h"
#include "decode.h"
#include "registry.h"
#include "up_transposed.h"

namespace tomoe {
namespace {

constexpr int64_t kPassTokens = 1024;     // tokens per pass over the weights: bounds the scratch memory
constexpr int64_t kBlockBytes = 1 << 18;  // weights of a block of phase 1: it and the next are half of a 1 MB L2
constexpr int64_t kLeastRows = 12, kMostRows = 128;  // neurons of such a block,
constexpr int64_t kLeastBlocks = 16;                 // and blocks, so that no thread waits long for the last
// Of many tokens threads claim parts of the neurons. An expert's rows of a part stay in L3 while chunks of its tokens
// come back to them, so there are 8 at least (1b: 5.6 MB each); and 4 a thread, so that none waits long for the last.
constexpr int64_t kLeastParts = 8, kPartsPerThread = 4;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of the calling thread, kept for the next call: it would otherwise be mapped and zeroed each time.
float* scratch(int which, size_t count) {
  thread_local std::unique_ptr<float[], Free> memory[3];
  thread_local size_t sizes[3] = {};
  if (sizes[which] < count) {
    memory[which].reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
    sizes[which] = count;
  }
  return memory[which].get();
}

int64_t block_of(int64_t rows) { return std::clamp(rows, kLeastRows, kMostRows); }

// Many tokens: one expert after the other, a part of its rows at a time.
void up_by_expert(const Problem& p, const Sorted& sorted, const float* columns, float* h, float* local, int64_t block,
                  std::atomic<int64_t>& claimed) {
  const int64_t parts = std::max(kLeastParts, kPartsPerThread * omp_get_num_threads());
  const int64_t part = ceil_div(sorted.touched.size, parts);
  for (int64_t b = claimed++; b < parts; b = claimed++)
    for (const Group& group : sorted.groups) {
      const Rows rows = rows_between(sorted, group.neurons, b * part, (b + 1) * part);
      if (group.is_in_lanes) up_in_lanes(p, group, rows, columns, h);
      else for (int64_t i = rows.begin; i < rows.end; i += block) {
        const Rows now{i, std::min(i + block, rows.end)}, later{now.end, std::min(now.end + block, rows.end)};
        Ahead ahead(p, group.neurons, later, num_tiles(p, group, now.count()));
        up_chunks(p, sorted, group, now, h, local, ahead);
      }
    }
}

// A token alone through both phases.
void run_token(const Problem& p, int64_t expert, int threads) {
  const List neurons{p.ids + expert * p.max_width, p.widths[expert]};
  const int64_t block = block_of(neurons.size / kLeastBlocks);
  float* h = scratch(0, p.max_width);
  std::atomic<int64_t> claimed{0}, claimed_panels{0};
#pragma omp parallel num_threads(threads)
  {
    float* local = scratch(1, block * p.rows_per_neuron);
    for (int64_t i = block * claimed++; i < neurons.size; i = block * claimed++)
      up_of_token(p, neurons.ids + i, std::min(block, neurons.size - i), local, h + i);
#pragma omp barrier
    for (int64_t d = p.panel_columns * claimed_panels++; d < p.depth; d = p.panel_columns * claimed_panels++)
      down_of_token(p, neurons, h, d, std::min(p.panel_columns, p.depth - d));
  }
}

// Tokens [first, first + count) through both phases.
void run_pass(const Problem& p, const int64_t* expert_ids, int64_t first, int64_t count, int threads) {
  const Sorted sorted = sort_tokens(p, expert_ids, first, count);
  for (const Group& group : sorted.groups)
    if (group.neurons.size == 0)  // a rank of tensor parallelism may hold no neuron of an expert
      for (int64_t t = group.first; t < group.first + group.count; ++t)
        std::fill_n(p.out + sorted.order[t] * p.depth, p.depth, 0.0f);
  const bool has_lanes = sorted.most_tokens >= kLaneTokens;
  float* h = scratch(0, count * sorted.max_width);
  float* columns = has_lanes ? scratch(2, count * p.depth) : nullptr;
  const int64_t row_bytes = p.depth * p.rows_per_neuron * static_cast<int64_t>(sizeof(float));
  const int64_t block = block_of(std::min(kBlockBytes / row_bytes, sorted.touched.size / kLeastBlocks));
  std::atomic<int64_t> claimed{0}, claimed_panels{0};
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    float* local = scratch(1, kTokenChunk * block * p.rows_per_neuron);
    if (has_lanes) {
      lay_out_lanes(p, sorted, columns, thread, team);
#pragma omp barrier
    }
    if (sorted.most_tokens >= kManyTokens) up_by_expert(p, sorted, columns, h, local, block, claimed);
    else up_in_turn(p, sorted, h, local, block, claimed);
#pragma omp barrier
    down_in_panels(p, sorted, h, claimed_panels);
  }
}

Activation activation_of(const std::string& name) {
  for (const auto& [known, activation] : kActivations)
    if (name == known) return activation;
  std::string all;
  for (const auto& [known, activation] : kActivations) all += (all.empty() ? "" : ", ") + std::string(known);
  STD_TORCH_CHECK(false, "activation is '", name, "'; the CPU kernels have ", all);
}

// The pointers and sizes of a layer's weights. Everything that the kernels rely on is checked here, once per layer.
Weights weights_of(const Tensor& up, const std::optional<Tensor>& up_bias, const Tensor& down, const Tensor& neuron_ids,
                   const Tensor& widths, const std::string& activation) {
  STD_TORCH_CHECK(up.scalar_type() == ScalarType::Float && down.scalar_type() == ScalarType::Float,
                  "tomoe::prepare_experts takes float32 weights on a CPU");
  const bool is_in_panels = down.dim() == 3;
  STD_TORCH_CHECK(up.dim() == 2 && (is_in_panels || down.dim() == 2),
                  "up must be a matrix, and down a matrix or [F, panels, columns]");
  const int64_t depth = up.size(1), neurons = down.size(0), panel_columns = is_in_panels ? down.size(2) : depth;
  STD_TORCH_CHECK(down.size(1) * (is_in_panels ? panel_columns : 1) == depth, "down must have the ", depth,
                  " columns of up");
  STD_TORCH_CHECK(neurons > 0 && (up.size(0) == neurons || up.size(0) == 2 * neurons), "up has ", up.size(0),
                  " rows; for the ", neurons, " neurons of down it must have one or two for each");
  STD_TORCH_CHECK(up.stride(1) == 1 && down.stride(down.dim() - 1) == 1, "rows of up and down must be contiguous");
  STD_TORCH_CHECK(neuron_ids.is_contiguous() && widths.is_contiguous() && neuron_ids.scalar_type() == ScalarType::Int &&
                      widths.scalar_type() == ScalarType::Int,
                  "neuron_ids and widths must be contiguous and int32");
  STD_TORCH_CHECK(neuron_ids.dim() == 2 && widths.numel() == neuron_ids.size(0),
                  "neuron_ids must be a matrix with a row for each of widths");
  STD_TORCH_CHECK(!up_bias || (up_bias->scalar_type() == ScalarType::Float && up_bias->is_contiguous() &&
                               up_bias->numel() == up.size(0)),
                  "up_bias must be contiguous and float32, with one value for each row of up");
  STD_TORCH_CHECK(depth <= kMaxSlice * kMaxSlices, "the CPU kernels take up to ", kMaxSlice * kMaxSlices, " columns");
  Weights w;
  w.up = data_of<const float>(up);
  w.up_bias = up_bias.has_value() ? data_of<const float>(*up_bias) : nullptr;
  w.down = data_of<const float>(down);
  w.ids = data_of<const int32_t>(neuron_ids);
  w.widths = data_of<const int32_t>(widths);
  w.depth = depth;
  w.neurons = neurons;
  w.experts = neuron_ids.size(0);
  w.max_width = neuron_ids.size(1);
  w.up_stride = up.stride(0);
  w.down_stride = down.stride(0);
  w.panel_columns = is_in_panels ? panel_columns : kPanelColumns;
  w.panel_stride = is_in_panels ? down.stride(1) : kPanelColumns;
  w.rows_per_neuron = static_cast<int>(up.size(0) / neurons);
  w.activation = activation_of(activation);
  for (int64_t e = 0; e < w.experts; ++e) {
    const List list{w.ids + e * w.max_width, w.widths[e]};
    STD_TORCH_CHECK(list.size >= 0 && list.size <= w.max_width, "widths[", e, "] is ", list.size, "; neuron_ids has ",
                    w.max_width, " columns");
    for (int64_t i = 0; i < list.size; ++i)
      STD_TORCH_CHECK(list.ids[i] >= 0 && list.ids[i] < w.neurons, "neuron_ids[", e, ", ", i, "] is ", list.ids[i],
                      "; there are ", w.neurons, " neurons");
  }
  return w;
}

Tensor run(const Tensor& hidden_states, const Tensor& expert_ids, const Weights& weights) {
  STD_TORCH_CHECK(hidden_states.scalar_type() == ScalarType::Float,
                  "tomoe::prepared_expert_mlp takes float32; hidden_states must be such");
  STD_TORCH_CHECK(hidden_states.dim() == 2, "tomoe::prepared_expert_mlp takes hidden_states as a matrix");
  STD_TORCH_CHECK(hidden_states.size(1) == weights.depth, "hidden_states has ", hidden_states.size(1),
                  " columns; the weights have ", weights.depth);
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long && expert_ids.is_contiguous(),
                  "expert_ids must be contiguous and int64");
  const int64_t tokens = hidden_states.size(0);
  STD_TORCH_CHECK(expert_ids.numel() == tokens, "there are ", expert_ids.numel(), " expert_ids for ", tokens, " tokens");
  const auto* ids = data_of<const int64_t>(expert_ids);
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < weights.experts, "expert_ids[", t, "] is ", ids[t], "; there are ",
                    weights.experts, " experts");
  const Tensor x = as_contiguous(hidden_states), out = empty({tokens, weights.depth}, aoti_torch_dtype_float32());
  const Problem p{weights, data_of<const float>(x), data_of<float>(out)};
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  if (tokens == 1) run_token(p, ids[0], threads);
  else for (int64_t first = 0; first < tokens; first += kPassTokens)
    run_pass(p, ids, first, std::min(kPassTokens, tokens - first), threads);
  return out;
}

Tensor prepare_experts(Tensor up, std::optional<Tensor> up_bias, Tensor down, Tensor neuron_ids, Tensor widths,
                       std::string activation) {
  const Weights weights = weights_of(up, up_bias, down, neuron_ids, widths, activation);
  const auto prepared = std::make_shared<Prepared>();
  prepared->weights = weights;
  prepared->neuron_ids.assign(weights.ids, weights.ids + neuron_ids.numel());
  prepared->widths.assign(weights.widths, weights.widths + widths.numel());
  prepared->weights.ids = prepared->neuron_ids.data();
  prepared->weights.widths = prepared->widths.data();
  prepared->memory = {OwnedMemory(up), OwnedMemory(down)};
  if (up_bias) prepared->memory.emplace_back(*up_bias);
  return registry().add(prepared);
}

Tensor prepared_expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor handle) {
  const std::shared_ptr<const Prepared> prepared = registry().find(handle);  // not freed before the call ends
  prepared->check_memory();
  return run(hidden_states, expert_ids, prepared->weights);
}

void release_experts(Tensor handle) { registry().remove(handle); }

}  // namespace
}  // namespace tomoe

STABLE_TORCH_LIBRARY_IMPL(tomoe, CPU, m) {
  m.impl("prepare_experts", TORCH_BOX(&tomoe::prepare_experts));
  m.impl("prepared_expert_mlp", TORCH_BOX(&tomoe::prepared_expert_mlp));
  m.impl("release_experts", TORCH_BOX(&tomoe::release_experts));
}
