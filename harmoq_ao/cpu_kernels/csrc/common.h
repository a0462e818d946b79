// What all kernels share: types, threads, and rounding as `quant/integer_reference.py` defines it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

namespace harmoq {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Calls f(next) in every thread; next(first, last) hands out runs of tasks until there are none. Threads that are held
// up, or have cheaper tasks, take fewer of them.
template <typename F>
void share_tasks(int64_t tasks, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks), run = std::max<int64_t>(tasks / (threads * 8 + 1), 1);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    f([&](int64_t& first, int64_t& last) {
      first = taken.fetch_add(run), last = std::min(first + run, tasks);
      return first < tasks;
    });
  });
}

}  // namespace harmoq
