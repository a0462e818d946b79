// Attention maps to codes relative to the largest entry of each row, and the gradient of that: the passes over a map of
// `quant/relative_maps.py`, in which every operation is rounded on its own.

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "rowwise/vectors.h"

namespace harmoq {
namespace {

constexpr float kTiny = 1e-30f;

struct Range {
  Range(const at::Tensor& lo_, const at::Tensor& hi_) : lo(lo_.item<float>()), hi(hi_.item<float>()) {}
  bool clips() const { return lo < 0 || hi < 1; }  // entries are in 0..1
  float lo, hi;
};

float largest(const float* row, int64_t width) {
  Vec most(row[0]);
  each_vector(width, [&](int64_t j, auto lanes) {
    most = at::vec::maximum(most, lanes == kLanes ? load(row + j, lanes) : Vec::set(most, load(row + j, lanes), lanes));
  });
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most);
}

// Codes of a row, as whole numbers of steps above zero, and the sums of its entries and of the codes.
std::pair<float, float> round_row(const float* row, float* codes, int64_t width, float most, const Range& range,
                                  float top) {
  const float step = step_size(range.lo, range.hi, top), lower = -range.lo / step;
  const Vec largest(most), factor(1.f / step), offset(lower), zero(0.f), last(top), shift(std::nearbyint(lower));
  Vec entries(0.f), total(0.f);
  each_vector(width, [&](int64_t j, auto lanes) {
    const Vec entry = load(row + j, lanes), product = entry / largest * factor;
    Vec code = range.clips() ? at::vec::clamp((product + offset).round(), zero, last) - shift : product.round();
    if (lanes < kLanes) code = Vec::set(zero, code, lanes);
    entries = entries + entry;
    total = total + code;
    store(code, codes + j, lanes);
  });
  return {sum(entries), sum(total)};
}

void check_map(const char* name, const at::Tensor& p, const at::Tensor& lo, const at::Tensor& hi) {
  TORCH_CHECK(p.device().is_cpu() && p.scalar_type() == at::kFloat && p.is_contiguous() && p.dim() > 0 && p.numel() > 0,
              name, ": a dense float32 map with entries, on cpu, got ", p.scalar_type(), " ", p.sizes());
  TORCH_CHECK(lo.numel() == 1 && hi.numel() == 1, name, ": one pair of bounds, got ", lo.sizes(), " and ", hi.sizes());
}

// f(row) in all threads.
template <typename F>
void each_row(int64_t rows, int64_t width, const F& f) {
  const int64_t run = std::max<int64_t>(4096 / width, 1);
  share_tasks((rows + run - 1) / run, [&](const auto& next) {
    for (int64_t begin, end; next(begin, end);) {
      for (int64_t row = begin * run; row < std::min(end * run, rows); ++row) f(row);
    }
  });
}

}  // namespace

// Codes, and of each row the largest entry, the sum of entries and the sum of codes.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relative_codes(const at::Tensor& p, const at::Tensor& lo,
                                                                          const at::Tensor& hi, int64_t bits) {
  check_map("relative_codes", p, lo, hi);
  TORCH_CHECK(bits >= 1 && bits <= 8, "relative_codes: 1 to 8 bits, got ", bits);
  const Range range(lo, hi);
  const float last = static_cast<float>((1 << bits) - 1);
  const int64_t width = p.size(-1), rows = p.numel() / width;
  std::vector<int64_t> shape = p.sizes().vec();
  shape.back() = 1;
  const at::TensorOptions options(at::kFloat);
  at::Tensor codes = at::empty_like(p), top = at::empty(shape, options), sums = at::empty(shape, options),
             totals = at::empty(shape, options);
  const float* const from = p.const_data_ptr<float>();
  float *const to = codes.data_ptr<float>(), *const of_top = top.data_ptr<float>(),
        *const of_sums = sums.data_ptr<float>(), *const of_totals = totals.data_ptr<float>();
  each_row(rows, width, [&](int64_t row) {
    const float* const entries = from + row * width;
    of_top[row] = std::max(largest(entries, width), kTiny);
    const auto found = round_row(entries, to + row * width, width, of_top[row], range, last);
    of_sums[row] = found.first, of_totals[row] = std::max(found.second, kTiny);
  });
  return {codes, top, sums, totals};
}

// In place: the gradient of codes, in entries, becomes that of the map. In each row `of_codes` is subtracted, entries
// that were clipped get zero, and `of_sum` is added to all.
void relative_map_backward_(const at::Tensor& grad, const at::Tensor& p, const at::Tensor& top,
                            const at::Tensor& of_codes, const at::Tensor& of_sum, const at::Tensor& lo,
                            const at::Tensor& hi) {
  check_map("relative_map_backward_", p, lo, hi);
  const int64_t width = p.size(-1), rows = p.numel() / width;
  TORCH_CHECK(grad.sizes() == p.sizes() && grad.scalar_type() == at::kFloat && grad.is_contiguous(),
              "relative_map_backward_: a dense gradient of the map's shape ", p.sizes(), ", got ", grad.sizes());
  for (const at::Tensor& part : {top, of_codes, of_sum}) {
    TORCH_CHECK(part.numel() == rows && part.scalar_type() == at::kFloat && part.is_contiguous(),
                "relative_map_backward_: a number for each of ", rows, " rows, got ", part.sizes());
  }
  const Range range(lo, hi);
  const float *const from = p.const_data_ptr<float>(), *const tops = top.const_data_ptr<float>(),
              *const taken = of_codes.const_data_ptr<float>(), *const added = of_sum.const_data_ptr<float>();
  float* const to = grad.data_ptr<float>();
  each_row(rows, width, [&](int64_t row) {
    const Vec largest(tops[row]), minus(taken[row]), plus(added[row]), low(range.lo), high(range.hi), zero(0.f);
    each_vector(width, [&](int64_t j, auto lanes) {
      float* const place = to + row * width + j;
      Vec moved = load(place, lanes) - minus;
      if (range.clips()) {
        const Vec relative = load(from + row * width + j, lanes) / largest;
        moved = Vec::blendv(moved, zero, (relative < low) | (relative > high));
      }
      store(moved + plus, place, lanes);
    });
  });
}

}  // namespace harmoq

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("relative_codes(Tensor p, Tensor lo, Tensor hi, int bits) -> (Tensor, Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::relative_codes)));
  m.def("relative_map_backward_(Tensor(a!) grad, Tensor p, Tensor top, Tensor of_codes, Tensor of_sum, Tensor lo, "
        "Tensor hi) -> ()",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::relative_map_backward_)));
}
