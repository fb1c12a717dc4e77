// The MLP of ToMoE on one copy of the weights, float32, for CPUs: tomoe::expert_mlp.
//
// Tokens are sorted by expert. Phase 1 walks blocks of neurons; each expert that has tokens takes its rows of
// the block, which the experts share in L2, so memory is read once: h = act(gate) * up, [T, widest expert].
// Phase 2 splits the output's columns among the threads and walks blocks of W_down's rows in the same way.
// Rows are read where they lie: an expert is a list of row numbers.
//
// Every sum has one order, whatever the number of tokens, of threads and the path: a token's output does not
// depend, not even in its last bit, on what else is in the batch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

constexpr int64_t kDepth = 1024;        // k per pass: 6 rows of weights stay in L1 while tokens pass by
constexpr int64_t kBlockBytes = 1 << 20;  // weights of one block of neurons: half of a 2 MB L2
constexpr int kTokenChunk = 128;        // tokens of one expert at a time in phase 1
constexpr int64_t kPassTokens = 1024;   // tokens per pass over the weights: bounds the scratch memory
constexpr int kChunkVecs = 4, kChunk = kChunkVecs * kWidth;  // output columns of one tile of phase 2
constexpr int kAxpyRows = 8, kStreamedTile = 4;  // rows and tokens of one step where phase 2 streams
constexpr int kRowByRowTokens = 8;  // up to so many tokens of a group phase 1 takes whole rows

struct Problem {
  const float* x;           // [T, D]
  const float* up;          // [2F, D], gate first, or [F, D]
  const float* up_bias;     // [2F] or [F], or null
  const float* down;        // [F, D]
  const int32_t* ids;       // [N, max_width], sorted
  const int32_t* widths;    // [N]
  float* out;               // [T, D]
  int64_t depth, neurons, experts, max_width;
  int rows_per_neuron;      // 2 with a gate
  Activation activation;
  const float* masks;       // [N, F], ones and zeros
  int64_t group_tokens;     // where phase 2 streams, experts are merged until a group has so many tokens
  int64_t streamed_tokens;  // up to so many tokens phase 2 streams rows, above it packs blocks
};

// Tokens that are computed together on the rows of their experts: one expert, or a few whose tokens are too few to
// fill a tile. Then the rows are the union of theirs, and h is zeroed where a token's own expert does not keep it.
struct Group {
  int64_t first, count;  // of the sorted tokens
  const int32_t* ids;    // [width], sorted
  int64_t width;
  bool is_merged;
};

struct Sorted {
  std::vector<int64_t> order, experts;  // of each sorted token: its row in x and its expert
  std::vector<Group> groups;
  std::vector<std::vector<int32_t>> unions;
  int64_t max_width = 0;
};

struct Rows {  // entries [begin, end) of a group's list that fall into a block of neurons
  int64_t begin, end;
};

inline Rows rows_in_block(const Group& group, int64_t first, int64_t last) {
  const int32_t* end = group.ids + group.width;
  const int32_t* a = std::lower_bound(group.ids, end, static_cast<int32_t>(first));
  return {a - group.ids, std::lower_bound(a, end, static_cast<int32_t>(last)) - group.ids};
}

// Stable counting sort of tokens [first, first + count) by expert, and their groups.
Sorted sort_tokens(const Problem& p, const int64_t* expert_ids, int64_t first, int64_t count) {
  Sorted sorted;
  std::vector<int64_t> starts(p.experts + 1);
  for (int64_t t = 0; t < count; ++t) ++starts[expert_ids[first + t] + 1];
  for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
  sorted.order.resize(count);
  sorted.experts.resize(count);
  std::vector<int64_t> next(starts);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = next[expert_ids[first + t]]++;
    sorted.order[place] = first + t;
    sorted.experts[place] = expert_ids[first + t];
  }
  std::vector<int64_t> members;
  int64_t begin = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    if (starts[e + 1] > starts[e]) members.push_back(e);
    const int64_t size = starts[e + 1] - begin;
    if (members.empty() || (size < p.group_tokens && e + 1 < p.experts)) continue;
    Group group{begin, size, p.ids + members[0] * p.max_width, p.widths[members[0]], members.size() > 1};
    if (group.is_merged) {
      std::vector<uint8_t> is_kept(p.neurons);
      for (const int64_t member : members)
        for (int64_t i = 0; i < p.widths[member]; ++i) is_kept[p.ids[member * p.max_width + i]] = 1;
      std::vector<int32_t>& ids = sorted.unions.emplace_back(p.neurons);
      int64_t width = 0;
      for (int64_t n = 0; n < p.neurons; ++n) {
        ids[width] = static_cast<int32_t>(n);
        width += is_kept[n];
      }
      group.ids = ids.data();  // stays where it is when the outer vector grows: its elements are moved
      group.width = width;
    }
    sorted.groups.push_back(group);
    sorted.max_width = std::max(sorted.max_width, group.width);
    members.clear();
    begin = starts[e + 1];
  }
  return sorted;
}

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

