// Attention within windows of tokens: gather, products, bias, mask, softmax, scatter; scores never leave the cache.
//
// Everything is transposed: scores are S[key][query] = K Q^T, so that a vector holds one key and 16 queries, largest
// score and sum of a softmax are vertical, and tails of keys need no masks. Probabilities are written as the packed
// right operand of O[channel][query] = V^T P. V^T has a row of ones below each head's channels: its product is the sum
// of the rounded probabilities (of the codes), by which the rounded numerators are divided.
//
// An `Element` is what the products multiply: float, bfloat16 or uint8 codes. 32 bits hold one, two or four of them, a
// word; what lies in a word is contracted together (gemm.h).
#include "amx.h"
#include "attention_vectors.h"
#include "gemm.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

namespace harmoq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTile = 16;                // queries of a column of blocks, and side of a transposed tile
constexpr float kBound = 80;                 // 2^t, its sums and products with v stay within float32 without a maximum
constexpr float kCodesBound = 100;           // likewise where exponentials are only summed and divided by the sum
constexpr float kRelativeBound = 60;         // twice this is how far a score can lie below the largest
constexpr float kSmallestExponent = -120;    // 2^t below this is as good as zero
constexpr int64_t kBiasBytes = 1 << 20;      // bias of the heads that a pass over the windows takes: half the L2
constexpr int64_t kScores = 4096;            // scores at a time where none waits for a maximum: a third of the L1
constexpr int64_t kSlack = 128;              // bytes that a vector may write beyond a buffer
#ifdef __AVX512BF16__
constexpr bool kHalf = true;
#else
constexpr bool kHalf = false;
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename Element>
constexpr int64_t kGroup = 4 / sizeof(Element);  // elements of a word

template <typename Element>
constexpr bool kCodes = std::is_same_v<Element, uint8_t>;

template <typename Element>
using Accumulator = std::conditional_t<kCodes<Element>, int32_t, float>;

// --- memory ----------------------------------------------------------------------------------------------------------

// Buffers of one thread. They stay for the next call: fresh pages cost more than the attention of a small window.
class Arena {
 public:
  void start(int64_t bytes) {
    if (bytes > size_) {
      block_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64))));
      TORCH_CHECK(block_, "window_attention: no memory for ", bytes, " bytes");
      size_ = bytes;
    }
    used_ = 0;
  }

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(block_.get() + used_);
    used_ += bytes_of<T>(count);
    return p;
  }

  template <typename T>
  static constexpr int64_t bytes_of(int64_t count) { return round_up(count * sizeof(T) + kSlack, 64); }

 private:
  struct Free { void operator()(char* p) const { std::free(p); } };
  std::unique_ptr<char, Free> block_;
  int64_t size_ = 0, used_ = 0;
};

Arena& arena() {
  static thread_local Arena of_thread;
  return of_thread;
}

inline void store_row(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) Vec::loadu(from + i).store(to + i, std::min(kLanes, count - i));
}

inline void store_row(BFloat16* to, const float* from, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto rounded = at::vec::cvtfp32_bf16(_mm512_loadu_ps(from));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), rounded);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = BFloat16(from[i]);
#endif
}

// 16 x 16 words.
inline void transpose_tile(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  const float* source = static_cast<const float*>(from);
  float* target = static_cast<float*>(to);
#if defined(CPU_CAPABILITY_AVX512)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(source + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {  // now quarters: row j of each four rows
    const __m512 low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), low_odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_ps(target + j * to_stride, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(target + (j + 8) * to_stride, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(target + (j + 4) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(target + (j + 12) * to_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
#else
  at::vec::transpose_mxn<float, kTile, kTile>(source, from_stride, target, to_stride);
#endif
}

// --- operands --------------------------------------------------------------------------------------------------------

struct Quantizer {  // of the channels of a head, padded to whole vectors with zeros
  const float* factor = nullptr;
  const float* offset = nullptr;
  const uint8_t* zero = nullptr;  // codes of zero
  float step = 0, lower = 0, top = 0;
};

// Codes of 16 columns; `quantizer` holds a factor and an offset for each column.
inline void store_row(uint8_t* to, const float* from, int64_t count, const Quantizer& quantizer, int64_t column) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec factor = Vec::loadu(quantizer.factor + column + i), offset = Vec::loadu(quantizer.offset + column + i);
    const Vec codes = codes_of(Vec::loadu(from + i), factor, offset, Vec(quantizer.top)).round();
    store(codes, to + i, std::min(kLanes, count - i));
  }
}

struct Tokens {  // a matrix of tokens from a column on
  const void* data;
  int64_t stride;
  at::ScalarType type;
};

struct Problem {
  Tokens q, k, v;
  const int32_t *q_rows, *k_rows, *out_rows;
  void* out;
  at::ScalarType out_type;
  int64_t out_stride;
  Quantizer out_codes;  // of all columns of the heads, where the result is codes
  int64_t windows, queries, keys, heads, head_dim, block;
  const float *q_factor, *score_factor;
  const float* bias = nullptr;  // [heads, blocks, keys, block]
  const int32_t *q_region = nullptr, *k_region = nullptr;
  float mask_value = 0;
  const float* mask_table = nullptr;  // [tables, blocks, keys, block]
  const int32_t* mask_index = nullptr;
  float largest_bias = 0;
  bool relative = false;
  Quantizer q_codes, k_codes, map_codes, v_codes;
  int32_t *score_accumulators = nullptr, *value_accumulators = nullptr;  // what tests look at
  uint8_t* map_out = nullptr;

  int64_t blocks() const { return (queries + block - 1) / block; }
};

struct Staged {  // where a token's elements go: its row, within it its heads, and how many channels are written
  int64_t row, head, channels;
};

// Heads of tokens as elements. Channels beyond `head_dim` are zero; rows of -1 are tokens of zeros.
// Some rows at a time, so that they are in the cache for all vectors of a row.
template <typename Element, typename Float>
void stage(const Problem& p, const Tokens& tokens, const int32_t* rows, int64_t count, int64_t first_head,
           int64_t heads, const float* factors, const Quantizer& quantizer, const Staged& at, const Float* zeros,
           Element* to) {
  constexpr int64_t some = 32;
  const Float* data = static_cast<const Float*>(tokens.data) + first_head * p.head_dim;
  const Vec top(quantizer.top);
  const Float* from[some];
  for (int64_t n = 0; n < count; n += some, to += some * at.row) {
    const int64_t these = std::min(some, count - n);
    for (int64_t i = 0; i < these; ++i) from[i] = rows[n + i] < 0 ? zeros : data + rows[n + i] * tokens.stride;
    for (int64_t h = 0; h < heads; ++h) {
      const Vec head_factor(factors ? factors[h] : 1.f);
      for (int64_t j = 0; j < at.channels; j += kLanes) {
        const Lanes lanes(std::clamp<int64_t>(p.head_dim - j, 0, kLanes));
        Vec factor, offset;
        if constexpr (kCodes<Element>) {
          factor = Vec::loadu(quantizer.factor + j);
          offset = Vec::loadu(quantizer.offset + j);
        }
        for (int64_t i = 0; i < these; ++i) {
          Vec x = load_floats(from[i] + h * p.head_dim + j, lanes) * head_factor;
          if constexpr (kCodes<Element>) x = codes_of(x, factor, offset, top);
          store_elements(to + i * at.row + h * at.head + j, x);
        }
      }
    }
  }
}

// Likewise, of tokens that are such elements already; `zero` is a head of a token of zeros.
template <typename Element>
void stage_elements(const Problem& p, const Tokens& tokens, const int32_t* rows, int64_t count, int64_t first_head,
                    int64_t heads, const Staged& at, const Element* zero, Element* to) {
  const Element* data = static_cast<const Element*>(tokens.data) + first_head * p.head_dim;
  const Lanes all(kLanes), last(p.head_dim % kLanes), none(0);
  for (int64_t n = 0; n < count; ++n) {
    const Element* from = rows[n] < 0 ? zero : data + rows[n] * tokens.stride;
    const int64_t between = rows[n] < 0 ? 0 : p.head_dim;
    // head after head: the last vector of one reaches into the next
    for (int64_t h = 0; h < heads; ++h) {
      Element* head = to + n * at.row + h * at.head;
      int64_t j = 0;
      for (; j + kLanes <= p.head_dim; j += kLanes) copy_elements(from + h * between + j, head + j, all);
      if (j < p.head_dim) copy_elements(from + h * between + j, head + j, last), j += kLanes;
      for (; j < at.channels; j += kLanes) copy_elements(from, head + j, none);
    }
  }
}

// [rows][words] to [words][rows]; both sides padded to whole tiles.
void transpose_words(const void* from, int64_t from_stride, int64_t rows, int64_t words, void* to, int64_t to_stride) {
  for (int64_t w = 0; w < words; w += kTile)
    for (int64_t n = 0; n < rows; n += kTile)
      transpose_tile(static_cast<const uint32_t*>(from) + n * from_stride + w, from_stride,
                     static_cast<uint32_t*>(to) + w * to_stride + n, to_stride);
}

// A row of words to a row for each element of a word.
template <typename Element>
inline void split_words(const uint32_t* words, Element* to, int64_t to_stride) {
  for (int64_t e = 0; e < kGroup<Element>; ++e) {
#if defined(CPU_CAPABILITY_AVX512)
    const auto shifted = _mm512_srli_epi32(_mm512_loadu_si512(words), static_cast<unsigned>(8 * sizeof(Element) * e));
    if constexpr (sizeof(Element) == 2)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + e * to_stride), _mm512_cvtepi32_epi16(shifted));
    else if constexpr (sizeof(Element) == 1)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + e * to_stride), _mm512_cvtepi32_epi8(shifted));
    else
      _mm512_storeu_si512(to + e * to_stride, shifted);
