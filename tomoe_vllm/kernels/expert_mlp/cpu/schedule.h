// The arguments of one call, and the order in which a pass works on its tokens: sorted by expert, in groups.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "prepared.h"

namespace tomoe {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct ExpertMlpArgs : Weights {
  const float* x;  // [T, D]
  float* out;      // [T, D]
};

struct NeuronList {  // sorted
  const int32_t* ids;
  int64_t size;
};

inline NeuronList neurons_of(const Weights& w, int64_t expert) {
  return {w.ids + expert * w.max_width, w.widths[expert]};
}

struct Range {  // entries [begin, end) of a NeuronList
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

// The tokens of one expert, or, where their activations are transposed, one block of them.
struct TokenGroup {
  int64_t first, count;  // in the sorted order
  NeuronList neurons;
  bool is_transposed;
  bool is_first_of_expert;
  // Layout of the group's part of h, which begins at h + hidden: [count, W], or transposed [W, count].
  int64_t hidden = 0, token_stride = 0, neuron_stride = 0;
};

struct TokenSchedule {
  std::vector<int64_t> order;  // of each sorted token: its row in x
  std::vector<TokenGroup> groups;
  NeuronList touched;  // the neurons that any token of the pass needs
  std::vector<int32_t> touched_ids;
  int64_t max_width = 0, max_tokens = 0;  // the largest of an expert

  bool has_prefetch() const { return static_cast<int64_t>(order.size()) >= kPrefetchTokens; }
};

// The entries of a list that are neurons [first, last).
inline Range entries_of(const NeuronList& list, int64_t first, int64_t last) {
  const int32_t* end = list.ids + list.size;
  const int32_t* a = std::lower_bound(list.ids, end, static_cast<int32_t>(first));
  return {a - list.ids, std::lower_bound(a, end, static_cast<int32_t>(last)) - list.ids};
}

// The entries of a list from the begin-th to the end-th neuron that any token needs: blocks of equal work.
inline Range entries_between(const TokenSchedule& schedule, const NeuronList& list, int64_t begin, int64_t end) {
  end = std::min(end, schedule.touched.size);
  if (begin >= end) return {list.size, list.size};
  return entries_of(list, schedule.touched.ids[begin], schedule.touched.ids[end - 1] + 1);
}

// The union of the groups' neurons, as schedule.touched.
inline void find_touched(const Weights& w, TokenSchedule& schedule) {
  schedule.touched = schedule.groups.front().neurons;
  if (schedule.groups.size() == 1) return;
  std::vector<uint8_t> is_touched(w.neurons);
  for (const TokenGroup& group : schedule.groups)
    for (int64_t i = 0; i < group.neurons.size; ++i) is_touched[group.neurons.ids[i]] = 1;
  schedule.touched_ids.resize(w.neurons);
  int64_t size = 0;
  for (int64_t n = 0; n < w.neurons; ++n) {
    schedule.touched_ids[size] = static_cast<int32_t>(n);
    size += is_touched[n];
  }
  schedule.touched = {schedule.touched_ids.data(), size};
}

// Stable counting sort of tokens [first, first + count) by expert. Experts with kTransposedTokens or more give groups
// of kTransposedBlockTokens transposed tokens; what is left of a multiple of kTransposedMultiple is one more group.
inline TokenSchedule schedule_tokens(const Weights& w, const int64_t* expert_ids, int64_t first, int64_t count) {
  TokenSchedule schedule;
  std::vector<int64_t> starts(w.experts + 1);
  for (int64_t t = 0; t < count; ++t) ++starts[expert_ids[first + t] + 1];
  for (int64_t e = 0; e < w.experts; ++e) starts[e + 1] += starts[e];
  schedule.order.resize(count);
  std::vector<int64_t> next(starts);
  for (int64_t t = 0; t < count; ++t) schedule.order[next[expert_ids[first + t]]++] = first + t;
  for (int64_t e = 0; e < w.experts; ++e) {
    const int64_t size = starts[e + 1] - starts[e];
    if (size == 0) continue;
    const NeuronList neurons = neurons_of(w, e);
    const int64_t transposed = size >= kTransposedTokens ? size / kTransposedMultiple * kTransposedMultiple : 0;
    for (int64_t t = 0; t < transposed; t += kTransposedBlockTokens)
      schedule.groups.push_back(
          {starts[e] + t, std::min(kTransposedBlockTokens, transposed - t), neurons, true, t == 0});
    if (size > transposed)
      schedule.groups.push_back({starts[e] + transposed, size - transposed, neurons, false, transposed == 0});
    schedule.max_width = std::max(schedule.max_width, neurons.size);
    schedule.max_tokens = std::max(schedule.max_tokens, size);
  }
  for (TokenGroup& group : schedule.groups) {
    group.hidden = group.first * schedule.max_width;
    group.token_stride = group.is_transposed ? 1 : schedule.max_width;
    group.neuron_stride = group.is_transposed ? group.count : 1;
  }
  find_touched(w, schedule);
  return schedule;
}

}  // namespace tomoe
