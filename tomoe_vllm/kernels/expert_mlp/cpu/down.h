// Phase 2 of the expert MLP: out = sum over the neurons of h * W_down's rows, vectorized over the columns.
//
// Threads take panels of columns dynamically. Where the weights are stored in panels (weight_layout.empty_panels), the
// rows of a panel are contiguous, so an expert's are read as one stream. A sum adds the neurons in their order,
// whatever the number of tokens and threads.
#pragma once
#include <atomic>

#include "schedule.h"

namespace tomoe {

struct DownTileArgs {
  const float* down;    // W_down at the tile's first column
  int64_t down_stride;  // in floats
  const int32_t* ids;   // ``count`` neurons
  const int32_t* prefetch_ids;  // as many, whose rows are prefetched
  int64_t count;
  const float* const* h;  // of each token; transposed: h[0] of all tokens, which are contiguous
  int64_t neuron_stride;  // between neurons of h, where transposed
  float* const* y;        // T rows of the output, at the tile's first column
  int64_t columns;        // up to V * kLanes
  bool is_first;          // start from zero instead of y
};

// The micro-kernel: MR = V vectors of columns x NR = T tokens, over some neurons of one expert.
template <int T, int V, bool kPrefetch, bool kTransposed>
void down_tile(const DownTileArgs& args) {
  const auto [down, down_stride, ids, prefetch_ids, count, h, neuron_stride, y, columns, is_first] = args;
  Vec sums[T][V];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kLanes;
      sums[t][v] = is_first ? zero() : left >= kLanes ? load(y[t] + v * kLanes) : load_first(y[t] + v * kLanes, left);
    }
  const int64_t last = columns - (V - 1) * kLanes;
  const float* token[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) token[t] = kTransposed ? h[0] + t : h[t];
  const auto add_rows = [&, down = down, down_stride = down_stride, ids = ids, prefetch_ids = prefetch_ids,
                         count = count, neuron_stride = neuron_stride](auto load_last) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i) {
      const float* row = down + ids[i] * down_stride;
      const int64_t neuron = kTransposed ? i * neuron_stride : i;
      if constexpr (kPrefetch) {
        const float* later = down + prefetch_ids[i] * down_stride;
#pragma GCC unroll 16
        for (int v = 0; v < V * kLanes; v += 16) __builtin_prefetch(later + v, 0, 2);
      }
      Vec weights[V];
#pragma GCC unroll 16
      for (int v = 0; v < V - 1; ++v) weights[v] = load(row + v * kLanes);
      weights[V - 1] = load_last(row + (V - 1) * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const Vec factor = broadcast(token[t][neuron]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[t][v] = fma(factor, weights[v], sums[t][v]);
      }
    }
  };
  // Two loops: with AVX2, a branch to a partial vector inside one loop costs half of the speed.
  if (last >= kLanes) add_rows(load);
  else add_rows([&](const float* p) { return load_first(p, last); });
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * kLanes;
      if (left >= kLanes) store(y[t] + v * kLanes, sums[t][v]);
      else store_first(y[t] + v * kLanes, sums[t][v], left);
    }
}

using DownTile = void (*)(const DownTileArgs&);

// Largest V for ``tokens`` tokens: one token takes a panel at once; of a few, half as many leave room for twice as many
// vectors.
constexpr int max_down_vecs(int64_t tokens) {
  constexpr int kPanelVecs = kPanelColumns / kLanes;
  return tokens == 1 ? kPanelVecs : std::min(kPanelVecs, kDownVecs * (tokens <= kDownTokens / 2 ? 2 : 1));
}

template <bool kPrefetch, bool kTransposed, int T = kDownTokens, int V = max_down_vecs(T)>
DownTile down_tile_of(int tokens, int vecs) {
  if constexpr (T > 1)
    if (tokens < T) return down_tile_of<kPrefetch, kTransposed, T - 1>(tokens, vecs);
  if constexpr (V > 1)
    if (vecs < V) return down_tile_of<kPrefetch, kTransposed, T, V - 1>(tokens, vecs);
  return down_tile<T, V, kPrefetch, kTransposed>;
}