#else
    const Element* elements = reinterpret_cast<const Element*>(words);
    for (int64_t i = 0; i < kTile; ++i) to[e * to_stride + i] = elements[i * kGroup<Element> + e];
#endif
  }
}

// [rows][columns] to [columns][rows], element by element.
template <typename Element>
void transpose_elements(const Element* from, int64_t from_stride, int64_t rows, int64_t columns, Element* to,
                        int64_t to_stride) {
  const int64_t words = (columns + kGroup<Element> - 1) / kGroup<Element>;
  alignas(64) uint32_t tile[kTile * kTile];
  for (int64_t w = 0; w < words; w += kTile) {
    for (int64_t m = 0; m < rows; m += kTile) {
      transpose_tile(reinterpret_cast<const uint32_t*>(from + m * from_stride) + w, from_stride / kGroup<Element>, tile,
                     kTile);
      for (int64_t i = 0; i < std::min(kTile, words - w); ++i)
        split_words(tile + i * kTile, to + (w + i) * kGroup<Element> * to_stride + m, to_stride);
    }
  }
}

// Smallest and largest code in each column; reads and writes whole vectors.
void column_extremes(const uint8_t* rows, int64_t count, int64_t stride, int64_t columns, uint8_t* least,
                     uint8_t* most) {
#if defined(CPU_CAPABILITY_AVX512)
  for (int64_t j = 0; j < columns; j += 64) {
    __m512i low = _mm512_set1_epi8(-1), high = _mm512_setzero_si512();
    for (int64_t n = 0; n < count; ++n) {
      const __m512i codes = _mm512_loadu_si512(rows + n * stride + j);
      low = _mm512_min_epu8(low, codes);
      high = _mm512_max_epu8(high, codes);
    }
    _mm512_storeu_si512(least + j, low);
    _mm512_storeu_si512(most + j, high);
  }
#else
  std::fill_n(least, columns, 255);
  std::fill_n(most, columns, 0);
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t j = 0; j < columns; ++j) {
      least[j] = std::min(least[j], rows[n * stride + j]);
      most[j] = std::max(most[j], rows[n * stride + j]);
    }
  }
#endif
}

