// Chains of token-wise operations in one pass: each thread takes blocks of rows through all instructions of a program
// (`rowwise.py`), temporaries staying in its cache.

#include <cstdlib>
#include <memory>
#include <optional>

#include "memory.h"
#include "rowwise/norm.h"
#include "rowwise/program.h"

namespace harmoq {
namespace {

constexpr int64_t kBlock = 64;  // rows of a block

constexpr int64_t padded(int64_t n, int64_t unit) { return packed_rows(n, unit); }

// Memory of this thread that outlives the call, so that its pages are touched once.
std::byte* thread_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<std::byte, decltype(&std::free)> memory{nullptr, &std::free};
  static thread_local int64_t held = 0;
  if (bytes > held) {
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kLine, padded(bytes, kLine))));
    held = memory ? bytes : 0;
    TORCH_CHECK(memory, "rowwise: no memory for ", bytes, " bytes of scratch");
  }
  return memory.get();
}

// Where the parts of a thread's scratch begin, in bytes.
struct Layout {
  int64_t block;  // rows of a product
  std::vector<int64_t> temporaries;
  int64_t code_stride, codes, acc, sums, stage_stride, stages[3], product, bytes = 0;

  explicit Layout(const Program& program) : block(std::min(kBlock, padded(program.rows, 16))) {
    for (const Slot& slot : program.slots) temporaries.push_back(slot.temporary ? take(block * slot.stride * 4) : -1);
    code_stride = padded(program.longest, kLine);
    codes = take(block * code_stride);
    acc = take(block * kLinearColumns * 4);
    sums = take(block * 4);
    stage_stride = padded(program.widest, 16);
    for (int64_t& stage : stages) stage = take(block * stage_stride * 4);
    product = take(block * stage_stride * 4);
  }

 private:
  int64_t take(int64_t size) {
    const int64_t begin = bytes;
    bytes += padded(size, kLine);
    return begin;
  }
};

class Worker {
 public:
  Worker(const Program& program, const Layout& layout)
      : program_(program), layout_(layout), scratch_(thread_scratch(layout.bytes)) {
#ifdef HARMOQ_AMX
    if (program.longest > 0 && amx_available()) tiles_.emplace(kTileLength / 4);
#endif
  }

  void run_block(int64_t begin) {
    begin_ = begin, rows_ = std::min(layout_.block, program_.rows - begin);
    fetch(begin + layout_.block);
    for (const Step& step : program_.steps) {
      switch (step.op) {
        case Op::kCopy: copy(step); break;
        case Op::kQuantize: quantize(step); break;
        case Op::kLinear: integer_linear(step); break;
        case Op::kFloatLinear: float_linear(step); break;
        case Op::kProduct: product(step); break;
        default: elementwise(step);
      }
    }
  }

 private:
  // Brings the rows of the next block closer while this one is worked on: address translation alone takes long.
  void fetch(int64_t begin) const {
    const int64_t rows = std::min(layout_.block, program_.rows - begin);
    for (const Slot& slot : program_.slots) {
      if (slot.temporary || slot.rows != program_.rows || slot.end <= slot.first) continue;
      const int64_t size = static_cast<int64_t>(c10::elementSize(slot.type)), stride = slot.stride * size;
      const int64_t length = (slot.end - slot.first) * size;
      const char* row = static_cast<const char*>(slot.data) + begin * stride + slot.first * size;
      for (int64_t r = 0; r < rows; ++r, row += stride) {
        for (int64_t i = 0; i < length + kLine - 1; i += kLine) {
          const char* at = row + std::min(i, length - 1);
          if (slot.input) {
            __builtin_prefetch(at, 0, 2);
          } else {
            __builtin_prefetch(at, 1, 2);
          }
        }
      }
    }
  }

