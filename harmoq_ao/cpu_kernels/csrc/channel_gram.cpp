// Channel attention's products, which contract over the pixels of an image: gram[i, j] = sum_t q[t, i] k[t, j], in
// float32 or exactly over codes. Blocks of tokens are unpacked to float32 and multiplied in registers, head by head.

#include <ATen/ops/zeros.h>
#include <cmath>
#include <vector>

#include "memory.h"
#include "rowwise/elementwise.h"

namespace harmoq {
namespace {

// 255 * 255 * 256 < 2^24: the sums of products of codes of one block are whole numbers that float32 holds exactly.
constexpr int64_t kTokens = 256;
constexpr int64_t kShare = 1024;  // tokens of a task; tasks are the same for any number of threads
constexpr int64_t kTile = 8;      // rows of the gram in registers at most

struct Sizes {
  int64_t images, tokens, heads, dim, shares;  // tokens of an image
  int64_t channels() const { return heads * dim; }
  // Of an unpacked token: tiles and vectors of the last heads may reach past the channels.
  int64_t width() const { return (channels() + 3 * kLanes - 1) / kLanes * kLanes; }
  int64_t products() const { return heads * dim * dim; }
};

struct Identity {
  Vec operator()(Vec x, int64_t, int64_t) const { return x; }
};

// Codes as float32: clamp(round(x * reciprocal + offset), 0, top), each operation rounded; 0 for what is not a number.
struct Quantize {
  const float* reciprocal;
  float offset, top;
  Vec operator()(Vec x, int64_t channel, int64_t lanes) const {
    const Vec position = x * load(reciprocal + channel, lanes) + Vec(offset);
    const Vec code = at::vec::clamp(position, Vec(0.f), Vec(top)).round();
    return code & (code == code);
  }
};

// [tokens, channels] of any type to float32 rows.
template <typename From, typename F>
void unpack(Rows<const From> from, Rows<float> to, int64_t tokens, int64_t channels, const F& f) {
  for (int64_t t = 0; t < tokens; ++t) {
    each_vector(channels, [&](int64_t j, auto lanes) { store(f(load(from[t] + j, lanes), j, lanes), to[t] + j, lanes); });
  }
}

// What adds a block's sums of products, whole numbers where T is int64_t, to those of a task.
template <typename T>
inline void add(Vec sum, T* total, int64_t lanes) {
  if constexpr (std::is_same_v<T, float>) {
    store(load(total, lanes) + sum, total, lanes);
  } else {
    alignas(64) float sums[kLanes];
    sum.store(sums);
    for (int64_t c = 0; c < lanes; ++c) total[c] += static_cast<T>(sums[c]);
  }
}

// total[i, j] += sum_t q[t, i] k[t, j] for at most I rows from i and J vectors of columns from j of a [dim, dim] matrix.
template <int I, int J, typename T>
inline void multiply(Rows<const float> q, Rows<const float> k, int64_t tokens, int64_t i, int64_t j, T* total,
                     int64_t dim) {
  Vec sums[I][J];
  for (auto& row : sums) {
    for (Vec& value : row) value = Vec(0.f);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float *left = q[t] + i, *right = k[t] + j;
    Vec column[J];
    for (int b = 0; b < J; ++b) column[b] = load(right + b * kLanes, kLanes);
    for (int a = 0; a < I; ++a) {
      const Vec value(left[a]);
      for (int b = 0; b < J; ++b) sums[a][b] = at::vec::fmadd(value, column[b], sums[a][b]);
    }
  }
  for (int a = 0; a < std::min<int64_t>(I, dim - i); ++a) {
    for (int b = 0; b < J; ++b) {
      const int64_t column = j + b * kLanes;
      if (column < dim) add(sums[a][b], total + (i + a) * dim + column, std::min(kLanes, dim - column));
    }
  }
}

// All rows in tiles of I, the largest tiles of a size that fits them.
template <int I, int J, typename T>
inline void multiply_rows(Rows<const float> q, Rows<const float> k, int64_t tokens, int64_t j, T* total, int64_t dim) {
  if constexpr (I > 1) {
    const int64_t tiles = (dim + kTile / J - 1) / (kTile / J);
    if ((dim + tiles - 1) / tiles < I) return multiply_rows<I - 1, J>(q, k, tokens, j, total, dim);
  }
  for (int64_t i = 0; i < dim; i += I) multiply<I, J>(q, k, tokens, i, j, total, dim);
}

template <typename T>
void add_products(Rows<const float> q, Rows<const float> k, int64_t tokens, T* total, int64_t dim) {
  int64_t j = 0;
  for (; j + kLanes < dim; j += 2 * kLanes) multiply_rows<kTile / 2, 2>(q, k, tokens, j, total, dim);
  if (j < dim) multiply_rows<kTile, 1>(q, k, tokens, j, total, dim);
}

// total[j] += sum_t term(x[t, j])
template <typename T, typename F>
void add_columns(Rows<const float> x, int64_t tokens, int64_t channels, T* total, const F& term) {
  each_vector(channels, [&](int64_t j, auto lanes) {
    Vec sum(0.f);
    for (int64_t t = 0; t < tokens; ++t) sum = term(load(x[t] + j, lanes), sum);
    add(sum, total + j, lanes);
  });
}

// One operand: a matrix of any type, from its column on, and what its values become in each image.
template <typename From, typename F>
struct Operand {
  Rows<const From> rows;
  std::vector<F> images;
};

// Sums of a task, `[heads, dim, dim]` products, then `[heads, dim]` of q and of k; T is float, or int64_t for codes.
template <typename T, typename Q, typename K, typename F>
void run_task(const Sizes& sizes, const Q& q, const K& k, int64_t task, float* scratch, T* sums, const F& term) {
  const int64_t image = task / sizes.shares, share = task % sizes.shares, dim = sizes.dim;
  const int64_t begin = sizes.tokens * share / sizes.shares, end = sizes.tokens * (share + 1) / sizes.shares;
  const Rows<float> left{scratch, sizes.width()}, right{left[kTokens], sizes.width()};
  T *q_sums = sums + sizes.products(), *k_sums = q_sums + sizes.channels();
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t count = std::min(kTokens, end - t), row = image * sizes.tokens + t;
    unpack(decltype(q.rows){q.rows[row], q.rows.stride}, left, count, sizes.channels(), q.images[image]);
    unpack(decltype(k.rows){k.rows[row], k.rows.stride}, right, count, sizes.channels(), k.images[image]);
    for (int64_t h = 0; h < sizes.heads; ++h) {
      const Rows<const float> a{left.data + h * dim, left.stride}, b{right.data + h * dim, right.stride};
      add_products(a, b, count, sums + h * dim * dim, dim);
    }
    add_columns(Rows<const float>{left.data, left.stride}, count, sizes.channels(), q_sums, term);
    add_columns(Rows<const float>{right.data, right.stride}, count, sizes.channels(), k_sums, term);
  }
}

// Some columns of the shares of each image, added in order.
template <typename T>
at::Tensor gather(const Sizes& sizes, const std::vector<T>& parts, int64_t first, std::vector<int64_t> shape) {
  shape.insert(shape.begin(), {sizes.images, sizes.heads});
  const at::Tensor total = at::zeros(shape, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  T* out = total.data_ptr<T>();
  const int64_t count = total.numel() / sizes.images, stride = parts.size() / (sizes.images * sizes.shares);
  for (int64_t task = 0; task < sizes.images * sizes.shares; ++task) {
    T* to = out + task / sizes.shares * count;
    const T* part = parts.data() + task * stride + first;
    for (int64_t c = 0; c < count; ++c) to[c] += part[c];
  }
  return total;
}

template <typename T, typename Q, typename K, typename F>
std::tuple<at::Tensor, at::Tensor, at::Tensor> gram(const Sizes& sizes, const Q& q, const K& k, const F& term) {
  const int64_t tasks = sizes.images * sizes.shares, each = sizes.products() + 2 * sizes.channels();
  std::vector<T> parts(tasks * each);
  share_tasks(tasks, [&](const auto& next) {
    std::vector<float> scratch(2 * kTokens * sizes.width());
    for (int64_t begin, end; next(begin, end);) {
      for (int64_t task = begin; task < end; ++task) {
        run_task(sizes, q, k, task, scratch.data(), parts.data() + task * each, term);
      }
    }
  });
  const int64_t dim = sizes.dim, q_first = sizes.products();
  return {gather(sizes, parts, 0, {dim, dim}), gather(sizes, parts, q_first, {dim}),
          gather(sizes, parts, q_first + sizes.channels(), {dim})};
}

at::Tensor checked(const at::Tensor& x, const char* name, int64_t col, int64_t heads, int64_t dim) {
  const bool typed = x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
  TORCH_CHECK(typed && x.dim() == 2, "channel_gram: ", name, " is a float32 or bfloat16 matrix on cpu, got ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(heads > 0 && dim > 0 && heads <= x.size(1) / dim && col >= 0 && col <= x.size(1) - heads * dim,
              "channel_gram: no ", heads, " * ", dim, " columns from ", col, " in ", x.size(1));
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

Sizes sizes_of(const at::Tensor& q, const at::Tensor& k, int64_t heads, int64_t dim, int64_t images) {
  TORCH_CHECK(images > 0 && q.size(0) == k.size(0) && q.size(0) % images == 0, "channel_gram: ", q.size(0), " and ",
              k.size(0), " rows are not the tokens of ", images, " images");
  const int64_t tokens = q.size(0) / images;
  return {images, tokens, heads, dim, std::max<int64_t>((tokens + kShare - 1) / kShare, 1)};
}

// Calls f with the operand in its own type.
template <typename H, typename F>
void with_operand(const at::Tensor& matrix, int64_t col, const std::vector<H>& images, const F& f) {
  if (matrix.scalar_type() == at::kFloat) {
    f(Operand<float, H>{{matrix.const_data_ptr<float>() + col, matrix.stride(0)}, images});
  } else {
    f(Operand<BFloat16, H>{{matrix.const_data_ptr<BFloat16>() + col, matrix.stride(0)}, images});
  }
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Result channel_gram(const at::Tensor& q, int64_t q_col, const at::Tensor& k, int64_t k_col, int64_t heads,
                    int64_t head_dim, int64_t images) {
  const at::Tensor left = checked(q, "q", q_col, heads, head_dim), right = checked(k, "k", k_col, heads, head_dim);
  const Sizes sizes = sizes_of(left, right, heads, head_dim, images);
  const std::vector<Identity> same(images);
  Result result;
  with_operand(left, q_col, same, [&](const auto& a) {
    with_operand(right, k_col, same, [&](const auto& b) {
      result = gram<float>(sizes, a, b, [](Vec x, Vec sum) { return at::vec::fmadd(x, x, sum); });
    });
  });
  return result;
}

// Quantizers of the channels of each image, divided by their lengths; `reciprocals` is where those are kept.
std::vector<Quantize> quantizers(const Sizes& sizes, const at::Tensor& squares, double eps, double factor,
                                 double offset, int64_t bits, std::vector<float>& reciprocals) {
  const std::vector<int64_t> shape{sizes.images, sizes.channels()};
  const bool fits = squares.device().is_cpu() && squares.scalar_type() == at::kFloat && squares.sizes() == shape;
  TORCH_CHECK(fits && squares.stride(1) == 1, "channel_gram_codes: mean squares are float32 ", at::IntArrayRef(shape),
              ", dense, got ", squares.scalar_type(), " ", squares.sizes());
  TORCH_CHECK(bits >= 1 && bits <= 8, "channel_gram_codes: codes have 1 to 8 bits, got ", bits);
  reciprocals.resize(squares.numel());
  std::vector<Quantize> images;
  for (int64_t image = 0; image < sizes.images; ++image) {
    const float* from = squares.const_data_ptr<float>() + image * squares.stride(0);
    float* to = reciprocals.data() + image * sizes.channels();
    for (int64_t c = 0; c < sizes.channels(); ++c) {
      const float length = std::sqrt(from[c] * static_cast<float>(sizes.tokens));
      to[c] = static_cast<float>(factor) / std::max(length, static_cast<float>(eps));
    }
    images.push_back({to, static_cast<float>(offset), static_cast<float>((1 << bits) - 1)});
  }
  return images;
}

Result channel_gram_codes(const at::Tensor& q, int64_t q_col, const at::Tensor& k, int64_t k_col, int64_t heads,
                          int64_t head_dim, int64_t images, const at::Tensor& q_squares, double q_eps, double q_factor,
                          double q_offset, int64_t q_bits, const at::Tensor& k_squares, double k_eps, double k_factor,
                          double k_offset, int64_t k_bits) {
  const at::Tensor left = checked(q, "q", q_col, heads, head_dim), right = checked(k, "k", k_col, heads, head_dim);
  const Sizes sizes = sizes_of(left, right, heads, head_dim, images);
  std::vector<float> q_reciprocals, k_reciprocals;
  const auto q_images = quantizers(sizes, q_squares, q_eps, q_factor, q_offset, q_bits, q_reciprocals);
  const auto k_images = quantizers(sizes, k_squares, k_eps, k_factor, k_offset, k_bits, k_reciprocals);
  Result result;
  with_operand(left, q_col, q_images, [&](const auto& a) {
    with_operand(right, k_col, k_images, [&](const auto& b) {
      result = gram<int64_t>(sizes, a, b, [](Vec x, Vec sum) { return x + sum; });
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def(
      "channel_gram(Tensor q, int q_col, Tensor k, int k_col, int heads, int head_dim, int images) "
      "-> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(channel_gram)));
  m.def(
      "channel_gram_codes(Tensor q, int q_col, Tensor k, int k_col, int heads, int head_dim, int images, "
      "Tensor q_squares, float q_eps, float q_factor, float q_offset, int q_bits, "
      "Tensor k_squares, float k_eps, float k_factor, float k_offset, int k_bits) -> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(channel_gram_codes)));
}

}  // namespace harmoq
