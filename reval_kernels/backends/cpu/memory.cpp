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

constexpr size_t kPage = size_t{2} << 20;       // a huge page
constexpr size_t kSmallest = size_t{32} << 20;  // below it, malloc itself keeps what was freed
constexpr size_t kKept = 2;                     // blocks: the gradient of a head, and that of logits

struct Block {
  char* data;
  size_t size;
};

// Its data is null if there is none.
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
  // Never destroyed: tensors may outlive whatever is.
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
    if (!block->data) return c10::GetCPUAllocator()->allocate(bytes);  // which finds the words for it
    char* data = block->data;
    return {data, block.release(), &GradientAllocator::free, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static size_t multiple(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

  GradientAllocator() { kept_.reserve(kKept + 1); }  // so that freeing never throws

  // The smallest kept block with room for `bytes`, unless half of it would lie idle.
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

  // The longest kept goes when there are more than kKept.
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
    if (oldest.data) munmap(oldest.data, oldest.size);  // takes long: others need not wait
  }

  // Gives all that waits back: memory is short.
  void drop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : kept_) munmap(block.data, block.size);
    kept_.clear();
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order in which they were freed
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
