// What all kernels share: types, threads, and rounding as `quant/integer_reference.py` defines it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace harmoq {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

}  // namespace harmoq