// Largest magnitude in each column; reads and writes whole vectors.
template <typename Element>
void column_maxima(const Element* rows, int64_t count, int64_t stride, int64_t columns, Element* maxima) {
#if defined(CPU_CAPABILITY_AVX512)
  for (int64_t j = 0; j < columns; j += 64 / sizeof(Element)) {
    __m512i most = _mm512_setzero_si512();  // magnitudes are ordered like their bits
    for (int64_t n = 0; n < count; ++n) {
      const __m512i bits = _mm512_loadu_si512(rows + n * stride + j);
      if constexpr (sizeof(Element) == 2)
        most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
      else
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    _mm512_storeu_si512(maxima + j, most);
  }
#else
  std::fill_n(maxima, columns, Element(0));
  for (int64_t n = 0; n < count; ++n)
    for (int64_t j = 0; j < columns; ++j)
      maxima[j] = std::max(maxima[j], Element(std::abs(float(rows[n * stride + j]))));
#endif
}

// --- softmax ---------------------------------------------------------------------------------------------------------

template <typename Element>
struct Scores {  // of a head and a block of queries, in units of log 2
  Accumulator<Element>* products;  // [keys][block]; with a maximum they are overwritten with the scores
  Element* map;                    // [keys, in words][block]
  int64_t keys, block;
  const float* bias;
  int64_t bias_stride;
  const float* table;              // a second bias, or none
  const int32_t *q_region, *k_region;
  float mask;
  float scale;                     // codes: of the accumulators
  const float* key_constants;      // codes: what the lower bound of q adds for each key
  const float* query_constants;    // codes without a maximum: what lies in the middle of the scores of each query
  Quantizer quantizer;             // codes: of the map
  bool relative;
};

enum class Mask { kNone, kTable, kRegion };

template <typename Element, Mask mask>
inline Vec score(const Scores<Element>& s, int64_t m, int64_t n) {
  Vec t;
  if constexpr (kCodes<Element>)
    t = at::vec::fmadd(load_floats(s.products + m * s.block + n), Vec(s.scale), Vec(s.key_constants[m]));
  else
    t = Vec::loadu(s.products + m * s.block + n);
  t = at::vec::fmadd(Vec::loadu(s.bias + m * s.bias_stride + n), Vec(kLog2E), t);
  if constexpr (mask == Mask::kTable) t = at::vec::fmadd(Vec::loadu(s.table + m * s.block + n), Vec(kLog2E), t);
  if constexpr (mask == Mask::kRegion) t = t + where_different(s.q_region + n, s.k_region[m], Vec(s.mask));
  return t;
}

// Scores in place of products, and the largest of each query.
template <typename Element, Mask mask, int columns>
__attribute__((noinline)) void maxima(const Scores<Element>& s, int64_t n, Vec* largest) {
  float* scores = reinterpret_cast<float*>(s.products) + n;
  Vec most[columns];
  for (int c = 0; c < columns; ++c) most[c] = Vec(-INFINITY);
  for (int64_t m = 0; m < s.keys; ++m) {
    for (int c = 0; c < columns; ++c) {
      const Vec t = score<Element, mask>(s, m, n + c * kLanes);
      most[c] = larger(most[c], t);
      t.store(scores + m * s.block + c * kLanes);
    }
  }
  for (int c = 0; c < columns; ++c) largest[c] = most[c];
}

// Exponentials in place of products (bounded) or of scores whose largest are known, and for each query their sum. Not
// inlined: its sums stay in registers.
template <typename Element, Mask mask, bool bounded, int columns>
__attribute__((noinline)) void exponentials(const Scores<Element>& s, int64_t n, const Vec* subtracted, Vec* total) {
  float* scores = reinterpret_cast<float*>(s.products) + n;
  const int64_t keys = s.keys, block = s.block;
  Vec sums[columns], less[columns];
  for (int c = 0; c < columns; ++c) sums[c] = Vec(0.f), less[c] = subtracted[c];
  for (int64_t m = 0; m < keys; ++m, scores += block) {
    Vec x[columns];
    for (int c = 0; c < columns; ++c) {
      if constexpr (bounded)
        x[c] = score<Element, mask>(s, m, n + c * kLanes) - less[c];
      else
        x[c] = larger(Vec::loadu(scores + c * kLanes) - less[c], Vec(kSmallestExponent));
    }
    for (int c = 0; c < columns; ++c) x[c] = power_of_two<float>(x[c]);
    for (int c = 0; c < columns; ++c) {
      sums[c] = sums[c] + x[c];
      x[c].store(scores + c * kLanes);
    }
  }
  for (int c = 0; c < columns; ++c) total[c] = sums[c];
}

template <typename Element, int columns, typename Row>
inline void write_map(const Scores<Element>& s, int64_t n, const Row& row) {
  constexpr int64_t group = kGroup<Element>;
  for (int64_t m = 0; m < s.keys; m += group) {
    Element* to = s.map + m * s.block + n * group;
    for (int c = 0; c < columns; ++c) {
      Vec rows[group];
      for (int64_t r = 0; r < group; ++r) rows[r] = m + r < s.keys ? row(m + r, c) : Vec(0.f);
      store_words(to + c * kLanes * group, rows);
    }
  }
}

// Entries of a map lie in 0..1, so their codes seldom need clamping.
inline bool needs_clamp(const Quantizer& q) {
  return q.offset[0] <= -0.49f || q.factor[0] + q.offset[0] >= q.top + 0.49f;
}

template <bool clamp>
inline Vec clamped(Vec position, const Quantizer& q) {
  return clamp ? codes_of(position, Vec(1.f), Vec(0.f), Vec(q.top)) : position;
}

// Codes of exponentials divided by their sum.
template <typename Element, bool clamp, int columns>
__attribute__((noinline)) void write_codes(const Scores<Element>& s, int64_t n, const Vec* total) {
  const float* scores = reinterpret_cast<const float*>(s.products) + n;
  const Vec factor(s.quantizer.factor[0]), offset(s.quantizer.offset[0]);
  Vec reciprocals[columns];
  for (int c = 0; c < columns; ++c) reciprocals[c] = Vec(1.f) / total[c];
  write_map<Element, columns>(s, n, [&](int64_t m, int c) {
    const Vec x = Vec::loadu(scores + m * s.block + c * kLanes) * reciprocals[c];
    return clamped<clamp>(at::vec::fmadd(x, factor, offset), s.quantizer);
  });
}

// Codes of 2^(t - max t), a map relative to its rows' largest entries; the quantizer's factor is part of the exponent.
template <typename Element, bool bounded, bool clamp, int columns>
__attribute__((noinline)) void write_relative(const Scores<Element>& s, int64_t n, const Vec* largest) {
  const float* scores = reinterpret_cast<const float*>(s.products) + n;
  const Vec offset(s.quantizer.offset[0]);
  Vec less[columns];
  for (int c = 0; c < columns; ++c) less[c] = largest[c] - Vec(std::log2(s.quantizer.factor[0]));
  write_map<Element, columns>(s, n, [&](int64_t m, int c) {
    const Vec t = Vec::loadu(scores + m * s.block + c * kLanes) - less[c];
    return clamped<clamp>(power_of_two<float>(bounded ? t : larger(t, Vec(kSmallestExponent))) + offset, s.quantizer);
  });
}

template <typename Element, Mask mask, bool bounded, int columns>
void relative_columns(const Scores<Element>& s, int64_t n) {
  Vec largest[columns];
  maxima<Element, mask, columns>(s, n, largest);
  if (needs_clamp(s.quantizer))
    write_relative<Element, bounded, true, columns>(s, n, largest);
  else
    write_relative<Element, bounded, false, columns>(s, n, largest);
}

template <typename Element, Mask mask, bool bounded, int columns>
void codes_columns(const Scores<Element>& s, int64_t n) {
  if (s.relative) return relative_columns<Element, mask, bounded, columns>(s, n);
  Vec subtracted[columns], total[columns];
  if constexpr (bounded) {
    for (int c = 0; c < columns; ++c) subtracted[c] = Vec::loadu(s.query_constants + n + c * kLanes);
  } else {
    maxima<Element, mask, columns>(s, n, subtracted);
  }
  exponentials<Element, mask, bounded, columns>(s, n, subtracted, total);
  if (needs_clamp(s.quantizer))
    write_codes<Element, true, columns>(s, n, total);
  else
    write_codes<Element, false, columns>(s, n, total);
}

template <typename Element, Mask mask, bool bounded, int columns>
__attribute__((noinline)) void softmax_columns(const Scores<Element>& s, int64_t n) {
  if constexpr (kCodes<Element>) {
    codes_columns<Element, mask, bounded, columns>(s, n);
  } else if constexpr (bounded) {
    write_map<Element, columns>(s, n, [&](int64_t m, int c) {
      return power_of_two<Element>(score<Element, mask>(s, m, n + c * kLanes));
    });
  } else {
    Vec largest[columns];
    maxima<Element, mask, columns>(s, n, largest);
    const float* scores = reinterpret_cast<const float*>(s.products) + n;
    write_map<Element, columns>(s, n, [&](int64_t m, int c) {
      const Vec t = Vec::loadu(scores + m * s.block + c * kLanes) - largest[c];
      return power_of_two<Element>(larger(t, Vec(kSmallestExponent)));
    });
  }
}

template <typename Element, Mask mask, bool bounded>
void softmax(const Scores<Element>& s, int64_t queries) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= queries; n += 2 * kLanes) softmax_columns<Element, mask, bounded, 2>(s, n);
  for (; n < queries; n += kLanes) softmax_columns<Element, mask, bounded, 1>(s, n);
}

