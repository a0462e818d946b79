// Layer norm over the columns of each row.
#pragma once

#include "elementwise.h"

namespace harmoq {

constexpr int64_t kNormRows = 64;  // rows whose moments are held at once, a multiple of kLanes

inline float row_mean(const float* x, int64_t width, float share) {
  Vec total(0.f);
  each_vector(width, [&](int64_t j, auto lanes) { total = total + load(x + j, lanes); });
  return sum(total) * share;
}

// About the mean, in a second pass: squares of large means would cancel.
inline float row_variance(const float* x, int64_t width, float share, float mean) {
  const Vec centre(mean);
  Vec squares(0.f);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Vec d = load(x + j, kLanes) - centre;
    squares = at::vec::fmadd(d, d, squares);
  }
  if (j < width) {  // lanes beyond the width hold zero, not the mean
    const Vec d = Vec::set(Vec(0.f), load(x + j, width - j) - centre, width - j);
    squares = at::vec::fmadd(d, d, squares);
  }
  return sum(squares) * share;
}

// (x - mean) / sqrt(variance + eps) * weight + bias; weight and bias may be null. At most kNormRows rows.
inline void norm_few_rows(Rows<const float> from, Rows<float> to, int64_t rows, int64_t width, const float* weight,
                          const float* bias, float eps) {
  const float share = 1.f / static_cast<float>(width);
  alignas(64) float mean[kNormRows], rstd[kNormRows];
  for (int64_t r = 0; r < rows; ++r) {
    mean[r] = row_mean(from[r], width, share);
    rstd[r] = row_variance(from[r], width, share, mean[r]);
  }
  // roots and quotients of many rows at once; those past the last are unused
  for (int64_t r = 0; r < rows; r += kLanes) {
    store(Vec(1.f) / (load(rstd + r, kLanes) + Vec(eps)).sqrt(), rstd + r, kLanes);
  }
  each_vector(width, [&](int64_t j, auto lanes) {
    const Vec factor = weight ? load(weight + j, lanes) : Vec(1.f), added = bias ? load(bias + j, lanes) : Vec(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec x = (load(from[r] + j, lanes) - Vec(mean[r])) * Vec(rstd[r]);
      store(at::vec::fmadd(x, factor, added), to[r] + j, lanes);
    }
  });
}

inline void layer_norm_rows(Rows<const float> from, Rows<float> to, int64_t rows, int64_t width, const float* weight,
                            const float* bias, float eps) {
  for (int64_t r = 0; r < rows; r += kNormRows) {
    const int64_t count = std::min(kNormRows, rows - r);
    norm_few_rows({from[r], from.stride}, {to[r], to.stride}, count, width, weight, bias, eps);
  }
}

}  // namespace harmoq