  void elementwise(const Step& s) {
    const Rows<const float> a = read(s.a, 0);
    const Rows<float> to = s.staged ? stage(2) : floats(s.to);
    const int64_t width = s.to.width;
    switch (s.op) {
      case Op::kLayerNorm: layer_norm_rows(a, to, rows_, width, s.scale, s.shift, s.number); break;
      case Op::kUnary: unary_rows(static_cast<Unary>(s.kind), s.number, a, to, rows_, width); break;
      case Op::kBinary: binary(s, a, to); break;
      case Op::kScalar: scalar_rows(static_cast<Binary>(s.kind), a, s.number, to, rows_, width); break;
      default: affine_rows(s.scale, s.shift, a, to, rows_, width);
    }
    if (s.staged) write(constant(to), s.to);
  }

  void binary(const Step& s, Rows<const float> a, Rows<float> to) {
    const auto kind = static_cast<Binary>(s.kind);
    switch (static_cast<Broadcast>(s.broadcast)) {
      case Broadcast::kNone: return binary_rows(kind, a, read(s.b, 1), to, rows_, s.to.width);
      case Broadcast::kColumn: return column_rows(kind, a, read(s.b, 1), to, rows_, s.to.width);
      default: break;
    }
    const int64_t per_image = program_.rows_per_image, image = begin_ / per_image;
    const Rows<const float> images = read(s.b, 1, image, (begin_ + rows_ - 1) / per_image - image + 1);
    binary_rows(kind, a, ImageRows{images, begin_ - image * per_image, per_image}, to, rows_, s.to.width);
  }

  void quantize(const Step& s) {
    const Rows<const float> from = read(s.a, 0);
    if (s.staged) {
      code_rows(s.scale, s.shift, s.number, from, stage(2), rows_, s.to.width);
      return write(constant(stage(2)), s.to);
    }
    with_rows(s.to, begin_, [&](auto to) { code_rows(s.scale, s.shift, s.number, from, to, rows_, s.to.width); });
  }

  void copy(const Step& s) {
    if (s.staged) {
      const Rows<float> through = stage(2);
      with_rows(s.a, begin_, [&](auto from) { copy_rows(constant(from), through, rows_, s.to.width); });
      return write(constant(through), s.to);
    }
    with_rows(s.a, begin_, [&](auto from) {
      with_rows(s.to, begin_, [&](auto to) { copy_rows(constant(from), to, rows_, s.to.width); });
    });
  }

  void integer_linear(const Step& s) {
    const LinearScratch scratch{{at<uint8_t>(layout_.codes), layout_.code_stride},
                                at<int32_t>(layout_.acc),
                                at<float>(layout_.sums),
                                has_tiles()};
    const bool temporary = program_.slots[s.to.slot].temporary;
    // memory takes whole rows more than twice as fast as columns of half a cache line
    const Rows<float> to = temporary ? floats(s.to) : stage(2);
    if (program_.slots[s.a.slot].type == at::kByte) {
      with_rows(s.a, begin_, [&](auto from) {
        if constexpr (std::is_same_v<decltype(from), Rows<uint8_t>>)
          linear_rows(s.linear, constant(from), to, rows_, layout_.block, scratch);
      });
    } else {
      linear_rows(s.linear, read(s.a, 0), to, rows_, layout_.block, scratch);
    }
    if (!temporary) write(constant(to), s.to);
  }

  void float_linear(const Step& s) {
    const Rows<const float> from = read(s.a, 0);
    const Rows<float> result = stage(2);
    if (s.n <= kNarrow) {
      dot_rows(s.matrix, from, result, rows_, s.k, s.n);
    } else {
      multiply(s, from, 0, rows_, s.matrix);
    }
    with_rows(s.to, begin_, [&](auto to) { affine_rows(nullptr, s.shift, constant(result), to, rows_, s.n); });
  }

  void product(const Step& s) {
    const Rows<const float> from = read(s.a, 0);
    const int64_t per_image = program_.rows_per_image;
    for (int64_t r = 0; r < rows_;) {
      const int64_t image = (begin_ + r) / per_image;
      const int64_t count = std::min(rows_ - r, (image + 1) * per_image - begin_ - r);
      multiply(s, from, r, count, s.matrix + image * s.matrix_rows * s.matrix_stride);
      r += count;
    }
    write(constant(stage(2)), s.to);
  }