template <typename Element>
void softmax(const Scores<Element>& s, int64_t queries, bool bounded) {
  if (s.table) return softmax<Element, Mask::kTable, false>(s, queries);
  if (s.q_region) return softmax<Element, Mask::kRegion, false>(s, queries);
  if (bounded) return softmax<Element, Mask::kNone, true>(s, queries);
  softmax<Element, Mask::kNone, false>(s, queries);
}

// --- one window ------------------------------------------------------------------------------------------------------

// A thread's buffers and what it does with the heads of a group in one window after the other.
template <typename Element>
class Worker {
 public:
  Worker(const Problem& p, int64_t group)
      : p_(p),
        group_(group),
        stride_(round_up(p.head_dim, p.head_dim > kLine ? kLine : kPack)),
        key_stride_(round_up(stride_, kLine)),  // tiles load aligned rows faster
        value_stride_(round_up(p.head_dim + 1, kPack)),
        queries_(round_up(p.queries, kTile)),
        keys_(round_up(p.keys, std::max(kLine, kTile))),
        sum_columns_(round_up(group, kTile)) {
    place(false);
    arena().start(bytes_);
    place(true);
    std::memset(zeros_, 0, zeros() * sizeof(float));
    std::memset(q_region_, 0, queries_ * sizeof(int32_t));
    std::memset(static_cast<void*>(map_), 0, keys_ * p.block * sizeof(Element));
    std::memset(static_cast<void*>(values_), 0, (group * value_stride_ + kTile) * keys_ * sizeof(Element));
#ifdef HARMOQ_AMX
    if constexpr (sizeof(Element) <= 2) {
      if (amx_available()) amx_.emplace(tall_words());
    }
#endif
    if constexpr (kCodes<Element>) fill_ones();
  }

  // Attention of a group of heads in a window.
  void run(int64_t window, int64_t first_head) {
    window_ = window;
    first_head_ = first_head;
    heads_ = std::min(group_, p_.heads - first_head);
    read_queries_and_keys();
    read_values();
    if constexpr (kCodes<Element>) sum_codes();
    find_mask();
    if (window + 1 < p_.windows) {
      fetch(p_.q, p_.q_rows + (window + 1) * p_.queries, p_.queries);
      fetch(p_.k, p_.k_rows + (window + 1) * p_.keys, p_.keys);
      fetch(p_.v, p_.k_rows + (window + 1) * p_.keys, p_.keys);
    }
    for (int64_t n = 0; n < p_.queries; n += p_.block) {
      const int64_t width = std::min(p_.block, queries_ - n);
      for (int64_t h = 0; h < heads_; ++h) attend(n, width, h);
      write(n, width);
    }
  }

 private:
  // Brings tokens of the next window closer while this one is worked on.
  void fetch(const Tokens& tokens, const int32_t* rows, int64_t count) const {
    const int64_t size = static_cast<int64_t>(c10::elementSize(tokens.type)), length = heads_ * p_.head_dim * size;
    const char* data = static_cast<const char*>(tokens.data) + first_head_ * p_.head_dim * size;
    for (int64_t n = 0; n < count; ++n) {
      if (rows[n] < 0) continue;
      const char* at = data + rows[n] * tokens.stride * size;
      for (int64_t i = 0; i < length + 63; i += 64) __builtin_prefetch(at + std::min(i, length - 1), 0, 2);
    }
  }

  static constexpr int64_t kPack = kGroup<Element>;
  static constexpr int64_t kLine = 64 / sizeof(Element);  // elements of a row of a tile

  int64_t tall_words() const { return std::min(stride_, kLine) / kPack; }

  int64_t zeros() const { return std::max(group_ * p_.head_dim, p_.block); }

  // Counts bytes, or gives each buffer its place.
  void place(bool now) {
    bytes_ = 0;
    const auto take = [&]<typename T>(T*& pointer, int64_t count) {
      bytes_ += Arena::bytes_of<T>(count);
      if (now) pointer = arena().take<T>(count);
    };
    const int64_t columns = group_ * stride_, value_columns = group_ * value_stride_;
    take(rows_, std::max(queries_, keys_) * (std::max(columns, value_columns) + kTile) + kTile * kPack);
    take(queries_packed_, round_up(columns / kPack, kTile) * queries_ * kPack);
    take(keys_rows_, keys_ * group_ * key_stride_);
    take(values_, (value_columns + kTile) * keys_);
    take(products_, keys_ * p_.block);
    take(map_, keys_ * p_.block);
    take(sums_and_products_, round_up(p_.head_dim + 1, kTile) * p_.block);
    take(result_, round_up(group_ * p_.head_dim, kTile) * p_.block);
    take(zeros_, zeros());
    take(q_region_, queries_);
    take(factors_, group_);
    take(bounds_, group_);
    take(extremes_, 2 * (round_up(columns, kLine) + key_stride_));
    if constexpr (kCodes<Element>) {
      take(head_ones_, columns * sum_columns_);
      take(ones_, keys_ * kTile);
      take(key_sums_, keys_ * sum_columns_);
      take(key_constants_, keys_ * sum_columns_);
      take(value_sums_, round_up(value_columns, kTile) * kTile);
      take(centres_, columns);
      take(query_constants_, p_.block);
    }
  }

  // Right operands that make sums of codes: ones, and ones where a channel belongs to a head.
  void fill_ones() {
    std::memset(ones_, 1, keys_ * kTile);
    std::memset(head_ones_, 0, group_ * stride_ * sum_columns_);
    for (int64_t h = 0; h < group_; ++h) {
      for (int64_t j = 0; j < p_.head_dim; ++j) {
        const int64_t row = h * stride_ + j;
        head_ones_[(row / kPack * sum_columns_ + h) * kPack + row % kPack] = 1;
      }
    }
  }

  void read(const Tokens& tokens, const int32_t* rows, int64_t count, const float* factors, const Quantizer& quantizer,
            const Staged& at, Element* to) {
    rows += window_ * count;
    if constexpr (kCodes<Element>) {
      if (tokens.type == at::kByte)
        return stage_elements(p_, tokens, rows, count, first_head_, heads_, at, quantizer.zero, to);
    } else if (!factors && tokens.type == c10::CppTypeToScalarType<Element>::value) {
      return stage_elements(p_, tokens, rows, count, first_head_, heads_, at, reinterpret_cast<const Element*>(zeros_),
                            to);
    }
    const auto read_as = [&](auto* zeros) {
      stage(p_, tokens, rows, count, first_head_, heads_, factors, quantizer, at, zeros, to);
    };
    if (tokens.type == at::kBFloat16)
      read_as(reinterpret_cast<const BFloat16*>(zeros_));
    else
      read_as(static_cast<const float*>(zeros_));
  }

