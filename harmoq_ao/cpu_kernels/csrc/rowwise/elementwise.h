// Copies, functions of one or two values, products with constants: one pass over a block of rows.
#pragma once

#include "activation.h"

namespace harmoq {

enum class Binary : int64_t { kAdd, kSub, kMul, kCount };
enum class Broadcast : int64_t { kNone, kColumn, kImage, kCount };

// Where rows of all operands follow one another without gaps they are taken as one long row: of 60 columns, say, three
// of four rows begin within a cache line, and their vectors would all cross lines.

// Rows of a block: the address of the first value and the distance of rows in values.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <typename From, typename To, typename F>
inline void map_rows(Rows<const From> from, Rows<To> to, int64_t rows, int64_t width, const F& f) {
  if (from.stride == width && to.stride == width) width *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r) {
    const From* x = from[r];
    To* y = to[r];
    each_vector(width, [&](int64_t j, auto lanes) { store(f(load(x + j, lanes)), y + j, lanes); });
  }
}

template <typename From, typename To>
inline void copy_rows(Rows<const From> from, Rows<To> to, int64_t rows, int64_t width) {
  map_rows(from, to, rows, width, [](Vec x) { return x; });
}

inline void unary_rows(Unary kind, float slope, Rows<const float> from, Rows<float> to, int64_t rows, int64_t width) {
  with_unary(kind, slope, [&](auto f) { map_rows(from, to, rows, width, f); });
}

// Calls f with the function of two vectors.
template <typename F>
inline void with_binary(Binary kind, const F& f) {
  switch (kind) {
    case Binary::kAdd: return f([](Vec a, Vec b) { return a + b; });
    case Binary::kSub: return f([](Vec a, Vec b) { return a - b; });
    case Binary::kMul: return f([](Vec a, Vec b) { return a * b; });
    case Binary::kCount: break;
  }
}

// A row per image of the batch, the block beginning with row `begin` of the first.
struct ImageRows {
  Rows<const float> images;
  int64_t begin, rows_per_image;
  const float* operator[](int64_t row) const { return images[(begin + row) / rows_per_image]; }
};

// `right` is Rows or ImageRows.
template <typename R>
inline void binary_rows(Binary kind, Rows<const float> left, const R& right, Rows<float> to, int64_t rows,
                        int64_t width) {
  if constexpr (std::is_same_v<R, Rows<const float>>) {
    if (left.stride == width && right.stride == width && to.stride == width) width *= rows, rows = 1;
  }
  with_binary(kind, [&](auto f) {
    for (int64_t r = 0; r < rows; ++r) {
      const float *a = left[r], *b = right[r];
      float* y = to[r];
      each_vector(width, [&](int64_t j, auto lanes) {
        store(f(load(a + j, lanes), load(b + j, lanes)), y + j, lanes);
      });
    }
  });
}

inline void column_rows(Binary kind, Rows<const float> left, Rows<const float> right, Rows<float> to, int64_t rows,
                        int64_t width) {
  with_binary(kind, [&](auto f) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* a = left[r];
      const Vec b(*right[r]);
      float* y = to[r];
      each_vector(width, [&](int64_t j, auto lanes) { store(f(load(a + j, lanes), b), y + j, lanes); });
    }
  });
}

inline void scalar_rows(Binary kind, Rows<const float> from, float number, Rows<float> to, int64_t rows,
                        int64_t width) {
  const Vec b(number);
  with_binary(kind, [&](auto f) { map_rows(from, to, rows, width, [&](Vec a) { return f(a, b); }); });
}

// from * scale + shift, each rounded; either may be null.
template <typename To>
inline void affine_rows(const float* scale, const float* shift, Rows<const float> from, Rows<To> to, int64_t rows,
                        int64_t width) {
  each_vector(width, [&](int64_t j, auto lanes) {
    const Vec factor = scale ? load(scale + j, lanes) : Vec(1.f);
    // -0 leaves every value as it is, also -0
    const Vec added = shift ? load(shift + j, lanes) : Vec(-0.f);
    for (int64_t r = 0; r < rows; ++r) store(load(from[r] + j, lanes) * factor + added, to[r] + j, lanes);
  });
}

// clamp(round(from * factor + added), 0, top): codes, as such or as floats.
template <typename To>
inline void code_rows(const float* factor, const float* added, float top, Rows<const float> from, Rows<To> to,
                      int64_t rows, int64_t width) {
  const Vec zero(0.f), most(top);
  each_vector(width, [&](int64_t j, auto lanes) {
    const Vec scale = load(factor + j, lanes), shift = load(added + j, lanes);
    for (int64_t r = 0; r < rows; ++r) {
      store(at::vec::clamp((load(from[r] + j, lanes) * scale + shift).round(), zero, most), to[r] + j, lanes);
    }
  });
}

}  // namespace harmoq
