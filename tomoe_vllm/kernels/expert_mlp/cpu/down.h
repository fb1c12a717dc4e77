// Phase 2 of tomoe::expert_mlp: outputs are sums of W_down's rows, lanes over the columns.
//
// Threads claim panels of columns. A panel's rows lie one after the other where the weights come as panels (rows.py), so
// that an expert's are read as one stream. A sum adds the neurons in their order, whatever the number of tokens and of threads.
#pragma once
#include <atomic>

#include "schedule.h"

namespace tomoe {

constexpr int64_t kPanelColumns = 96;  // of W_down that one thread works on, a token alone in one go; a panel of the
                                       // weights is no wider
constexpr int64_t kDownRows = 256;     // neurons of a block: 96 KB of a panel stay in L2 while all tokens pass by

// T tokens by V vectors of columns, over the rows of one expert in one block of neurons. Sums stay in registers.
// ``kNext``: rows ``next`` are fetched meanwhile, one for each that is used. ``kInLanes``: the tokens' activations
// of a neuron lie side by side, from ``h[0]`` on and ``h_stride`` apart; otherwise a token's of all neurons, from h[t] on.
template <int T, int V, bool kPrefetch, bool kInLanes>
void down_tile(const float* down, int64_t stride, const int32_t* ids, const int32_t* next, int64_t count,
               const float* const* h, int64_t h_stride, float* const* y, int64_t columns, bool is_first) {
  Vec sums[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      sums[t][v] = is_first ? zero() : left >= kWidth ? load(y[t] + v * kWidth) : load_first(y[t] + v * kWidth, left);
    }
  const int64_t last = columns - (V - 1) * kWidth;
  const float* token[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) token[t] = kInLanes ? h[0] + t : h[t];
  const auto add_rows = [&](auto load_last) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) {
      const float* row = down + ids[i] * stride;
      const int64_t neuron = kInLanes ? i * h_stride : i;
      if constexpr (kPrefetch) {
        const float* ahead = down + next[i] * stride;
#pragma GCC unroll 16
        for (int v = 0; v < V * kWidth; v += 16) __builtin_prefetch(ahead + v, 0, 2);
      }
      Vec weights[V];
#pragma GCC unroll 16
      for (int v = 0; v < V - 1; ++v) weights[v] = load(row + v * kWidth);
      weights[V - 1] = load_last(row + (V - 1) * kWidth);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const Vec factor = broadcast(token[t][neuron]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[t][v] = fma(factor, weights[v], sums[t][v]);
      }
    }
  };
  // Two loops: a branch to a shorter vector within one costs half of the speed with AVX2.
  if (last >= kWidth) add_rows(load);
  else add_rows([&](const float* p) { return load_first(p, last); });
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kWidth;
      if (left >= kWidth) store(y[t] + v * kWidth, sums[t][v]);
      else store_first(y[t] + v * kWidth, sums[t][v], left);
    }
}

using DownTile = void (*)(const float*, int64_t, const int32_t*, const int32_t*, int64_t, const float* const*, int64_t,
                          float* const*, int64_t, bool);

// Vectors of columns that a tile of so many tokens takes at most.
constexpr int down_vecs(int64_t tokens) {
  constexpr int kWhole = kPanelColumns / kWidth;
  return tokens == 1 ? kWhole : std::min(kWhole, kDownVecs * (tokens <= kDownTokens / 2 ? 2 : 1));
}

template <bool kPrefetch, bool kInLanes, int T = kDownTokens, int V = down_vecs(T)>
DownTile down_tile_of(int tokens, int vecs) {
  if constexpr (T > 1)
    if (tokens < T) return down_tile_of<kPrefetch, kInLanes, T - 1>(tokens, vecs);
  if constexpr (V > 1)
    if (vecs < V) return down_tile_of<kPrefetch, kInLanes, T, V - 1>(tokens, vecs);
  return down_tile<T, V, kPrefetch, kInLanes>;
}

inline DownTile down_tile_of(int tokens, int vecs, bool is_fetching, bool is_in_lanes) {
  if (is_in_lanes) return is_fetching ? down_tile_of<true, true>(tokens, vecs) : down_tile_of<false, true>(tokens, vecs);
  return is_fetching ? down_tile_of<true, false>(tokens, vecs) : down_tile_of<false, false>(tokens, vecs);
}

// Columns [d, d + columns) of all outputs of a group, over some rows of its list.
inline void down_rows(const Problem& p, const Sorted& sorted, const Group& group, const Rows& rows, const float* h,
                      int64_t d, int64_t columns) {
  const float* down = p.down + d / p.panel_columns * p.panel_stride;
  const int32_t* ids = group.neurons.ids + rows.begin;
  const int32_t* next = group.neurons.ids + std::min(rows.end, group.neurons.size - rows.count());
  // Memory likes to be read in one go: where tiles of several tokens take part of the columns and nothing is fetched
  // ahead, one token takes them all first.
  const bool is_whole = down_vecs(std::min<int64_t>(group.count, kDownTokens)) * kWidth >= columns;
  const int64_t lone = !is_whole && !sorted.is_fetching(), others = group.count - lone;
  const int64_t num_tiles = ceil_div(others, kDownTokens);
  for (int64_t tile = -lone; tile < num_tiles; ++tile) {
    const int64_t first = tile < 0 ? 0 : lone + others * tile / num_tiles;
    const int tokens = static_cast<int>(tile < 0 ? 1 : lone + others * (tile + 1) / num_tiles - first);
    const float* hidden[kDownTokens];
    float* y[kDownTokens];
    for (int t = 0; t < tokens; ++t) {
      hidden[t] = h + group.hidden + (first + t) * group.token_stride + rows.begin * group.neuron_stride;
      y[t] = p.out + sorted.order[group.first + first + t] * p.depth + d;
    }
    const int64_t num_vecs = ceil_div(columns, kWidth);
    const int64_t part = ceil_div(num_vecs, ceil_div(num_vecs, down_vecs(tokens))) * kWidth;
    const bool is_fetching = tile == 0 && group.is_first && sorted.is_fetching();
    for (int64_t c = 0; c < columns; c += part) {
      const int64_t left = std::min(part, columns - c);
      const DownTile run = down_tile_of(tokens, ceil_div(left, kWidth), is_fetching, group.is_in_lanes);
      run(down + c, p.down_stride, ids, next, rows.count(), hidden, group.neuron_stride, y, left, rows.begin == 0);
      for (int t = 0; t < tokens; ++t) y[t] += part;
    }
  }
}

// A block of a panel stays near while all tokens pass by; of the next block each expert fetches its rows meanwhile.
inline void down_in_panels(const Problem& p, const Sorted& sorted, const float* h, std::atomic<int64_t>& claimed) {
  const int64_t num_panels = ceil_div(p.depth, p.panel_columns);
  for (int64_t panel = claimed++; panel < num_panels; panel = claimed++) {
    const int64_t d = panel * p.panel_columns, columns = std::min(p.panel_columns, p.depth - d);
    for (int64_t n = 0; n < p.neurons; n += kDownRows)
      for (const Group& group : sorted.groups)
        if (const Rows rows = rows_in_block(group.neurons, n, n + kDownRows); rows.count() > 0)
          down_rows(p, sorted, group, rows, h, d, columns);
  }
}

}  // namespace tomoe
