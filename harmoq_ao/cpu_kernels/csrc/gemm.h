// Small matrix products C[M, N] = A[M, K] B[K, N] within one thread.
//
//   A       B        C        torch's brgemm, if it works here          else
//   u8, s8  u8, s8   int32    avx512, avx512_bf16, with VNNI or AMX     16-bit products, int32 sums: exact
//   bf16    bf16     float32  avx512_bf16                               converted to float32
//   float32 float32  float32  avx512, avx512_bf16                       multiply-adds in register blocks
//
// `B` is packed so that what one instruction multiplies lies together: integers in groups of four rows,
// B[k / 4][n][k % 4], bfloat16 in pairs, B[k / 2][n][k % 2]; rows beyond K are zero. float32 is not packed. `lda`,
// `ldb` and `ldc` are columns from row to row (of B before packing). Nothing beyond column K of A is read. Call
// `gemm_done` once per thread and parallel region.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <type_traits>

#include <ATen/Context.h>

#include "common.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace harmoq {

constexpr int64_t packed_rows(int64_t rows, int64_t group) { return (rows + group - 1) / group * group; }

// How many rows of B lie together when it is packed.
template <typename B>
constexpr int64_t kGroup = sizeof(B) == 1 ? 4 : sizeof(B) == 2 ? 2 : 1;

// Packs B[K, N] with rows `ld` apart; `packed` has packed_rows(k, kGroup<B>) * n elements.
template <typename B>
inline void pack(int64_t k, int64_t n, const B* b, int64_t ld, B* packed) {
  constexpr int64_t group = kGroup<B>;
  for (int64_t i = 0; i < packed_rows(k, group); ++i)
    for (int64_t j = 0; j < n; ++j) packed[(i / group * n + j) * group + i % group] = i < k ? b[i * ld + j] : B(0);
}

namespace own {  // products that need neither AVX-512 nor oneDNN

// Calls f with std::integral_constant<count>, 1 <= count <= Most: loops over registers need constant bounds.
template <int Most, typename F>
inline void with_constant(int64_t count, const F& f) {
  if constexpr (Most > 1) {
    if (count < Most) return with_constant<Most - 1>(count, f);
  }
  f(std::integral_constant<int, Most>{});
}

// Vectors of floats. Where at::vec has none but arrays, those of the compiler.
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
using Floats = Vec;
inline Floats load(const float* p) { return Vec::loadu(p); }
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return at::vec::fmadd(a, b, sum); }
inline Floats same(float x) { return Vec(x); }
inline void store(float* p, Floats x) { x.store(p); }
#else
typedef float Floats __attribute__((vector_size(16)));
inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }
inline Floats same(float x) { return Floats{} + x; }
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }
#endif

constexpr int64_t kFloats = sizeof(Floats) / sizeof(float);

// `count` < kFloats floats; those beyond are zero.
inline Floats load_some(const float* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
#elif defined(CPU_CAPABILITY_AVX512)
  return Vec::loadu(p, count);
#else
  float some[kFloats] = {};
  std::memcpy(some, p, count * sizeof(float));
  return load(some);
#endif
}

inline void store_some(float* p, Floats x, int64_t count) {
  float some[kFloats];
  store(some, x);
  std::memcpy(p, some, count * sizeof(float));
}

// Sixteen vector registers hold 6 x 2 sums, two vectors of B and one element of A; 32 hold 8 x 3.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

