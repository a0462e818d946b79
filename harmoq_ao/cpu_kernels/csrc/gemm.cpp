// The products of `gemm.h` as an operator of their own, for tests and measurements.
#include "gemm.h"

#include <vector>

#include <ATen/ops/empty.h>

namespace harmoq {
namespace {

template <typename A, typename B, typename C>
at::Tensor product(const at::Tensor& a, const at::Tensor& b, bool own, int64_t repeats, at::ScalarType type) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  at::Tensor c = at::empty({m, n}, a.options().dtype(type));
  std::vector<B> packed(packed_rows(k, kGroup<B>) * n);
  pack(k, n, b.const_data_ptr<B>(), b.stride(0), packed.data());
  const A* from = a.const_data_ptr<A>();
  C* to = c.mutable_data_ptr<C>();
  for (int64_t i = 0; i < repeats; ++i) {
    if (own)
      own::gemm(m, n, k, a.stride(0), n, n, from, packed.data(), to);
    else
      gemm(m, n, k, a.stride(0), n, n, from, packed.data(), to);
  }
  gemm_done();
  return c;
}

// A[M, K] B[K, N], rows contiguous. `own`: without torch's micro-kernels. `repeats`: how often it is computed.
at::Tensor gemm_operator(const at::Tensor& a, const at::Tensor& b, bool own, int64_t repeats) {
  using at::kBFloat16, at::kByte, at::kChar, at::kFloat, at::kInt;
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "gemm takes A[M, K] and B[K, N]");
  TORCH_CHECK(a.stride(1) == 1 && b.stride(1) == 1, "gemm takes matrices with contiguous rows");
  const auto types = [&](at::ScalarType of_a, at::ScalarType of_b) {
    return a.scalar_type() == of_a && b.scalar_type() == of_b;
  };
  if (types(kByte, kChar)) return product<uint8_t, int8_t, int32_t>(a, b, own, repeats, kInt);
  if (types(kByte, kByte)) return product<uint8_t, uint8_t, int32_t>(a, b, own, repeats, kInt);
  if (types(kChar, kChar)) return product<int8_t, int8_t, int32_t>(a, b, own, repeats, kInt);
  if (types(kBFloat16, kBFloat16)) return product<at::BFloat16, at::BFloat16, float>(a, b, own, repeats, kFloat);
  if (types(kFloat, kFloat)) return product<float, float, float>(a, b, own, repeats, kFloat);
  TORCH_CHECK(false, "gemm takes no ", a.scalar_type(), " x ", b.scalar_type());
}

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("gemm(Tensor a, Tensor b, *, bool own=False, int repeats=1) -> Tensor");
  m.impl("gemm", c10::DispatchKey::CPU, gemm_operator);
}

}  // namespace
}  // namespace harmoq
