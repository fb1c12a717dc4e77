// Phase 1 of the expert MLP: h = act(gate . x) * (up . x) for the neurons of each token's expert.
//
// Three variants by the number of tokens: one token (up_of_token), dot products vectorized over the columns
// (up_neuron_major, up_expert_major), and transposed activations vectorized over the tokens (up_transposed).
// A sum of the first two has one order, whatever the number of tokens and threads; a transposed one has another order.
#pragma once
#include <atomic>

#include <omp.h>

#include "../../simd/dot_tile.h"
#include "schedule.h"

namespace tomoe {

// KC: the columns of a sum in equal slices of at most kMaxUpColumns.
struct Slices {
  int64_t depth, count, size;

  explicit Slices(int64_t columns)
      : depth(columns), count(ceil_div(columns, kMaxUpColumns)), size(ceil_div(ceil_div(columns, count), 16) * 16) {}

  int64_t begin(int64_t slice) const { return slice * size; }
  int64_t end(int64_t slice) const { return std::min(begin(slice) + size, depth); }
};

// h [count] of one token; ``projected``: [rows_per_neuron, count], the gate's first.
template <Activation A>
void activate_token(const Weights& w, const int32_t* ids, const float* projected, int64_t count, float* h) {
  const bool is_gated = w.rows_per_neuron == 2;
  const float* up = projected + count;
  if (w.up_bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float gate = activate<A>(projected[i] + w.up_bias[ids[i]]);
      h[i] = is_gated ? gate * (up[i] + w.up_bias[w.neurons + ids[i]]) : gate;
    }
  } else if (is_gated) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]) * up[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]);
  }
}

// ------------------------------------------------------------------------------------------------------ one token
// h of ``count`` entries of an expert's list. ``local``: room for [rows_per_neuron, count]. No prefetch instructions:
// there is too little arithmetic to overlap them with.
inline void up_of_token(const ExpertMlpArgs& p, const int32_t* ids, int64_t count, float* local, float* h) {
  const int64_t per_tile = kDecodeRows / p.rows_per_neuron;
  const Slices slices(p.depth);
  for (int64_t i = 0; i < count; i += per_tile) {
    const int neurons = static_cast<int>(std::min(per_tile, count - i)), num_rows = neurons * p.rows_per_neuron;
    const float* w[kDecodeRows];
    float* out[kDecodeRows];
    for (int r = 0; r < num_rows; ++r) {
      const int64_t half = r / neurons, n = i + r % neurons;
      w[r] = p.up_row(half, ids[n]);
      out[r] = local + half * count + n;
    }
    for (int64_t slice = 0; slice < slices.count; ++slice)
      dot_tile_of(1, num_rows)({w, &p.x, slices.begin(slice), slices.end(slice), nullptr, 0, out, 1, slice == 0});
  }
  with_activation(p.activation, [&]<Activation A>() { activate_token<A>(p, ids, local, count, h); });
}

// --------------------------------------------------------------------------------------------------- dot products
// The rows of the next block, handed out at an even pace to the ``num_tiles`` micro-kernels of the present one.
struct PrefetchCursor {
  NeuronList neurons;
  int64_t per_tile;
  int64_t taken[kMaxUpSlices] = {};  // of each slice of columns

  PrefetchCursor(const Weights& w, const NeuronList& list, const Range& range, int64_t num_tiles)
      : neurons{list.ids + range.begin, range.count()},
        per_tile(std::min<int64_t>(ceil_div(range.count(), num_tiles), kMaxPrefetchRows / w.rows_per_neuron)) {}

  // Writes the next rows and returns their number.
  int take(const Weights& w, int64_t slice, const float** rows) {
    int num_rows = 0;
    int64_t& at = taken[slice];
    for (const int64_t end = std::min(at + per_tile, neurons.size); at < end; ++at)
      for (int64_t half = 0; half < w.rows_per_neuron; ++half) rows[num_rows++] = w.up_row(half, neurons.ids[at]);
    return num_rows;
  }
};

// Micro-kernels that a group needs for so many entries.
inline int64_t num_tiles(const Weights& w, const TokenGroup& group, int64_t num_entries) {
  return ceil_div(num_entries, kDotRows / w.rows_per_neuron) * ceil_div(group.count, kDotTokens);
}

