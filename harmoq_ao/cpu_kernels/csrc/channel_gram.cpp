// Channel attention's products, which contract over the pixels of an image: gram[i, j] = sum_t q[t, i] k[t, j], in
// float32 or exactly over codes. Blocks of tokens are unpacked to float32, a head at a time, and multiplied in
// registers.

#include <ATen/ATen.h>
#include <vector>

#include "gemm.h"
#include "rowwise/elementwise.h"

namespace harmoq {
namespace {

// 255 * 255 * 256 < 2^24: the sums of products of codes of one block are whole numbers that float32 holds exactly.
constexpr int64_t kTokens = 256;
constexpr int64_t kShare = 4096;  // tokens of a task; tasks are the same for any number of threads
constexpr int64_t kTile = 8;      // rows of the gram in registers

struct Sizes {
  int64_t images, tokens, heads, dim, shares;  // tokens of an image
  int64_t rows() const { return packed_rows(dim, kTile); }
  int64_t columns() const { return packed_rows(dim, kLanes); }
  int64_t width() const { return std::max(rows(), columns()); }  // of an unpacked token
};

struct Identity {
  Vec operator()(Vec x, int64_t, int64_t) const { return x; }
};

// Codes as float32: clamp(round(x * reciprocal + offset), 0, top), each operation rounded; 0 for what is not a number.
struct Quantize {
  const float *reciprocal, *offset;
  float top;
  Vec operator()(Vec x, int64_t channel, int64_t lanes) const {
    const Vec position = x * load(reciprocal + channel, lanes) + load(offset + channel, lanes);
    const Vec code = at::vec::clamp(position, Vec(0.f), Vec(top)).round();
    return code & (code == code);
  }
};

// [tokens, dim] of any type to float32 [tokens, width], zeros after the channels.
template <typename From, typename F>
void unpack(Rows<const From> from, Rows<float> to, int64_t tokens, int64_t dim, const F& f) {
  for (int64_t t = 0; t < tokens; ++t) {
    each_vector(dim, [&](int64_t j, auto lanes) {
      store(f(load(from[t] + j, lanes), j, lanes), to[t] + j, kLanes);  // lanes past the channels load as zeros
    });
  }
}

// block[i, j] = sum_t q[t, i] k[t, j] for I rows from i and J vectors of columns from j.
template <int I, int J>
inline void multiply(Rows<const float> q, Rows<const float> k, int64_t tokens, int64_t i, int64_t j,
                     Rows<float> block) {
  Vec total[I][J];
  for (auto& row : total) {
    for (Vec& value : row) value = Vec(0.f);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float *left = q[t] + i, *right = k[t] + j;
    Vec column[J];
    for (int b = 0; b < J; ++b) column[b] = load(right + b * kLanes, kLanes);
    for (int a = 0; a < I; ++a) {
      const Vec value(left[a]);
      for (int b = 0; b < J; ++b) total[a][b] = at::vec::fmadd(value, column[b], total[a][b]);
    }
  }
  for (int a = 0; a < I; ++a) {
    for (int b = 0; b < J; ++b) store(total[a][b], block[i + a] + j + b * kLanes, kLanes);
  }
}

void block_gram(const Sizes& sizes, Rows<const float> q, Rows<const float> k, int64_t tokens, Rows<float> block) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= sizes.columns(); j += 2 * kLanes) {
    for (int64_t i = 0; i < sizes.rows(); i += kTile / 2) multiply<kTile / 2, 2>(q, k, tokens, i, j, block);
  }
  for (; j < sizes.columns(); j += kLanes) {
    for (int64_t i = 0; i < sizes.rows(); i += kTile) multiply<kTile, 1>(q, k, tokens, i, j, block);
  }
}

// total[j] += sum_t term(x[t, j])
template <typename T, typename F>
void add_columns(Rows<const float> x, int64_t tokens, int64_t dim, T* total, const F& term) {
  alignas(64) float sums[kLanes];
  for (int64_t j = 0; j < dim; j += kLanes) {
    Vec sum(0.f);
    for (int64_t t = 0; t < tokens; ++t) sum = term(load(x[t] + j, kLanes), sum);
    store(sum, sums, kLanes);
    for (int64_t c = 0; c < std::min(kLanes, dim - j); ++c) total[j + c] += static_cast<T>(sums[c]);
  }
}

// One operand: a matrix of any type, from its column on, and what its values become.
template <typename From, typename F>
struct Operand {
  Rows<const From> rows;
  std::vector<F> heads;  // one for each image and head
};

// Sums of each task, [tasks, heads, ...]; T is float, or int64_t for codes.
template <typename T>
struct Sums {
  T *gram, *q, *k;
};

template <typename T, typename Q, typename K, typename F>
void run_task(const Sizes& sizes, const Q& q, const K& k, int64_t task, int64_t head, std::vector<float>& scratch,
              Sums<T> sums, const F& term) {
  const int64_t image = task / sizes.shares, share = task % sizes.shares, width = sizes.width();
  const int64_t begin = sizes.tokens * share / sizes.shares, end = sizes.tokens * (share + 1) / sizes.shares;
  const Rows<float> left{scratch.data(), width}, right{left[kTokens], width}, block{right[kTokens], sizes.columns()};
  const int64_t place = image * sizes.heads + head;
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t count = std::min(kTokens, end - t), row = image * sizes.tokens + t, column = head * sizes.dim;
    unpack(decltype(q.rows){q.rows[row] + column, q.rows.stride}, left, count, sizes.dim, q.heads[place]);
    unpack(decltype(k.rows){k.rows[row] + column, k.rows.stride}, right, count, sizes.dim, k.heads[place]);
    const Rows<const float> a{left.data, width}, b{right.data, width};
    block_gram(sizes, a, b, count, block);
    for (int64_t i = 0; i < sizes.dim; ++i) {
      for (int64_t j = 0; j < sizes.dim; ++j) sums.gram[i * sizes.dim + j] += static_cast<T>(block[i][j]);
    }
    add_columns(a, count, sizes.dim, sums.q, term);
    add_columns(b, count, sizes.dim, sums.k, term);
  }
}