inline DownTile down_tile_of(int tokens, int vecs, bool has_prefetch, bool is_transposed) {
  if (is_transposed)
    return has_prefetch ? down_tile_of<true, true>(tokens, vecs) : down_tile_of<false, true>(tokens, vecs);
  return has_prefetch ? down_tile_of<true, false>(tokens, vecs) : down_tile_of<false, false>(tokens, vecs);
}

// W_down at column d, which begins a panel.
inline const float* panel_at(const Weights& w, int64_t d) { return w.down + d / w.panel_columns * w.panel_stride; }

// ------------------------------------------------------------------------------------------------------ one token
// Columns [d, d + columns) of the output.
inline void down_of_token(const ExpertMlpArgs& p, const NeuronList& neurons, const float* h, int64_t d,
                          int64_t columns) {
  for (int64_t c = 0; c < columns; c += kPanelColumns) {
    const int64_t left = std::min(kPanelColumns, columns - c);
    float* y = p.out + d + c;
    down_tile_of(1, ceil_div(left, kLanes), false, false)(
        {panel_at(p, d) + c, p.down_stride, neurons.ids, neurons.ids, neurons.size, &h, 1, &y, left, true});
  }
}

// --------------------------------------------------------------------------------------------------- many tokens
// Columns [d, d + columns) of all outputs of a group, over a range of its list.
inline void down_group(const ExpertMlpArgs& p, const TokenSchedule& schedule, const TokenGroup& group,
                       const Range& range, const float* h, int64_t d, int64_t columns) {
  const float* down = panel_at(p, d);
  const int32_t* ids = group.neurons.ids + range.begin;
  const int32_t* prefetch_ids = group.neurons.ids + std::min(range.end, group.neurons.size - range.count());
  // Sequential reads are fastest: where tiles of several tokens take only a part of the columns, and there are no
  // prefetch instructions, one token first reads all columns of the panel.
  const bool is_whole = max_down_vecs(std::min<int64_t>(group.count, kDownTokens)) * kLanes >= columns;
  const int64_t single = !is_whole && !schedule.has_prefetch(), others = group.count - single;
  const int64_t num_tiles = ceil_div(others, kDownTokens);
  for (int64_t tile = -single; tile < num_tiles; ++tile) {
    const int64_t first = tile < 0 ? 0 : single + others * tile / num_tiles;
    const int tokens = static_cast<int>(tile < 0 ? 1 : single + others * (tile + 1) / num_tiles - first);
    const float* hidden[kDownTokens];
    float* y[kDownTokens];
    for (int t = 0; t < tokens; ++t) {
      hidden[t] = h + group.hidden + (first + t) * group.token_stride + range.begin * group.neuron_stride;
      y[t] = p.out + schedule.order[group.first + first + t] * p.depth + d;
    }
    const int64_t num_vecs = ceil_div(columns, kLanes);
    const int64_t part = ceil_div(num_vecs, ceil_div(num_vecs, max_down_vecs(tokens))) * kLanes;
    const bool has_prefetch = tile == 0 && group.is_first_of_expert && schedule.has_prefetch();
    for (int64_t c = 0; c < columns; c += part) {
      const int64_t left = std::min(part, columns - c);
      const DownTile run = down_tile_of(tokens, ceil_div(left, kLanes), has_prefetch, group.is_transposed);
      run({down + c, p.down_stride, ids, prefetch_ids, range.count(), hidden, group.neuron_stride, y, left,
           range.begin == 0});
      for (int t = 0; t < tokens; ++t) y[t] += part;
    }
  }
}

// Panels outside (taken by threads dynamically), KC blocks of neurons, then groups: a block of a panel stays in L2
// while all tokens use it. Each expert prefetches its rows of the next block.
inline void down_panels(const ExpertMlpArgs& p, const TokenSchedule& schedule, const float* h,
                        std::atomic<int64_t>& next_panel) {
  const int64_t num_panels = ceil_div(p.depth, p.panel_columns);
  for (int64_t panel = next_panel++; panel < num_panels; panel = next_panel++) {
    const int64_t d = panel * p.panel_columns, columns = std::min(p.panel_columns, p.depth - d);
    for (int64_t n = 0; n < p.neurons; n += kDownBlockNeurons)
      for (const TokenGroup& group : schedule.groups)
        if (const Range range = entries_of(group.neurons, n, n + kDownBlockNeurons); range.count() > 0)
          down_group(p, schedule, group, range, h, d, columns);
  }
}

}  // namespace tomoe
