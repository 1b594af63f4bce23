// Tensors and workspace of the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "tensor.h"

namespace pixnorm {

// PyTorch does not cache CPU memory, so the page faults of a large new tensor cost as much as the kernel that fills it:
// 64 MB take 40 ms in 4 KB pages and 8 ms in 2 MB pages (EPYC 7003). So ask for huge pages, but only in blocks that
// malloc maps and unmaps as a whole (glibc: above 32 MB). On the heap they cost more than they save.
inline void use_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2u << 20;
  constexpr size_t kOwnMapping = 32u << 20;
  if (bytes < kOwnMapping) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // best effort
#else
  (void)data, (void)bytes;
#endif
}

// An uninitialised array of A, aligned for vector loads.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr size_t kAlign = 64;
    data_.reset(std::aligned_alloc(kAlign, (count * sizeof(A) / kAlign + 1) * kAlign));
    if (!data_) throw std::bad_alloc();
  }
  A* data() const { return static_cast<A*>(data_.get()); }
  A& operator[](int64_t i) const { return data()[i]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype,
                    MemoryFormat layout = MemoryFormat::Contiguous) {
  Tensor t =
      torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, std::nullopt, std::nullopt, layout);
  use_huge_pages(t.data_ptr(), t.numel() * t.element_size());
  return t;
}

// Copies a small tensor to a vector, with conversion; copy_to is the inverse.
template <class A>
std::vector<A> to_vector(const Tensor& t) {
  const Tensor from = dense(t);
  return dispatch_floating(from.scalar_type(), [&](auto type) {
    const auto* data = data_of<typename decltype(type)::type>(from);
    return std::vector<A>(data, data + from.numel());
  });
}

template <class A>
void copy_to(const std::vector<A>& from, const Tensor& to) {
  dispatch_floating(to.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    std::transform(from.begin(), from.end(), static_cast<T*>(to.data_ptr()), [](A v) { return static_cast<T>(v); });
  });
}

// How many images to take through a GEMM and the passes around it while they stay in cache.
inline int64_t images_per_chunk(int64_t images, int64_t elements, size_t element) {
  constexpr int64_t kChunkBytes = 1 << 19;
  return std::clamp<int64_t>(kChunkBytes / (elements * static_cast<int64_t>(element)), 1, images);
}

}  // namespace pixnorm