// h of one expert's tokens for the rows of its list that fall into one block of neurons.
void up_block(const Problem& p, const Sorted& sorted, const Group& group, const Rows& rows, float* h, float* local,
              int64_t block) {
  const int32_t* ids = group.ids;
  const int per_tile = kDotRows / p.rows_per_neuron;
  const int64_t token_stride = block * p.rows_per_neuron;
  for (int64_t chunk = 0; chunk < group.count; chunk += kTokenChunk) {
    const int64_t first = group.first + chunk, count = std::min<int64_t>(kTokenChunk, group.count - chunk);
    const auto tiles = [&](int64_t i, int64_t k, int64_t k_end) {
      const float *w[kDotRows], *next[kDotRows];
      float* out[kDotRows];
      const int neurons = static_cast<int>(std::min<int64_t>(per_tile, rows.end - i));
      const int num_rows = neurons * p.rows_per_neuron;
      for (int r = 0; r < num_rows; ++r) {
        const int64_t half = r / neurons, n = r % neurons;
        const int64_t after = std::min<int64_t>(i + n + neurons, group.width - 1);
        w[r] = p.up + (half * p.neurons + ids[i + n]) * p.depth;
        next[r] = p.up + (half * p.neurons + ids[after]) * p.depth;
        out[r] = local + half * block + (i + n - rows.begin);
      }
      for (int64_t t = 0; t < count; t += kDotTokens) {
        const int num_tokens = static_cast<int>(std::min<int64_t>(kDotTokens, count - t));
        const float* x[kDotTokens];
        for (int j = 0; j < num_tokens; ++j) x[j] = p.x + sorted.order[first + t + j] * p.depth;
        const DotTile tile = t == 0 ? dot_tile_of<true>(num_tokens, num_rows) : dot_tile_of<false>(num_tokens, num_rows);
        tile(w, x, k, k_end, next, out, token_stride, k == 0);
        for (int r = 0; r < num_rows; ++r) out[r] += num_tokens * token_stride;
      }
    };
    // Few tokens: row by row, as memory likes it. Many: a slice of k of all rows while the tokens' slice is near.
    if (count <= kRowByRowTokens) {
      for (int64_t i = rows.begin; i < rows.end; i += per_tile)
        for (int64_t k = 0; k < p.depth; k += kDepth) tiles(i, k, std::min(k + kDepth, p.depth));
    } else {
      for (int64_t k = 0; k < p.depth; k += kDepth)
        for (int64_t i = rows.begin; i < rows.end; i += per_tile) tiles(i, k, std::min(k + kDepth, p.depth));
    }
    for (int64_t t = 0; t < count; ++t) {
      float* target = h + (first + t) * sorted.max_width;
      activate_rows(p, ids + rows.begin, local + t * token_stride, rows.end - rows.begin, block, target + rows.begin);
      if (group.is_merged) {
        const float* mask = p.masks + sorted.experts[first + t] * p.neurons;
        for (int64_t i = rows.begin; i < rows.end; ++i) target[i] *= mask[ids[i]];
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- phase 2
// Few tokens: kAxpyRows rows at a time into the outputs of T tokens, columns [begin, end). Rows past the end of the
// list come with h = 0.
template <int T>
void axpy_rows(const float* const* w, const float* const* next, const float* h, float* const* y, int64_t begin,
               int64_t end, bool is_first) {
  int64_t d = begin;
  for (; d + kWidth <= end; d += kWidth) {
    Vec rows[kAxpyRows];
#pragma GCC unroll 8
    for (int r = 0; r < kAxpyRows; ++r) {
      __builtin_prefetch(next[r] + d, 0, 2);
      rows[r] = load(w[r] + d);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      Vec sum = is_first ? zero() : load(y[t] + d);
#pragma GCC unroll 8
      for (int r = 0; r < kAxpyRows; ++r) sum = fma(broadcast(h[t * kAxpyRows + r]), rows[r], sum);
      store(y[t] + d, sum);
    }
  }
  if (const int64_t left = end - d; left > 0)
    for (int t = 0; t < T; ++t) {
      Vec sum = is_first ? zero() : load_first(y[t] + d, left);
      for (int r = 0; r < kAxpyRows; ++r) sum = fma(broadcast(h[t * kAxpyRows + r]), load_first(w[r] + d, left), sum);
      store_first(y[t] + d, sum, left);
    }
}

using AxpyRows = void (*)(const float* const*, const float* const*, const float*, float* const*, int64_t, int64_t, bool);

template <int T = kStreamedTile>
AxpyRows axpy_rows_of(int tokens) {
  if constexpr (T > 1)
    if (tokens < T) return axpy_rows_of<T - 1>(tokens);
  return axpy_rows<T>;
}

void down_streamed(const Problem& p, const Sorted& sorted, const float* h, int64_t begin, int64_t end) {
  const int64_t block = sorted.groups.size() == 1 ? p.neurons : 64;
  for (int64_t n = 0; n < p.neurons; n += block) {
    for (const Group& group : sorted.groups) {
      const Rows rows = rows_in_block(group, n, n + block);
      for (int64_t i = rows.begin; i < rows.end; i += kAxpyRows) {
        const int64_t count = std::min<int64_t>(kAxpyRows, rows.end - i);
        const float *w[kAxpyRows], *next[kAxpyRows];
        for (int64_t r = 0; r < kAxpyRows; ++r) {
          w[r] = p.down + group.ids[i + std::min(r, count - 1)] * p.depth;
          next[r] = p.down + group.ids[std::min(i + r + count, group.width - 1)] * p.depth;
        }
        for (int64_t t = 0; t < group.count; t += kStreamedTile) {
          const int64_t tokens = std::min<int64_t>(kStreamedTile, group.count - t);
          float scales[kStreamedTile * kAxpyRows] = {}, *y[kStreamedTile];
          for (int64_t j = 0; j < tokens; ++j) {
            const int64_t token = group.first + t + j;
            y[j] = p.out + sorted.order[token] * p.depth;
            std::copy_n(h + token * sorted.max_width + i, count, scales + j * kAxpyRows);
          }
          axpy_rows_of(static_cast<int>(tokens))(w, next, scales, y, begin, end, i == 0);
        }
      }
    }
  }
}

// Rows of the next block, to be asked for while this one is computed with: a copy alone would wait for memory.
struct Ahead {
  const float* row;   // first row of the next block, from column ``begin``
  int64_t rows, columns, stride;  // left of it; floats
  int64_t column = 0;

  inline void step() {
    if (rows <= 0) return;
    __builtin_prefetch(row + column, 0, 2);
    column += 16;
    if (column >= columns) column = 0, row += stride, --rows;
  }
};

// Many tokens: T tokens by V vectors of columns, over the rows of one expert in one packed block.
template <int T, int V>
void axpy_tile(const float* packed, const int32_t* ids, int64_t count, int64_t first_neuron, const float* const* h,
               float* const* y, int64_t columns, bool is_first, Ahead& ahead) {
  Vec sums[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      sums[t][v] = is_first ? zero() : left >= kWidth ? load(y[t] + v * kWidth) : load_first(y[t] + v * kWidth, left);
    }
  for (int64_t i = 0; i < count; ++i) {
    const float* row = packed + (ids[i] - first_neuron) * kChunk;
    ahead.step();
    Vec weights[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) weights[v] = load(row + v * kWidth);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec scale = broadcast(h[t][i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[t][v] = fma(scale, weights[v], sums[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      if (left >= kWidth) store(y[t] + v * kWidth, sums[t][v]);
      else store_first(y[t] + v * kWidth, sums[t][v], left);
    }
}

using AxpyTile = void (*)(const float*, const int32_t*, int64_t, int64_t, const float* const*, float* const*, int64_t,
                          bool, Ahead&);

template <int T = kAxpyTokens, int V = kChunkVecs>
AxpyTile axpy_tile_of(int tokens, int vecs) {
  if constexpr (T > 1)
    if (tokens < T) return axpy_tile_of<T - 1, V>(tokens, vecs);
  if constexpr (V > 1)
    if (vecs < V) return axpy_tile_of<T, V - 1>(tokens, vecs);
  return axpy_tile<T, V>;
}

// Copies columns [begin, end) of rows [first, last) as [chunks][rows][kChunk]: contiguous for a tile, where the rows
// themselves lie a power of two apart and would share a few cache sets.
void pack_block(const Problem& p, int64_t first, int64_t last, int64_t begin, int64_t end, float* packed) {
  const int64_t rows = last - first;
  for (int64_t n = 0; n < rows; ++n) {
    const float* source = p.down + (first + n) * p.depth;
    float* target = packed + n * kChunk;
    for (int64_t d = begin; d < end; d += kChunk, target += rows * kChunk)
      for (int64_t j = 0; j < std::min<int64_t>(kChunk, end - d); j += kWidth) {
        const int64_t left = end - d - j;
        store(target + j, left >= kWidth ? load(source + d + j) : load_first(source + d + j, left));
      }
  }
}

void down_packed(const Problem& p, const Sorted& sorted, const float* h, int64_t begin, int64_t end, int64_t block,
                 float* packed) {
  for (int64_t n = 0; n < p.neurons; n += block) {
    const int64_t last = std::min(n + block, p.neurons);
    pack_block(p, n, last, begin, end, packed);
    Ahead ahead{p.down + last * p.depth + begin, std::min(block, p.neurons - last), end - begin, p.depth};
    const float* chunk = packed;
    for (int64_t d = begin; d < end; d += kChunk, chunk += (last - n) * kChunk) {
      const int64_t columns = std::min<int64_t>(kChunk, end - d);
      const int vecs = static_cast<int>((columns + kWidth - 1) / kWidth);
      for (const Group& group : sorted.groups) {
        const Rows rows = rows_in_block(group, n, last);
        if (rows.begin == rows.end) continue;
        const int32_t* ids = group.ids + rows.begin;
        for (int64_t t = 0; t < group.count; t += kAxpyTokens) {
          const int tokens = static_cast<int>(std::min<int64_t>(kAxpyTokens, group.count - t));
          const float* hidden[kAxpyTokens];
          float* y[kAxpyTokens];
          for (int j = 0; j < tokens; ++j) {
            hidden[j] = h + (group.first + t + j) * sorted.max_width + rows.begin;
            y[j] = p.out + sorted.order[group.first + t + j] * p.depth + d;
          }
          axpy_tile_of(tokens, vecs)(chunk, ids, rows.end - rows.begin, n, hidden, y, columns, rows.begin == 0,
                                         ahead);
        }
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
  thread_local std::unique_ptr<float[], Free> memory[3];
  thread_local size_t sizes[3] = {};
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
    if (group.width == 0)  // a rank of tensor parallelism may hold no neuron of an expert
      for (int64_t t = group.first; t < group.first + group.count; ++t)
        std::fill_n(p.out + sorted.order[t] * p.depth, p.depth, 0.0f);
  float* h = scratch(0, count * sorted.max_width);
  const int64_t row_bytes = p.depth * p.rows_per_neuron * static_cast<int64_t>(sizeof(float));
  const int64_t block = std::clamp<int64_t>(kBlockBytes / row_bytes, 12, 128);
  const int64_t num_blocks = (p.neurons + block - 1) / block;
  const int64_t num_vecs = (p.depth + kWidth - 1) / kWidth;
#pragma omp parallel num_threads(threads)
  {
    float* local = scratch(1, kTokenChunk * block * p.rows_per_neuron);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < num_blocks; ++b)
      for (const Group& group : sorted.groups) {
        const Rows rows = rows_in_block(group, b * block, (b + 1) * block);
        if (rows.begin < rows.end) up_block(p, sorted, group, rows, h, local, block);
      }
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = num_vecs * thread / team * kWidth;
    const int64_t end = std::min(num_vecs * (thread + 1) / team * kWidth, p.depth);
    if (begin < end) {
      if (count <= p.streamed_tokens) {
        down_streamed(p, sorted, h, begin, end);
      } else {
        const int64_t padded = (end - begin + kChunk - 1) / kChunk * kChunk;
        const int64_t rows = std::clamp<int64_t>(kBlockBytes / (padded * 4), 16, 256);
        down_packed(p, sorted, h, begin, end, rows, scratch(2, rows * padded));
      }
    }
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
                  int64_t group_tokens, int64_t streamed_tokens) {
  for (const Tensor& tensor : {hidden_states, up_weight, down_weight, expert_masks})
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Float,
                    "tomoe::expert_mlp on CPU takes float32 matrices; hidden_states, up_weight, down_weight and "
                    "expert_masks must be such");
  for (const Tensor& tensor : {up_weight, down_weight, expert_masks, neuron_ids, widths, expert_ids})
    STD_TORCH_CHECK(tensor.is_contiguous(), "tomoe::expert_mlp takes contiguous weights and tables");
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long && neuron_ids.scalar_type() == ScalarType::Int &&
                      widths.scalar_type() == ScalarType::Int,
                  "expert_ids must be int64, neuron_ids and widths int32");
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
  p.neurons = down_weight.size(0);
  p.experts = neuron_ids.size(0);
  p.max_width = neuron_ids.size(1);
  p.rows_per_neuron = static_cast<int>(up_weight.size(0) / p.neurons);
  p.activation = activation_of(activation);
  p.masks = static_cast<const float*>(expert_masks.data_ptr());
  p.group_tokens = tokens <= streamed_tokens ? group_tokens : 1;  // merging saves traffic, and costs operations
  p.streamed_tokens = streamed_tokens;
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