// Sum over the shares of each image, in order.
at::Tensor gather(const Sizes& sizes, const at::Tensor& parts) {
  std::vector<int64_t> shape = parts.sizes().vec();
  shape[0] = sizes.images, shape.insert(shape.begin() + 1, sizes.shares);
  at::Tensor total = parts.view(shape).select(1, 0).clone();
  for (int64_t share = 1; share < sizes.shares; ++share) total.add_(parts.view(shape).select(1, share));
  return total;
}

template <typename T, typename Q, typename K, typename F>
std::tuple<at::Tensor, at::Tensor, at::Tensor> gram(const Sizes& sizes, const Q& q, const K& k, const F& term) {
  const int64_t tasks = sizes.images * sizes.shares, dim = sizes.dim;
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
  const at::Tensor products = at::zeros({tasks, sizes.heads, dim, dim}, options);
  const at::Tensor q_sums = at::zeros({tasks, sizes.heads, dim}, options), k_sums = at::zeros_like(q_sums);
  at::parallel_for(0, tasks * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * kTokens * sizes.width() + sizes.rows() * sizes.columns());
    for (int64_t n = begin; n < end; ++n) {
      const Sums<T> sums{products.data_ptr<T>() + n * dim * dim, q_sums.data_ptr<T>() + n * dim,
                         k_sums.data_ptr<T>() + n * dim};
      run_task(sizes, q, k, n / sizes.heads, n % sizes.heads, scratch, sums, term);
    }
  });
  return {gather(sizes, products), gather(sizes, q_sums), gather(sizes, k_sums)};
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
void with_operand(const at::Tensor& matrix, int64_t col, const std::vector<H>& heads, const F& f) {
  if (matrix.scalar_type() == at::kFloat) {
    f(Operand<float, H>{{matrix.const_data_ptr<float>() + col, matrix.stride(0)}, heads});
  } else {
    f(Operand<BFloat16, H>{{matrix.const_data_ptr<BFloat16>() + col, matrix.stride(0)}, heads});
  }
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Result channel_gram(const at::Tensor& q, int64_t q_col, const at::Tensor& k, int64_t k_col, int64_t heads,
                    int64_t head_dim, int64_t images) {
  const at::Tensor left = checked(q, "q", q_col, heads, head_dim), right = checked(k, "k", k_col, heads, head_dim);
  const Sizes sizes = sizes_of(left, right, heads, head_dim, images);
  const std::vector<Identity> same(images * heads);
  Result result;
  with_operand(left, q_col, same, [&](const auto& a) {
    with_operand(right, k_col, same, [&](const auto& b) {
      result = gram<float>(sizes, a, b, [](Vec x, Vec sum) { return at::vec::fmadd(x, x, sum); });
    });
  });
  return result;
}

std::vector<Quantize> quantizers(const Sizes& sizes, const at::Tensor& reciprocal, const at::Tensor& offset,
                                 int64_t bits) {
  const std::vector<int64_t> shape{sizes.images, sizes.heads, sizes.dim};
  for (const at::Tensor& vector : {reciprocal, offset}) {
    const bool fits = vector.device().is_cpu() && vector.scalar_type() == at::kFloat && vector.sizes() == shape;
    TORCH_CHECK(fits && vector.is_contiguous(), "channel_gram_codes: reciprocal and offset are float32 ",
                at::IntArrayRef(shape), ", contiguous, got ", vector.scalar_type(), " ", vector.sizes());
  }
  TORCH_CHECK(bits >= 1 && bits <= 8, "channel_gram_codes: codes have 1 to 8 bits, got ", bits);
  std::vector<Quantize> heads;
  for (int64_t n = 0; n < sizes.images * sizes.heads; ++n) {
    heads.push_back({reciprocal.const_data_ptr<float>() + n * sizes.dim, offset.const_data_ptr<float>() + n * sizes.dim,
                     static_cast<float>((1 << bits) - 1)});
  }
  return heads;
}

Result channel_gram_codes(const at::Tensor& q, int64_t q_col, const at::Tensor& k, int64_t k_col, int64_t heads,
                          int64_t head_dim, int64_t images, const at::Tensor& q_reciprocal, const at::Tensor& q_offset,
                          int64_t q_bits, const at::Tensor& k_reciprocal, const at::Tensor& k_offset, int64_t k_bits) {
  const at::Tensor left = checked(q, "q", q_col, heads, head_dim), right = checked(k, "k", k_col, heads, head_dim);
  const Sizes sizes = sizes_of(left, right, heads, head_dim, images);
  const auto q_heads = quantizers(sizes, q_reciprocal, q_offset, q_bits);
  const auto k_heads = quantizers(sizes, k_reciprocal, k_offset, k_bits);
  Result result;
  with_operand(left, q_col, q_heads, [&](const auto& a) {
    with_operand(right, k_col, k_heads, [&](const auto& b) {
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
      "Tensor q_reciprocal, Tensor q_offset, int q_bits, Tensor k_reciprocal, Tensor k_offset, int k_bits) "
      "-> (Tensor, Tensor, Tensor)",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(channel_gram_codes)));
}

}  // namespace harmoq
