// The micro-kernel of dot products: MR = R rows of weights x NR = T tokens, vectorized over k (the columns).
#pragma once
#include "vectors.h"

namespace tomoe {

struct DotTileArgs {
  const float* const* w;         // R rows of weights
  const float* const* x;         // T rows of activations
  int64_t begin, end;            // columns of both
  const float* const* prefetch;  // rows of which the same columns are prefetched into L2
  int num_prefetch;
  float* const* out;     // out[r][t * token_stride] is set, or added to
  int64_t token_stride;  // in floats
  bool is_first;         // set instead of add
};

// Every sum has one order, which depends on [begin, end) alone, not on T, R or the tile's position.
template <int T, int R>
void dot_tile(const DotTileArgs& args) {
  const auto [w, x, begin, end, prefetch, num_prefetch, out, token_stride, is_first] = args;
  // All loops over tokens and rows must be unrolled: indexed at run time, the sums would be on the stack
  // (benchmarks/tile_code.py counts that).
  static_assert(T <= 16 && R <= 16, "the pragmas below unroll up to 16 iterations");
  Vec sums[(R * T + 3) / 4 * 4];
#pragma GCC unroll 32
  for (int i = 0; i < (R * T + 3) / 4 * 4; ++i) sums[i] = zero();
  int64_t k = begin;
  for (; k + kLanes <= end; k += kLanes) {
    Vec tokens[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) tokens[t] = load(x[t] + k);
    if (k % 16 == 0)
      for (int n = 0; n < num_prefetch; ++n) __builtin_prefetch(prefetch[n] + k, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = load(w[r] + k);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[r * T + t] = fma(row, tokens[t], sums[r * T + t]);
    }
  }
  if (const int64_t left = end - k; left > 0) {
    Vec tokens[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) tokens[t] = load_first(x[t] + k, left);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = load_first(w[r] + k, left);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[r * T + t] = fma(row, tokens[t], sums[r * T + t]);
    }
  }
  float values[(R * T + 3) / 4 * 4];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; i += 4) sum4(sums + i, values + i);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      float& target = out[r][t * token_stride];
      target = is_first ? values[r * T + t] : target + values[r * T + t];
    }
}

using DotTile = void (*)(const DotTileArgs&);

// The instance for ``tokens`` x ``rows``: one token with up to kDecodeRows rows, others with up to kDotRows.
template <int T = kDotTokens, int R = (T == 1 ? kDecodeRows : kDotRows)>
DotTile dot_tile_of(int tokens, int rows) {
  if constexpr (T > 1)
    if (tokens < T) return dot_tile_of<T - 1>(tokens, rows);
  if constexpr (R > 1)
    if (rows < R) return dot_tile_of<T, R - 1>(tokens, rows);
  return dot_tile<T, R>;
}

}  // namespace tomoe
