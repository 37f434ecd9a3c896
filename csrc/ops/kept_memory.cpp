#include "kept_memory.h"

#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// torch has this function from 2.11 on. The declaration is weak, because the extension also runs beside torch 2.10,
// where the address is null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace fastnn {
namespace {

// The sizes of blocks: eight for each power of two, so that a block serves a network whose last batch is smaller.
size_t block_bytes(size_t bytes) {
  size_t step = 64;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

struct Blocks {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> idle;  // by their size
  size_t idle_bytes = 0;

  static Blocks& instance() {
    static Blocks& all = *new Blocks;  // never destroyed: tensors may outlive everything
    return all;
  }
};

}  // namespace

void advise_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kHuge = 2 << 20;  // bytes of a page, on x86 and on most ARM systems
  const size_t before = (kHuge - reinterpret_cast<uintptr_t>(block) % kHuge) % kHuge;
  if (bytes < before + kHuge) return;
  madvise(static_cast<char*>(block) + before, (bytes - before) / kHuge * kHuge, MADV_HUGEPAGE);  // a hint: may fail
#endif
}

size_t KeptMemory::most_idle_bytes() {
#if defined(__linux__)
  static const size_t quarter =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 4 * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
  return quarter;
#else
  return size_t{1} << 30;
#endif
}

void* KeptMemory::take(size_t bytes) {
  const size_t size = block_bytes(bytes);
  Blocks& all = Blocks::instance();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.idle.find(size);
    if (found != all.idle.end() && !found->second.empty()) {
      void* const block = found->second.back();
      found->second.pop_back();
      all.idle_bytes -= size;
      return block;
    }
  }
  void* block = std::aligned_alloc(64, size);
  if (!block) {
    release();
    block = std::aligned_alloc(64, size);
  }
  if (block) advise_huge_pages(block, size);
  return block;
}

void KeptMemory::give_back(void* block, size_t bytes) {
  const size_t size = block_bytes(bytes);
  Blocks& all = Blocks::instance();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (all.idle_bytes + size <= most_idle_bytes()) {
      all.idle[size].push_back(block);
      all.idle_bytes += size;
      return;
    }
  }
  std::free(block);
}

void KeptMemory::release() {
  Blocks& all = Blocks::instance();
  std::map<size_t, std::vector<void*>> idle;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    idle.swap(all.idle);
    all.idle_bytes = 0;
  }
  for (const auto& blocks : idle) {
    for (void* const block : blocks.second) std::free(block);
  }
}

size_t KeptMemory::idle_bytes() {
  Blocks& all = Blocks::instance();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.idle_bytes;
}

thread_local bool TensorsInKeptMemory::is_on_ = false;

AtenTensorHandle TensorsInKeptMemory::new_tensor(const Sizes& sizes, const int64_t* strides, int32_t dtype,
                                                 size_t bytes) {
  if (!torch_from_blob || bytes < KeptMemory::kLeastBytes) return nullptr;
  void* const block = KeptMemory::take(bytes);
  if (!block) return nullptr;
  const auto give_back = [](void* data, void* size) { KeptMemory::give_back(data, reinterpret_cast<size_t>(size)); };
  constexpr int32_t kAnyIndex = -1;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      block, static_cast<int64_t>(sizes.size()), sizes.data(), strides, 0, dtype, aoti_torch_device_type_cpu(),
      kAnyIndex, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, reinterpret_cast<void*>(bytes));
  if (error == AOTI_TORCH_SUCCESS) return handle;
  KeptMemory::give_back(block, bytes);
  return nullptr;
}

}  // namespace fastnn
