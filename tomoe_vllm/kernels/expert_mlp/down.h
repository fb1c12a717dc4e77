// Phase 2 of tomoe::expert_mlp: outputs are sums of W_down's rows, lanes over the columns, which the threads share.
//
// A sum adds the neurons in their order, whatever the number of tokens and of threads.
#pragma once
#include "problem.h"

namespace tomoe {

constexpr int64_t kTurnBytes = 1 << 18;  // of the rows that experts take turns at, and as many are fetched: L2
constexpr int64_t kLargeBlockTokens = 8;  // tokens of an expert from which blocks are large
constexpr int64_t kDownColumns = 64;     // of a block's rows that stay near while all tokens pass by
constexpr int64_t kDownRows = 512;       // neurons of a block of many tokens: 128 KB of 64 columns stay in L2

// Neurons of a block that experts take turns at.
inline int64_t block_rows(int64_t columns) {
  return std::clamp<int64_t>(kTurnBytes / (columns * static_cast<int64_t>(sizeof(float))), 16, 128);
}

// One expert's tokens, T by R rows: the outputs pass through registers once for R neurons. Rows ``next`` are fetched.
template <int T, int R>
void stream_tile(const float* const* rows, const float* const* next, const float* const* h, int64_t h_stride,
                 float* const* y, int64_t columns, bool is_first) {
  Vec factors[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) factors[t][r] = broadcast(h[t][r * h_stride]);
  const auto step = [&](int64_t d, int64_t left) {
    const bool is_whole = left >= kWidth;
    Vec sums[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      sums[t] = is_first ? zero() : is_whole ? load(y[t] + d) : load_first(y[t] + d, left);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec weights = is_whole ? load(rows[r] + d) : load_first(rows[r] + d, left);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[t] = fma(factors[t][r], weights, sums[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      if (is_whole) store(y[t] + d, sums[t]);
      else store_first(y[t] + d, sums[t], left);
  };
  int64_t d = 0;
  for (; d + kWidth <= columns; d += kWidth) {
    if (d % 16 == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + d, 0, 2);
    step(d, kWidth);
  }
  if (d < columns) step(d, columns - d);
}

using StreamTile = void (*)(const float* const*, const float* const*, const float* const*, int64_t, float* const*,
                            int64_t, bool);

// Rows that a tile of so many tokens takes at most: as many factors as there are registers for.
constexpr int streamed_rows(int64_t tokens) {
  return static_cast<int>(std::min<int64_t>(kTileSums / tokens, kMaxStreamedRows));
}

template <int T = kStreamedTokens, int R = streamed_rows(T)>
StreamTile stream_tile_of(int64_t tokens, int64_t rows) {
  if constexpr (T > 1)
    if (tokens < T) return stream_tile_of<T - 1>(tokens, rows);
  if constexpr (R > 1)
    if (rows < R) return stream_tile_of<T, R - 1>(tokens, rows);
  return stream_tile<T, R>;
}

// Columns [begin, end) of all outputs where experts have few tokens: memory is the limit, and whole rows are what it
// gives fastest. Experts take turns at blocks of neurons; each fetches its rows of the next.
inline void down_streamed(const Problem& p, const Sorted& sorted, const float* h, int64_t begin, int64_t end) {
  const int64_t columns = end - begin, block = block_rows(columns);
  for (int64_t n = 0; n < p.neurons; n += block)
    for (const Group& group : sorted.groups) {
      const List& list = group.neurons;
      const Rows rows = rows_in_block(list, n, n + block);
      const float* hidden[kStreamedTokens];
      float* y[kStreamedTokens];
      for (int64_t t = 0; t < group.count; ++t) y[t] = p.out + sorted.order[group.first + t] * p.depth + begin;
      const int per_tile = streamed_rows(group.count);
      for (int64_t i = rows.begin; i < rows.end; i += per_tile) {
        const int64_t num_rows = std::min<int64_t>(per_tile, rows.end - i);
        const float *w[kMaxStreamedRows], *next[kMaxStreamedRows];
        for (int64_t r = 0; r < num_rows; ++r) {
          const int64_t later = std::min(rows.end + (i - rows.begin) + r, list.size - 1);
          w[r] = p.down + list.ids[i + r] * p.down_stride + begin;
          next[r] = p.down + list.ids[later] * p.down_stride + begin;
        }
        for (int64_t t = 0; t < group.count; ++t)
          hidden[t] = h + group.hidden + t * group.token_stride + i * group.neuron_stride;
        stream_tile_of(group.count, num_rows)(w, next, hidden, group.neuron_stride, y, columns, i == 0);
      }
    }
}

// T tokens by V vectors of columns, over the rows of one expert in one block of neurons. Sums stay in registers.
// ``next``: rows of ``later`` to be fetched meanwhile, one for each that is used. ``kInLanes``: the tokens' activations
// of a neuron lie side by side, from ``h[0]`` on and ``h_stride`` apart; otherwise a token's of all neurons, from h[t] on.
template <int T, int V, bool kPrefetch, bool kInLanes>
void down_tile(const float* down, const float* later, int64_t stride, const int32_t* ids, const int32_t* next,
               int64_t count, const float* const* h, int64_t h_stride, float* const* y, int64_t columns,
               bool is_first) {
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
        const float* ahead = later + next[i] * stride;
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

using DownTile = void (*)(const float*, const float*, int64_t, const int32_t*, const int32_t*, int64_t,
                          const float* const*, int64_t, float* const*, int64_t, bool);

// Vectors of columns that a tile of so many tokens takes at most: kTileSums sums at most.
constexpr int down_vecs(int64_t tokens) { return kDownVecs * (tokens <= kDownTokens / 2 ? 2 : 1); }

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

// Columns [begin, end) of all outputs: a few columns of a block's rows stay near while all tokens pass by. Of few tokens
// a block is small, and the next block is fetched meanwhile; of many it is large, so that outputs are read and written
// seldom, and its next columns are fetched.
inline void down_in_blocks(const Problem& p, const Sorted& sorted, const float* h, int64_t begin, int64_t end) {
  const bool is_large = sorted.most_tokens >= kLargeBlockTokens;
  const int64_t block = is_large ? kDownRows : block_rows(end - begin);
  const int64_t chunk = kDownColumns * (sorted.most_tokens <= kDownTokens / 2 ? 2 : 1);
  for (int64_t n = 0; n < p.neurons; n += block)
    for (int64_t d = begin; d < end; d += chunk) {
      const int64_t columns = std::min(chunk, end - d);
      const bool is_next_block = !is_large || d + chunk >= end;
      const float* later = p.down + (!is_large ? d : is_next_block ? begin : d + chunk);
      for (const Group& group : sorted.groups) {
        const List& list = group.neurons;
        const Rows rows = rows_in_block(list, n, n + block);
        if (rows.count() == 0) continue;
        const int32_t* next = list.ids + (is_next_block ? std::min(rows.end, list.size - rows.count()) : rows.begin);
        const int64_t num_tiles = ceil_div(group.count, kDownTokens);
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          const int64_t first = group.count * tile / num_tiles;
          const int tokens = static_cast<int>(group.count * (tile + 1) / num_tiles - first);
          const float* hidden[kDownTokens];
          float* y[kDownTokens];
          for (int j = 0; j < tokens; ++j) {
            hidden[j] = h + group.hidden + (first + j) * group.token_stride + rows.begin * group.neuron_stride;
            y[j] = p.out + sorted.order[group.first + first + j] * p.depth + d;
          }
          const int64_t part = down_vecs(tokens) * kWidth;
          for (int64_t c = 0; c < columns; c += part) {
            const int64_t left = std::min(part, columns - c);
            const int vecs = static_cast<int>(ceil_div(left, kWidth));
            const DownTile run = down_tile_of(tokens, vecs, tile == 0 && group.is_first, group.is_in_lanes);
            run(p.down + d + c, later + c, p.down_stride, list.ids + rows.begin, next, rows.count(), hidden,
                group.neuron_stride, y, left, rows.begin == 0);
            for (int j = 0; j < tokens; ++j) y[j] += part;
          }
        }
      }
    }
}

}  // namespace tomoe
