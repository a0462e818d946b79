// Depthwise convolution of images whose pixels are rows of a matrix, channels side by side.

#include <vector>

#include "memory.h"
#include "gemm.h"
#include "rowwise/elementwise.h"

namespace harmoq {
namespace {

// One line of an image's output and the K lines of input it looks at, one vector of channels at a time.
template <typename From>
struct Line {
  const Rows<const From>* inputs;  // [k]; lines outside of the image are zeros with stride 0
  int64_t width, channels;
  const float *weight, *bias;  // [k * k, channels], [channels] or null
  Rows<float> output;
};

// `channel` to `channel + lanes` of a line. The window slides: each input pixel is read once and adds to the K outputs
// it is a neighbour of, which wait in registers; K terms are summed first, so that outputs do not wait for one another.
template <int K, typename From, typename Lanes>
inline void slide(const Line<From>& line, int64_t channel, Lanes lanes) {
  constexpr int kRadius = K / 2;
  Vec weight[K][K], waiting[K];
  for (int dy = 0; dy < K; ++dy) {
    for (int dx = 0; dx < K; ++dx) weight[dy][dx] = load(line.weight + (dy * K + dx) * line.channels + channel, lanes);
  }
  const Vec bias = line.bias ? load(line.bias + channel, lanes) : Vec(0.f);
  for (Vec& output : waiting) output = bias;
  const From* inputs[K];
  for (int dy = 0; dy < K; ++dy) inputs[dy] = line.inputs[dy].data + channel;
  for (int64_t p = 0; p < line.width + kRadius; ++p) {
    if (p < line.width) {
      Vec x[K];
      for (int dy = 0; dy < K; ++dy) x[dy] = load(inputs[dy], lanes), inputs[dy] += line.inputs[dy].stride;
      for (int t = 0; t < K; ++t) {  // output p - kRadius + t
        Vec term = x[0] * weight[0][K - 1 - t];
        for (int dy = 1; dy < K; ++dy) term = at::vec::fmadd(x[dy], weight[dy][K - 1 - t], term);
        waiting[t] = waiting[t] + term;
      }
    }
    if (p >= kRadius) store(waiting[0], line.output[p - kRadius] + channel, lanes);
    for (int t = 0; t + 1 < K; ++t) waiting[t] = waiting[t + 1];
    waiting[K - 1] = bias;
  }
}

// The same for windows whose weights no register file holds.
template <typename From, typename Lanes>
inline void gather(const Line<From>& line, int64_t k, int64_t channel, Lanes lanes) {
  const Vec bias = line.bias ? load(line.bias + channel, lanes) : Vec(0.f);
  for (int64_t p = 0; p < line.width; ++p) {
    const int64_t first = std::max<int64_t>(k / 2 - p, 0), last = std::min(k, line.width + k / 2 - p);
    Vec total = bias;
    for (int64_t dy = 0; dy < k; ++dy) {
      for (int64_t dx = first; dx < last; ++dx) {
        const Vec x = load(line.inputs[dy][p + dx - k / 2] + channel, lanes);
        total = at::vec::fmadd(x, load(line.weight + (dy * k + dx) * line.channels + channel, lanes), total);
      }
    }
    store(total, line.output[p] + channel, lanes);
  }
}

struct Images {
  int64_t height, width, channels, k;
};

template <typename From>
void convolve_line(const Images& images, Rows<const From> image, int64_t y, const From* zeros, const float* weight,
                   const float* bias, Rows<float> output) {
  std::vector<Rows<const From>> inputs(images.k);
  for (int64_t dy = 0; dy < images.k; ++dy) {
    const int64_t source = y + dy - images.k / 2;
    const bool inside = source >= 0 && source < images.height;
    inputs[dy] = inside ? Rows<const From>{image[source * images.width], image.stride} : Rows<const From>{zeros, 0};
  }
  const Line<From> line{inputs.data(), images.width, images.channels, weight, bias, output};
  each_vector(images.channels, [&](int64_t channel, auto lanes) {
    switch (images.k) {
      case 3: return slide<3>(line, channel, lanes);
      case 5: return slide<5>(line, channel, lanes);
      default: return gather(line, images.k, channel, lanes);
    }
  });
}

template <typename To>
void activate(std::optional<Unary> activation, Rows<const float> from, Rows<To> to, int64_t rows, int64_t width) {
  if (!activation) return copy_rows(from, to, rows, width);
  with_unary(*activation, 0.01f, [&](auto f) { map_rows(from, to, rows, width, f); });
}

template <typename From, typename To>
void convolve(const Images& images, Rows<const From> x, int64_t lines, const float* weight, const float* bias,
              std::optional<Unary> activation, Rows<To> out) {
  const bool direct = std::is_same_v<To, float> && !activation;
  const int64_t stride = packed_rows(images.channels, kLanes);
  at::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
    const std::vector<From> zeros(images.channels);
    std::vector<float> buffer(direct ? 0 : images.width * stride);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / images.height, y = line % images.height;
      const Rows<To> result{out[line * images.width], out.stride};
      Rows<float> sums{buffer.data(), stride};
      if constexpr (std::is_same_v<To, float>) sums = direct ? result : sums;
      convolve_line(images, {x[image * images.height * images.width], x.stride}, y, zeros.data(), weight, bias, sums);
      if (!direct) activate(activation, {sums.data, sums.stride}, result, images.width, images.channels);
    }
  });
}

