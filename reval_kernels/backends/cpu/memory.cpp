// Memory for large gradients (memory.h): an allocator that keeps the last freed blocks for the next gradients.
#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace reval {
namespace {

#ifdef __linux__

constexpr size_t kPage = size_t{2} << 20;       // size of a huge page
constexpr size_t kSmallest = size_t{32} << 20;  // smaller blocks come from malloc, which keeps freed blocks itself
constexpr size_t kKept = 2;                     // number of kept blocks: the gradient of a head and that of logits

struct Block {
  char* data;
  size_t size;
};

// New memory, aligned to huge pages. `data` is null if the system has no memory.
Block map(size_t size) {
  void* mapped = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {nullptr, 0};
  const auto begin = reinterpret_cast<uintptr_t>(mapped), data = (begin + kPage - 1) / kPage * kPage;
  if (data > begin) munmap(mapped, data - begin);
  munmap(reinterpret_cast<void*>(data + size), begin + kPage - data);
  madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);
  return {reinterpret_cast<char*>(data), size};
}

class GradientAllocator final : public c10::Allocator {
 public:
  // The allocator is never destroyed, because a tensor may live longer than any static object.
  static GradientAllocator& get() {
    static auto* allocator = new GradientAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetCPUAllocator()->allocate(bytes);
    auto block = std::make_unique<Block>(take(bytes));
    if (!block->data) *block = map(multiple(bytes));
    if (!block->data) {
      drop();
      *block = map(multiple(bytes));
    }
    if (!block->data) return c10::GetCPUAllocator()->allocate(bytes);  // raises torch's usual out-of-memory error
    char* data = block->data;
    return {data, block.release(), &GradientAllocator::free, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static size_t multiple(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

  GradientAllocator() { kept_.reserve(kKept + 1); }  // free() then never allocates, so it never throws

  // Takes the smallest kept block of at least `bytes`. A block more than twice as large as needed is not taken.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->size >= bytes && it->size / 2 <= multiple(bytes);
      if (fits && (best == kept_.end() || it->size < best->size)) best = it;
    }
    if (best == kept_.end()) return {nullptr, 0};
    const Block block = *best;
    kept_.erase(best);
    return block;
  }

  static void free(void* context) {
    auto* block = static_cast<Block*>(context);
    get().keep(*block);
    delete block;
  }

  // Keeps a freed block. If there are then more than kKept blocks, the one that was freed first goes back to the
  // system.
  void keep(Block block) {
    if (madvise(block.data, block.size, MADV_FREE) != 0) {
      munmap(block.data, block.size);
      return;
    }
    Block oldest = {nullptr, 0};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
      if (kept_.size() > kKept) {
        oldest = kept_.front();
        kept_.erase(kept_.begin());
      }
    }
    if (oldest.data) munmap(oldest.data, oldest.size);  // after the lock is released, because munmap takes long
  }

  // Gives all kept blocks back to the system, because an allocation has failed.
  void drop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : kept_) munmap(block.data, block.size);
    kept_.clear();
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // sorted by the time at which they were freed, the oldest first
};

c10::Allocator* allocator() { return &GradientAllocator::get(); }

#else

c10::Allocator* allocator() { return c10::GetCPUAllocator(); }

#endif

}  // namespace

at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType type) {
  at::Tensor out(at::detail::empty_generic(
      sizes, allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt));
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    at::native::fill_empty_deterministic_(out);  // as at::empty does
  }
  return out;
}

}  // namespace reval
