// The MLP of ToMoE on one copy of the weights, float32, for CPUs: tomoe::expert_mlp.
//
// Tokens are sorted by expert; an expert is a list of row numbers, and rows are read where they lie. Phase 1 walks
// blocks of neurons: h = act(gate) * up, [T, widest expert]. Phase 2 splits the output's columns among the threads
// and walks blocks of W_down's rows. In both, the experts that have tokens take their rows of a block one after the
// other, while it is near, so memory is read once; and rows of the next block are fetched at an even pace meanwhile,
// so that memory works as long as the arithmetic does. That serves one token and a thousand alike.
//
// Every sum has one order, whatever the number of tokens, of threads and the path: a token's output does not
// depend, not even in its last bit, on what else is in the batch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <omp.h>

#include "../dot_tile.h"

namespace tomoe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxSlice = 2048;       // columns of x and weights at a time where tokens are many: 8 KB a row
constexpr int64_t kBlockBytes = 1 << 18;  // weights of a block of phase 1: it and the next are half of a 1 MB L2
constexpr int64_t kDownRows = 64;         // neurons of a block of phase 2: 256 B of each, 16 KB, stay in L1
constexpr int64_t kTokenChunk = 32;       // tokens of one expert at a time in phase 1: 256 KB of x beside a block
constexpr int64_t kPassTokens = 1024;     // tokens per pass over the weights: bounds the scratch memory
constexpr int64_t kRowByRowTokens = 8;    // up to so many tokens of an expert phase 1 takes whole rows
constexpr int kMaxNext = 16;    // rows that a tile may fetch: one token's tiles, the fewest, ask for 6 to 12
constexpr int kMaxSlices = 32;  // 65,536 columns

struct Problem {
  const float* x;           // [T, D]
  const float* up;          // [2F, D], gate first, or [F, D]
  const float* up_bias;     // [2F] or [F], or null
  const float* down;        // [F, D], rows down_stride apart
  const int32_t* ids;       // [N, max_width], sorted
  const int32_t* widths;    // [N]
  float* out;               // [T, D]
  int64_t depth, neurons, experts, max_width, down_stride;
  int rows_per_neuron;      // 2 with a gate
  int64_t slice;            // columns at a time in phase 1
  Activation activation;
};

struct List {  // of neurons, sorted
  const int32_t* ids;
  int64_t size;
};

struct Group {  // the tokens of one expert
  int64_t first, count;  // of the sorted tokens
  List neurons;
};

struct Sorted {
  std::vector<int64_t> order;  // of each sorted token: its row in x
  std::vector<Group> groups;
  std::vector<int32_t> in_union;
  List touched;  // the neurons that any token needs
  int64_t max_width = 0;
};

struct Rows {  // entries [begin, end) of a list that fall into a block of neurons
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

inline Rows rows_in_block(const List& list, int64_t first, int64_t last) {
  const int32_t* end = list.ids + list.size;
  const int32_t* a = std::lower_bound(list.ids, end, static_cast<int32_t>(first));
  return {a - list.ids, std::lower_bound(a, end, static_cast<int32_t>(last)) - list.ids};
}

// Stable counting sort of tokens [first, first + count) by expert.
Sorted sort_tokens(const Problem& p, const int64_t* expert_ids, int64_t first, int64_t count) {
  Sorted sorted;
  std::vector<int64_t> starts(p.experts + 1);
  for (int64_t t = 0; t < count; ++t) ++starts[expert_ids[first + t] + 1];
  for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
  sorted.order.resize(count);
  std::vector<int64_t> next(starts);
  for (int64_t t = 0; t < count; ++t) sorted.order[next[expert_ids[first + t]]++] = first + t;
  for (int64_t e = 0; e < p.experts; ++e) {
    if (starts[e + 1] == starts[e]) continue;
    sorted.groups.push_back({starts[e], starts[e + 1] - starts[e], {p.ids + e * p.max_width, p.widths[e]}});
    sorted.max_width = std::max<int64_t>(sorted.max_width, p.widths[e]);
  }
  sorted.touched = sorted.groups.front().neurons;
  if (sorted.groups.size() > 1) {
    std::vector<uint8_t> is_touched(p.neurons);
    for (const Group& group : sorted.groups)
      for (int64_t i = 0; i < group.neurons.size; ++i) is_touched[group.neurons.ids[i]] = 1;
    sorted.in_union.resize(p.neurons);
    int64_t size = 0;
    for (int64_t n = 0; n < p.neurons; ++n) {
      sorted.in_union[size] = static_cast<int32_t>(n);
      size += is_touched[n];
    }
    sorted.touched = {sorted.in_union.data(), size};
  }
  return sorted;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------- phase 1
template <Activation A>
void activate_rows(const Problem& p, const int32_t* ids, const float* projected, int64_t count, int64_t up_offset,
                   float* h) {
  const bool is_gated = p.rows_per_neuron == 2;
  if (p.up_bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float gate = activate<A>(projected[i] + p.up_bias[ids[i]]);
      h[i] = is_gated ? gate * (projected[up_offset + i] + p.up_bias[p.neurons + ids[i]]) : gate;
    }
  } else if (is_gated) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]) * projected[up_offset + i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]);
  }
}

