// Means over the rows of each image, column by column, of values or of their squares.

#include "memory.h"
#include "rowwise/vectors.h"

namespace harmoq {
namespace {

constexpr int64_t kRows = 256;  // rows of a partial sum; these are added in order, for any number of threads

template <typename From>
void add_rows(const From* x, int64_t stride, int64_t rows, int64_t columns, bool squares, float* sums) {
  each_vector(columns, [&](int64_t j, auto lanes) {
    Vec total(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec value = load(x + r * stride + j, lanes);
      total = squares ? at::vec::fmadd(value, value, total) : total + value;
    }
    store(total, sums + j, lanes);
  });
}

}  // namespace

at::Tensor column_means(const at::Tensor& x, int64_t first, int64_t columns, int64_t images, bool squares) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 2 && (type == at::kFloat || type == at::kBFloat16) && x.stride(1) == 1,
              "column_means: a float32 or bfloat16 matrix with dense rows on cpu, got ", type, " ", x.sizes());
  TORCH_CHECK(first >= 0 && columns > 0 && first + columns <= x.size(1), "column_means: no ", columns,
              " columns from ", first, " in ", x.size(1));
  TORCH_CHECK(images > 0 && x.size(0) > 0 && x.size(0) % images == 0, "column_means: ", x.size(0),
              " rows are no whole number of ", images, " images");
  const int64_t length = x.size(0) / images, parts = (length + kRows - 1) / kRows;
  const at::Tensor partial = at::empty({images * parts, columns}, at::TensorOptions(at::kFloat));
  float* const sums = partial.data_ptr<float>();
  share_tasks(images * parts, [&](const auto& next) {
    for (int64_t begin, end; next(begin, end);) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i % parts * kRows, row = i / parts * length + start;
        const int64_t rows = std::min(kRows, length - start), offset = row * x.stride(0) + first;
        if (type == at::kFloat) {
          add_rows(x.const_data_ptr<float>() + offset, x.stride(0), rows, columns, squares, sums + i * columns);
        } else {
          add_rows(x.const_data_ptr<BFloat16>() + offset, x.stride(0), rows, columns, squares, sums + i * columns);
        }
      }
    }
  });
  at::Tensor means = at::empty({images, columns}, at::TensorOptions(at::kFloat));
  float* const out = means.data_ptr<float>();
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t c = 0; c < columns; ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[(image * parts + part) * columns + c];
      out[image * columns + c] = static_cast<float>(total / static_cast<double>(length));
    }
  }
  return means;
}

}  // namespace harmoq

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("column_means(Tensor x, int first, int columns, int images, bool squares=False) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::column_means)));
}