// h of sorted tokens [first, first + count) of a group, for a range of its list. ``local``: the sums before the
// activation, [count, rows_per_neuron, range].
inline void up_tokens(const ExpertMlpArgs& p, const TokenSchedule& schedule, const TokenGroup& group,
                      const Range& range, int64_t first, int64_t count, float* h, float* local,
                      PrefetchCursor& cursor) {
  const int32_t* ids = group.neurons.ids;
  const int64_t width = range.count(), token_stride = width * p.rows_per_neuron;
  const Slices slices(p.depth);
  const float* x[kUpTokens];
  for (int64_t t = 0; t < count; ++t) x[t] = p.x + schedule.order[first + t] * p.depth;
  // Tiles of about equal size: 5 tokens are 3 and 2, not 4 and 1.
  const int token_tiles = static_cast<int>(ceil_div(count, kDotTokens));
  const int large = static_cast<int>(ceil_div(count, token_tiles));
  const int num_large = static_cast<int>(count) - (large - 1) * token_tiles;
  const int64_t row_tiles = ceil_div(width, kDotRows / p.rows_per_neuron), per_tile = ceil_div(width, row_tiles);
  const auto micro_panel = [&](int64_t i, int64_t slice) {  // MR rows by all tokens
    const float* w[kDotRows];
    float* out[kDotRows];
    const int neurons = static_cast<int>(std::min<int64_t>(per_tile, range.end - i));
    const int num_rows = neurons * p.rows_per_neuron;
    for (int r = 0; r < num_rows; ++r) {
      const int64_t half = r / neurons, n = r % neurons;
      w[r] = p.up_row(half, ids[i + n]);
      out[r] = local + half * width + (i + n - range.begin);
    }
    const float* const* tokens = x;
    for (int tile = 0; tile < token_tiles; ++tile) {
      const int num_tokens = tile < num_large ? large : large - 1;
      const float* prefetch[kMaxPrefetchRows];
      const int num_prefetch = cursor.take(p, slice, prefetch);
      dot_tile_of(num_tokens, num_rows)(
          {w, tokens, slices.begin(slice), slices.end(slice), prefetch, num_prefetch, out, token_stride, slice == 0});
      tokens += num_tokens;
      for (int r = 0; r < num_rows; ++r) out[r] += num_tokens * token_stride;
    }
  };
  // Few tokens: whole rows, so memory is read sequentially. Many: block over k, so x's slice stays in L2.
  if (count <= kWholeRowTokens) {
    for (int64_t i = range.begin; i < range.end; i += per_tile)
      for (int64_t slice = 0; slice < slices.count; ++slice) micro_panel(i, slice);
  } else {
    for (int64_t slice = 0; slice < slices.count; ++slice)
      for (int64_t i = range.begin; i < range.end; i += per_tile) micro_panel(i, slice);
  }
  float* target = h + group.hidden + (first - group.first) * group.token_stride + range.begin;
  with_activation(p.activation, [&]<Activation A>() {
    for (int64_t t = 0; t < count; ++t)
      activate_token<A>(p, ids + range.begin, local + t * token_stride, width, target + t * group.token_stride);
  });
}

// All tokens of a group, in NC blocks of about equal size.
inline void up_group(const ExpertMlpArgs& p, const TokenSchedule& schedule, const TokenGroup& group, const Range& range,
                     float* h, float* local, PrefetchCursor& cursor) {
  const int64_t blocks = ceil_div(group.count, kUpTokens);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = group.count * b / blocks, last = group.count * (b + 1) / blocks;
    up_tokens(p, schedule, group, range, group.first + first, last - first, h, local, cursor);
  }
}

// Neuron-major: blocks of neurons outside, experts inside, so that every weight is read from memory once. Threads take
// blocks dynamically, one ahead: the block to prefetch is known while the present one is computed.
inline void up_neuron_major(const ExpertMlpArgs& p, const TokenSchedule& schedule, float* h, float* local,
                            int64_t block, std::atomic<int64_t>& next_block) {
  const int64_t num_blocks = ceil_div(schedule.touched.size, block);
  for (int64_t b = next_block++, next; b < num_blocks; b = next) {
    next = next_block++;
    const auto range_of = [&](const NeuronList& list) {
      return entries_between(schedule, list, b * block, (b + 1) * block);
    };
    int64_t tiles = 0;
    for (const TokenGroup& group : schedule.groups) tiles += num_tiles(p, group, range_of(group.neurons).count());
    const int64_t prefetched = schedule.has_prefetch() ? block : 0;
    const Range later = entries_between(schedule, schedule.touched, next * block, next * block + prefetched);
    PrefetchCursor cursor(p, schedule.touched, later, tiles);
    for (const TokenGroup& group : schedule.groups)
      if (const Range range = range_of(group.neurons); range.count() > 0)
        up_group(p, schedule, group, range, h, local, cursor);
  }
}

