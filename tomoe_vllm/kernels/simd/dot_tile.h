// The tile that all CPU kernels sum with: R rows of weights by T tokens, lanes over k.
#pragma once
#include "vectors.h"

namespace tomoe {

// R rows by T tokens, lanes over k. ``out[r][t * token_stride]`` is set, or added to. Meanwhile the same columns of
// ``num_next`` rows ``next`` are fetched into L2.
// A sum's order depends on [begin, end) alone, not on T or R.
template <int T, int R>
void dot_tile(const float* const* w, const float* const* x, int64_t begin, int64_t end, const float* const* next,
              int num_next, float* const* out, int64_t token_stride, bool is_first) {
  // A loop that is left over reaches sums by number, and they lie on the stack (benchmarks/tile_code.py).
  static_assert(T <= 16 && R <= 16, "loops over tokens and rows must be unrolled whole");
  Vec sums[(R * T + 3) / 4 * 4];
#pragma GCC unroll 32
  for (int i = 0; i < (R * T + 3) / 4 * 4; ++i) sums[i] = zero();
  int64_t k = begin;
  for (; k + kWidth <= end; k += kWidth) {
    Vec tokens[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) tokens[t] = load(x[t] + k);
    if (k % 16 == 0)
      for (int n = 0; n < num_next; ++n) __builtin_prefetch(next[n] + k, 0, 2);
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

using DotTile = void (*)(const float* const*, const float* const*, int64_t, int64_t, const float* const*, int,
                         float* const*, int64_t, bool);

template <int T = kDotTokens, int R = (T == 1 ? kLoneDotRows : kDotRows)>
DotTile dot_tile_of(int tokens, int rows) {
  if constexpr (T > 1)
    if (tokens < T) return dot_tile_of<T - 1>(tokens, rows);
  if constexpr (R > 1)
    if (rows < R) return dot_tile_of<T, R - 1>(tokens, rows);
  return dot_tile<T, R>;
}

}  // namespace tomoe