// R rows of C times V vectors of columns, of which the last has `tail` columns (kFloats: it is full).
template <int R, int V, bool Full, typename A>
inline void float_block(
    int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, int64_t tail, const A* a, const float* b, float* c) {
  const auto row = [tail](const float* p, int v) {
    return Full || v < V - 1 ? load(p + v * kFloats) : load_some(p + v * kFloats, tail);
  };
  Floats sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? row(c + r * ldc, v) : same(0.0f);
  for (int64_t i = 0; i < k; ++i) {
    Floats column[V];
    for (int v = 0; v < V; ++v) column[v] = row(b + i * ldb, v);
    for (int r = 0; r < R; ++r) {
      const Floats element = same(static_cast<float>(a[r * lda + i]));
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(element, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* const out = c + r * ldc + v * kFloats;
      Full || v < V - 1 ? store(out, sum[r][v]) : store_some(out, sum[r][v], tail);
    }
}

// C[M, N] (+)= A[M, K] B[K, N] with N <= kVectors * kFloats: B stays in the first-level cache.
template <typename A>
inline void float_panel(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const A* a, const float* b,
    float* c) {
  const int64_t vectors = (n + kFloats - 1) / kFloats, tail = n - (vectors - 1) * kFloats;
  with_constant<kVectors>(vectors, [&](auto V) {
    for (int64_t i = 0; i < m; i += kRows)
      with_constant<kRows>(std::min<int64_t>(kRows, m - i), [&](auto R) {
        const auto block = tail == kFloats ? float_block<R, V, true, A> : float_block<R, V, false, A>;
        block(k, lda, ldb, ldc, add, tail, a + i * lda, b, c + i * ldc);
      });
  });
}

inline void gemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const float* a, const float* b, float* c,
    bool add = false) {
  for (int64_t j = 0; j < n; j += kVectors * kFloats)
    float_panel(m, std::min(n - j, kVectors * kFloats), k, lda, ldb, ldc, add, a, b + j, c + j);
}

// Rows of a panel of B are converted to float32, at most kDepth at a time.
inline void gemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const at::BFloat16* a,
    const at::BFloat16* b, float* c, bool add = false) {
  constexpr int64_t width = kVectors * kFloats, kDepth = 128;
  alignas(64) float panel[kDepth * width];
  for (int64_t j = 0; j < n; j += width)
    for (int64_t i = 0; i == 0 || i < k; i += kDepth) {
      const int64_t columns = std::min(n - j, width), rows = std::min(k - i, kDepth);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < columns; ++s)
          panel[r * width + s] = static_cast<float>(b[((i + r) / 2 * ldb + j + s) * 2 + (i + r) % 2]);
      float_panel(m, columns, rows, lda, width, ldc, add || i > 0, a + i, panel, c + j);
    }
}

#if defined(__x86_64__)

// 16-bit lanes, four for each column: one multiply-add leaves two int32 sums a column, which are added at the end.
// Products of 8-bit numbers and sums of two of them are exact (the 8-bit multiply-add of AVX2 would saturate).
#if defined(CPU_CAPABILITY_AVX512)
using Ints = __m512i;
inline __m256i bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Ints widen(const uint8_t* p) { return _mm512_cvtepu8_epi16(bytes(p)); }
inline Ints widen(const int8_t* p) { return _mm512_cvtepi8_epi16(bytes(p)); }
inline Ints spread(const int16_t* four) {
  int64_t bits;
  std::memcpy(&bits, four, sizeof(bits));
  return _mm512_set1_epi64(bits);
}
inline Ints zeros() { return _mm512_setzero_si512(); }
inline Ints multiply_add(Ints a, Ints b, Ints sum) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
// One int32 for each of the columns of two registers.
inline Ints sums(Ints low, Ints high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high));
}
inline void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
#elif defined(CPU_CAPABILITY_AVX2)
using Ints = __m256i;
inline __m128i bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Ints widen(const uint8_t* p) { return _mm256_cvtepu8_epi16(bytes(p)); }
inline Ints widen(const int8_t* p) { return _mm256_cvtepi8_epi16(bytes(p)); }
inline Ints spread(const int16_t* four) {
  int64_t bits;
  std::memcpy(&bits, four, sizeof(bits));
  return _mm256_set1_epi64x(bits);
}
inline Ints zeros() { return _mm256_setzero_si256(); }
inline Ints multiply_add(Ints a, Ints b, Ints sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
// One int32 for each of the columns of two registers.
inline Ints sums(Ints low, Ints high) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8); }
inline void store(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
#else  // SSE2, which all have
using Ints = __m128i;
inline __m128i bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline Ints widen(const uint8_t* p) { return _mm_unpacklo_epi8(bytes(p), _mm_setzero_si128()); }
inline Ints widen(const int8_t* p) { return _mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes(p)), 8); }
inline Ints spread(const int16_t* four) { return _mm_unpacklo_epi64(bytes(four), bytes(four)); }
inline Ints zeros() { return _mm_setzero_si128(); }
inline Ints multiply_add(Ints a, Ints b, Ints sum) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
// One int32 for each of the columns of two registers.
inline Ints sums(Ints low, Ints high) {
  const __m128 x = _mm_castsi128_ps(low), y = _mm_castsi128_ps(high);
  return _mm_add_epi32(_mm_castps_si128(_mm_shuffle_ps(x, y, 0x88)), _mm_castps_si128(_mm_shuffle_ps(x, y, 0xDD)));
}
inline void store(int32_t* p, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x); }
#endif

