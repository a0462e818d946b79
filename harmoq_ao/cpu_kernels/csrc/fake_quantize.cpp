// Rounding to the levels of a quantizer and back, and the gradients of that: one pass each, of the formulas of
// `quant/quantizer.py`, whose every multiplication, division and addition is rounded on its own.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <optional>

#include "rowwise/vectors.h"

namespace harmoq {
namespace {

constexpr int64_t kTask = 1 << 14;  // values of a partial sum; these are added in order, for any number of threads
constexpr float kEdge = 1e-4f;

using Optional = std::optional<at::Tensor>;

// An operand in the order of its memory, `[outer, rows, columns]`: bounds are of all or of a row, joint scale and shift
// of a column or of a row. Narrow rows are joined: columns then repeat after `period`.
struct Layout {
  int64_t outer, rows, columns, period;
  bool bounds_by_row, has_joint, joint_by_column;
  // Rows are cut into segments, which are handed out in runs.
  int64_t segments() const { return (columns + kTask - 1) / kTask; }
  int64_t pieces() const { return outer * rows * segments(); }
  int64_t run() const { return std::max<int64_t>(kTask / columns, 1); }
  int64_t tasks() const { return (pieces() + run() - 1) / run(); }
  bool sums_by_row() const { return bounds_by_row || (has_joint && !joint_by_column); }
};

at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

// The dimensions of x, or of a dense copy, that have an extent, slowest first.
std::vector<int64_t> memory_order(const at::Tensor& x) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) order.push_back(d);
  }
  if (!x.is_non_overlapping_and_dense()) return order;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  return order;
}

constexpr int64_t kWhole = -1, kUnfit = -2;

// The dimension of x that a small tensor follows.
int64_t dimension_of(const at::Tensor& small, const at::Tensor& x) {
  if (small.scalar_type() != at::kFloat || !small.device().is_cpu() || small.dim() > x.dim()) return kUnfit;
  int64_t found = kWhole;
  for (int64_t d = 0; d < small.dim(); ++d) {
    if (small.size(d) == 1) continue;
    const int64_t of_x = d + x.dim() - small.dim();
    if (found != kWhole || small.size(d) != x.size(of_x)) return kUnfit;
    found = of_x;
  }
  return found;
}

void join_rows(Layout& layout) {
  if (!layout.joint_by_column || layout.bounds_by_row) return;
  for (; layout.columns < 128 && layout.outer % 2 == 0; layout.outer /= 2) layout.columns *= 2;
}

std::optional<Layout> layout_of(const at::Tensor& x, const at::Tensor& lo, const at::Tensor& hi, const Optional& scale,
                                const Optional& shift) {
  if (x.scalar_type() != at::kFloat || !x.device().is_cpu() || x.numel() == 0) return {};
  if (lo.sizes() != hi.sizes() || hi.scalar_type() != at::kFloat) return {};
  if (scale && shift && scale->sizes() != shift->sizes()) return {};
  const bool has_joint = scale || shift;
  const int64_t bounds = dimension_of(lo, x), joint = has_joint ? dimension_of(scale ? *scale : *shift, x) : kWhole;
  if (bounds == kUnfit || joint == kUnfit || (scale && shift && dimension_of(*shift, x) == kUnfit)) return {};
  const std::vector<int64_t> order = memory_order(x);
  const bool by_column = joint != kWhole && joint == order.back() && joint != bounds;
  if (!by_column && joint != kWhole && bounds != kWhole && joint != bounds) return {};
  const int64_t row = bounds != kWhole ? bounds : by_column ? kWhole : joint;
  if (by_column && row != kWhole && row != order[order.size() - 2]) return {};
  int64_t columns = by_column ? x.size(joint) : 1;
  if (!by_column) {
    for (size_t i = order.size(); i-- > 0 && order[i] != row;) columns *= x.size(order[i]);
  }
  const int64_t rows = row == kWhole ? 1 : x.size(row);
  Layout layout{x.numel() / (rows * columns), rows, columns, columns, bounds != kWhole, has_joint, by_column};
  join_rows(layout);
  return layout;
}