void check(const at::Tensor& x, int64_t col, int64_t channels, int64_t tokens, const at::Tensor& weight,
           const std::optional<at::Tensor>& bias, int64_t activation, at::ScalarType out) {
  const auto floating = [](at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; };
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 2 && floating(x.scalar_type()) && x.size(0) == tokens,
              "depthwise: the input is float32 or bfloat16 [", tokens, ", columns] on cpu, got ", x.scalar_type(), " ",
              x.sizes());
  TORCH_CHECK(channels > 0 && col >= 0 && channels <= x.size(1) && col <= x.size(1) - channels, "depthwise: no ",
              channels, " columns from ", col, " in ", x.size(1));
  const auto float_on_cpu = [](const at::Tensor& t) { return t.device().is_cpu() && t.scalar_type() == at::kFloat; };
  TORCH_CHECK(float_on_cpu(weight) && weight.dim() == 2 && weight.size(1) == channels,
              "depthwise: the weight is float32 [k * k, ", channels, "] on cpu, got ", weight.scalar_type(), " ",
              weight.sizes());
  TORCH_CHECK(!bias || (float_on_cpu(*bias) && bias->numel() == channels), "depthwise: the bias is float32 [",
              channels, "] on cpu, or none");
  TORCH_CHECK(activation >= -1 && activation < static_cast<int64_t>(Unary::kCount), "depthwise: unknown activation ",
              activation);
  TORCH_CHECK(floating(out), "depthwise: the output is float32 or bfloat16, not ", out);
}

int64_t window_side(const at::Tensor& weight) {
  const auto side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(weight.size(0)))));
  TORCH_CHECK(side * side == weight.size(0) && side % 2 == 1, "depthwise: the window is square and odd, got ",
              weight.size(0), " weights for each channel");
  return side;
}

// Calls f with Rows of the tensor's own type, from a column on.
template <typename F>
void with_type(const at::Tensor& matrix, int64_t col, const F& f) {
  if (matrix.scalar_type() == at::kFloat) {
    f(Rows<float>{matrix.data_ptr<float>() + col, matrix.stride(0)});
  } else {
    f(Rows<BFloat16>{matrix.data_ptr<BFloat16>() + col, matrix.stride(0)});
  }
}

at::Tensor depthwise(const at::Tensor& x, int64_t col, int64_t channels, int64_t images, int64_t height, int64_t width,
                     const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t activation,
                     at::ScalarType out) {
  TORCH_CHECK(images >= 0 && height > 0 && width > 0, "depthwise: no images of ", height, " x ", width);
  check(x, col, channels, images * height * width, weight, bias, activation, out);
  const Images sizes{height, width, channels, window_side(weight)};
  const at::Tensor rows = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(), taps = weight.contiguous();
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  at::Tensor result = token_rows(x.size(0), channels, out);
  const auto kind = activation < 0 ? std::nullopt : std::optional(static_cast<Unary>(activation));
  with_type(rows, col, [&](auto from) {
    const Rows<const std::remove_pointer_t<decltype(from.data)>> source{from.data, from.stride};
    with_type(result, 0, [&](auto to) {
      const float* offsets = bias ? added.const_data_ptr<float>() : nullptr;
      convolve(sizes, source, images * height, taps.const_data_ptr<float>(), offsets, kind, to);
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def(
      "depthwise(Tensor x, int col, int channels, int images, int height, int width, Tensor weight, Tensor? bias, "
      "int activation, ScalarType out) -> Tensor",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(depthwise)));
}

}  // namespace harmoq
