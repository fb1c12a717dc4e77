// The weights of a layer as the kernels read them, checked once, and the registry that owns them.
//
// tomoe::prepare_experts returns a handle: an int64 tensor [1] that holds a random key, never a pointer. Bytes that
// this process did not make, or whose entry was released, name nothing and raise RuntimeError. Keys are 64 random bits,
// so those of another process, of a fork or of a released entry do not come back. An entry owns the memory that it
// points to: Python may free its tensors first.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../simd/tensors.h"
#include "../../simd/vectors.h"

namespace tomoe {

// D hidden_size, F neurons, N experts, W width of the widest expert; strides in floats.
struct Weights {
  const float* up;  // [2F, D], gate first, or [F, D]; rows are up_stride apart
  const float* up_bias;  // [2F] or [F], or null
  const float* down;  // [D / panel_columns, F, panel_columns]; panels are panel_stride apart, rows down_stride
  const int32_t* ids;  // [N, W], each row sorted
  const int32_t* widths;  // [N]
  int64_t depth, neurons, experts, max_width, up_stride, down_stride, panel_columns, panel_stride;
  int rows_per_neuron;  // 2 with a gate, else 1
  Activation activation;

  // Row of W_up for a neuron; half 0 is the gate's, if there is one.
  const float* up_row(int64_t half, int64_t neuron) const { return up + (half * neurons + neuron) * up_stride; }
};

// --------------------------------------------------------------------------------------------------------- checks
inline Activation activation_of(const std::string& name) {
  for (const auto& [known, activation] : kActivations)
    if (name == known) return activation;
  std::string all;
  for (const auto& [known, activation] : kActivations) all += (all.empty() ? "" : ", ") + std::string(known);
  STD_TORCH_CHECK(false, "activation is '", name, "'; the CPU kernels have ", all);
}

inline void check_lists(const Weights& w) {
  for (int64_t e = 0; e < w.experts; ++e) {
    const int64_t width = w.widths[e];
    STD_TORCH_CHECK(width >= 0 && width <= w.max_width, "widths[", e, "] is ", width, "; neuron_ids has ", w.max_width,
                    " columns");
    const int32_t* ids = w.ids + e * w.max_width;
    for (int64_t i = 0; i < width; ++i) {
      STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < w.neurons, "neuron_ids[", e, ", ", i, "] is ", ids[i], "; there are ",
                      w.neurons, " neurons");
      STD_TORCH_CHECK(i == 0 || ids[i - 1] < ids[i], "neuron_ids[", e, "] is not sorted at ", i);
    }
  }
}

// Everything that the kernels rely on is checked here; the arguments are those of tomoe::prepare_experts.
inline Weights weights_of(const Tensor& up, const std::optional<Tensor>& up_bias, const Tensor& down,
                          const Tensor& neuron_ids, const Tensor& widths, const std::string& activation) {
  STD_TORCH_CHECK(up.scalar_type() == ScalarType::Float && down.scalar_type() == ScalarType::Float,
                  "tomoe::prepare_experts takes float32 weights on a CPU");
  const bool is_in_panels = down.dim() == 3;
  STD_TORCH_CHECK(up.dim() == 2 && (is_in_panels || down.dim() == 2),
                  "up must be a matrix, and down a matrix or [F, panels, columns]");
  const int64_t depth = up.size(1), neurons = down.size(0), panel_columns = is_in_panels ? down.size(2) : depth;
  STD_TORCH_CHECK(down.size(1) * (is_in_panels ? panel_columns : 1) == depth, "down must have the ", depth,
                  " columns of up");
  STD_TORCH_CHECK(neurons > 0 && (up.size(0) == neurons || up.size(0) == 2 * neurons), "up has ", up.size(0),
                  " rows; for the ", neurons, " neurons of down it must have one or two for each");
  STD_TORCH_CHECK(up.stride(1) == 1 && down.stride(down.dim() - 1) == 1, "rows of up and down must be contiguous");
  STD_TORCH_CHECK(depth <= kMaxUpColumns * kMaxUpSlices, "the CPU kernels take up to ", kMaxUpColumns * kMaxUpSlices,
                  " columns");
  STD_TORCH_CHECK(!up_bias || (up_bias->scalar_type() == ScalarType::Float && up_bias->is_contiguous() &&
                               up_bias->numel() == up.size(0)),
                  "up_bias must be contiguous and float32, with one value for each row of up");
  STD_TORCH_CHECK(neuron_ids.is_contiguous() && widths.is_contiguous() && neuron_ids.scalar_type() == ScalarType::Int &&
                      widths.scalar_type() == ScalarType::Int,
                  "neuron_ids and widths must be contiguous and int32");
  STD_TORCH_CHECK(neuron_ids.dim() == 2 && widths.numel() == neuron_ids.size(0),
                  "neuron_ids must be a matrix with a row for each of widths");
  const Weights weights{
      .up = data_of<const float>(up),
      .up_bias = up_bias ? data_of<const float>(*up_bias) : nullptr,
      .down = data_of<const float>(down),
      .ids = data_of<const int32_t>(neuron_ids),
      .widths = data_of<const int32_t>(widths),
      .depth = depth,
      .neurons = neurons,
      .experts = neuron_ids.size(0),
      .max_width = neuron_ids.size(1),
      .up_stride = up.stride(0),
      .down_stride = down.stride(0),
      .panel_columns = is_in_panels ? panel_columns : kPanelColumns,
      .panel_stride = is_in_panels ? down.stride(1) : kPanelColumns,
      .rows_per_neuron = static_cast<int>(up.size(0) / neurons),
      .activation = activation_of(activation),
  };
  check_lists(weights);
  return weights;
}