void activate_rows(const Problem& p, const int32_t* ids, const float* projected, int64_t count, int64_t up_offset,
                   float* h) {
  switch (p.activation) {
    case Activation::kSilu: return activate_rows<Activation::kSilu>(p, ids, projected, count, up_offset, h);
    case Activation::kRelu: return activate_rows<Activation::kRelu>(p, ids, projected, count, up_offset, h);
    case Activation::kGelu: return activate_rows<Activation::kGelu>(p, ids, projected, count, up_offset, h);
    case Activation::kGeluTanh: return activate_rows<Activation::kGeluTanh>(p, ids, projected, count, up_offset, h);
  }
}

// Rows of the next block of neurons, fetched at an even pace by the tiles of this one.
struct Ahead {
  List neurons;
  int64_t per_tile;
  int64_t taken[kMaxSlices] = {};  // of each slice of columns

  int take(const Problem& p, int64_t slice, const float** rows) {
    int num_rows = 0;
    int64_t& at = taken[slice];
    for (const int64_t end = std::min(at + per_tile, neurons.size); at < end; ++at)
      for (int64_t half = 0; half < p.rows_per_neuron; ++half)
        rows[num_rows++] = p.up + (half * p.neurons + neurons.ids[at]) * p.depth;
    return num_rows;
  }
};

// h of one expert's tokens for the rows of its list that fall into one block of neurons.
void up_block(const Problem& p, const Sorted& sorted, const Group& group, const Rows& rows, float* h, float* local,
              int64_t block, Ahead& ahead) {
  const int32_t* ids = group.neurons.ids;
  const int per_tile = kDotRows / p.rows_per_neuron;
  const int64_t token_stride = block * p.rows_per_neuron;
  for (int64_t chunk = 0; chunk < group.count; chunk += kTokenChunk) {
    const int64_t first = group.first + chunk, count = std::min(kTokenChunk, group.count - chunk);
    const int64_t num_tiles = ceil_div(count, kDotTokens);
    const auto tiles = [&](int64_t i, int64_t slice) {
      const float* w[kDotRows];
      float* out[kDotRows];
      const int neurons = static_cast<int>(std::min<int64_t>(per_tile, rows.end - i));
      const int num_rows = neurons * p.rows_per_neuron;
      for (int r = 0; r < num_rows; ++r) {
        const int64_t half = r / neurons, n = r % neurons;
        w[r] = p.up + (half * p.neurons + ids[i + n]) * p.depth;
        out[r] = local + half * block + (i + n - rows.begin);
      }
      const int64_t k = slice * p.slice, k_end = std::min(k + p.slice, p.depth);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {  // of about equal size: 5 tokens are 2 and 3, not 4 and 1
        const int64_t t = count * tile / num_tiles;
        const int num_tokens = static_cast<int>(count * (tile + 1) / num_tiles - t);
        const float *x[kDotTokens], *next[kMaxNext];
        for (int j = 0; j < num_tokens; ++j) x[j] = p.x + sorted.order[first + t + j] * p.depth;
        const int num_next = ahead.take(p, slice, next);
        dot_tile_of(num_tokens, num_rows)(w, x, k, k_end, next, num_next, out, token_stride, slice == 0);
        for (int r = 0; r < num_rows; ++r) out[r] += num_tokens * token_stride;
      }
    };
    // Few tokens: row by row, as memory likes it. Many: a slice of all rows while the tokens' slice is near.
    const int64_t num_slices = ceil_div(p.depth, p.slice);
    if (count <= kRowByRowTokens) {
      for (int64_t i = rows.begin; i < rows.end; i += per_tile)
        for (int64_t slice = 0; slice < num_slices; ++slice) tiles(i, slice);
    } else {
      for (int64_t slice = 0; slice < num_slices; ++slice)
        for (int64_t i = rows.begin; i < rows.end; i += per_tile) tiles(i, slice);
    }
    for (int64_t t = 0; t < count; ++t)
      activate_rows(p, ids + rows.begin, local + t * token_stride, rows.count(), block,
                    h + (first + t) * sorted.max_width + rows.begin);
  }
}