// More rows would fit, but compilers compute their products before they add them, and spill.
constexpr int kIntRows = sizeof(Ints) == 64 ? 8 : 4;
constexpr int64_t kIntColumns = sizeof(Ints) / 4;  // columns of a pair of registers
constexpr int64_t kDepth = 512;

// R rows of C, `n` <= kIntColumns columns of B, whose groups of four rows are `stride` bytes apart.
template <int R, typename B>
inline void int_block(
    int64_t n, int64_t groups, int64_t stride, int64_t ldc, bool add, const int16_t* a, const B* b, int32_t* c) {
  Ints low[R], high[R];
  for (int r = 0; r < R; ++r) low[r] = high[r] = zeros();
  for (int64_t i = 0; i < groups; ++i) {
    const Ints left = widen(b + i * stride), right = widen(b + i * stride + 2 * kIntColumns);
    for (int r = 0; r < R; ++r) {
      const Ints four = spread(a + r * kDepth + 4 * i);
      low[r] = multiply_add(four, left, low[r]);
      high[r] = multiply_add(four, right, high[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const Ints total = sums(low[r], high[r]);
    int32_t* const out = c + r * ldc;
    if (n == kIntColumns && !add) {
      store(out, total);
      continue;
    }
    alignas(64) int32_t each[kIntColumns];
    store(each, total);
    for (int64_t j = 0; j < n; ++j) out[j] = (add ? out[j] : 0) + each[j];
  }
}

// C[M, N] (+)= A[M, K] B[K, N] with K <= kDepth.
template <typename A, typename B>
inline void int_slice(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const A* a, const B* b,
    int32_t* c) {
  const int64_t groups = packed_rows(k, 4) / 4, whole = n / kIntColumns * kIntColumns;
  B last[kDepth * kIntColumns];  // vectors are read whole: what they read behind the last columns must be there
  for (int64_t i = 0; whole < n && i < groups; ++i)
    std::memcpy(last + i * 4 * kIntColumns, b + (i * ldb + whole) * 4, 4 * (n - whole));
  int16_t wide[kIntRows * kDepth];  // rows of A, zero up to whole groups
  for (int64_t i = 0; i < m; i += kIntRows)
    with_constant<kIntRows>(std::min<int64_t>(kIntRows, m - i), [&](auto R) {
      for (int r = 0; r < R; ++r) {
        for (int64_t s = 0; s < k; ++s) wide[r * kDepth + s] = a[(i + r) * lda + s];
        for (int64_t s = k; s < 4 * groups; ++s) wide[r * kDepth + s] = 0;
      }
      int32_t* const out = c + i * ldc;
      for (int64_t j = 0; j < whole; j += kIntColumns)
        int_block<R>(kIntColumns, groups, 4 * ldb, ldc, add, wide, b + 4 * j, out + j);
      if (whole < n) int_block<R>(n - whole, groups, 4 * kIntColumns, ldc, add, wide, last, out + whole);
    });
}

#else

constexpr int64_t kDepth = 512;

// Plain loops, which compilers vectorise: 16-bit numbers of B in rows, int32 sums of a row of C in registers.
// K <= kDepth.
template <typename A, typename B>
inline void int_slice(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const A* a, const B* b,
    int32_t* c) {
  constexpr int64_t width = 16;
  int16_t panel[kDepth * width] = {};
  for (int64_t j = 0; j < n; j += width) {
    const int64_t columns = std::min(n - j, width);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t s = 0; s < columns; ++s) panel[i * width + s] = b[(i / 4 * ldb + j + s) * 4 + i % 4];
    for (int64_t r = 0; r < m; ++r) {
      int32_t sum[width] = {};
      for (int64_t i = 0; i < k; ++i)
        for (int64_t s = 0; s < width; ++s)
          sum[s] += static_cast<int32_t>(static_cast<int16_t>(a[r * lda + i])) * panel[i * width + s];
      int32_t* const out = c + r * ldc + j;
      for (int64_t s = 0; s < columns; ++s) out[s] = (add ? out[s] : 0) + sum[s];
    }
  }
}

#endif

template <typename A, typename B, typename = std::enable_if_t<sizeof(A) == 1 && sizeof(B) == 1>>
inline void gemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const A* a, const B* b, int32_t* c,
    bool add = false) {
  for (int64_t i = 0; i == 0 || i < k; i += kDepth)
    int_slice(m, n, std::min(k - i, kDepth), lda, ldb, ldc, add || i > 0, a + i, b + i * ldb, c);
}

}  // namespace own

