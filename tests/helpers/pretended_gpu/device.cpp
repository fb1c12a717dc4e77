// A device "gpu" whose memory is the CPU's and whose rules are CUDA's. See __init__.py for what it checks.
//
// torch reserves the dispatch key PrivateUse1 for backends outside its tree. Here one boxed fallback is registered for
// it: it refuses what CUDA refuses, notes what makes CUDA wait, and runs the CPU's kernel on aliases of the arguments
// (CPU tensors on the same memory). Views, storages, autograd and generators are torch's own.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <set>

#include "runtime.h"

namespace {

// ------------------------------------------------------------------------------------------------ rules of an operator
bool is_gpu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kGpu; }

template <typename F>
void for_each_tensor(const c10::IValue& value, F f) {
  if (value.isTensor()) {
    f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) f(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      if (tensor.has_value()) f(*tensor);
    }
  }
}

bool takes_cpu_indices(const std::string& name) {
  static const std::set<std::string> names = {"aten::index",         "aten::index_put",
                                              "aten::index_put_",    "aten::_index_put_impl_",
                                              "aten::_unsafe_index", "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

// CUDA's rule: one device, but for CPU tensors without dims that are only read, and for indices of `x[...]`.
// Returns the device, or nothing for an op without tensors.
std::optional<c10::Device> common_device(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments) {
  std::optional<c10::Device> device;
  for (const auto& argument : arguments) {
    for_each_tensor(argument, [&](const at::Tensor& t) {
      if (is_gpu(t) && !device.has_value()) device = t.device();
    });
  }
  for (const auto& argument : arguments) {
    if (!argument.isGenerator()) continue;
    const auto found = argument.toGenerator().device().type();
    const bool has_tensors = arguments[0].isTensor();
    TORCH_CHECK(!device.has_value() || found == kGpu, "Expected a 'gpu' device type for generator but found '", found,
                "'");
    TORCH_CHECK(device.has_value() || !has_tensors, "Expected a 'cpu' device type for generator but found '", found,
                "'");
  }
  if (!device.has_value()) return device;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = schema.arguments()[i];
    const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    const bool is_index = takes_cpu_indices(schema.name()) && argument.name() == "indices";
    for_each_tensor(arguments[i], [&](const at::Tensor& t) {
      if (!t.defined() || t.device() == *device) return;
      if (t.is_cpu() && (is_index || (t.dim() == 0 && !is_written))) return;
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                  " and ", t.device(), "! (when checking argument for argument ", argument.name(), " in method ",
                  schema.name(), ")");
    });
  }
  return device;
}

bool needs_indices(const c10::IValue& indices, bool copies_masks) {
  bool found = false;
  for_each_tensor(indices, [&](const at::Tensor& t) {
    if (!t.defined()) return;
    found |= t.is_cpu() || (copies_masks && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte));
  });
  return found;
}

// Whether CUDA's kernel waits for the device: the shape of the result, or a check, depends on values.
bool waits_for_device(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  static const std::set<std::string> always = {"aten::_local_scalar_dense",
                                               "aten::equal",
                                               "aten::nonzero",
                                               "aten::masked_select",
                                               "aten::bincount",
                                               "aten::_unique",
                                               "aten::_unique2",
                                               "aten::unique_dim",
                                               "aten::unique_consecutive",
                                               "aten::multinomial",
                                               "aten::histc",
                                               "aten::unique_dim_consecutive",
                                               "aten::_assert_scalar"};
  if (always.count(name) > 0) return true;
  if (name == "aten::repeat_interleave") return arguments.back().isNone();
  if (name != "aten::_index_put_impl_") return false;  // reading `x[...]` calls nonzero or a copy
  const bool is_fill = arguments[2].toTensor().dim() == 0;  // `x[mask] = number` becomes masked_fill
  return needs_indices(arguments[1], /*copies_masks=*/!is_fill);
}

// ------------------------------------------------------------------------------------------ the CPU's kernel on
// aliases
class CpuCall {
 public:
  explicit CpuCall(c10::Device device) : device_(device) {}

