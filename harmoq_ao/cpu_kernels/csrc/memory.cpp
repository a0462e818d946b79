#include "memory.h"

#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace harmoq {
namespace {

constexpr size_t kPage = size_t{1} << 21;      // bytes of a huge page
constexpr size_t kSmall = size_t{1} << 18;     // below this, torch's own allocator serves as well
constexpr size_t kKept = size_t{64} << 20;     // bytes that are kept in any case

// Blocks that were given back, by size. What is kept is never more than what was in use at one time.
class Pool {
 public:
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    in_use_ += bytes;
    most_ = std::max(most_, in_use_);
    const auto found = free_.lower_bound(bytes);
    if (found == free_.end() || found->first > 2 * bytes) {
      void* block = std::aligned_alloc(kPage, bytes);
      TORCH_CHECK(block != nullptr, "no memory for a matrix of ", bytes, " bytes");
      madvise(block, bytes, MADV_HUGEPAGE);
      sizes_[block] = bytes;
      return block;
    }
    void* block = found->second;
    kept_ -= found->first;
    in_use_ += found->first - bytes;
    free_.erase(found);
    return block;
  }

  void give(void* block) {
    const std::lock_guard<std::mutex> guard(lock_);
    const size_t bytes = sizes_[block];
    in_use_ -= bytes;
    if (kept_ + bytes > std::max(most_, kKept)) {
      sizes_.erase(block);
      std::free(block);
      return;
    }
    kept_ += bytes;
    free_.emplace(bytes, block);
  }

 private:
  std::mutex lock_;
  std::multimap<size_t, void*> free_;
  std::map<void*, size_t> sizes_;
  size_t in_use_ = 0, most_ = 0, kept_ = 0;
};

Pool& pool() {
  static Pool* const shared = new Pool;  // outlives the tensors of other static objects
  return *shared;
}

}  // namespace

at::Tensor token_rows(int64_t rows, int64_t columns, at::ScalarType type) {
  const int64_t size = static_cast<int64_t>(c10::elementSize(type)), line = kLine / size;
  const int64_t stride = columns < line ? columns : (columns + line - 1) / line * line;
  const size_t bytes = static_cast<size_t>(rows * stride * size), whole = (bytes + kPage - 1) / kPage * kPage;
  if (bytes < kSmall) return at::empty({rows, stride}, at::TensorOptions(type)).narrow(1, 0, columns);
  void* block = pool().take(whole);
  return at::from_blob(block, {rows, columns}, {stride, 1}, [](void* p) { pool().give(p); }, at::TensorOptions(type));
}

}  // namespace harmoq

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("token_rows(int rows, int columns, ScalarType type) -> Tensor", &harmoq::token_rows);
}