  // Rows [first, first + count) of the block times a matrix, to the same rows of stage 2. A product of fewer rows than
  // a block is made of a whole one in scratch: a micro-kernel for each number of rows would be generated otherwise.
  void multiply(const Step& s, Rows<const float> from, int64_t first, int64_t count, const float* matrix) {
    Rows<const float> a{from[first], from.stride};
    Rows<float> to{stage(2)[first], stage(2).stride};
    const bool whole = count == layout_.block;
    if (!whole) {
      copy_rows(a, stage(1), count, s.k);
      a = constant(stage(1));
      to = {at<float>(layout_.product), layout_.stage_stride};
    }
    gemm(layout_.block, s.n, s.k, a.stride, s.matrix_stride, to.stride, a.data, matrix, to.data);
    if (!whole) copy_rows(constant(to), Rows<float>{stage(2)[first], stage(2).stride}, count, s.n);
  }

  // --- operands -----------------------------------------------------------------------------------------------------

  bool has_tiles() const {
#ifdef HARMOQ_AMX
    return tiles_.has_value();
#else
    return false;
#endif
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(scratch_ + offset);
  }

  Rows<float> stage(int64_t number) const { return {at<float>(layout_.stages[number]), layout_.stage_stride}; }

  template <typename T>
  static Rows<const T> constant(Rows<T> rows) {
    return {rows.data, rows.stride};
  }

  // Calls f with the operand's rows from `begin` on, in their own type.
  template <typename F>
  void with_rows(const Columns& columns, int64_t begin, const F& f) const {
    const Slot& slot = program_.slots[columns.slot];
    const int64_t offset = columns.first + (slot.temporary ? 0 : begin * slot.stride);
    if (slot.type == at::kBFloat16) {
      f(Rows<BFloat16>{static_cast<BFloat16*>(slot.data) + offset, slot.stride});
    } else if (slot.type == at::kByte) {
      f(Rows<uint8_t>{static_cast<uint8_t*>(slot.data) + offset, slot.stride});
    } else {
      float* data = slot.temporary ? at<float>(layout_.temporaries[columns.slot]) : static_cast<float*>(slot.data);
      f(Rows<float>{data + offset, slot.stride});
    }
  }

  // Rows of a float32 slot where they are.
  Rows<float> floats(const Columns& columns) const {
    Rows<float> found{};
    with_rows(columns, begin_, [&](auto rows) {
      if constexpr (std::is_same_v<decltype(rows), Rows<float>>) found = rows;
    });
    return found;
  }

  Rows<const float> read(const Columns& columns, int64_t number) const { return read(columns, number, begin_, rows_); }

  // An operand in float32: where it is, or converted to a stage.
  Rows<const float> read(const Columns& columns, int64_t number, int64_t begin, int64_t count) const {
    Rows<const float> found{};
    with_rows(columns, begin, [&](auto rows) {
      if constexpr (std::is_same_v<decltype(rows), Rows<float>>) {
        found = constant(rows);
      } else {
        copy_rows(constant(rows), stage(number), count, columns.width);
        found = constant(stage(number));
      }
    });
    return found;
  }

  void write(Rows<const float> from, const Columns& columns) const {
    with_rows(columns, begin_, [&](auto to) { copy_rows(from, to, rows_, columns.width); });
  }

  const Program& program_;
  const Layout& layout_;
  std::byte* scratch_;
  int64_t begin_ = 0, rows_ = 0;
#ifdef HARMOQ_AMX
  std::optional<AmxTiles> tiles_;  // no product of torch's that needs tiles may run meanwhile: all others are float32
#endif
};