  // Of staged rows whose heads are `stride` apart: the last whole vector does not reach into the next row.
  int64_t row_stride(int64_t stride) const {
    return round_up((heads_ - 1) * stride + round_up(stride, kLanes), kPack);
  }

  __attribute__((noinline)) void read_queries_and_keys() {
    const int64_t columns = heads_ * stride_, row = row_stride(stride_);
    for (int64_t h = 0; h < heads_; ++h) {  // the factor of the scores goes into q as well where q is not quantized
      const float factor = p_.q_factor[first_head_ + h];
      factors_[h] = kCodes<Element> ? factor : factor * p_.score_factor[first_head_ + h] * kLog2E;
    }
    read(p_.k, p_.k_rows, p_.keys, nullptr, p_.k_codes, {key_stride_, keys_ * key_stride_, stride_}, keys_rows_);
    read(p_.q, p_.q_rows, p_.queries, factors_, p_.q_codes, {row, stride_, stride_}, rows_);
    bound_scores();
    clear_rows(p_.queries, queries_, row);
    transpose_words(rows_, row / kPack, queries_, columns / kPack, queries_packed_, queries_);
  }

  // To [heads][channels, and a row of ones][keys]; keys that only pad are zero.
  __attribute__((noinline)) void read_values() {
    const int64_t columns = heads_ * value_stride_, row = row_stride(value_stride_);
    read(p_.v, p_.k_rows, p_.keys, nullptr, p_.v_codes, {row, value_stride_, p_.head_dim}, rows_);
    clear_rows(p_.keys, keys_, row);
    transpose_elements(rows_, row, keys_, columns, values_, keys_);
    for (int64_t h = 0; h < heads_; ++h)
      std::fill_n(values_ + (h * value_stride_ + p_.head_dim) * keys_, p_.keys, Element(1));
  }

  // No score of a head is larger than sum_j max_n |q_nj| max_m |k_mj| and the largest bias. Of codes, the same of keys
  // less the middle of each channel: a softmax does not see what is the same for all keys of a query.
  __attribute__((noinline)) void bound_scores() {
    const int64_t columns = heads_ * stride_, line = round_up(columns, kLine);
    Element *q = extremes_, *k = extremes_ + 2 * line;
    if constexpr (kCodes<Element>)
      column_extremes(rows_, p_.queries, row_stride(stride_), columns, q, q + line);
    else
      column_maxima(rows_, p_.queries, row_stride(stride_), columns, q);
    for (int64_t h = 0; h < heads_; ++h, q += stride_) {
      const Element* keys = keys_rows_ + h * keys_ * key_stride_;
      float bound = 0;
      if constexpr (kCodes<Element>) {
        column_extremes(keys, p_.keys, key_stride_, key_stride_, k, k + key_stride_);
        bound = bound_codes(h, q, q + line, k, k + key_stride_);
      } else {
        column_maxima(keys, p_.keys, key_stride_, key_stride_, k);
        for (int64_t j = 0; j < p_.head_dim; ++j) bound += static_cast<float>(q[j]) * static_cast<float>(k[j]);
      }
      bounds_[h] = bound + p_.largest_bias * kLog2E;
    }
  }

  float score_scale(int64_t h) const { return p_.score_factor[first_head_ + h] * kLog2E; }

  float bound_codes(int64_t h, const uint8_t* q_least, const uint8_t* q_most, const uint8_t* k_least,
                    const uint8_t* k_most) {
    const float lower = p_.q_codes.lower, step = p_.q_codes.step;
    float bound = 0;
    for (int64_t j = 0; j < p_.head_dim; ++j) {
      const float q = std::max(std::abs(lower + step * q_least[j]), std::abs(lower + step * q_most[j]));
      centres_[h * stride_ + j] = 0.5f * static_cast<float>(k_least[j] + k_most[j]);
      bound += q * 0.5f * static_cast<float>(k_most[j] - k_least[j]);
    }
    return bound * p_.k_codes.step * std::abs(score_scale(h));
  }

  // The product of each query with the middles of the keys' channels.
  void centre(int64_t n, int64_t width, int64_t h) {
    const float scale = p_.k_codes.step * score_scale(h), *centres = centres_ + h * stride_;
    const float total = std::accumulate(centres, centres + p_.head_dim, 0.f) * p_.q_codes.lower * scale;
    const uint8_t* q = queries_packed_ + (h * stride_ / kPack * queries_ + n) * kPack;
    for (int64_t i = 0; i < width; i += kLanes) {
      Vec sum(0.f);
      for (int64_t j = 0; j < p_.head_dim; ++j)
        sum = at::vec::fmadd(codes_in_words(q + (j / kPack * queries_ + i) * kPack, j % kPack), Vec(centres[j]), sum);
      at::vec::fmadd(sum, Vec(p_.q_codes.step * scale), Vec(total)).store(query_constants_ + i);
    }
  }


  void clear_rows(int64_t from, int64_t to, int64_t columns) {
    std::memset(static_cast<void*>(rows_ + from * columns), 0, (to - from) * columns * sizeof(Element));
  }

  // Sums of the codes of k over channels, times what they are multiplied with in the scores, and of v over keys.
  void sum_codes() {
    products_with_ones(heads_ * value_stride_);
    transpose_words(key_sums_, sum_columns_, keys_, sum_columns_, key_constants_, keys_);
    for (int64_t h = 0; h < heads_; ++h) {
      const Vec factor(p_.k_codes.step * p_.q_codes.lower * score_scale(h));
      float* constants = key_constants_ + h * keys_;
      for (int64_t m = 0; m < keys_; m += kLanes)
        (load_floats(reinterpret_cast<const int32_t*>(constants + m)) * factor).store(constants + m);
    }
  }

