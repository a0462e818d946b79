// A row program as `rowwise.py` encodes it: decoded, and checked to the last operand, before anything runs.
#pragma once

#include <limits>
#include <vector>

#include "linear.h"

namespace harmoq {

enum class Op : int64_t {
  kCopy,
  kLinear,
  kLayerNorm,
  kUnary,
  kBinary,
  kScalar,
  kAffine,
  kFloatLinear,
  kProduct,
  kQuantize,
  kCount
};

// A matrix of the program; temporaries have no data of their own and exist for one block of rows.
struct Slot {
  void* data;
  int64_t rows, columns, stride;
  at::ScalarType type;
  bool input, temporary;
  int64_t first = std::numeric_limits<int64_t>::max(), end = 0;  // columns that steps read or write
};

// `width` columns of a slot.
struct Columns {
  int64_t slot, first, width;
};

struct Step {
  Op op;
  Columns to, a, b;
  int64_t kind, broadcast;
  float number;
  IntegerLinear linear;
  int64_t k, n;
  const float *scale, *shift, *matrix;  // vectors of norms and affine maps (null: none); float weight [k, n], or null
  int64_t matrix_stride, matrix_rows;   // of a product's matrix: row stride, and k; 0 rows where all images share one
  bool staged;                          // the result is written to scratch first
};

struct Program {
  std::vector<Slot> slots;
  std::vector<Step> steps;
  std::vector<at::Tensor> kept;  // tensors that steps point into
  int64_t rows, rows_per_image;
  int64_t widest = 0, longest = 0;  // operand; contraction of an integer linear
};

class Decoder {
 public:
  Decoder(Program& program, at::TensorList constants, at::IntArrayRef code, at::ArrayRef<double> numbers)
      : program_(program), constants_(constants), code_(code), numbers_(numbers) {}

  void decode() {
    while (at_ < static_cast<int64_t>(code_.size())) {
      Step step{};
      const int64_t op = next("opcode");
      TORCH_CHECK(op >= 0 && op < static_cast<int64_t>(Op::kCount), "rowwise: unknown opcode ", op);
      step.op = static_cast<Op>(op);
      const int64_t operands = next("number of operands"), end = at_ + operands;
      decode_operands(step);
      TORCH_CHECK(at_ == end, "rowwise: opcode ", op, " takes ", operands - end + at_, " operands, got ", operands);
      program_.steps.push_back(step);
    }
  }

 private:
  void decode_operands(Step& s) {
    switch (s.op) {
      case Op::kCopy: s.to = place(), s.a = place(), widths(s, next("width")); break;
      case Op::kLinear: return integer_linear(s);
      case Op::kLayerNorm:
        s.to = place(), s.a = place(), widths(s, next("width"));
        s.scale = vector(s.a.width), s.shift = vector(s.a.width), s.number = number();
        break;
      case Op::kUnary: unary(s); break;
      case Op::kBinary: binary(s); break;
      case Op::kScalar:
        s.kind = choice(Binary::kCount), s.to = place(), s.a = place(), widths(s, next("width")), s.number = number();
        break;
      case Op::kAffine:
        s.to = place(), s.a = place(), widths(s, next("width"));
        s.scale = vector(s.a.width), s.shift = vector(s.a.width);
        break;
      case Op::kFloatLinear: return float_linear(s);
      case Op::kProduct: return product(s);
      case Op::kQuantize: quantize(s); break;
      case Op::kCount: break;
    }
    const at::ScalarType type = program_.slots[s.to.slot].type;
    const bool codes = s.op == Op::kQuantize || s.op == Op::kCopy;
    TORCH_CHECK(codes || type != at::kByte, "rowwise: slot ", s.to.slot, " is uint8 and takes codes only");
    // linears read all before they write, and write all types
    s.staged = (!codes && type != at::kFloat) || overlaps(s.to, s.a) || overlaps(s.to, s.b);
  }

  void unary(Step& s) {
    s.kind = choice(Unary::kCount), s.to = place(), s.a = place(), widths(s, next("width"));
    const int64_t slope = next("number");
    if (static_cast<Unary>(s.kind) == Unary::kLeakyRelu) s.number = number(slope);
  }