// Inputs that a PRODUCT multiplies with have rows of their own; every other input has one for each token or image.
int64_t row_count(at::TensorList inputs, at::IntArrayRef code) {
  constexpr int64_t kMatrixOperand = 6;
  std::vector<bool> matrix(inputs.size());
  const int64_t length = code.size();
  for (int64_t at = 0; at + 2 <= length && code[at + 1] >= 0; at += 2 + code[at + 1]) {
    if (code[at] != static_cast<int64_t>(Op::kProduct) || code[at + 1] != kMatrixOperand + 1) continue;
    if (at + 2 + kMatrixOperand >= length) break;
    const int64_t slot = code[at + 2 + kMatrixOperand];
    if (slot >= 0 && slot < static_cast<int64_t>(inputs.size())) matrix[slot] = true;
  }
  int64_t rows = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!matrix[i]) rows = std::max(rows, inputs[i].size(0));
  }
  return rows;
}

void add_matrix(Program& program, const at::Tensor& matrix, bool input) {
  const at::ScalarType type = matrix.scalar_type();
  TORCH_CHECK(matrix.device().is_cpu() && (type == at::kFloat || type == at::kBFloat16 || type == at::kByte),
              "rowwise: matrices are float32, bfloat16 or uint8 on cpu, got ", type, " on ", matrix.device());
  program.kept.push_back(matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : matrix.contiguous());
  const at::Tensor& kept = program.kept.back();
  program.slots.push_back({kept.data_ptr(), kept.size(0), kept.size(1), kept.stride(0), type, input, false});
}

std::vector<at::Tensor> add_slots(Program& program, at::TensorList inputs, at::IntArrayRef columns,
                                  at::ArrayRef<at::ScalarType> types, at::IntArrayRef temporaries) {
  for (const at::Tensor& input : inputs) add_matrix(program, input, true);
  TORCH_CHECK(columns.size() == types.size(), "rowwise: each output has columns and a type");
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < columns.size(); ++i) {
    TORCH_CHECK(columns[i] > 0, "rowwise: an output has at least one column, got ", columns[i]);
    outputs.push_back(token_rows(program.rows, columns[i], types[i]));
    add_matrix(program, outputs.back(), false);
  }
  for (const int64_t width : temporaries) {
    TORCH_CHECK(width > 0, "rowwise: a temporary has at least one column, got ", width);
    program.slots.push_back({nullptr, program.rows, width, padded(width, 16), at::kFloat, false, true});
  }
  return outputs;
}

std::vector<at::Tensor> rowwise(at::TensorList inputs, at::TensorList constants, at::IntArrayRef code,
                                at::ArrayRef<double> numbers, at::IntArrayRef output_columns,
                                at::ArrayRef<at::ScalarType> output_types, at::IntArrayRef temporaries,
                                int64_t rows_per_image) {
  TORCH_CHECK(rows_per_image > 0, "rowwise: an image has at least one row, got ", rows_per_image);
  for (const at::Tensor& x : inputs) TORCH_CHECK(x.dim() == 2, "rowwise: inputs are matrices, got ", x.sizes());
  Program program;
  program.rows = row_count(inputs, code), program.rows_per_image = rows_per_image;
  std::vector<at::Tensor> outputs = add_slots(program, inputs, output_columns, output_types, temporaries);
  Decoder(program, constants, code, numbers).decode();
  const Layout layout(program);
  const int64_t blocks = (program.rows + layout.block - 1) / std::max<int64_t>(layout.block, 1);
  share_tasks(blocks, [&](const auto& next) {
    Worker worker(program, layout);
    for (int64_t first, last; next(first, last);) {
      for (int64_t block = first; block < last; ++block) worker.run_block(block * layout.block);
    }
    gemm_done();
  });
  return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def(
      "rowwise(Tensor[] inputs, Tensor[] constants, int[] code, float[] numbers, int[] output_columns, "
      "ScalarType[] output_types, int[] temporaries, int rows_per_image) -> Tensor[]",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(rowwise)));
}

}  // namespace harmoq
