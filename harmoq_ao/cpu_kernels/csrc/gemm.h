// Small matrix products C[M, N] = A[M, K] B[K, N] within one thread, from torch's micro-kernels (AMX, VNNI, AVX-512).
//
// `B` is packed so that what one instruction multiplies lies together: integers in groups of four rows,
// B[k / 4][n][k % 4], bfloat16 in pairs, B[k / 2][n][k % 2]; rows beyond K are zero. float32 is not packed. `ldb` is the
// number of columns of the packed matrix. Call `gemm_done` once per thread and parallel region.
#pragma once

#include "common.h"

namespace harmoq {

constexpr int64_t packed_rows(int64_t rows, int64_t group) { return (rows + group - 1) / group * group; }

template <typename A, typename B, typename C>
inline void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const A* a, const B* b, C* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, false, a, b, c, !std::is_same_v<A, float>);
}

inline void gemm_done() { at::native::cpublas::brgemm_release(true); }

}  // namespace harmoq
