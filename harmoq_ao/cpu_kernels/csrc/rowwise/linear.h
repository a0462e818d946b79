// Linears of a block of rows: quantize, integer product, epilogue; and the float ones.
#pragma once

#include "../amx.h"
#include "../gemm.h"
#include "elementwise.h"

namespace harmoq {

constexpr int64_t kMaxLinearLength = 65793;  // (2^31 - 1) / (255 * 128): beyond it int32 could overflow
constexpr int64_t kLinearColumns = 192;      // accumulators of a block of rows and so many columns stay in L1
constexpr int64_t kTileColumns = 16;           // of AMX
constexpr int64_t kTileLength = 64;            // elements that a tile of AMX contracts
constexpr int64_t kNarrow = 4;               // float linears of at most so many columns are dot products

struct IntegerLinear {
  int64_t k, n;
  float top;                         // largest code
  const float *reciprocal, *offset;  // [k]
  const int8_t* weight;              // [k64 / 4, columns, 4]: whole tiles of AMX
  int64_t columns, products;         // of the packed weight; multiplied: n, and one of ones if there is a shift
  const float *scale, *constant, *shift;  // [n], shift may be null
};

// One vector of columns. All by value: bytes may alias anything, and what they could change would be loaded again.
template <typename Lanes>
inline void quantize_column(const float* x, int64_t x_stride, uint8_t* code, int64_t code_stride, int64_t rows,
                            Vec factor, Vec added, Vec top, Lanes lanes) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, code += code_stride) {
    store_codes(at::vec::clamp(load(x, lanes) * factor + added, Vec(0.f), top), code);
  }
}

// codes[r][j] = clamp(round(x * reciprocal + offset), 0, top), with zeros up to a multiple of kLanes.
inline void quantize_rows(const IntegerLinear& linear, Rows<const float> from, Rows<uint8_t> codes, int64_t rows) {
  each_vector(linear.k, [&](int64_t j, auto lanes) {
    quantize_column(from.data + j, from.stride, codes.data + j, codes.stride, rows, load(linear.reciprocal + j, lanes),
                    load(linear.offset + j, lanes), Vec(linear.top), lanes);
  });
}

// (acc [+ shift * sum]) * scale + constant for the columns from `first` on, each operation rounded.
template <typename To>
inline void epilogue_rows(const IntegerLinear& linear, int64_t first, int64_t width, Rows<const int32_t> acc,
                          const float* sums, Rows<To> to, int64_t rows) {
  each_vector(width, [&](int64_t j, auto lanes) {
    const int64_t column = first + j;
    const Vec scale = load(linear.scale + column, lanes), constant = load(linear.constant + column, lanes);
    if (linear.shift == nullptr) {
      for (int64_t r = 0; r < rows; ++r) store(load_int(acc[r] + j) * scale + constant, to[r] + column, lanes);
      return;
    }
    const Vec shift = load(linear.shift + column, lanes);
    for (int64_t r = 0; r < rows; ++r) {
      store((load_int(acc[r] + j) + shift * Vec(sums[r])) * scale + constant, to[r] + column, lanes);
    }
  });
}

struct LinearScratch {
  Rows<uint8_t> codes;  // at least `block` rows
  int32_t* acc;         // [block, kLinearColumns]
  float* sums;
  bool tiles;           // those of AMX are configured
};

// Accumulators of `width` columns from `first` on, their rows `stride` apart.
inline void multiply_codes(const IntegerLinear& linear, int64_t first, int64_t width, int64_t stride, int64_t block,
                           const LinearScratch& scratch) {
  const int8_t* weight = linear.weight + first * 4;
#ifdef HARMOQ_AMX
  if (scratch.tiles) {
    return amx_tall(kTileLength / 4, scratch.codes.data, {scratch.codes.stride, 0}, weight, linear.columns * 4,
                    scratch.acc, stride * 4, block, kTileColumns, 1, (linear.k + kTileLength - 1) / kTileLength);
  }
#endif
  gemm(block, width, packed_rows(linear.k, 4), scratch.codes.stride, linear.columns, stride, scratch.codes.data, weight,
       scratch.acc);
}

// What a linear multiplies: codes of values, or codes that are given, with zeros up to a multiple of kLanes.
inline void take_codes(const IntegerLinear& linear, Rows<const float> from, Rows<uint8_t> codes, int64_t rows) {
  quantize_rows(linear, from, codes, rows);
}

inline void take_codes(const IntegerLinear& linear, Rows<const uint8_t> from, Rows<uint8_t> codes, int64_t rows) {
  each_vector(linear.k, [&](int64_t j, auto lanes) {
    for (int64_t r = 0; r < rows; ++r) copy_codes(from[r] + j, codes[r] + j, lanes);
  });
}

// Products always have `block` rows, so that one micro-kernel serves all; codes of rows past `rows` stay as they are.
// Columns go from last to first: what the column of ones gives, the sum of each row's codes, all others need. On AMX so
// few at a time that their accumulators go from tiles to results through lines that stay in L1.
template <typename From, typename To>
inline void linear_rows(const IntegerLinear& linear, Rows<const From> from, Rows<To> to, int64_t rows, int64_t block,
                        const LinearScratch& scratch) {
  take_codes(linear, from, scratch.codes, rows);
  const int64_t some = scratch.tiles ? kTileColumns : kLinearColumns;
  for (int64_t first = (linear.products - 1) / some * some; first >= 0; first -= some) {
    const int64_t width = std::min(some, linear.products - first);
    const Rows<const int32_t> acc{scratch.acc, some};
    multiply_codes(linear, first, width, some, block, scratch);
    const int64_t results = std::min(width, linear.n - first);
    if (results < width) {
      for (int64_t r = 0; r < rows; ++r) scratch.sums[r] = static_cast<float>(acc[r][results]);
    }
    epilogue_rows(linear, first, results, acc, scratch.sums, to, rows);
  }
}

// y = x @ weight for few columns; `transposed` is [n, k].
inline void dot_rows(const float* transposed, Rows<const float> from, Rows<float> to, int64_t rows, int64_t k,
                     int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    float y[kNarrow];
    for (int64_t i = 0; i < n; ++i) {
      Vec total(0.f);
      const float* w = transposed + i * k;
      each_vector(k, [&](int64_t j, auto lanes) {
        total = at::vec::fmadd(load(from[r] + j, lanes), load(w + j, lanes), total);
      });
      y[i] = sum(total);
    }
    for (int64_t i = 0; i < n; ++i) to[r][i] = y[i];
  }
}

}  // namespace harmoq
