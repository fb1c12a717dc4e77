// What torch asks of a device: its memory, generators, current device and streams. Part of device.cpp.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr auto kGpu = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kNumDevices = 2;

std::atomic<bool> is_available{false};
void (*on_synchronization)(const char* what) = nullptr;
thread_local c10::DeviceIndex current_device = 0;

void note_synchronization(const std::string& what) {
  if (on_synchronization != nullptr) on_synchronization(what.c_str());
}

// ------------------------------------------------------------------------------------------------------------ memory
struct Usage {
  std::atomic<int64_t> bytes{0}, peak{0};
} usage[kNumDevices];

struct Memory {  // of one storage of the device: a storage of the CPU
  c10::Storage cpu;
  int64_t bytes;
  c10::DeviceIndex device;
};

void release(void* context) {
  auto* memory = static_cast<Memory*>(context);
  usage[memory->device].bytes -= memory->bytes;
  delete memory;
}

c10::DataPtr to_gpu(const c10::Storage& cpu, c10::DeviceIndex device) {
  auto* memory = new Memory{cpu, static_cast<int64_t>(cpu.nbytes()), device};
  const int64_t bytes = usage[device].bytes += memory->bytes;
  if (bytes > usage[device].peak) usage[device].peak = bytes;
  return {cpu.mutable_data(), memory, &release, c10::Device(kGpu, device)};
}

c10::DataPtr allocate_on(c10::DeviceIndex device, size_t bytes) {
  const c10::Storage cpu(c10::Storage::use_byte_size_t{}, bytes, c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  std::memset(cpu.mutable_data(), 0xff, bytes);
  return to_gpu(cpu, device);
}

struct GpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return allocate_on(current_device, bytes); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} gpu_allocator;

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // first byte -> length

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(bytes + 1);
    const std::lock_guard lock(pinned_mutex);
    pinned[static_cast<char*>(data)] = bytes + 1;
    return {data, data, &free_pinned, c10::kCPU};
  }
  static void free_pinned(void* data) {
    const std::lock_guard lock(pinned_mutex);
    pinned.erase(static_cast<char*>(data));
    std::free(data);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_allocator;

bool is_pinned(const void* data) {
  const std::lock_guard lock(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  return after != pinned.begin() && static_cast<const char*>(data) < std::prev(after)->first + std::prev(after)->second;
}

// --------------------------------------------------------------------------------------------------- random numbers
struct GpuGenerator final : c10::GeneratorImpl {
  explicit GpuGenerator(c10::DeviceIndex index, at::Generator cpu)
      : GeneratorImpl(c10::Device(kGpu, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(cpu) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  GpuGenerator* clone_impl() const override { return new GpuGenerator(device().index(), cpu.clone()); }
  at::Generator cpu;
};

at::Generator make_generator(c10::DeviceIndex index) {
  return at::make_generator<GpuGenerator>(index < 0 ? current_device : index,
                                          at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val));
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const at::Generator generators[kNumDevices] = {make_generator(0), make_generator(1)};
  return generators[index < 0 ? current_device : index];
}

at::Generator cpu_generator(const at::Generator& generator) {
  return static_cast<GpuGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

// --------------------------------------------------------------------------------------------------- device and hooks
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kGpu> {
  c10::Device getDevice() const override { return {kGpu, current_device}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kNumDevices, "there is no device ", device);
    uncheckedSetDevice(device);
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device old = getDevice();
    setDevice(device);
    return old;
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, {kGpu, device.has_index() ? device.index() : current_device});
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { note_synchronization("Event.synchronize"); }
  void synchronizeStream(const c10::Stream&) const override { note_synchronization("Stream.synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { note_synchronization("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return is_available; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return is_available; }
  c10::DeviceIndex deviceCount() const override { return kNumDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override { return make_generator(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const auto device = storage.device().index();
    auto data = allocate_on(device, bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
} hooks;

}  // namespace