// What the small tensors make of a value: `x * factor + offset` is its position, `code * step + lo` a level.
class Affine {
 public:
  Affine(const Layout& layout, int64_t bits, const at::Tensor& lo, const at::Tensor& hi, const Optional& scale,
         const Optional& shift)
      : top(static_cast<float>((1 << bits) - 1)), layout_(layout), lo_(lo.contiguous()), hi_(hi.contiguous()),
        scale_(scale ? scale->contiguous() : at::Tensor()), shift_(shift ? shift->contiguous() : at::Tensor()) {
    if (!layout.joint_by_column) return;
    factors.resize(layout.columns), offsets.resize(layout.columns);
    if (scale) scales.resize(layout.columns);
  }

  void take_row(int64_t row) {
    if (row == row_) return;
    row_ = row;
    const int64_t of_bounds = layout_.bounds_by_row ? row : 0;
    lo = lo_.const_data_ptr<float>()[of_bounds];
    step = step_size(lo, hi_.const_data_ptr<float>()[of_bounds], top);
    if (layout_.joint_by_column) {
      set_columns();
      return;
    }
    const auto of_row = [&](const at::Tensor& x) { return x.const_data_ptr<float>()[x.numel() > 1 ? row : 0]; };
    if (scale_.defined()) scale = of_row(scale_);
    factor = 1.f / (scale_.defined() ? scale * step : step);
    offset = -lo / step;
    if (shift_.defined()) offset = less_product(offset, of_row(shift_), factor);
  }

  float top, lo = 0, step = 1, factor = 1, offset = 0, scale = 1;
  std::vector<float> factors, offsets, scales;  // by column

 private:
  template <typename T>
  static T less_product(T from, T a, T b) {
    const T product = a * b;
    return from - product;
  }

  void set_columns() {
    const float *const s = scale_.defined() ? scale_.const_data_ptr<float>() : nullptr,
                *const z = shift_.defined() ? shift_.const_data_ptr<float>() : nullptr;
    each_vector(layout_.period, [&](int64_t c, auto lanes) {
      const Vec some = Vec(1.f) / (s ? load(s + c, lanes) * Vec(step) : Vec(step));
      Vec from(-lo / step);
      if (z) from = less_product(from, load(z + c, lanes), some);
      store(some, factors.data() + c, lanes), store(from, offsets.data() + c, lanes);
      if (s) store(load(s + c, lanes), scales.data() + c, lanes);
    });
    for (std::vector<float>* many : {&factors, &offsets, &scales}) {  // joined rows
      for (size_t c = layout_.period; c < many->size(); ++c) (*many)[c] = (*many)[c - layout_.period];
    }
  }

  const Layout& layout_;
  const at::Tensor lo_, hi_, scale_, shift_;
  int64_t row_ = -1;
};

struct Piece {
  int64_t number, row, place, column, columns;
};

// f(task, affine, next) in every thread, where next(piece) goes through the pieces of a task.
template <typename F>
void each_task(const Layout& layout, const Affine& prototype, const F& f) {
  share_tasks(layout.tasks(), [&](const auto& next) {
    Affine affine = prototype;
    for (int64_t task, end; next(task, end);) {
      for (; task < end; ++task) {
        int64_t number = task * layout.run();
        const int64_t last = std::min(number + layout.run(), layout.pieces());
        f(task, affine, [&](Piece& piece) {
          if (number >= last) return false;
          const int64_t row = number / layout.segments(), column = number % layout.segments() * kTask;
          piece = {number, row % layout.rows, row * layout.columns + column, column,
                   std::min(kTask, layout.columns - column)};
          affine.take_row(piece.row);
          return ++number, true;
        });
      }
    }
  });
}

template <bool kByColumn>
inline Vec of_column(const std::vector<float>& many, float one, int64_t column, int64_t lanes) {
  return kByColumn ? load(many.data() + column, lanes) : Vec(one);
}

template <bool kByColumn>
void round_trip(const float* x, float* y, int64_t column, int64_t columns, const Affine& a) {
  const Vec zero(0.f), top(a.top), step(a.step), lo(a.lo);
  each_vector(columns, [&](int64_t j, auto lanes) {
    const Vec factor = of_column<kByColumn>(a.factors, a.factor, column + j, lanes);
    const Vec offset = of_column<kByColumn>(a.offsets, a.offset, column + j, lanes);
    const Vec product = load(x + j, lanes) * factor;
    const Vec code = at::vec::clamp((product + offset).round(), zero, top) * step;
    store(code + lo, y + j, lanes);
  });
}