// ------------------------------------------------------------------------------------------------------ ownership
// A tensor of its own on the memory of ``tensor``: neither ``set_`` on that one nor its end frees the memory.
inline Tensor alias_of(const Tensor& tensor) {
  const int64_t one = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 1, &one, &one, 0, &handle));
  return Tensor(handle);
}

// Weights and what they point to. The lists are copies, since they are trusted once they were checked; values of the
// matrices and the bias may change in place.
class Prepared {
 public:
  Prepared(const Tensor& up, const std::optional<Tensor>& up_bias, const Tensor& down, const Tensor& neuron_ids,
           const Tensor& widths, const std::string& activation)
      : weights_(weights_of(up, up_bias, down, neuron_ids, widths, activation)),
        ids_(weights_.ids, weights_.ids + neuron_ids.numel()),
        widths_(weights_.widths, weights_.widths + widths.numel()) {
    weights_.ids = ids_.data();
    weights_.widths = widths_.data();
    for (const Tensor* tensor : {&up, &down, up_bias ? &*up_bias : nullptr})
      if (tensor) {
        memory_.push_back(alias_of(*tensor));
        addresses_.push_back(memory_.back().data_ptr());
      }
  }
  Prepared(const Prepared&) = delete;

  // A storage can still be resized, which moves or frees the memory that all its tensors share.
  const Weights& weights() const {
    for (size_t i = 0; i < memory_.size(); ++i)
      STD_TORCH_CHECK(memory_[i].data_ptr() == addresses_[i],
                      "the memory of the prepared weights was moved or freed; create ExpertWeights again");
    return weights_;
  }

 private:
  Weights weights_;
  std::vector<int32_t> ids_, widths_;
  std::vector<Tensor> memory_;
  std::vector<const void*> addresses_;
};

// By key. Calls may come from many threads; an entry that is released during a call is freed after it.
class Registry {
 public:
  Tensor add(std::shared_ptr<const Prepared> prepared) {
    const Tensor handle = empty({1}, aoti_torch_dtype_int64());
    const std::unique_lock lock(mutex_);
    int64_t key = 0;
    while (key == 0 || !entries_.try_emplace(key, prepared).second)
      key = static_cast<int64_t>(uint64_t{random_()} << 32 | random_());
    *data_of<int64_t>(handle) = key;
    return handle;
  }

  std::shared_ptr<const Prepared> find(const Tensor& handle) const {
    const int64_t key = key_of(handle);
    const std::shared_lock lock(mutex_);
    const auto entry = entries_.find(key);
    STD_TORCH_CHECK(entry != entries_.end(),
                    "the handle names no prepared weights of this process: they were released, or another process "
                    "made the handle; create ExpertWeights again");
    return entry->second;
  }

  // No effect where there is no such entry.
  void remove(const Tensor& handle) {
    const int64_t key = key_of(handle);
    std::shared_ptr<const Prepared> released;  // freed after the lock is released
    const std::unique_lock lock(mutex_);
    if (const auto entry = entries_.find(key); entry != entries_.end()) {
      released = std::move(entry->second);
      entries_.erase(entry);
    }
  }

 private:
  static int64_t key_of(const Tensor& handle) {
    STD_TORCH_CHECK(handle.scalar_type() == ScalarType::Long && handle.numel() == 1,
                    "a handle is an int64 tensor of one element, made by tomoe::prepare_experts");
    return *data_of<const int64_t>(handle);
  }

  mutable std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Prepared>> entries_;
  std::random_device random_;  // the operating system's: a forked process draws other numbers
};

// Never destroyed: at exit, torch may be gone before the tensors are.
inline Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

}  // namespace tomoe
