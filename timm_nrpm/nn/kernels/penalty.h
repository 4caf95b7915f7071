// The weight functions, and what the passes over a layer share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vectors.h"

namespace {

constexpr int64_t CACHE = 1 << 18;    // bytes of a panel, which fit well into a second-level cache
constexpr int64_t TASKS = 64;         // smallest number of pieces of the work, where the shapes allow it
constexpr int64_t SMALL = 1 << 15;    // products that one thread computes before another has woken up

// Passed by value, so that it stays in registers: behind a pointer, any store might change it.
struct Penalty {
  float eps, scale, shift, low, high;
  // omega(t) and, if asked, -omega'(t) * sign(t), which is 0 where omega is clamped.
  template <bool GENERAL>
  inline Vec weight(Vec t, Vec* slope = nullptr) const {
    Vec inverse = reciprocal(magnitude(t) + eps);
    if (!GENERAL) {
      if (slope) *slope = inverse * inverse;
      return inverse;
    }
    Vec w = inverse * scale - shift;
    if (slope) *slope = (Vec)((Int)(inverse * inverse * scale) & (Int)((w > low) & (w < high)));
    Vec lows = Vec{} + low, highs = Vec{} + high;
    w = w < lows ? lows : w;  // a comparison with NaN is false, so NaN passes
    return w > highs ? highs : w;
  }
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float, Free> Buffer;

Buffer buffer(int64_t floats) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<int64_t>(floats, 16) * 4)) std::abort();
  return Buffer(static_cast<float*>(p));
}

}  // namespace