  void products_with_ones(int64_t value_columns) {
#ifdef HARMOQ_AMX
    if (amx_) {
      amx_tall(tall_words(), keys_rows_, {key_stride_, keys_ * key_stride_}, head_ones_, sum_columns_ * 4, key_sums_,
               sum_columns_ * 4, round_up(p_.keys, kTile), sum_columns_, heads_, (stride_ + kLine - 1) / kLine);
      amx_wide(values_, keys_, ones_, kTile * 4, value_sums_, kTile * 4, round_up(value_columns, kTile), kTile,
               keys_ / kLine);
      return;
    }
#endif
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t m = 0; m < p_.keys; ++m) {
        const Element* k = keys_rows_ + (h * keys_ + m) * key_stride_;
        key_sums_[m * sum_columns_ + h] = std::accumulate(k, k + p_.head_dim, 0);
      }
    }
    for (int64_t j = 0; j < value_columns; ++j)
      value_sums_[j * kTile] = std::accumulate(values_ + j * keys_, values_ + j * keys_ + p_.keys, 0);
  }

  void find_mask() {
    table_ = nullptr;
    regions_ = false;
    if (p_.mask_table && p_.mask_index[window_] >= 0)
      table_ = p_.mask_table + p_.mask_index[window_] * p_.blocks() * p_.keys * p_.block;
    if (!p_.q_region) return;
    const int32_t *q = p_.q_region + window_ * p_.queries, *k = p_.k_region + window_ * p_.keys;
    int32_t differ = 0;
    for (int64_t n = 0; n < p_.queries; ++n) differ |= q[n] ^ q[0];
    for (int64_t m = 0; m < p_.keys; ++m) differ |= k[m] ^ q[0];
    regions_ = differ != 0;
    if (regions_) std::copy_n(q, p_.queries, q_region_);
  }

  // Of keys from `m` on.
  Scores<Element> scores(int64_t n, int64_t h, int64_t m, int64_t count) const {
    const int64_t head = first_head_ + h, block = n / p_.block, size = p_.keys * p_.block;
    Scores<Element> s{};
    s.products = products_;
    s.map = map_ + m * p_.block;
    s.keys = count;
    s.block = p_.block;
    s.bias = p_.bias ? p_.bias + (head * p_.blocks() + block) * size + m * p_.block : zeros_;
    s.bias_stride = p_.bias ? p_.block : 0;
    s.table = table_ ? table_ + block * size : nullptr;
    s.q_region = regions_ ? q_region_ + n : nullptr;
    s.k_region = regions_ ? p_.k_region + window_ * p_.keys : nullptr;
    s.mask = p_.mask_value * kLog2E;
    if constexpr (kCodes<Element>) {
      s.scale = p_.q_codes.step * p_.k_codes.step * score_scale(h);
      s.key_constants = key_constants_ + h * keys_;
      s.query_constants = query_constants_;
      s.quantizer = p_.map_codes;
      s.relative = p_.relative;
    }
    return s;
  }

  void attend(int64_t n, int64_t width, int64_t h) {
    const Element* q = queries_packed_ + (h * stride_ / kPack * queries_ + n) * kPack;
    const float bound = !kCodes<Element> ? kBound : p_.relative ? kRelativeBound : kCodesBound;
    const bool bounded = bounds_[h] < bound && !table_ && !regions_;
    if constexpr (kCodes<Element>) {
      if (bounded && !p_.relative) centre(n, width, h);
    }
    // with neither a maximum nor a sum to wait for, scores of some keys at a time
    const int64_t step = bounded && !kCodes<Element> ? std::max(kScores / p_.block / kTile, int64_t(1)) * kTile : p_.keys;
    for (int64_t m = 0; m < p_.keys; m += step) {
      const int64_t count = std::min(step, p_.keys - m);
      score_products(keys_rows_ + (h * keys_ + m) * key_stride_, q, count, width);
      if constexpr (kCodes<Element>) show(p_.score_accumulators, products_, p_.keys, n, h);
      softmax(scores(n, h, m, count), width, bounded);
    }
    const Element* v = values_ + h * value_stride_ * keys_;
    value_products(v, width);
    if constexpr (kCodes<Element>) {
      show(p_.value_accumulators, sums_and_products_, p_.head_dim, n, h);
      show_map(n, h);
      values_of_codes(width, h);
    } else {
      normalize(width, h);
    }
  }

  void score_products(const Element* k, const Element* q, int64_t count, int64_t width) {
#ifdef HARMOQ_AMX
    if constexpr (sizeof(Element) <= 2) {
      if (amx_)
        return amx_tall(tall_words(), k, {key_stride_ * int64_t(sizeof(Element)), 0}, q, queries_ * 4, products_, p_.block * 4,
                        round_up(count, kTile), width, 1, (stride_ + kLine - 1) / kLine);
    }
#endif
    gemm(count, width, stride_, key_stride_, queries_, p_.block, k, q, products_);
  }

  void value_products(const Element* v, int64_t width) {
#ifdef HARMOQ_AMX
    if constexpr (sizeof(Element) <= 2) {
      if (amx_)
        return amx_wide(v, keys_ * sizeof(Element), map_, p_.block * 4, sums_and_products_, p_.block * 4,
                        round_up(p_.head_dim + 1, kTile), width, keys_ / kLine);
    }
#endif
    gemm(p_.head_dim + 1, width, round_up(p_.keys, kPack), keys_, p_.block, p_.block, v, map_, sums_and_products_);
  }

  __attribute__((noinline)) void normalize(int64_t width, int64_t h) {
    for (int64_t n = 0; n < width; n += kLanes) {
      const float* o = sums_and_products_ + n;
      const Vec reciprocal = Vec(1.f) / Vec::loadu(o + p_.head_dim * p_.block);
      float* result = result_ + h * p_.head_dim * p_.block + n;
      for (int64_t j = 0; j < p_.head_dim; ++j)
        (Vec::loadu(o + j * p_.block) * reciprocal).store(result + j * p_.block);
    }
  }

  // `matmul_epilogue` of the map and v; a relative map is divided by the sum of its rounded entries.
  void values_of_codes(int64_t width, int64_t h) {
    const Quantizer &map = p_.map_codes, &v = p_.v_codes;
    const Vec scale(map.step * v.step), step(map.step), base(map.lower * p_.keys), lower(v.lower);
    for (int64_t n = 0; n < width; n += kLanes) {
      const int32_t* o = sums_and_products_ + n;
      const Vec row_sum = at::vec::fmadd(load_floats(o + p_.head_dim * p_.block), step, base);
      const Vec factor = p_.relative ? Vec(1.f) / larger(row_sum, Vec(1e-30f)) : Vec(1.f);
      float* result = result_ + h * p_.head_dim * p_.block + n;
      for (int64_t j = 0; j < p_.head_dim; ++j) {
        const float column_sum = static_cast<float>(value_sums_[(h * value_stride_ + j) * kTile]);
        const Vec constant = at::vec::fmadd(row_sum, lower, Vec(column_sum * v.step * map.lower));
        const Vec product = at::vec::fmadd(load_floats(o + j * p_.block), scale, constant);
        (product * factor).store(result + j * p_.block);
      }
    }
  }

  // Transposed accumulators [count][block] of a head to `to` [windows, heads, queries, count].
  void show(int32_t* to, const int32_t* accumulators, int64_t count, int64_t first, int64_t h) const {
    if (!to) return;
    to += (window_ * p_.heads + first_head_ + h) * p_.queries * count;
    for (int64_t n = first; n < std::min(first + p_.block, p_.queries); ++n)
      for (int64_t i = 0; i < count; ++i) to[n * count + i] = accumulators[i * p_.block + n - first];
  }

  void show_map(int64_t first, int64_t h) const {
    if (!p_.map_out) return;
    uint8_t* to = p_.map_out + (window_ * p_.heads + first_head_ + h) * p_.queries * p_.keys;
    const uint8_t* map = reinterpret_cast<const uint8_t*>(map_);
    for (int64_t n = first; n < std::min(first + p_.block, p_.queries); ++n)
      for (int64_t m = 0; m < p_.keys; ++m)
        to[n * p_.keys + m] = map[(m / kPack * p_.block + n - first) * kPack + m % kPack];
  }

  __attribute__((noinline)) void write(int64_t first, int64_t width) {
    const auto write_as = [&]<typename Out>(Out* out) {
      const int64_t columns = heads_ * p_.head_dim;
      alignas(64) float tile[kTile * kTile];
      out += first_head_ * p_.head_dim;
      for (int64_t n = 0; n < width; n += kTile) {
        const int32_t* rows = p_.out_rows + window_ * p_.queries + first + n;
        const int64_t count = std::min(kTile, p_.queries - first - n);
        for (int64_t c = 0; c < columns; c += kTile) {
          transpose_tile(result_ + c * p_.block + n, p_.block, tile, kTile);
          for (int64_t i = 0; i < count; ++i) {
            if (rows[i] < 0) continue;
            Out* to = out + rows[i] * p_.out_stride + c;
            const int64_t width = std::min(kTile, columns - c);
            if constexpr (std::is_same_v<Out, uint8_t>)
              store_row(to, tile + i * kTile, width, p_.out_codes, first_head_ * p_.head_dim + c);
            else
              store_row(to, tile + i * kTile, width);
          }
        }
      }
    };
    if (p_.out_type == at::kByte)
      write_as(static_cast<uint8_t*>(p_.out));
    else if (p_.out_type == at::kBFloat16)
      write_as(static_cast<BFloat16*>(p_.out));
    else
      write_as(static_cast<float*>(p_.out));
  }

  const Problem& p_;
  const int64_t group_, stride_, key_stride_, value_stride_, queries_, keys_, sum_columns_;
  int64_t bytes_ = 0, window_ = 0, first_head_ = 0, heads_ = 0;
  Element *rows_, *extremes_, *queries_packed_, *keys_rows_, *values_, *map_, *head_ones_, *ones_;
  Accumulator<Element>*products_, *sums_and_products_;
  float *result_, *zeros_, *factors_, *bounds_, *key_constants_, *centres_, *query_constants_;
  int32_t *q_region_, *key_sums_, *value_sums_;
  const float* table_ = nullptr;
  bool regions_ = false;