  void binary(Step& s) {
    s.kind = choice(Binary::kCount), s.to = place(), s.a = place(), s.b = place();
    const int64_t width = next("width");
    s.broadcast = choice(Broadcast::kCount);
    widths(s, width);
    const auto broadcast = static_cast<Broadcast>(s.broadcast);
    if (broadcast == Broadcast::kImage) {
      const Slot& images = range(s.b, width);
      TORCH_CHECK(images.input && images.rows == image_count(), "rowwise: a right operand per image is an input of ",
                  image_count(), " rows, got ", images.rows);
    } else {
      per_row(s.b, broadcast == Broadcast::kColumn ? 1 : width);
    }
  }

  void quantize(Step& s) {
    s.to = place(), s.a = place(), widths(s, next("width"));
    const int64_t bits = next("bits");
    TORCH_CHECK(bits >= 1 && bits <= 8, "rowwise: codes have 1 to 8 bits, got ", bits);
    s.number = static_cast<float>((1 << bits) - 1);
    s.scale = needed(vector(s.a.width)), s.shift = needed(vector(s.a.width));
  }

  void integer_linear(Step& s) {
    s.to = place(), s.a = place();
    s.k = next("K"), s.n = next("N");
    TORCH_CHECK(s.k > 0 && s.k <= kMaxLinearLength, "rowwise: a linear contracts 1 to ", kMaxLinearLength,
                " columns, got ", s.k);
    const int64_t bits = next("bits");
    TORCH_CHECK(bits >= 1 && bits <= 8, "rowwise: codes have 1 to 8 bits, got ", bits);
    target(s.to, s.n), per_row(s.a, s.k);
    IntegerLinear& l = s.linear;
    l.k = s.k, l.n = s.n, l.top = static_cast<float>((1 << bits) - 1);
    l.reciprocal = needed(vector(s.k)), l.offset = needed(vector(s.k));
    const at::Tensor packed = constant(next("weight"), at::kChar);
    l.scale = needed(vector(s.n)), l.constant = needed(vector(s.n)), l.shift = vector(s.n);
    l.products = s.n + (l.shift ? 1 : 0);
    const int64_t groups = packed_rows(s.k, kTileLength) / 4, columns = packed_rows(l.products, kTileColumns);
    TORCH_CHECK(packed.sizes() == at::IntArrayRef({groups, columns, 4}), "rowwise: the packed weight of a ", s.k, " to ",
                s.n, " linear has shape [", groups, ", ", columns, ", 4], got ", packed.sizes());
    l.columns = columns;
    l.weight = static_cast<const int8_t*>(packed.const_data_ptr());
    program_.longest = std::max(program_.longest, s.k);
  }

