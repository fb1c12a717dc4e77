// tomoe::expert_mlp for a token alone: nothing to sort, no row that comes back, no arithmetic to fetch rows beside.
//
// Its time is that of memory, and of code and tables that are in no cache: both are kept few. Sums are those of up_dot.h
// and down.h, bit for bit.
#pragma once
#include "down.h"
#include "up_dot.h"

namespace tomoe {

// h of some rows of the expert's list. ``local``: room for [rows_per_neuron, rows].
inline void up_of_token(const Problem& p, const int32_t* ids, int64_t count, float* local, float* h) {
  const int64_t per_tile = kLoneDotRows / p.rows_per_neuron;
  const Slices slices(p.depth);
  for (int64_t i = 0; i < count; i += per_tile) {
    const int neurons = static_cast<int>(std::min(per_tile, count - i)), num_rows = neurons * p.rows_per_neuron;
    const float* w[kLoneDotRows];
    float* out[kLoneDotRows];
    for (int r = 0; r < num_rows; ++r) {
      const int64_t half = r / neurons, n = i + r % neurons;
      w[r] = p.up_row(half, ids[n]);
      out[r] = local + half * count + n;
    }
    for (int64_t slice = 0; slice < slices.count; ++slice)
      dot_tile_of(1, num_rows)(w, &p.x, slices.begin(slice), slices.end(slice), nullptr, 0, out, 1, slice == 0);
  }
  with_activation(p.activation, [&]<Activation A>() { activate_rows<A>(p, ids, local, count, h); });
}

// Columns [d, d + columns) of the output.
inline void down_of_token(const Problem& p, const List& neurons, const float* h, int64_t d, int64_t columns) {
  const float* down = p.down + d / p.panel_columns * p.panel_stride;
  for (int64_t c = 0; c < columns; c += kPanelColumns) {
    const int64_t left = std::min(kPanelColumns, columns - c);
    float* y = p.out + d + c;
    down_tile_of(1, ceil_div(left, kWidth), false, false)(down + c, p.down_stride, neurons.ids, neurons.ids,
                                                          neurons.size, &h, 1, &y, left, true);
  }
}

}  // namespace tomoe
