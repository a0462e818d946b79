// Functions of one value. What is not a number stays so: at::vec's clamps keep it at the cost of one instruction.
#pragma once

#include "vectors.h"

namespace harmoq {

enum class Unary : int64_t { kGelu, kGeluTanh, kSigmoid, kRelu, kLeakyRelu, kSilu, kTanh, kCount };

// GELU(x) = max(x, 0) - u Phi(-u) with u = |x|, and Phi(-u) = q(u)^-8 with a polynomial q of degree 8, the minimax fit
// of u Phi(-u) on [0, 6.5] (4e-8). In float32 the error is at most 3e-7 absolutely, and 6e-6 of GELU(x) for x > -2;
// below, where torch's 1 + erf cancels, the value only stays within 3e-7. Beyond 6.5, u Phi(-u) is below 3e-10.
struct Gelu {
  Vec operator()(Vec x) const {
    const Vec u = at::vec::clamp_max(x.abs(), Vec(6.5f));
    Vec q(3.35459981e-06f);
    for (float c : {-2.03825148e-05f, 0.000118096243f, 8.7481938e-05f, 0.00112562533f, 0.00931580737f, 0.0488703959f,
                    0.108752005f, 1.09050834f}) {
      q = at::vec::fmadd(q, u, Vec(c));
    }
    q = q * q;
    q = q * q;
    return at::vec::fnmadd(u, reciprocal(q * q), at::vec::clamp_min(x, Vec(0.f)));
  }
};

// 1 / (1 + exp(-x)); exp within 2^-20, and held below infinity, whose reciprocal has no Newton step.
inline Vec sigmoid(Vec x) { return reciprocal(Vec(1.f) + at::vec::clamp_max(x.neg(), Vec(87.f)).exp_u20()); }

struct Sigmoid {
  Vec operator()(Vec x) const { return sigmoid(x); }
};

// x (1 + tanh(z)) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  Vec operator()(Vec x) const {
    return x * sigmoid(x * at::vec::fmadd(x * x, Vec(0.0713548163f), Vec(1.59576912f)));
  }
};

struct Silu {
  Vec operator()(Vec x) const { return x * sigmoid(x); }
};

// 2 sigmoid(2 x) - 1, which cancels near zero: there the first terms of the series, within 2e-7 of tanh(x) below 0.15.
struct Tanh {
  Vec operator()(Vec x) const {
    const Vec y = at::vec::fmsub(Vec(2.f), sigmoid(x + x), Vec(1.f));
    const Vec t = x * x;
    const Vec series = at::vec::fmadd(at::vec::fmadd(t, Vec(-17.f / 315), Vec(2.f / 15)), t, Vec(-1.f / 3));
    return Vec::blendv(y, at::vec::fmadd(x * t, series, x), x.abs() < Vec(0.15f));
  }
};

struct Relu {
  Vec operator()(Vec x) const { return at::vec::clamp_min(x, Vec(0.f)); }
};

struct LeakyRelu {
  Vec slope;
  Vec operator()(Vec x) const { return Vec::blendv(x * slope, x, x > Vec(0.f)); }
};

// Calls f with the function; the slope is that of a leaky ReLU.
template <typename F>
inline void with_unary(Unary kind, float slope, const F& f) {
  switch (kind) {
    case Unary::kGelu: return f(Gelu{});
    case Unary::kGeluTanh: return f(GeluTanh{});
    case Unary::kSigmoid: return f(Sigmoid{});
    case Unary::kRelu: return f(Relu{});
    case Unary::kLeakyRelu: return f(LeakyRelu{Vec(slope)});
    case Unary::kSilu: return f(Silu{});
    case Unary::kTanh: return f(Tanh{});
    case Unary::kCount: break;
  }
}

}  // namespace harmoq
