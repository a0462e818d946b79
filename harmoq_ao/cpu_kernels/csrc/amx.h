// Products of whole tiles on AMX, C[rows, columns] = A[rows, K] B[K, columns], for kernels that alternate between
// shapes: torch's `brgemm` configures the tiles anew at each change, which costs more than a small product.
//
// Rows and columns come in tiles of 16; what lies beyond is multiplied with the rest, so buffers are padded and padded
// values only meet padded results. `B` is packed as in gemm.h. Elements are 8-bit integers or bfloat16, four or two to a
// word.
#pragma once

#include "common.h"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#define HARMOQ_AMX 1
#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#include <immintrin.h>

namespace harmoq {
namespace {

#define HARMOQ_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,amx-int8")))

inline bool amx_available() {
  static const bool available = [] {
    constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed && at::cpu::init_amx();
  }();
  return available;
}

// Some compilers do not know that tile instructions read memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// The tiles of a thread: 0 to 3 accumulate, 4 and 5 are A and B of `amx_tall`, 6 and 7 those of `amx_wide`.
class AmxTiles {
 public:
  HARMOQ_AMX_TARGET explicit AmxTiles(int64_t tall_words) {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = i == 5 ? static_cast<uint8_t>(tall_words) : 16;
      config.bytes[i] = i == 4 ? static_cast<uint16_t>(4 * tall_words) : 64;
    }
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  HARMOQ_AMX_TARGET ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

#define HARMOQ_TILE_DOT(c, a, b)                 \
  if constexpr (sizeof(A) == 2) {                \
    _tile_dpbf16ps(c, a, b);                     \
  } else if constexpr (std::is_signed_v<B>) {    \
    _tile_dpbusd(c, a, b);                       \
  } else {                                       \
    _tile_dpbuud(c, a, b);                       \
  }

struct AmxStrides {  // of A, in bytes
  int64_t row, group;
};

// Many rows, K of `groups` of `chunks` times `words` words, the tall ones of the tiles: B stays while A passes. Strides in bytes.
template <typename A, typename B, typename C>
HARMOQ_AMX_TARGET inline void amx_tall(int64_t words, const A* a, const AmxStrides& a_stride,
                                       const B* b, int64_t b_stride, C* c, int64_t c_stride, int64_t rows,
                                       int64_t columns, int64_t groups, int64_t chunks) {
  finish_stores();
  const char *a_bytes = reinterpret_cast<const char*>(a), *b_bytes = reinterpret_cast<const char*>(b);
  char* c_bytes = reinterpret_cast<char*>(c);
  const int64_t a_tile = 16 * a_stride.row, c_tile = 16 * c_stride;
  const int64_t a_step = 4 * words, b_step = words * b_stride;
  for (int64_t n = 0; n < columns / 16; ++n) {
    int64_t m = 0;
    for (; m + 4 <= rows / 16; m += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const char* b_tile = b_bytes + n * 64;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t k = 0; k < chunks; ++k, b_tile += b_step) {
          const char* from = a_bytes + m * a_tile + g * a_stride.group + k * a_step;
          _tile_loadd(5, b_tile, b_stride);
          _tile_loadd(4, from, a_stride.row);
          HARMOQ_TILE_DOT(0, 4, 5);
          _tile_loadd(4, from + a_tile, a_stride.row);
          HARMOQ_TILE_DOT(1, 4, 5);
          _tile_loadd(4, from + 2 * a_tile, a_stride.row);
          HARMOQ_TILE_DOT(2, 4, 5);
          _tile_loadd(4, from + 3 * a_tile, a_stride.row);
          HARMOQ_TILE_DOT(3, 4, 5);
        }
      }
      char* to = c_bytes + m * c_tile + n * 64;
      _tile_stored(0, to, c_stride);
      _tile_stored(1, to + c_tile, c_stride);
      _tile_stored(2, to + 2 * c_tile, c_stride);
      _tile_stored(3, to + 3 * c_tile, c_stride);
    }
    for (; m < rows / 16; ++m) {
      _tile_zero(0);
      const char* b_tile = b_bytes + n * 64;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t k = 0; k < chunks; ++k, b_tile += b_step) {
          _tile_loadd(5, b_tile, b_stride);
          _tile_loadd(4, a_bytes + m * a_tile + g * a_stride.group + k * a_step, a_stride.row);
          HARMOQ_TILE_DOT(0, 4, 5);
        }
      }
      _tile_stored(0, c_bytes + m * c_tile + n * 64, c_stride);
    }
  }
}

// Few rows, K of `chunks` whole tiles: A stays while B passes. Strides in bytes.
template <typename A, typename B, typename C>
HARMOQ_AMX_TARGET inline void amx_wide(const A* a, int64_t a_stride, const B* b, int64_t b_stride, C* c,
                                       int64_t c_stride, int64_t rows, int64_t columns, int64_t chunks) {
  finish_stores();
  const char *a_bytes = reinterpret_cast<const char*>(a), *b_bytes = reinterpret_cast<const char*>(b);
  char* c_bytes = reinterpret_cast<char*>(c);
  for (int64_t m = 0; m < rows / 16; ++m, a_bytes += 16 * a_stride, c_bytes += 16 * c_stride) {
    int64_t n = 0;
    for (; n + 2 <= columns / 16; n += 2) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < chunks; ++k) {
        const char* from = b_bytes + k * 16 * b_stride + n * 64;
        _tile_loadd(6, a_bytes + 64 * k, a_stride);
        _tile_loadd(7, from, b_stride);
        HARMOQ_TILE_DOT(0, 6, 7);
        _tile_loadd(7, from + 64, b_stride);
        HARMOQ_TILE_DOT(1, 6, 7);
      }
      _tile_stored(0, c_bytes + n * 64, c_stride);
      _tile_stored(1, c_bytes + n * 64 + 64, c_stride);
    }
    for (; n < columns / 16; ++n) {
      _tile_zero(0);
      for (int64_t k = 0; k < chunks; ++k) {
        _tile_loadd(6, a_bytes + 64 * k, a_stride);
        _tile_loadd(7, b_bytes + k * 16 * b_stride + n * 64, b_stride);
        HARMOQ_TILE_DOT(0, 6, 7);
      }
      _tile_stored(0, c_bytes + n * 64, c_stride);
    }
  }
}

}  // namespace
}  // namespace harmoq
#endif