  at::Tensor alias(const at::Tensor& tensor) {
    if (!is_gpu(tensor)) return tensor;
    for (const auto& [gpu, cpu] : tensors_) {
      if (gpu.is_same(tensor)) return cpu;
    }
    auto impl = c10::make_intrusive<c10::TensorImpl>(alias_storage(tensor.storage()),
                                                     c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    tensors_.emplace_back(tensor, at::Tensor(std::move(impl)));
    return tensors_.back().second;
  }

  c10::IValue argument(const c10::IValue& value) {
    if (value.isTensor()) return alias(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(alias(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor.has_value() ? std::optional(alias(*tensor)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kGpu) return c10::Device(c10::kCPU);
    if (value.isGenerator() && value.toGenerator().device().type() == kGpu) return cpu_generator(value.toGenerator());
    return value;
  }

  // What the kernel resized is resized on the device.
  void write_back() {
    for (const auto& [gpu, cpu] : storages_) {
      if (gpu.data() == cpu.data() && gpu.nbytes() == cpu.nbytes()) continue;
      gpu.set_data_ptr_noswap(to_gpu(cpu, device_.index()));
      gpu.unsafeGetStorageImpl()->set_nbytes(cpu.nbytes());
    }
    for (const auto& [gpu, cpu] : tensors_) {
      auto* impl = gpu.unsafeGetTensorImpl();
      if (gpu.sizes() != cpu.sizes() || gpu.strides() != cpu.strides() ||
          gpu.storage_offset() != cpu.storage_offset()) {
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }

  at::Tensor output(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) return tensor;
    for (const auto& [gpu, cpu] : tensors_) {
      if (cpu.is_same(tensor)) return gpu;
    }
    auto impl = view_of(tensor);
    if (!impl) {
      const auto bytes = tensor.storage().nbytes();
      const c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes, to_gpu(tensor.storage(), device_.index()),
                                 &gpu_allocator, true);
      impl = c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage),
                                                  c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
      tensors_.emplace_back(at::Tensor(impl), tensor);  // of outputs that share it
      storages_.emplace_back(storage, tensor.storage());
    }
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return at::Tensor(std::move(impl));
  }

  c10::IValue result(const c10::IValue& value) {
    if (value.isTensor()) return output(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(output(tensor));
      return list;
    }
    return value;
  }

 private:
  // With the keys of the tensor that is viewed: in inference mode they differ from those of a new tensor.
  c10::intrusive_ptr<c10::TensorImpl> view_of(const at::Tensor& tensor) {
    for (const auto& [gpu, cpu] : tensors_) {
      if (!cpu.storage().is_alias_of(tensor.storage())) continue;
      return c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(gpu.storage()), gpu.key_set(),
                                                  tensor.dtype());
    }
    return {};
  }

  c10::Storage alias_storage(const c10::Storage& gpu) {
    for (const auto& [known, cpu] : storages_) {
      if (known.is_alias_of(gpu)) return cpu;
    }
    auto* owner = new c10::Storage(gpu);
    c10::DataPtr data(
        gpu.mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::kCPU));
    storages_.emplace_back(gpu, c10::Storage(c10::Storage::use_byte_size_t{}, gpu.nbytes(), std::move(data),
                                             c10::GetAllocator(c10::kCPU), true));
    return storages_.back().second;
  }

  c10::Device device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;      // on the device, alias on the CPU
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // likewise
};

bool is_optional_generator(const c10::Argument& argument) {
  return argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()));
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size()).vec();
  const auto common = common_device(schema, arguments);
  if (common.has_value() && waits_for_device(schema.name(), arguments)) note_synchronization(schema.name());
  c10::Device device = common.value_or(c10::Device(kGpu, current_device));
  for (const auto& argument : arguments) {  // of a factory
    if (!common.has_value() && argument.isDevice() && argument.toDevice().has_index()) device = argument.toDevice();
  }
  CpuCall call(device);
  torch::jit::drop(*stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].isNone() && is_optional_generator(schema.arguments()[i])) {
      torch::jit::push(*stack, cpu_generator(default_generator(device.index())));
    } else {
      torch::jit::push(*stack, call.argument(arguments[i]));
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.write_back();
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (const auto& value : results) torch::jit::push(*stack, call.result(value));
  if (schema.name() == "aten::empty" || schema.name() == "aten::empty_strided") {
    const auto& storage = stack->back().toTensor().storage();
    std::memset(storage.mutable_data(), 0xff, storage.nbytes());  // NaN: memory of a GPU is seldom zero
  }
}

// ---------------------------------------------------------------------------------------- kernels with rules of their
// own
at::Tensor on_cpu(const at::Tensor& tensor) { return CpuCall(tensor.device()).alias(tensor); }

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  const bool to_cpu = target.is_cpu(), from_cpu = source.is_cpu();
  if (to_cpu || from_cpu) {
    const bool is_asynchronous = non_blocking && is_pinned((to_cpu ? target : source).storage().data());
    if (!is_asynchronous) note_synchronization(to_cpu ? "copy to the CPU" : "copy to the device");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  TORCH_CHECK(source.device().type() == kGpu, "Expected a storage on gpu, got one on ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto items = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {items}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
}

TORCH_LIBRARY(pretended_gpu, m) {
  m.def("on_cpu(Tensor(a) self) -> Tensor(a)");
  m.impl("on_cpu", c10::DispatchKey::PrivateUse1, &on_cpu);
  m.def("get_rng_state(int device) -> Tensor",
        [](int64_t device) { return at::Tensor(default_generator(device).unsafeGetGeneratorImpl()->get_state()); });
  m.def("set_rng_state(int device, Tensor state) -> ()", [](int64_t device, const at::Tensor& state) {
    default_generator(device).unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
  });
}

const bool is_registered = [] {
  c10::SetAllocator(kGpu, &gpu_allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

extern "C" {
void gpu_set_available(bool value) { is_available = value; }
int gpu_is_available() { return is_available; }
void gpu_set_callback(void (*callback)(const char*)) { on_synchronization = callback; }
void gpu_set_device(int device) { current_device = static_cast<c10::DeviceIndex>(device); }
void gpu_manual_seed(int device, uint64_t seed) { cpu_generator(default_generator(device)).set_current_seed(seed); }
int gpu_current_device() { return current_device; }
int64_t gpu_allocated(int device) { return usage[device].bytes; }
int64_t gpu_peak(int device) { return usage[device].peak; }
void gpu_reset_peak(int device) { usage[device].peak = usage[device].bytes.load(); }
}
