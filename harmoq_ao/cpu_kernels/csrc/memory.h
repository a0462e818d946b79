// Memory of matrices of tokens, kept between calls: pages are touched once, and are huge where the system has them.
#pragma once

#include "common.h"

namespace harmoq {

constexpr int64_t kLine = 64;  // bytes of a cache line

// `[rows, columns]`, not initialised. Rows begin with a cache line, unless they are shorter than one, so that no vector
// lies across two lines.
at::Tensor token_rows(int64_t rows, int64_t columns, at::ScalarType type);

}  // namespace harmoq