#ifdef HARMOQ_AMX
  std::optional<AmxTiles> amx_;
#endif
};

// Heads whose bias fits the cache go over all windows together; few windows are shared out by heads.
int64_t heads_of_a_pass(const Problem& p) {
  const int64_t bytes = p.bias ? p.blocks() * p.keys * p.block * int64_t(sizeof(float)) : 1;
  const int64_t most = std::clamp<int64_t>(kBiasBytes / bytes, 1, p.heads);
  if (p.windows * ((p.heads + most - 1) / most) < 2 * at::get_num_threads()) return 1;
  const int64_t passes = (p.heads + most - 1) / most;
  return (p.heads + passes - 1) / passes;
}

template <typename Element>
void attend_all(const Problem& p) {
  const int64_t group = heads_of_a_pass(p), passes = (p.heads + group - 1) / group;
  share_tasks(passes * p.windows, [&](const auto& next) {
    Worker<Element> worker(p, group);
    for (int64_t first, last; next(first, last);) {
      for (int64_t i = first; i < last; ++i) worker.run(i % p.windows, i / p.windows * group);
    }
    gemm_done();
  });
}

// --- the operator ----------------------------------------------------------------------------------------------------

const int32_t* integers(const char* name, const Tensor& x, int64_t windows, int64_t tokens) {
  TORCH_CHECK(x.scalar_type() == at::kInt && x.is_contiguous() && x.dim() == 2 && x.size(0) == windows &&
                  x.size(1) == tokens,
              "window_attention: ", name, " must be int32 [", windows, ", ", tokens, "], contiguous");
  return x.const_data_ptr<int32_t>();
}

void check_rows(const char* name, const Tensor& rows, int64_t windows, int64_t tokens, int64_t most) {
  const int32_t* p = integers(name, rows, windows, tokens);
  int32_t least = -1, largest = -1;
  for (int64_t i = 0; i < rows.numel(); ++i) {
    least = std::min(least, p[i]);
    largest = std::max(largest, p[i]);
  }
  TORCH_CHECK(least >= -1 && largest < most, "window_attention: ", name, " must lie in -1 to ", most - 1);
}

const float* floats(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, "window_attention: ", name,
              " must be float32 ", shape, ", contiguous, and is ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}

float largest_magnitude(const float* p, int64_t count) {
  float most[kTile] = {};
  for (int64_t i = 0; i + kTile <= count; i += kTile)  // packed biases are whole tiles
    for (int64_t j = 0; j < kTile; ++j) most[j] = std::max(most[j], std::abs(p[i + j]));
  return *std::max_element(most, most + kTile);
}

Tokens tokens_of(const char* name, const Tensor& x, int64_t column, int64_t channels, bool codes = false) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK((type == at::kBFloat16 || type == at::kFloat || (codes && type == at::kByte)) && x.dim() == 2 &&
                  x.stride(1) == 1,
              "window_attention: ", name, " must be a matrix of float32 or bfloat16", codes ? " or codes" : "",
              " with dense rows");
  TORCH_CHECK(column >= 0 && column + channels <= x.size(1),
              "window_attention: ", name, " has ", x.size(1),
              " columns, too few for ", channels, " from ", column, " on");
  return {static_cast<const char*>(x.const_data_ptr()) + column * x.element_size(), x.stride(0), type};
}

// Reciprocals and offsets of q, k, the map and v, each padded to whole vectors: what pads gets code 0.
class Quantizers {
 public:
  Quantizers(const Tensor& bounds, const Tensor& reciprocals, int64_t head_dim)
      : padded_(round_up(head_dim, 64)), vectors_(at::zeros({4, 2, padded_}, at::kFloat)), zeros_(4 * padded_) {
    const float* b = floats("quantizers", bounds, {4, 4});
    const float* r = floats("reciprocals", reciprocals, {4, head_dim});
    for (int64_t i = 0; i < 4; ++i) {
      float* factor = vectors_.data_ptr<float>() + i * 2 * padded_;
      std::copy_n(r + i * head_dim, head_dim, factor);
      std::fill_n(factor + padded_, head_dim, b[4 * i + 2]);
      const float top = b[4 * i + 3];
      uint8_t* zero = zeros_.data() + i * padded_;
      const Vec code = codes_of(Vec(0.f), Vec(1.f), Vec(b[4 * i + 2]), Vec(top));
      for (int64_t j = 0; j < head_dim; j += kLanes) store_elements(zero + j, code);
      of[i] = {factor, factor + padded_, zero, b[4 * i], b[4 * i + 1], top};
    }
  }

  Quantizer of[4];

 private:
  int64_t padded_;
  Tensor vectors_;
  std::vector<uint8_t> zeros_;
};