// Sums over some values: of gradients that were clipped, and of those above; of what rounding moved; of gradients
// inside, alone and times what they belong to.
struct Sums {
  Vec clipped{0.f}, above{0.f}, rounding{0.f}, inside{0.f}, scaled{0.f};
  void write(float* to) const {
    for (const Vec* part : {&clipped, &above, &rounding, &inside, &scaled}) *to++ = sum(*part);
  }
};
constexpr int64_t kSums = 5;

template <bool kByColumn>
void gradients(const float* grad, const float* x, float* grad_x, int64_t column, int64_t columns, const Affine& a,
               Sums& sums, float* by_column) {
  const Vec zero(0.f), least(-kEdge), most(static_cast<float>(a.top + 1e-4)), half(a.top / 2), step(a.step), lo(a.lo);
  const bool divides = kByColumn ? !a.scales.empty() : a.scale != 1.f;
  each_vector(columns, [&](int64_t j, auto lanes) {
    const Vec factor = of_column<kByColumn>(a.factors, a.factor, column + j, lanes);
    const Vec offset = of_column<kByColumn>(a.offsets, a.offset, column + j, lanes);
    const Vec product = load(x + j, lanes) * factor, position = product + offset, g = load(grad + j, lanes);
    const Vec inside = Vec::blendv(g, zero, (position <= least) | (position >= most)), clipped = g - inside;
    sums.clipped = sums.clipped + clipped;
    sums.above = sums.above + Vec::blendv(clipped, zero, position <= half);
    sums.rounding = sums.rounding + (position.round() - position) * inside;
    const Vec scaled = (position * step + lo) * inside;
    if (kByColumn) {
      float* const total = by_column + column + j;
      store(load(total, lanes) + inside, total, lanes);
      store(load(total + a.factors.size(), lanes) + scaled, total + a.factors.size(), lanes);
    } else {
      sums.inside = sums.inside + inside;
      sums.scaled = sums.scaled + scaled;
    }
    store(divides ? inside / of_column<kByColumn>(a.scales, a.scale, column + j, lanes) : inside, grad_x + j, lanes);
  });
}

void backward(const Layout& layout, const Affine& affine, const float* grad, const float* x, float* grad_x, float* sums,
              float* by_column) {
  each_task(layout, affine, [&](int64_t task, const Affine& a, const auto& next) {
    Sums total;
    float* const columns = by_column + 2 * layout.columns * task;
    for (Piece piece; next(piece);) {
      const auto call = layout.joint_by_column ? gradients<true> : gradients<false>;
      call(grad + piece.place, x + piece.place, grad_x + piece.place, piece.column, piece.columns, a, total, columns);
      if (!layout.sums_by_row()) continue;
      total.write(sums + piece.number * kSums);
      total = Sums();
    }
    if (!layout.sums_by_row()) total.write(sums + task * kSums);
  });
}

// Gradients of bounds, of joint scale and of joint shift from partial sums, which are added in their order.
struct Totals {
  explicit Totals(const Layout& layout)
      : clipped(layout.rows), above(layout.rows), rounding(layout.rows),
        inside(layout.joint_by_column ? layout.period : layout.rows), scaled(inside.size()) {}

  void add_rows(const Layout& layout, const float* sums, int64_t count) {
    for (int64_t i = 0; i < count; ++i, sums += kSums) {
      const int64_t row = layout.sums_by_row() ? i / layout.segments() % layout.rows : 0;
      clipped[row] += sums[0], above[row] += sums[1], rounding[row] += sums[2];
      if (!layout.joint_by_column) inside[row] += sums[3], scaled[row] += sums[4];
    }
  }

  void add_columns(const Layout& layout, const float* sums) {
    for (int64_t task = 0; task < layout.tasks(); ++task, sums += 2 * layout.columns) {
      for (int64_t first = 0; first < layout.columns; first += layout.period) {
        for (int64_t c = 0; c < layout.period; ++c) {
          inside[c] += sums[first + c], scaled[c] += sums[layout.columns + first + c];
        }
      }
    }
  }

  std::vector<double> clipped, above, rounding, inside, scaled;
};

// Values by row or column in the shape of a small tensor, summed where that has one for all.
at::Tensor in_shape_of(const at::Tensor& small, const std::vector<double>& values) {
  at::Tensor result = at::zeros(small.sizes(), at::TensorOptions(at::kFloat));
  float* const to = result.data_ptr<float>();
  if (small.numel() == 1) {
    *to = static_cast<float>(std::accumulate(values.begin(), values.end(), 0.0));
  } else {
    std::copy(values.begin(), values.end(), to);
  }
  return result;
}