// Blocks of neurons, claimed one ahead, so that it is known which rows to fetch while one is computed with.
void up_blocks(const Problem& p, const Sorted& sorted, float* h, float* local, int64_t block,
               std::atomic<int64_t>& claimed) {
  const int64_t num_blocks = ceil_div(p.neurons, block), per_tile = kDotRows / p.rows_per_neuron;
  for (int64_t b = claimed++, next; b < num_blocks; b = next) {
    next = claimed++;
    int64_t num_tiles = 0;
    for (const Group& group : sorted.groups)
      num_tiles += ceil_div(rows_in_block(group.neurons, b * block, (b + 1) * block).count(), per_tile) *
                   ceil_div(group.count, kDotTokens);
    if (num_tiles == 0) continue;
    const Rows later = rows_in_block(sorted.touched, next * block, (next + 1) * block);
    Ahead ahead{{sorted.touched.ids + later.begin, later.count()},
                std::min<int64_t>(ceil_div(later.count(), num_tiles), kMaxNext / p.rows_per_neuron)};
    for (const Group& group : sorted.groups) {
      const Rows rows = rows_in_block(group.neurons, b * block, (b + 1) * block);
      if (rows.count() > 0) up_block(p, sorted, group, rows, h, local, block, ahead);
    }
  }
}

// ---------------------------------------------------------------------------------------------- phase 2
// T tokens by V vectors of columns, over the rows of one expert in one block of neurons. Sums stay in registers.
// ``next``: rows to be fetched meanwhile, one for each that is used.
template <int T, int V, bool kPrefetch>
void down_tile(const float* down, int64_t stride, const int32_t* ids, const int32_t* next, int64_t count,
               const float* const* h, float* const* y, int64_t columns, bool is_first) {
  Vec sums[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      sums[t][v] = is_first ? zero() : left >= kWidth ? load(y[t] + v * kWidth) : load_first(y[t] + v * kWidth, left);
    }
  for (int64_t i = 0; i < count; ++i) {
    const float* row = down + ids[i] * stride;
    if constexpr (kPrefetch) {
      const float* later = down + next[i] * stride;
#pragma GCC unroll 16
      for (int v = 0; v < V * kWidth; v += 16) __builtin_prefetch(later + v, 0, 2);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const Vec weights = load(row + v * kWidth);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t][v] = fma(broadcast(h[t][i]), weights, sums[t][v]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      if (left >= kWidth) store(y[t] + v * kWidth, sums[t][v]);
      else store_first(y[t] + v * kWidth, sums[t][v], left);
    }
}

using DownTile = void (*)(const float*, int64_t, const int32_t*, const int32_t*, int64_t, const float* const*,
                          float* const*, int64_t, bool);

template <bool kPrefetch, int T = kDownTokens, int V = kDownVecs * (T <= kDownTokens / 2 ? 2 : 1)>
DownTile down_tile_of(int tokens, int vecs) {
  if constexpr (T > 1)
    if (tokens < T) return down_tile_of<kPrefetch, T - 1>(tokens, vecs);
  if constexpr (V > 1)
    if (vecs < V) return down_tile_of<kPrefetch, T, V - 1>(tokens, vecs);
  return down_tile<T, V, kPrefetch>;
}

// Columns [begin, end) of all outputs.
void down_columns(const Problem& p, const Sorted& sorted, const float* h, int64_t begin, int64_t end) {
  int64_t most = 0;
  for (const Group& group : sorted.groups) most = std::max(most, group.count);
  const int64_t chunk = kDownVecs * kWidth * (most <= kDownTokens / 2 ? 2 : 1);
  for (int64_t n = 0; n < p.neurons; n += kDownRows)
    for (int64_t d = begin; d < end; d += chunk) {
      const int64_t columns = std::min(chunk, end - d);
      const int vecs = static_cast<int>(ceil_div(columns, kWidth));
      for (const Group& group : sorted.groups) {
        const List& list = group.neurons;
        const Rows rows = rows_in_block(list, n, n + kDownRows);
        if (rows.count() == 0) continue;
        int32_t next[kDownRows];
        for (int64_t i = 0; i < rows.count(); ++i) next[i] = list.ids[std::min(rows.end + i, list.size - 1)];
        const int64_t num_tiles = ceil_div(group.count, kDownTokens);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          const int64_t first = group.first + group.count * tile / num_tiles;
          const int tokens = static_cast<int>(group.first + group.count * (tile + 1) / num_tiles - first);
          const float* hidden[kDownTokens];
          float* y[kDownTokens];
          for (int j = 0; j < tokens; ++j) {
            hidden[j] = h + (first + j) * sorted.max_width + rows.begin;
            y[j] = p.out + sorted.order[first + j] * p.depth + d;
          }
          const DownTile run = tile == 0 ? down_tile_of<true>(tokens, vecs) : down_tile_of<false>(tokens, vecs);
          run(p.down + d, p.down_stride, list.ids + rows.begin, next, rows.count(), hidden, y, columns,
              rows.begin == 0);
        }
      }
    }
}

