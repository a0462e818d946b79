// What all kernels share: types, threads, and rounding as `quant/integer_reference.py` defines it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace harmoq {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// The distance between neighbouring levels, as `step_size` of `quant/quantizer.py` has it; top is the largest code.
inline float step_size(float lo, float hi, float top) { return std::max((hi - lo) / top, 0x1p-64f); }

// Calls f(next) in every thread; next(first, last) hands out runs of tasks until there are none. Each thread takes those
// of its own share first, the same in every kernel, so that it finds in its cache what it wrote before; then it helps
// the others: threads may be held up, or have the costlier tasks.
template <typename F>
void share_tasks(int64_t tasks, const F& f) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  if (tasks <= 0) return;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  const int64_t run = std::max<int64_t>(tasks / (threads * 8 + 1), 1);
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = tasks * t / threads, shares[t].end = tasks * (t + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    int64_t done = 0;  // shares that are handed out, the own one first
    f([&](int64_t& first, int64_t& last) {
      for (; done < threads; ++done) {
        Share& share = shares[(own + done) % threads];
        first = share.next.fetch_add(run), last = std::min(first + run, share.end);
        if (first < share.end) return true;
      }
      return false;
    });
  });
}

}  // namespace harmoq
