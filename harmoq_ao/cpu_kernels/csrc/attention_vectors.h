// What attention does with vectors: tokens to floats, floats to elements, exponentials, codes, words of a map.
#pragma once

#include "rowwise/vectors.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace harmoq {
namespace {

using at::BFloat16;

constexpr float kLog2E = 1.44269502f;

struct Lanes {  // the first `count` lanes
  explicit Lanes(int64_t count) : count(count), mask((1u << count) - 1) {}
  int64_t count;
  uint32_t mask;
};

inline Vec load_floats(const float* p, const Lanes& lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.mask), p);
#else
  return lanes.count == kLanes ? Vec::loadu(p) : Vec::loadu(p, lanes.count);
#endif
}

inline Vec load_floats(const BFloat16* p, const Lanes& lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes.mask), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  alignas(64) float values[kLanes] = {};
  for (int64_t i = 0; i < lanes.count; ++i) values[i] = p[i];
  return Vec::loadu(values);
#endif
}

inline Vec load_floats(const int32_t* p) { return load_int(p); }

inline void store_elements(float* p, Vec x) { x.store(p); }

#ifdef __AVX512BF16__
inline void store_elements(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// Rounded half to even, of 0 to 255.
inline void store_elements(uint8_t* p, Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#else
  alignas(64) float values[kLanes];
  x.round().store(values);
  for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(values[i]);
#endif
}

// The elements of some lanes, and zeros for the others; reads nothing past them.
template <typename Element>
inline void copy_elements(const Element* from, Element* to, const Lanes& lanes) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto mask = static_cast<__mmask16>(lanes.mask);
  if constexpr (sizeof(Element) == 1)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_loadu_epi8(mask, from));
  else if constexpr (sizeof(Element) == 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(mask, from));
  else
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(mask, from));
#else
  for (int64_t j = 0; j < kLanes; ++j) to[j] = j < lanes.count ? from[j] : Element(0);
#endif
}

// The codes at a place of words, each of a lane.
inline Vec codes_in_words(const uint8_t* words, int64_t place) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto shifted = _mm512_srli_epi32(_mm512_loadu_si512(words), static_cast<unsigned>(8 * place));
  return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)));
#else
  alignas(64) float values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) values[i] = words[4 * i + place];
  return Vec::loadu(values);
#endif
}

// The larger one; without the care for numbers that are none that `at::vec::maximum` takes.
inline Vec larger(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// clamp(x * factor + offset, 0, top), to be rounded half to even when it is stored; a NaN becomes 0.
inline Vec codes_of(Vec x, Vec factor, Vec offset, Vec top) {
  const Vec position = x * factor + offset;
#if defined(CPU_CAPABILITY_AVX512)  // the second operand where the first is not a number
  return _mm512_min_ps(_mm512_max_ps(position, _mm512_setzero_ps()), top);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(_mm256_max_ps(position, _mm256_setzero_ps()), top);
#else
  alignas(64) float values[kLanes];
  position.store(values);
  for (float& value : values) value = value > 0 ? value : 0;
  return at::vec::minimum(Vec::loadu(values), top);
#endif
}

// p * 2^n for n in the lowest bits of z.
inline Vec scale_by_power(Vec p, Vec z) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(z), 23)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(z), 23)));
#else
  alignas(64) uint32_t a[kLanes], b[kLanes];
  p.store(a);
  z.store(b);
  for (int64_t i = 0; i < kLanes; ++i) a[i] += b[i] << 23;
  return Vec::loadu(a);
#endif
}

// `otherwise` where two ids differ, else 0.
inline Vec where_different(const int32_t* ids, int32_t id, Vec otherwise) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto different = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(ids), _mm512_set1_epi32(id));
  return _mm512_maskz_mov_ps(different, otherwise);
#elif defined(CPU_CAPABILITY_AVX2)
  const auto loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(loaded, _mm256_set1_epi32(id))), otherwise);
#else
  alignas(64) float values[kLanes];
  otherwise.store(values);
  for (int64_t i = 0; i < kLanes; ++i) values[i] = ids[i] == id ? 0 : values[i];
  return Vec::loadu(values);
#endif
}

// 2^t for |t| <= 126. float32: relative error below 2^-21, exactly 1 at 0. bfloat16: the square root of two times 2^t,
// in [1, 2) times a power of two, with half a step of bfloat16 added, so that cutting off 16 bits rounds to nearest;
// relative error before rounding 2^-13.7. The constant factor cancels in a softmax.
template <typename Element>
inline Vec power_of_two(Vec t) {
  const Vec magic(12582912.f);  // adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits
  const Vec z = t + magic;
  const Vec f = t - (z - magic);
  Vec p;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    p = at::vec::fmadd(f, Vec(0.07802452f), Vec(0.34310395f));
    p = at::vec::fmadd(f, p, Vec(0.98041910f));
    p = at::vec::fmadd(f, p, Vec(1.41411185f + 0.00390625f));
  } else {
    p = at::vec::fmadd(f, Vec(0.0013264727f), Vec(0.0096715130f));
    p = at::vec::fmadd(f, p, Vec(0.055507336f));
    p = at::vec::fmadd(f, p, Vec(0.24022242f));
    p = at::vec::fmadd(f, p, Vec(0.69314700f));
    p = at::vec::fmadd(f, p, Vec(1.f));
  }
  return scale_by_power(p, z);
}

// One word for each query, of as many rows of the map as it holds.
inline void store_words(float* p, const Vec* rows) { rows[0].store(p); }

#ifdef __AVX512BF16__
inline void store_words(BFloat16* p, const Vec* rows) {
  const auto low = _mm512_srli_epi32(_mm512_castps_si512(rows[0]), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(rows[1])));
}
#endif

inline void store_words(uint8_t* p, const Vec* rows) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto low = _mm512_or_si512(_mm512_cvtps_epi32(rows[0]), _mm512_slli_epi32(_mm512_cvtps_epi32(rows[1]), 8));
  const auto high = _mm512_or_si512(_mm512_cvtps_epi32(rows[2]), _mm512_slli_epi32(_mm512_cvtps_epi32(rows[3]), 8));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  const auto low = _mm256_or_si256(_mm256_cvtps_epi32(rows[0]), _mm256_slli_epi32(_mm256_cvtps_epi32(rows[1]), 8));
  const auto high = _mm256_or_si256(_mm256_cvtps_epi32(rows[2]), _mm256_slli_epi32(_mm256_cvtps_epi32(rows[3]), 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
#else
  for (int64_t r = 0; r < 4; ++r) {
    alignas(64) float values[kLanes];
    rows[r].round().store(values);
    for (int64_t i = 0; i < kLanes; ++i) p[4 * i + r] = static_cast<uint8_t>(values[i]);
  }
#endif
}

}  // namespace
}  // namespace harmoq