// ------------------------------------------------------------------------------------------ one pass
struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Memory of the calling thread, kept for the next call: it would otherwise be mapped and zeroed each time.
float* scratch(int which, size_t count) {
  thread_local std::unique_ptr<float[], Free> memory[2];
  thread_local size_t sizes[2] = {};
  if (sizes[which] < count) {
    memory[which].reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
    sizes[which] = count;
  }
  return memory[which].get();
}

// Tokens [first, first + count) through both phases.
void run_pass(const Problem& p, const int64_t* expert_ids, int64_t first, int64_t count, int threads) {
  const Sorted sorted = sort_tokens(p, expert_ids, first, count);
  for (const Group& group : sorted.groups)
    if (group.neurons.size == 0)  // a rank of tensor parallelism may hold no neuron of an expert
      for (int64_t t = group.first; t < group.first + group.count; ++t)
        std::fill_n(p.out + sorted.order[t] * p.depth, p.depth, 0.0f);
  float* h = scratch(0, count * sorted.max_width);
  const int64_t row_bytes = p.depth * p.rows_per_neuron * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::clamp<int64_t>(std::min(kBlockBytes / row_bytes, p.neurons / 16), 12, 128);
  std::atomic<int64_t> claimed{0};
  const int64_t num_vecs = ceil_div(p.depth, kWidth);
#pragma omp parallel num_threads(threads)
  {
    float* local = scratch(1, kTokenChunk * block * p.rows_per_neuron);
    up_blocks(p, sorted, h, local, block, claimed);
#pragma omp barrier
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = num_vecs * thread / team * kWidth;
    const int64_t end = std::min(num_vecs * (thread + 1) / team * kWidth, p.depth);
    if (begin < end) down_columns(p, sorted, h, begin, end);
  }
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  return Activation::kGeluTanh;  // gelu_new and its aliases: Python has checked the name
}

Tensor expert_mlp(Tensor hidden_states, Tensor expert_ids, Tensor up_weight, std::optional<Tensor> up_bias,
                  Tensor down_weight, Tensor expert_masks, Tensor neuron_ids, Tensor widths, std::string activation,
                  int64_t gather_tokens, int64_t grouped_tokens) {
  for (const Tensor& tensor : {hidden_states, up_weight, down_weight})
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float,
                    "tomoe::expert_mlp on CPU takes float32 matrices; hidden_states, up_weight and down_weight must "
                    "be such");
  STD_TORCH_CHECK(down_weight.stride(1) == 1, "tomoe::expert_mlp takes rows of down_weight that are contiguous");
  for (const Tensor& tensor : {up_weight, neuron_ids, widths, expert_ids})
    STD_TORCH_CHECK(tensor.is_contiguous(), "tomoe::expert_mlp takes contiguous weights and tables");
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long && neuron_ids.scalar_type() == ScalarType::Int &&
                      widths.scalar_type() == ScalarType::Int,
                  "expert_ids must be int64, neuron_ids and widths int32");
  STD_TORCH_CHECK(hidden_states.size(1) <= kMaxSlice * kMaxSlices, "tomoe::expert_mlp on CPU takes up to ",
                  kMaxSlice * kMaxSlices, " columns");
  const Tensor x = torch::stable::contiguous(hidden_states);
  Tensor out = torch::stable::empty_like(x);
  const int64_t tokens = x.size(0);
  Problem p;
  p.x = static_cast<const float*>(x.data_ptr());
  p.up = static_cast<const float*>(up_weight.data_ptr());
  p.up_bias = up_bias.has_value() ? static_cast<const float*>(up_bias->data_ptr()) : nullptr;
  p.down = static_cast<const float*>(down_weight.data_ptr());
  p.ids = static_cast<const int32_t*>(neuron_ids.data_ptr());
  p.widths = static_cast<const int32_t*>(widths.data_ptr());
  p.out = static_cast<float*>(out.data_ptr());
  p.depth = x.size(1);
  p.slice = ceil_div(ceil_div(p.depth, ceil_div(p.depth, kMaxSlice)), 16) * 16;
  p.neurons = down_weight.size(0);
  p.down_stride = down_weight.stride(0);
  p.experts = neuron_ids.size(0);
  p.max_width = neuron_ids.size(1);
  p.rows_per_neuron = static_cast<int>(up_weight.size(0) / p.neurons);
  p.activation = activation_of(activation);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const auto* ids = static_cast<const int64_t*>(expert_ids.data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    STD_TORCH_CHECK(ids[t] >= 0 && ids[t] < p.experts, "expert_ids[", t, "] is ", ids[t], "; there are ", p.experts,
                    " experts");
  for (int64_t first = 0; first < tokens; first += kPassTokens)
    run_pass(p, ids, first, std::min(kPassTokens, tokens - first), threads);
  return out;
}

}  // namespace
}  // namespace tomoe

STABLE_TORCH_LIBRARY_IMPL(tomoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&tomoe::expert_mlp));
}
