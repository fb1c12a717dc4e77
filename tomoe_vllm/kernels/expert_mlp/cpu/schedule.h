// What one pass of tomoe::expert_mlp works on: the weights, and the tokens sorted by expert.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../simd/vectors.h"

namespace tomoe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kFetchingTokens = 5;  // tokens of a pass from which code fetches what comes next; the hardware alone
                                        // is as good where there is next to no arithmetic
constexpr int64_t kManyTokens = 16;  // tokens of an expert from which it takes its rows alone, and
constexpr int64_t kLaneTokens = 64;  // from which they lie in lanes (up_transposed.h), as many as this divides:
constexpr int64_t kLaneMultiple = 16;
constexpr int64_t kLaneChunk = kLaneVecs * kWidth;  // tokens in lanes at a time

struct Weights {
  const float* up;        // [2F, D], gate first, or [F, D], rows up_stride apart
  const float* up_bias;   // [2F] or [F], or null
  const float* down;      // [D / panel_columns, F, panel_columns]: panels panel_stride, rows down_stride apart
  const int32_t* ids;     // [N, max_width], sorted
  const int32_t* widths;  // [N]
  int64_t depth, neurons, experts, max_width, up_stride, down_stride, panel_columns, panel_stride;
  int rows_per_neuron;  // 2 with a gate
  Activation activation;

  // Row of W_up for a neuron: half 0 is the gate's where there is one.
  const float* up_row(int64_t half, int64_t neuron) const { return up + (half * neurons + neuron) * up_stride; }
};

struct Problem : Weights {
  const float* x;  // [T, D]
  float* out;      // [T, D]
};

struct List {  // of neurons, sorted
  const int32_t* ids;
  int64_t size;
};

struct Group {  // tokens of one expert; of those in lanes, one chunk
  int64_t first, count;  // of the sorted tokens
  List neurons;
  bool is_in_lanes;
  bool is_first;  // of its expert's
  // Its activations begin at ``hidden``: [count, width of the widest expert], or, of tokens in lanes, [width, count].
  int64_t hidden, token_stride, neuron_stride;
};

struct Sorted {
  std::vector<int64_t> order;  // of each sorted token: its row in x
  std::vector<Group> groups;
  std::vector<int32_t> in_union;
  List touched;  // the neurons that any token needs
  int64_t max_width = 0, most_tokens = 0;  // of an expert

  bool is_fetching() const { return static_cast<int64_t>(order.size()) >= kFetchingTokens; }
};

struct Rows {  // entries [begin, end) of a list
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

// The entries that fall into a block of neurons.
inline Rows rows_in_block(const List& list, int64_t first, int64_t last) {
  const int32_t* end = list.ids + list.size;
  const int32_t* a = std::lower_bound(list.ids, end, static_cast<int32_t>(first));
  return {a - list.ids, std::lower_bound(a, end, static_cast<int32_t>(last)) - list.ids};
}

// The entries of a list between the begin-th and the end-th neuron that any token needs: shares of equal work.
inline Rows rows_between(const Sorted& sorted, const List& list, int64_t begin, int64_t end) {
  end = std::min(end, sorted.touched.size);
  if (begin >= end) return {list.size, list.size};
  return rows_in_block(list, sorted.touched.ids[begin], sorted.touched.ids[end - 1] + 1);
}

// Stable counting sort of tokens [first, first + count) by expert.
inline Sorted sort_tokens(const Problem& p, const int64_t* expert_ids, int64_t first, int64_t count) {
  Sorted sorted;
  std::vector<int64_t> starts(p.experts + 1);
  for (int64_t t = 0; t < count; ++t) ++starts[expert_ids[first + t] + 1];
  for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
  sorted.order.resize(count);
  std::vector<int64_t> next(starts);
  for (int64_t t = 0; t < count; ++t) sorted.order[next[expert_ids[first + t]]++] = first + t;
  for (int64_t e = 0; e < p.experts; ++e) {
    if (starts[e + 1] == starts[e]) continue;
    const List neurons{p.ids + e * p.max_width, p.widths[e]};
    const int64_t size = starts[e + 1] - starts[e];
    const int64_t in_lanes = size >= kLaneTokens ? size / kLaneMultiple * kLaneMultiple : 0;
    for (int64_t chunk = 0; chunk < in_lanes; chunk += kLaneChunk)
      sorted.groups.push_back({starts[e] + chunk, std::min(kLaneChunk, in_lanes - chunk), neurons, true, chunk == 0});
    if (size > in_lanes) sorted.groups.push_back({starts[e] + in_lanes, size - in_lanes, neurons, false, in_lanes == 0});
    sorted.max_width = std::max(sorted.max_width, neurons.size);
    sorted.most_tokens = std::max(sorted.most_tokens, size);
  }
  for (Group& group : sorted.groups) {
    group.hidden = group.first * sorted.max_width;
    group.token_stride = group.is_in_lanes ? 1 : sorted.max_width;
    group.neuron_stride = group.is_in_lanes ? group.count : 1;
  }
  sorted.touched = sorted.groups.front().neurons;
  if (sorted.groups.size() > 1) {
    std::vector<uint8_t> is_touched(p.neurons);
    for (const Group& group : sorted.groups)
      for (int64_t i = 0; i < group.neurons.size; ++i) is_touched[group.neurons.ids[i]] = 1;
    sorted.in_union.resize(p.neurons);
    int64_t size = 0;
    for (int64_t n = 0; n < p.neurons; ++n) {
      sorted.in_union[size] = static_cast<int32_t>(n);
      size += is_touched[n];
    }
    sorted.touched = {sorted.in_union.data(), size};
  }
  return sorted;
}

}  // namespace tomoe
