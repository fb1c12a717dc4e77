// Helpers for tensors of torch's stable ABI.
//
// torch::stable's contiguous, empty_like and new_empty look an operator up by name in each call, which is a measurable
// part of a call with one token; these do not.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

namespace tomoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialized and contiguous, on the CPU. ``dtype``: from a C function such as aoti_torch_dtype_float32().
template <size_t N>
Tensor empty(const int64_t (&sizes)[N], int32_t dtype) {
  int64_t strides[N];
  strides[N - 1] = 1;
  for (size_t i = N - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace tomoe