  void float_linear(Step& s) {
    s.to = place(), s.a = place(), s.k = next("K"), s.n = next("N");
    target(s.to, s.n), per_row(s.a, s.k);
    at::Tensor weight = constant(next("weight"), at::kFloat);
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) == s.k && weight.size(1) == s.n,
                "rowwise: a float weight has shape [", s.k, ", ", s.n, "], got ", weight.sizes());
    if (s.n <= kNarrow) weight = keep(weight.t().contiguous());
    s.matrix = weight.const_data_ptr<float>(), s.matrix_stride = s.n;
    s.shift = vector(s.n);
  }

  void product(Step& s) {
    s.to = place(), s.a = place(), s.k = next("K"), s.n = next("N");
    target(s.to, s.n), per_row(s.a, s.k);
    const Slot& matrix = slot(next("matrix"));
    const bool fits = matrix.input && matrix.type == at::kFloat && matrix.columns == s.n &&
                      matrix.rows % s.k == 0 && matrix.rows / s.k == image_count();
    TORCH_CHECK(fits, "rowwise: the matrices of a product are a float32 input [", image_count(), " * ", s.k, ", ", s.n,
                "], got [", matrix.rows, ", ", matrix.columns, "] ", matrix.type);
    s.matrix = static_cast<const float*>(matrix.data), s.matrix_stride = matrix.stride, s.matrix_rows = s.k;
  }

  // --- operands -----------------------------------------------------------------------------------------------------

  int64_t next(const char* what) {
    TORCH_CHECK(at_ < static_cast<int64_t>(code_.size()), "rowwise: the code ends before a ", what);
    return code_[at_++];
  }

  template <typename E>
  int64_t choice(E count) {
    const int64_t value = next("kind");
    TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(count), "rowwise: unknown kind ", value);
    return value;
  }

  const Slot& slot(int64_t number) const {
    TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(program_.slots.size()), "rowwise: no slot ", number);
    return program_.slots[number];
  }

  Columns place() {
    const int64_t number = next("slot");
    slot(number);
    return {number, next("column"), 0};
  }

  // Holds that the slot has these columns.
  const Slot& range(Columns& columns, int64_t width) {
    const Slot& s = slot(columns.slot);
    // compared so that no sum can overflow
    TORCH_CHECK(width > 0 && width <= s.columns && columns.first >= 0 && columns.first <= s.columns - width,
                "rowwise: slot ", columns.slot, " has ", s.columns, " columns, not ", width, " from ", columns.first);
    columns.width = width;
    Slot& used = program_.slots[columns.slot];
    used.first = std::min(used.first, columns.first), used.end = std::max(used.end, columns.first + width);
    program_.widest = std::max(program_.widest, width);
    return s;
  }

  void per_row(Columns& columns, int64_t width) {
    const Slot& s = range(columns, width);
    TORCH_CHECK(s.rows == program_.rows, "rowwise: slot ", columns.slot, " has ", s.rows, " rows, not ", program_.rows);
  }

  void target(Columns& columns, int64_t width) {
    per_row(columns, width);
    TORCH_CHECK(!slot(columns.slot).input, "rowwise: slot ", columns.slot, " is an input and cannot be written");
  }

  void widths(Step& s, int64_t width) { target(s.to, width), per_row(s.a, width); }

  int64_t image_count() const {
    TORCH_CHECK(program_.rows % program_.rows_per_image == 0, "rowwise: ", program_.rows,
                " rows are no whole number of images of ", program_.rows_per_image);
    return program_.rows / program_.rows_per_image;
  }

  float number() { return number(next("number")); }

  float number(int64_t place) const {
    TORCH_CHECK(place >= 0 && place < static_cast<int64_t>(numbers_.size()), "rowwise: no number ", place);
    return static_cast<float>(numbers_[place]);
  }

  at::Tensor keep(at::Tensor tensor) {
    program_.kept.push_back(tensor);
    return tensor;
  }

  at::Tensor constant(int64_t place, at::ScalarType type) {
    TORCH_CHECK(place >= 0 && place < static_cast<int64_t>(constants_.size()), "rowwise: no constant ", place);
    const at::Tensor& value = constants_[place];
    TORCH_CHECK(value.device().is_cpu() && value.scalar_type() == type, "rowwise: constant ", place, " is ",
                value.scalar_type(), " on ", value.device(), ", not ", type, " on cpu");
    return keep(value.contiguous());
  }

  const float* vector(int64_t length) {
    const int64_t place = next("constant");
    if (place == -1) return nullptr;
    const at::Tensor value = constant(place, at::kFloat);
    TORCH_CHECK(value.numel() == length, "rowwise: constant ", place, " has ", value.numel(), " values, not ", length);
    return value.const_data_ptr<float>();
  }

  static const float* needed(const float* vector) {
    TORCH_CHECK(vector != nullptr, "rowwise: a linear needs all of its constants but the shift");
    return vector;
  }

  // Whether writing `to` column by column could overwrite what is still to be read of `from`.
  static bool overlaps(const Columns& to, const Columns& from) {
    if (from.width == 0 || to.slot != from.slot) return false;
    const bool same = to.first == from.first && to.width == from.width;
    return !same && to.first < from.first + from.width && from.first < to.first + to.width;
  }

  Program& program_;
  at::TensorList constants_;
  at::IntArrayRef code_;
  at::ArrayRef<double> numbers_;
  int64_t at_ = 0;
};

}  // namespace harmoq
