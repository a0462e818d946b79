// Rows of float32, bfloat16 and codes in vectors; no lane past the end of a row is ever touched in memory.
#pragma once

#include "../common.h"

namespace harmoq {

using at::BFloat16;

// f(column, lanes) for whole vectors, `lanes` then being a compile-time constant, and for what is left of the width.
template <typename F>
inline void each_vector(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) f(j, std::integral_constant<int64_t, kLanes>{});
  if (j < width) f(j, width - j);
}

inline Vec load(const float* from, int64_t lanes) {
#if defined(CPU_CAPABILITY_AVX2)
  if (lanes < kLanes) {
    alignas(32) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_maskload_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + kLanes - lanes)));
  }
#endif
  return Vec::loadu(from, lanes);
}

inline void store(Vec x, float* to, int64_t lanes) {
#if defined(CPU_CAPABILITY_AVX2)
  if (lanes < kLanes) {
    alignas(32) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    _mm256_maskstore_ps(to, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + kLanes - lanes)), x);
    return;
  }
#endif
  x.store(to, lanes);
}

#if defined(CPU_CAPABILITY_AVX512)

inline Vec load(const BFloat16* from, int64_t lanes) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes) - 1), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Round to nearest even.
inline void store(Vec x, BFloat16* to, int64_t lanes) {
#if defined(__AVX512BF16__)
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  const __m256i half = _mm512_cvtepi32_epi16(rounded);
#endif
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << lanes) - 1), half);
}

inline Vec load(const uint8_t* from, int64_t lanes) {
  const __m128i codes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << lanes) - 1), from);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
}

// Whole numbers of 0 to 255; NaN becomes 0.
inline void store(Vec x, uint8_t* to, int64_t lanes) {
  const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1u << lanes) - 1), codes);
}

#else

inline Vec load(const BFloat16* from, int64_t lanes) {
  alignas(64) float wide[kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) wide[i] = static_cast<float>(from[i]);
  return Vec::loadu(wide);
}

inline void store(Vec x, BFloat16* to, int64_t lanes) {
  alignas(64) float wide[kLanes];
  x.store(wide);
  for (int64_t i = 0; i < lanes; ++i) to[i] = wide[i];
}

inline Vec load(const uint8_t* from, int64_t lanes) {
  alignas(64) float wide[kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) wide[i] = from[i];
  return Vec::loadu(wide);
}

inline void store(Vec x, uint8_t* to, int64_t lanes) {
  alignas(64) float wide[kLanes];
  x.store(wide);
  for (int64_t i = 0; i < lanes; ++i) to[i] = wide[i] > 0 ? static_cast<uint8_t>(wide[i]) : 0;
}

#endif

// The first codes of a vector, and zeros up to its end.
inline void copy_codes(const uint8_t* from, uint8_t* to, int64_t lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i codes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << lanes) - 1), from);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
#else
  for (int64_t i = 0; i < kLanes; ++i) to[i] = i < lanes ? from[i] : 0;
#endif
}

inline Vec load_int(const int32_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(from));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  alignas(64) float wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(from[i]);
  return Vec::loadu(wide);
#endif
}

// Writes kLanes codes: x within 0..255 or NaN (code 0) rounded half to even.
inline void store_codes(Vec x, uint8_t* to) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
#else
  alignas(64) float wide[kLanes];
  x.store(wide);
  for (int64_t i = 0; i < kLanes; ++i) to[i] = wide[i] > 0 ? static_cast<uint8_t>(std::nearbyint(wide[i])) : 0;
#endif
}

// An estimate and one Newton step: within 2^-22 of 1 / x for finite x of ordinary magnitude.
inline Vec reciprocal(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec r = _mm512_rcp14_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const Vec r = _mm256_rcp_ps(x);
#else
  return Vec(1.f) / x;
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return r * at::vec::fnmadd(x, r, Vec(2.f));
#endif
}

inline float sum(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
#endif
}

}  // namespace harmoq