// ---------------------------------------------------------------------------------------------------- transposed
// The micro-kernel: MR = R rows of weights x NR = V vectors of tokens, over all columns; weights are broadcast.
// ``x``: [D, V * kLanes]; ``out``: [R, V * kLanes]. Prefetches the rows ``prefetch`` [R] into L2.
template <int V, int R>
void transposed_tile(const float* const* w, const float* const* prefetch, const float* x, int64_t depth, float* out) {
  Vec sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k, x += V * kLanes) {
    if (k % 16 == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(prefetch[r] + k, 0, 2);
    Vec tokens[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) tokens[v] = load(x + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec weight = broadcast(w[r][k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[r][v] = fma(weight, tokens[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + (r * V + v) * kLanes, sums[r][v]);
}

using TransposedTile = void (*)(const float* const*, const float* const*, const float*, int64_t, float*);

template <int V = kTransposedVecs, int R = kTransposedRows>
TransposedTile transposed_tile_of(int64_t vecs, int64_t rows) {
  if constexpr (V > 1)
    if (vecs < V) return transposed_tile_of<V - 1, R>(vecs, rows);
  if constexpr (R > 1)
    if (rows < R) return transposed_tile_of<V, R - 1>(vecs, rows);
  return transposed_tile<V, R>;
}

// h [count] of one neuron for ``count`` tokens.
template <Activation A>
void activate_neuron(const Weights& w, int64_t neuron, const float* gate, const float* up, int64_t count, float* h) {
  const float gate_bias = w.up_bias ? w.up_bias[neuron] : 0.0f;
  if (w.rows_per_neuron == 1) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) h[t] = activate<A>(gate[t] + gate_bias);
    return;
  }
  const float up_bias = w.up_bias ? w.up_bias[w.neurons + neuron] : 0.0f;
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) h[t] = activate<A>(gate[t] + gate_bias) * (up[t] + up_bias);
}

// Packs x^T of the transposed groups: each [D, group.count], at the group's offset in ``packed`` (room for all of x).
// Groups are distributed round-robin over the ``team`` threads.
inline void pack_transposed(const ExpertMlpArgs& p, const TokenSchedule& schedule, float* packed, int64_t thread,
                            int64_t team) {
  int64_t index = 0;
  for (const TokenGroup& group : schedule.groups) {
    if (!group.is_transposed || index++ % team != thread) continue;
    float* target = packed + group.first * p.depth;
    for (int64_t k = 0; k < p.depth; k += 16)
      for (int64_t t = 0; t < group.count; ++t) {
        const float* token = p.x + schedule.order[group.first + t] * p.depth;
        for (int64_t j = k; j < std::min(k + 16, p.depth); ++j) target[j * group.count + t] = token[j];
      }
  }
}

// h^T of a transposed group for a range of its list; its x^T stays in L2 while the rows are streamed.
inline void up_transposed(const ExpertMlpArgs& p, const TokenGroup& group, const Range& range, const float* packed,
                          float* h) {
  const int per_tile = kTransposedRows / p.rows_per_neuron;
  const int32_t* ids = group.neurons.ids;
  const int64_t count = group.count;
  const float* x = packed + group.first * p.depth;
  float sums[kTransposedRows * kTransposedBlockTokens];
  for (int64_t i = range.begin; i < range.end; i += per_tile) {
    const int neurons = static_cast<int>(std::min<int64_t>(per_tile, range.end - i));
    const float *w[kTransposedRows], *prefetch[kTransposedRows];
    for (int n = 0; n < neurons; ++n)
      for (int half = 0; half < p.rows_per_neuron; ++half) {
        w[half * neurons + n] = p.up_row(half, ids[i + n]);
        prefetch[half * neurons + n] = p.up_row(half, ids[std::min(i + n + per_tile, range.end - 1)]);
      }
    transposed_tile_of(count / kLanes, neurons * p.rows_per_neuron)(w, prefetch, x, p.depth, sums);
    with_activation(p.activation, [&]<Activation A>() {
      for (int n = 0; n < neurons; ++n)
        activate_neuron<A>(p, ids[i + n], sums + n * count, sums + (neurons + n) * count, count,
                           h + group.hidden + (i + n) * group.neuron_stride);
    });
  }
}

// --------------------------------------------------------------------------------------------------- expert-major
// Parts of the neurons outside (taken by threads dynamically), experts inside, and of each expert its blocks of
// neurons: a block's weights stay in L2 while all tokens of the expert use them.
inline void up_expert_major(const ExpertMlpArgs& p, const TokenSchedule& schedule, const float* packed, float* h,
                            float* local, int64_t block, std::atomic<int64_t>& next_part) {
  const int64_t parts = std::max(kMinParts, kPartsPerThread * omp_get_num_threads());
  const int64_t part = ceil_div(schedule.touched.size, parts);
  for (int64_t b = next_part++; b < parts; b = next_part++)
    for (const TokenGroup& group : schedule.groups) {
      const Range range = entries_between(schedule, group.neurons, b * part, (b + 1) * part);
      if (group.is_transposed) {
        up_transposed(p, group, range, packed, h);
        continue;
      }
      for (int64_t i = range.begin; i < range.end; i += block) {
        const Range now{i, std::min(i + block, range.end)}, later{now.end, std::min(now.end + block, range.end)};
        PrefetchCursor cursor(p, group.neurons, later, num_tiles(p, group, now.count()));
        up_group(p, schedule, group, now, h, local, cursor);
      }
    }
}

}  // namespace tomoe
