// Phase 1 of tomoe::expert_mlp: h = act(gate) * up, sums with lanes over the columns (dot_tile.h).
//
// A sum has one order, whatever the number of tokens and of threads.
#pragma once
#include <atomic>

#include "../../simd/dot_tile.h"
#include "schedule.h"

namespace tomoe {

constexpr int64_t kMaxSlice = 2048;       // columns of x and weights at a time where tokens are many: 8 KB a row
constexpr int kMaxSlices = 32;            // so D is at most 65,536
constexpr int64_t kTokenChunk = 32;       // tokens of one expert at a time: 256 KB of x beside a block of weights
constexpr int64_t kRowByRowTokens = 8;    // up to so many tokens of an expert whole rows are taken
constexpr int kMaxNext = 24;              // rows that a tile may fetch

// The columns of a sum, in equal slices.
struct Slices {
  int64_t depth, count, size;

  explicit Slices(int64_t columns)
      : depth(columns), count(ceil_div(columns, kMaxSlice)), size(ceil_div(ceil_div(columns, count), 16) * 16) {}

  int64_t begin(int64_t slice) const { return slice * size; }
  int64_t end(int64_t slice) const { return std::min(begin(slice) + size, depth); }
};

// Activations of one token: ``projected`` is [rows_per_neuron, count].
template <Activation A>
void activate_rows(const Problem& p, const int32_t* ids, const float* projected, int64_t count, float* h) {
  const bool is_gated = p.rows_per_neuron == 2;
  const float* up = projected + count;
  if (p.up_bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float gate = activate<A>(projected[i] + p.up_bias[ids[i]]);
      h[i] = is_gated ? gate * (up[i] + p.up_bias[p.neurons + ids[i]]) : gate;
    }
  } else if (is_gated) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]) * up[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = activate<A>(projected[i]);
  }
}

// Rows that are needed next, fetched at an even pace by ``num_tiles`` tiles.
struct Ahead {
  List neurons;
  int64_t per_tile;
  int64_t taken[kMaxSlices] = {};  // of each slice of columns

  Ahead(const Problem& p, const List& list, const Rows& rows, int64_t num_tiles)
      : neurons{list.ids + rows.begin, rows.count()},
        per_tile(std::min<int64_t>(ceil_div(rows.count(), num_tiles), kMaxNext / p.rows_per_neuron)) {}

  int take(const Problem& p, int64_t slice, const float** rows) {
    int num_rows = 0;
    int64_t& at = taken[slice];
    for (const int64_t end = std::min(at + per_tile, neurons.size); at < end; ++at)
      for (int64_t half = 0; half < p.rows_per_neuron; ++half) rows[num_rows++] = p.up_row(half, neurons.ids[at]);
    return num_rows;
  }
};

// Tiles that a group needs for so many rows.
inline int64_t num_tiles(const Problem& p, const Group& group, int64_t num_rows) {
  return ceil_div(num_rows, kDotRows / p.rows_per_neuron) * ceil_div(group.count, kDotTokens);
}

// h of ``count`` tokens of one expert, from sorted token ``first``, for some rows of its list.
inline void up_rows(const Problem& p, const Sorted& sorted, const Group& group, const Rows& rows, int64_t first,
                    int64_t count, float* h, float* local, Ahead& ahead) {
  const int32_t* ids = group.neurons.ids;
  const int64_t width = rows.count(), token_stride = width * p.rows_per_neuron;
  const Slices slices(p.depth);
  const float* x[kTokenChunk];
  for (int64_t t = 0; t < count; ++t) x[t] = p.x + sorted.order[first + t] * p.depth;
  // Tiles of about equal size: 5 tokens are 3 and 2, not 4 and 1.
  const int num_tiles = static_cast<int>(ceil_div(count, kDotTokens));
  const int large = static_cast<int>(ceil_div(count, num_tiles));
  const int num_large = static_cast<int>(count) - (large - 1) * num_tiles;
  const int64_t row_tiles = ceil_div(width, kDotRows / p.rows_per_neuron), per_tile = ceil_div(width, row_tiles);
  const auto tiles = [&](int64_t i, int64_t slice) {
    const float* w[kDotRows];
    float* out[kDotRows];
    const int neurons = static_cast<int>(std::min<int64_t>(per_tile, rows.end - i));
    const int num_rows = neurons * p.rows_per_neuron;
    for (int r = 0; r < num_rows; ++r) {
      const int64_t half = r / neurons, n = r % neurons;
      w[r] = p.up_row(half, ids[i + n]);
      out[r] = local + half * width + (i + n - rows.begin);
    }
    const float* const* tokens = x;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int num_tokens = tile < num_large ? large : large - 1;
      const float* next[kMaxNext];
      const int num_next = ahead.take(p, slice, next);
      dot_tile_of(num_tokens, num_rows)(w, tokens, slices.begin(slice), slices.end(slice), next, num_next, out,
                                        token_stride, slice == 0);
      tokens += num_tokens;
      for (int r = 0; r < num_rows; ++r) out[r] += num_tokens * token_stride;
    }
  };
  // Few tokens: row by row, as memory likes it. Many: a slice of all rows while the tokens' slice is near.
  if (count <= kRowByRowTokens) {
    for (int64_t i = rows.begin; i < rows.end; i += per_tile)
      for (int64_t slice = 0; slice < slices.count; ++slice) tiles(i, slice);
  } else {
    for (int64_t slice = 0; slice < slices.count; ++slice)
      for (int64_t i = rows.begin; i < rows.end; i += per_tile) tiles(i, slice);
  }
  float* target = h + group.hidden + (first - group.first) * group.token_stride + rows.begin;
  with_activation(p.activation, [&]<Activation A>() {
    for (int64_t t = 0; t < count; ++t)
      activate_rows<A>(p, ids + rows.begin, local + t * token_stride, width, target + t * group.token_stride);
  });
}

// The same for all tokens of a group, in chunks of about equal size.
inline void up_chunks(const Problem& p, const Sorted& sorted, const Group& group, const Rows& rows, float* h,
                      float* local, Ahead& ahead) {
  const int64_t chunks = ceil_div(group.count, kTokenChunk);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = group.count * c / chunks, last = group.count * (c + 1) / chunks;
    up_rows(p, sorted, group, rows, group.first + first, last - first, h, local, ahead);
  }
}

// Experts take turns at blocks of neurons, while a block is near: memory is read once. Blocks are claimed one ahead, so
// that it is known which rows to fetch while one is computed with, and memory works as long as the arithmetic does.
inline void up_in_turn(const Problem& p, const Sorted& sorted, float* h, float* local, int64_t block,
                       std::atomic<int64_t>& claimed) {
  const int64_t num_blocks = ceil_div(sorted.touched.size, block);
  for (int64_t b = claimed++, next; b < num_blocks; b = next) {
    next = claimed++;
    int64_t tiles = 0;
    for (const Group& group : sorted.groups)
      tiles += num_tiles(p, group, rows_between(sorted, group.neurons, b * block, (b + 1) * block).count());
    const int64_t fetched = sorted.is_fetching() ? block : 0;
    Ahead ahead(p, sorted.touched, rows_between(sorted, sorted.touched, next * block, next * block + fetched), tiles);
    for (const Group& group : sorted.groups) {
      const Rows rows = rows_between(sorted, group.neurons, b * block, (b + 1) * block);
      if (rows.count() > 0) up_chunks(p, sorted, group, rows, h, local, ahead);
    }
  }
}

}  // namespace tomoe
