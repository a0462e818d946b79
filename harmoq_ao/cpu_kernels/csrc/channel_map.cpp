// Attention maps of channels from sums over pixels, as matrices that tokens are multiplied with.

#include <ATen/ops/zeros.h>
#include <cmath>

#include "common.h"

namespace harmoq {
namespace {

struct Sizes {
  int64_t images, heads, dim;
  int64_t channels() const { return heads * dim; }
};

// `clamp(round(x * factor + offset), 0, top)` and back: `code * step + lower`.
struct Quantizer {
  float factor, offset, top, step, lower;
  float operator()(float x) const {
    const float product = x * factor;  // rounded before the addition
    const float code = std::min(std::max(std::nearbyint(product + offset), 0.f), top);
    const float value = code * step;
    return value + lower;
  }
};

// exp(s - max s), and their sum.
float exponentials(float* row, int64_t dim) {
  float most = row[0], sum = 0;
  for (int64_t j = 1; j < dim; ++j) most = std::max(most, row[j]);
  for (int64_t j = 0; j < dim; ++j) sum += row[j] = std::exp(row[j] - most);
  return sum;
}

// Calls score(image, head, i, row) for what row i of a map is made of and finish(row, sum) for the map of exponentials,
// and writes the result as a column of the image's block-diagonal matrix.
template <typename S, typename F>
void write_maps(const Sizes& sizes, const at::Tensor& matrix, const S& score, const F& finish) {
  const int64_t channels = sizes.channels(), dim = sizes.dim;
  float* const out = matrix.data_ptr<float>();
  at::parallel_for(0, sizes.images * sizes.heads, std::max<int64_t>(4096 / (dim * dim), 1), [&](int64_t n, int64_t end) {
    std::vector<float> row(dim);
    for (; n < end; ++n) {
      const int64_t image = n / sizes.heads, first = n % sizes.heads * dim;
      float* block = out + (image * channels + first) * channels + first;
      for (int64_t i = 0; i < dim; ++i) {
        score(n, i, row.data());
        finish(n * dim + i, row.data(), exponentials(row.data(), dim));
        for (int64_t j = 0; j < dim; ++j) block[j * channels + i] = row[j];
      }
    }
  });
}

Sizes sizes_of(const char* name, const at::Tensor& gram, const at::Tensor& q, const at::Tensor& k,
               const at::Tensor& factor, at::ScalarType type) {
  const auto dense = [](const at::Tensor& x) { return x.device().is_cpu() && x.is_contiguous(); };
  TORCH_CHECK(gram.dim() == 4 && gram.size(2) == gram.size(3), name, ": products are [images, heads, D, D], got ",
              gram.sizes());
  const Sizes sizes{gram.size(0), gram.size(1), gram.size(2)};
  const std::vector<int64_t> sums{sizes.images, sizes.heads, sizes.dim};
  TORCH_CHECK(q.sizes() == sums && k.sizes() == sums && factor.sizes() == at::IntArrayRef({sizes.heads}), name,
              ": sums are ", at::IntArrayRef(sums), " and factors [", sizes.heads, "], got ", q.sizes(), ", ", k.sizes(),
              " and ", factor.sizes());
  TORCH_CHECK(dense(gram) && dense(q) && dense(k) && dense(factor) && gram.scalar_type() == type &&
                  q.scalar_type() == type && k.scalar_type() == type && factor.scalar_type() == at::kFloat,
              name, ": products and sums are dense ", type, " and factors float32, on cpu");
  return sizes;
}

at::Tensor matrices(const Sizes& sizes) {
  return at::zeros({sizes.images * sizes.channels(), sizes.channels()}, at::TensorOptions(at::kFloat));
}

at::Tensor channel_map(const at::Tensor& gram, const at::Tensor& q, const at::Tensor& k, double q_eps, double k_eps,
                       const at::Tensor& factor) {
  const Sizes sizes = sizes_of("channel_map", gram, q, k, factor, at::kFloat);
  const int64_t dim = sizes.dim;
  const auto lengths = [&](const at::Tensor& squares, double eps) {
    std::vector<float> found(squares.const_data_ptr<float>(), squares.const_data_ptr<float>() + squares.numel());
    for (float& x : found) x = std::max(std::sqrt(x), static_cast<float>(eps));
    return found;
  };
  const std::vector<float> rows = lengths(q, q_eps), columns = lengths(k, k_eps);
  const float *products = gram.const_data_ptr<float>(), *factors = factor.const_data_ptr<float>();
  const auto score = [&](int64_t n, int64_t i, float* row) {
    for (int64_t j = 0; j < dim; ++j) {
      row[j] = products[(n * dim + i) * dim + j] / rows[n * dim + i] / columns[n * dim + j] * factors[n % sizes.heads];
    }
  };
  const at::Tensor result = matrices(sizes);
  write_maps(sizes, result, score, [&](int64_t, float* row, float sum) {
    for (int64_t j = 0; j < dim; ++j) row[j] /= sum;
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> channel_map_codes(const at::Tensor& gram, const at::Tensor& q, const at::Tensor& k,
                                                     int64_t tokens, at::ArrayRef<double> left,
                                                     at::ArrayRef<double> right, const at::Tensor& factor,
                                                     at::ArrayRef<double> map, int64_t bits,
                                                     at::ArrayRef<double> value, bool relative) {
  const Sizes sizes = sizes_of("channel_map_codes", gram, q, k, factor, at::kLong);
  TORCH_CHECK(left.size() == 2 && right.size() == 2 && map.size() == 4 && value.size() == 2 && bits >= 1 && bits <= 8,
              "channel_map_codes: steps and lower bounds of two operands and the values, factor, offset, step and lower "
              "bound of the map, and 1 to 8 bits");
  const auto real = [](double x) { return static_cast<float>(x); };
  const float q_step = real(left[0]), q_lower = real(left[1]), k_step = real(right[0]), k_lower = real(right[1]);
  const float value_step = real(value[0]), value_lower = real(value[1]), length = static_cast<float>(tokens);
  const Quantizer round{real(map[0]), real(map[1]), real((1 << bits) - 1), real(map[2]), real(map[3])};
  const int64_t dim = sizes.dim;
  const int64_t *products = gram.const_data_ptr<int64_t>(), *rows = q.const_data_ptr<int64_t>(),
                *columns = k.const_data_ptr<int64_t>();
  const float* factors = factor.const_data_ptr<float>();
  const auto score = [&](int64_t n, int64_t i, float* row) {
    const float outer = (static_cast<float>(rows[n * dim + i]) * q_step + q_lower * length) * k_lower;
    for (int64_t j = 0; j < dim; ++j) {
      const float product = static_cast<float>(products[(n * dim + i) * dim + j]) * q_step * k_step;
      const float column = static_cast<float>(columns[n * dim + j]) * k_step * q_lower;
      row[j] = (product + outer + column) * factors[n % sizes.heads];
    }
  };
  const at::Tensor result = matrices(sizes);
  const at::Tensor offsets = at::empty({sizes.images, sizes.channels()}, at::TensorOptions(at::kFloat));
  float* const offset = offsets.data_ptr<float>();
  write_maps(sizes, result, score, [&](int64_t place, float* row, float sum) {
    float total = 0;
    for (int64_t j = 0; j < dim; ++j) total += row[j] = round(relative ? row[j] : row[j] / sum);
    // rows of a relative map sum to one again
    const float scale = relative ? 1.f / std::max(total, 1e-30f) : 1.f;
    for (int64_t j = 0; j < dim; ++j) row[j] = row[j] * scale * value_step;
    offset[place] = total * scale * value_lower;
  });
  return {result, offsets};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("channel_map(Tensor gram, Tensor q, Tensor k, float q_eps, float k_eps, Tensor factor) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(channel_map)));
  m.def(
      "channel_map_codes(Tensor gram, Tensor q, Tensor k, int tokens, float[] left, float[] right, Tensor factor, "
      "float[] map, int bits, float[] value, bool relative) -> (Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(channel_map_codes)));
}

}  // namespace harmoq
