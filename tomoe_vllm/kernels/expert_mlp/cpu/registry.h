// The weights of all prepared layers of this process, by handle.
//
// A handle is an int64 tensor [1] that holds a random key, never a pointer: bytes that this process did not make, or
// whose entry was released, name nothing and raise RuntimeError. Keys are 64 random bits, so those of another process,
// of a fork or of a released entry do not come back. An entry owns the memory that it points to: Python may free its
// tensors first.
#pragma once
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../../simd/tensors.h"
#include "schedule.h"

namespace tomoe {

// A tensor of its own on the memory of another one: ``set_`` on that one, or its end, does not free the memory.
inline Tensor alias_of(const Tensor& tensor) {
  const int64_t one = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 1, &one, &one, 0, &handle));
  return Tensor(handle);
}

// Memory that a tensor shares with others, and where it was when the weights were prepared.
struct OwnedMemory {
  Tensor tensor;
  const void* address;

  explicit OwnedMemory(const Tensor& other) : tensor(alias_of(other)), address(tensor.data_ptr()) {}
};

struct Prepared {
  Weights weights;  // points into the others
  std::vector<OwnedMemory> memory;
  std::vector<int32_t> neuron_ids, widths;  // copies: they were checked, and are trusted in each call

  // A storage can be resized, and then moves, under a tensor that owns it.
  void check_memory() const {
    for (const OwnedMemory& owned : memory)
      STD_TORCH_CHECK(owned.tensor.data_ptr() == owned.address,
                      "the memory of the prepared weights was moved or freed; make ExpertWeights anew");
  }
};

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
                    "made the handle; make ExpertWeights anew");
    return entry->second;
  }

  void remove(const Tensor& handle) {
    std::shared_ptr<const Prepared> released;  // freed after the lock
    const std::unique_lock lock(mutex_);
    if (const auto entry = entries_.find(key_of(handle)); entry != entries_.end()) {
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
  std::random_device random_;  // the operating system's: a fork has other numbers
};

// Never destroyed: at exit its tensors would outlive what frees them.
inline Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

}  // namespace tomoe
