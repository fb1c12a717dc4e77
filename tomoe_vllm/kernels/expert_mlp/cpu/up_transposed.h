// Phase 1 of tomoe::expert_mlp where an expert has many tokens: one token a lane, so that nothing is summed across
// lanes, and weights are broadcast from the rows as they lie.
//
// The tokens are laid out in columns first, [D, tokens of the chunk], and h comes out so, [width, tokens of the chunk].
#pragma once
#include "schedule.h"

namespace tomoe {

// V vectors of tokens by R rows of weights over all columns; sums go to ``out`` [R, V * kWidth]. Rows ``next`` are
// fetched into L2 meanwhile.
template <int V, int R>
void lane_tile(const float* const* w, const float* const* next, const float* x, int64_t depth, float* out) {
  Vec sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k, x += V * kWidth) {
    if (k % 16 == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + k, 0, 2);
    Vec tokens[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) tokens[v] = load(x + v * kWidth);
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
    for (int v = 0; v < V; ++v) store(out + (r * V + v) * kWidth, sums[r][v]);
}

using LaneTile = void (*)(const float* const*, const float* const*, const float*, int64_t, float*);

template <int V = kLaneVecs, int R = kLaneRows>
LaneTile lane_tile_of(int64_t vecs, int64_t rows) {
  if constexpr (V > 1)
    if (vecs < V) return lane_tile_of<V - 1, R>(vecs, rows);
  if constexpr (R > 1)
    if (rows < R) return lane_tile_of<V, R - 1>(vecs, rows);
  return lane_tile<V, R>;
}

// h of one neuron for ``count`` tokens.
template <Activation A>
void activate_lanes(const Problem& p, int64_t neuron, const float* gate, const float* up, int64_t count, float* h) {
  const float gate_bias = p.up_bias ? p.up_bias[neuron] : 0.0f;
  if (p.rows_per_neuron == 1) {
#pragma omp simd
    for (int64_t t = 0; t < count; ++t) h[t] = activate<A>(gate[t] + gate_bias);
    return;
  }
  const float up_bias = p.up_bias ? p.up_bias[p.neurons + neuron] : 0.0f;
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) h[t] = activate<A>(gate[t] + gate_bias) * (up[t] + up_bias);
}

// Tokens of the groups in lanes, in columns, at their places in ``columns`` (room for all of x). Thread ``thread`` of
// ``team`` lays out its share.
inline void lay_out_lanes(const Problem& p, const Sorted& sorted, float* columns, int64_t thread, int64_t team) {
  int64_t turn = 0;
  for (const Group& group : sorted.groups) {
    if (!group.is_in_lanes || turn++ % team != thread) continue;
    float* target = columns + group.first * p.depth;
    for (int64_t k = 0; k < p.depth; k += 16)
      for (int64_t t = 0; t < group.count; ++t) {
        const float* token = p.x + sorted.order[group.first + t] * p.depth;
        for (int64_t j = k; j < std::min(k + 16, p.depth); ++j) target[j * group.count + t] = token[j];
      }
  }
}

// h of a group in lanes for some rows of its list; the tokens stay near while the rows pass by.
inline void up_in_lanes(const Problem& p, const Group& group, const Rows& rows, const float* columns, float* h) {
  const int per_tile = kLaneRows / p.rows_per_neuron;
  const int32_t* ids = group.neurons.ids;
  const int64_t lanes = group.count;
  const float* x = columns + group.first * p.depth;
  float sums[kLaneRows * kLaneChunk];
  for (int64_t i = rows.begin; i < rows.end; i += per_tile) {
    const int neurons = static_cast<int>(std::min<int64_t>(per_tile, rows.end - i));
    const float *w[kLaneRows], *next[kLaneRows];
    for (int n = 0; n < neurons; ++n)
      for (int half = 0; half < p.rows_per_neuron; ++half) {
        w[half * neurons + n] = p.up_row(half, ids[i + n]);
        next[half * neurons + n] = p.up_row(half, ids[std::min(i + n + per_tile, rows.end - 1)]);
      }
    lane_tile_of(lanes / kWidth, neurons * p.rows_per_neuron)(w, next, x, p.depth, sums);
    with_activation(p.activation, [&]<Activation A>() {
      for (int n = 0; n < neurons; ++n)
        activate_lanes<A>(p, ids[i + n], sums + n * lanes, sums + (neurons + n) * lanes, lanes,
                          h + group.hidden + (i + n) * group.neuron_stride);
    });
  }
}

}  // namespace tomoe
