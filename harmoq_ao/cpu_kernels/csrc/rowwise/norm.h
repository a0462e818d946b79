// Layer norm over the columns of each row.
#pragma once

#include "elementwise.h"

namespace harmoq {

struct Moments {
  float mean, rstd;
};

// Variance about the mean, in a second pass: squares of large means would cancel.
inline Moments moments(const float* x, int64_t width, float eps) {
  Vec total(0.f), squares(0.f);
  each_vector(width, [&](int64_t j, auto lanes) { total = total + load(x + j, lanes); });
  const float mean = sum(total) / static_cast<float>(width);
  const Vec centre(mean);
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const Vec d = load(x + j, kLanes) - centre;
    squares = at::vec::fmadd(d, d, squares);
  }
  if (j < width) {  // lanes beyond the width hold zero, not the mean
    const Vec d = Vec::set(Vec(0.f), load(x + j, width - j) - centre, width - j);
    squares = at::vec::fmadd(d, d, squares);
  }
  return {mean, 1.f / std::sqrt(sum(squares) / static_cast<float>(width) + eps)};
}

// (x - mean) * rstd * weight + bias; weight and bias may be null.
inline void layer_norm_rows(Rows<const float> from, Rows<float> to, int64_t rows, int64_t width, const float* weight,
                            const float* bias, float eps) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = from[r];
    float* y = to[r];
    const auto [mean, rstd] = moments(x, width, eps);
    const Vec centre(mean), scale(rstd);
    each_vector(width, [&](int64_t j, auto lanes) {
      Vec v = (load(x + j, lanes) - centre) * scale;
      if (weight) v = v * load(weight + j, lanes);
      if (bias) v = v + load(bias + j, lanes);
      store(v, y + j, lanes);
    });
  }
}

}  // namespace harmoq