// Factor and offset of each column of the result, and room for a last whole tile to read beyond them.
class OutQuantizer {
 public:
  OutQuantizer(const OptionalTensor& given, int64_t bits, int64_t channels) {
    if (!given) return;
    TORCH_CHECK(bits >= 1 && bits <= 8, "window_attention: codes have 1 to 8 bits, got ", bits);
    const float* vectors = floats("out_quantizer", *given, {2, channels});
    const int64_t padded = channels + kTile;
    vectors_.resize(2 * padded);
    std::copy_n(vectors, channels, vectors_.data());
    std::copy_n(vectors + channels, channels, vectors_.data() + padded);
    of.factor = vectors_.data();
    of.offset = vectors_.data() + padded;
    of.top = static_cast<float>((1 << bits) - 1);
  }

  Quantizer of;

 private:
  std::vector<float> vectors_;
};

void window_attention(const Tensor& out, const Tensor& out_rows, int64_t out_col, const Tensor& q, int64_t q_col,
                      const Tensor& k, int64_t k_col, const Tensor& v, int64_t v_col, const Tensor& q_rows,
                      const Tensor& k_rows, int64_t heads, int64_t head_dim, const Tensor& q_factor,
                      const Tensor& score_factor, const OptionalTensor& bias, const OptionalTensor& q_region,
                      const OptionalTensor& k_region, double mask_value, const OptionalTensor& mask_table,
                      const OptionalTensor& mask_index, int64_t block, bool half, const OptionalTensor& quantizers,
                      const OptionalTensor& reciprocals, bool relative, const OptionalTensor& out_quantizer,
                      int64_t out_bits, const OptionalTensor& score_accumulators,
                      const OptionalTensor& map_codes, const OptionalTensor& value_accumulators) {
  TORCH_CHECK(q_rows.dim() == 2 && k_rows.dim() == 2, "window_attention: rows must be [windows, tokens]");
  TORCH_CHECK(heads > 0 && head_dim > 0 && block > 0 && block % kTile == 0,
              "window_attention: heads, head_dim and block must be positive, block a multiple of ", kTile);
  const int64_t channels = heads * head_dim, windows = q_rows.size(0), queries = q_rows.size(1), keys = k_rows.size(1);
  Problem p{};
  p.windows = windows;
  p.queries = queries;
  p.keys = keys;
  p.heads = heads;
  p.head_dim = head_dim;
  p.block = std::min(block, round_up(queries, kTile));
  if (windows == 0 || queries == 0) return;
  TORCH_CHECK(keys > 0, "window_attention: no keys");
  p.q = tokens_of("q", q, q_col, channels, quantizers.has_value());
  p.k = tokens_of("k", k, k_col, channels, quantizers.has_value());
  p.v = tokens_of("v", v, v_col, channels, quantizers.has_value());
  const Tokens result = tokens_of("out", out, out_col, channels, out_quantizer.has_value());
  p.out = const_cast<void*>(result.data);
  p.out_stride = result.stride;
  p.out_type = result.type;
  const OutQuantizer out_codes(out_quantizer, out_bits, channels);
  p.out_codes = out_codes.of;
  check_rows("q_rows", q_rows, windows, queries, q.size(0));
  check_rows("k_rows", k_rows, windows, keys, std::min(k.size(0), v.size(0)));
  check_rows("out_rows", out_rows, windows, queries, out.size(0));
  p.q_rows = q_rows.const_data_ptr<int32_t>();
  p.k_rows = k_rows.const_data_ptr<int32_t>();
  p.out_rows = out_rows.const_data_ptr<int32_t>();
  p.q_factor = floats("q_factor", q_factor, {heads});
  p.score_factor = floats("score_factor", score_factor, {heads});
  if (bias) {
    p.bias = floats("bias", *bias, {heads, p.blocks(), keys, p.block});
    p.largest_bias = largest_magnitude(p.bias, bias->numel());
  }
  if (mask_table) {
    TORCH_CHECK(mask_index, "window_attention: mask_table without mask_index");
    p.mask_table = floats("mask_table", *mask_table, {mask_table->size(0), p.blocks(), keys, p.block});
    check_rows("mask_index", mask_index->unsqueeze(0), 1, windows, mask_table->size(0));
    p.mask_index = mask_index->const_data_ptr<int32_t>();
  }
  TORCH_CHECK(q_region.has_value() == k_region.has_value(), "window_attention: regions of q and k belong together");
  if (q_region) {
    p.q_region = integers("q_region", *q_region, windows, queries);
    p.k_region = integers("k_region", *k_region, windows, keys);
    p.mask_value = static_cast<float>(mask_value);
  }
  if (!quantizers) {
    if (half && kHalf) {
#ifdef __AVX512BF16__
      attend_all<BFloat16>(p);
#endif
    } else {
      attend_all<float>(p);
    }
    return;
  }
  TORCH_CHECK(reciprocals, "window_attention: quantizers without reciprocals");
  const Quantizers ready(*quantizers, *reciprocals, head_dim);
  p.q_codes = ready.of[0];
  p.k_codes = ready.of[1];
  p.map_codes = ready.of[2];
  p.v_codes = ready.of[3];
  p.relative = relative;
  const auto shown = [](const OptionalTensor& x, at::IntArrayRef shape) -> int32_t* {
    if (!x) return nullptr;
    TORCH_CHECK(x->scalar_type() == at::kInt && x->is_contiguous() && x->sizes() == shape,
                "window_attention: accumulators must be int32 ", shape);
    return x->data_ptr<int32_t>();
  };
  p.score_accumulators = shown(score_accumulators, {windows, heads, queries, keys});
  p.value_accumulators = shown(value_accumulators, {windows, heads, queries, head_dim});
  if (map_codes) {
    TORCH_CHECK(map_codes->scalar_type() == at::kByte && map_codes->is_contiguous() &&
                    map_codes->sizes() == at::IntArrayRef({windows, heads, queries, keys}),
                "window_attention: map_codes must be uint8 [windows, heads, queries, keys]");
    p.map_out = map_codes->data_ptr<uint8_t>();
  }
  attend_all<uint8_t>(p);
}

TORCH_LIBRARY_FRAGMENT(HARMOQ_NAMESPACE, m) {
  m.def(
      "window_attention(Tensor(a!) out, Tensor out_rows, int out_col, Tensor q, int q_col, Tensor k, int k_col, "
      "Tensor v, int v_col, Tensor q_rows, Tensor k_rows, int heads, int head_dim, Tensor q_factor, "
      "Tensor score_factor, Tensor? bias, Tensor? q_region, Tensor? k_region, float mask_value, Tensor? mask_table, "
      "Tensor? mask_index, "
      "int block, bool half, Tensor? quantizers=None, Tensor? reciprocals=None, bool relative=False, "
      "Tensor? out_quantizer=None, int out_bits=8, "
      "Tensor(b!)? score_accumulators=None, Tensor(c!)? map_codes=None, Tensor(d!)? value_accumulators=None) -> ()");
}

TORCH_LIBRARY_IMPL(HARMOQ_NAMESPACE, CPU, m) { m.impl("window_attention", window_attention); }

}  // namespace
}  // namespace harmoq