// Whether torch's micro-kernels compute this product here, and exactly: they need oneDNN, for integers VNNI, and refuse
// otherwise; 8-bit multiply-adds without VNNI would saturate at 2 x 255 x 127.
template <typename A, typename B, typename C>
inline bool brgemm_works() {
#if !defined(CPU_CAPABILITY_AVX512)
  return false;
#else
  if constexpr (std::is_same_v<A, at::BFloat16>) {
#if !defined(__AVX512BF16__)
    return false;
#endif
  }
  static const bool works = [] {
    constexpr int64_t k = 8, n = 16;
    const float largest = sizeof(A) > 1 ? 1.0f : std::is_signed_v<A> ? -128.0f : 255.0f;
    A a[k];
    B b[k * n];
    C c[n] = {};
    std::fill(std::begin(a), std::end(a), static_cast<A>(largest));
    std::fill(std::begin(b), std::end(b), static_cast<B>(sizeof(B) == 1 && std::is_signed_v<B> ? 127.0f : largest));
    try {
      at::native::cpublas::brgemm(1, n, k, k, n, n, false, a, b, c, !std::is_same_v<A, float>);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    const C expected = static_cast<C>(k * static_cast<C>(a[0]) * static_cast<C>(b[0]));
    return std::all_of(std::begin(c), std::end(c), [expected](C x) { return x == expected; });
  }();
  return works && at::globalContext().userEnabledMkldnn();
#endif
}

// `add`: adds to C. The fastest K is a multiple of kGroup<B>: pass packed_rows(K) where A has such rows (of integers
// with anything in the columns beyond K, of bfloat16 with zeros). AMX takes whole groups of rows of B (oneDNN runs into
// an illegal instruction otherwise); `own` adds the rest.
template <typename A, typename B, typename C>
inline void gemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const A* a, const B* b, C* c,
    bool add = false) {
  const int64_t whole = brgemm_works<A, B, C>() ? k / kGroup<B> * kGroup<B> : 0;
  if (whole > 0)
    at::native::cpublas::brgemm(m, n, whole, lda, ldb, ldc, add, a, b, c, !std::is_same_v<A, float>);
  if (whole < k || k == 0) own::gemm(m, n, k - whole, lda, ldb, ldc, a + whole, b + whole * ldb, c, add || whole > 0);
}

// Gives back the tile registers of AMX.
inline void gemm_done() {
#if defined(CPU_CAPABILITY_AVX512)
  at::native::cpublas::brgemm_release(true);
#endif
}

}  // namespace harmoq