Layout checked(const char* name, const at::Tensor& x, const at::Tensor& lo, const at::Tensor& hi, int64_t bits,
               const Optional& scale, const Optional& shift) {
  const std::optional<Layout> layout = layout_of(x, lo, hi, scale, shift);
  TORCH_CHECK(layout && bits >= 1 && bits <= 8, name, ": an operand that fake_quantize_fits, and 1 to 8 bits, got ",
              x.scalar_type(), " ", x.sizes(), ", bounds ", lo.sizes(), " and ", bits, " bits");
  return *layout;
}

}  // namespace

bool fake_quantize_fits(const at::Tensor& x, const at::Tensor& lo, const at::Tensor& hi, const Optional& scale,
                        const Optional& shift) {
  return layout_of(x, lo, hi, scale, shift).has_value();
}

at::Tensor fake_quantize(const at::Tensor& given, const at::Tensor& lo, const at::Tensor& hi, int64_t bits,
                         const Optional& scale, const Optional& shift) {
  const at::Tensor x = dense(given);
  const Layout layout = checked("fake_quantize", x, lo, hi, bits, scale, shift);
  at::Tensor y = at::empty_like(x);
  const float* const from = x.const_data_ptr<float>();
  float* const to = y.data_ptr<float>();
  each_task(layout, Affine(layout, bits, lo, hi, scale, shift), [&](int64_t, const Affine& a, const auto& next) {
    for (Piece piece; next(piece);) {
      const auto call = layout.joint_by_column ? round_trip<true> : round_trip<false>;
      call(from + piece.place, to + piece.place, piece.column, piece.columns, a);
    }
  });
  return y;
}

// Gradients of x, lo, hi, scale and shift; empty for those that are not there.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& given, const at::Tensor& lo, const at::Tensor& hi, int64_t bits,
    const Optional& scale, const Optional& shift) {
  const at::Tensor x = dense(given);
  const Layout layout = checked("fake_quantize_backward", x, lo, hi, bits, scale, shift);
  TORCH_CHECK(grad.scalar_type() == at::kFloat && grad.sizes() == x.sizes(),
              "fake_quantize_backward: a gradient like the operand, ", x.sizes(), ", got ", grad.scalar_type(), " ",
              grad.sizes());
  at::Tensor grad_x = at::empty_like(x);
  const at::Tensor ordered = grad.strides() == x.strides() ? grad : at::empty_like(x).copy_(grad);
  const int64_t count = layout.sums_by_row() ? layout.pieces() : layout.tasks();
  std::vector<float> sums(count * kSums), by_column(layout.joint_by_column ? 2 * layout.columns * layout.tasks() : 0);
  backward(layout, Affine(layout, bits, lo, hi, scale, shift), ordered.const_data_ptr<float>(),
           x.const_data_ptr<float>(), grad_x.data_ptr<float>(), sums.data(), by_column.data());
  Totals totals(layout);
  totals.add_rows(layout, sums.data(), count);
  if (layout.joint_by_column) totals.add_columns(layout, by_column.data());
  std::vector<double> grad_lo(layout.rows), grad_hi(layout.rows);
  for (int64_t row = 0; row < layout.rows; ++row) {
    grad_hi[row] = totals.above[row] + totals.rounding[row] / ((1 << bits) - 1);
    grad_lo[row] = totals.clipped[row] - grad_hi[row];
  }
  const at::Tensor none = at::empty({0}, at::TensorOptions(at::kFloat));
  at::Tensor grad_scale = scale ? in_shape_of(*scale, totals.scaled).div_(*scale).neg_() : none;
  at::Tensor grad_shift = shift ? in_shape_of(*shift, totals.inside).neg_() : none;
  if (shift && scale) grad_shift.div_(*scale);
  return {grad_x, in_shape_of(lo, grad_lo), in_shape_of(hi, grad_hi), grad_scale, grad_shift};
}

}  // namespace harmoq

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def("fake_quantize_fits(Tensor x, Tensor lo, Tensor hi, Tensor? scale, Tensor? shift) -> bool",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::fake_quantize_fits)));
  m.def("fake_quantize(Tensor x, Tensor lo, Tensor hi, int bits, Tensor? scale, Tensor? shift) -> Tensor",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::fake_quantize)));
  m.def("fake_quantize_backward(Tensor grad, Tensor x, Tensor lo, Tensor hi, int bits, Tensor? scale, Tensor? shift) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(harmoq::fake_quantize_backward)));
}
