// Convolutions, and panels of their input.
//
// A panel holds the input that a few vectors of output positions read: [D][panel] floats, packed from an input of any
// strides.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int VECTORS = 4;  // of positions in a panel: independent sums, enough to hide the latency of an addition
constexpr int PANEL = LANES * VECTORS;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Conv {
  int64_t batch, groups, channels, outputs;  // channels and outputs of one group
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x[4], z[4];  // strides of the input and its gradient, and of everything shaped like the output
  int64_t steps;
  int64_t depth() const { return channels * kernel[0] * kernel[1]; }
  int64_t area() const { return out_height * out_width; }
  int64_t positions() const { return batch * area(); }
};

// Consecutive positions of one row, at `at` in the panel.
struct Run {
  int64_t image, row, column, count, at;
};

struct Runs {
  Run run[PANEL];
  int count = 0;
  int64_t first = -1;
  // Setting the same positions again costs nothing.
  void set(int64_t height, int64_t width, int64_t start, int64_t size) {
    if (first == start) return;
    first = start, count = 0;
    for (int64_t at = 0; at < size;) {
      const int64_t p = first + at, column = p % width, row = p / width, n = std::min(size - at, width - column);
      run[count++] = {row / height, row % height, column, n, at};
      at += n;
    }
  }
  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// The positions of a panel, cut into runs that are contiguous in the input, and into runs contiguous in the output.
struct Positions {
  Runs in, out;
  void set(const Conv& c, int64_t start, int64_t size) {
    in.set(c.out_height, c.out_width, start, size);
    if (c.z[2] == c.out_width * c.z[3]) out.set(1, c.area(), start, size);  // the rows are contiguous
    else out.set(c.out_height, c.out_width, start, size);
  }
};

template <class F>
inline void each(const Conv& c, const Runs& runs, const F& f) {
  for (const Run& r : runs) f(r.image * c.z[0] + r.row * c.z[2] + r.column * c.z[3], r.at, r.count);
}

// Copies the numbers of one output at the positions of a panel.
inline void gather(float* to, const float* from, const Conv& c, const Runs& runs) {
  each(c, runs, [&](int64_t offset, int64_t at, int64_t n) {
    if (c.z[3] == 1) copy(to + at, from + offset, n);
    else for (int64_t i = 0; i < n; i++) to[at + i] = from[offset + i * c.z[3]];
  });
}

inline void scatter(float* to, const float* from, const Conv& c, const Runs& runs) {
  each(c, runs, [&](int64_t offset, int64_t at, int64_t n) {
    if (c.z[3] == 1) copy(to + offset, from + at, n);
    else for (int64_t i = 0; i < n; i++) to[offset + i * c.z[3]] = from[at + i];
  });
}

// Calls f(row of the panel, place in it, offset into x, count) for every stretch of input that the panel reads from the
// first channel, leaving out what lies in the padding. Other channels are read at the same places.
template <class F>
inline void stretches(const Conv& c, const Runs& runs, int64_t first_channel, const F& f) {
  for (const Run& r : runs) {
    for (int64_t i = 0; i < c.kernel[0]; i++) {
      const int64_t h = r.row * c.stride[0] - c.padding[0] + i * c.dilation[0];
      if (h < 0 || h >= c.height) continue;
      for (int64_t j = 0; j < c.kernel[1]; j++) {
        const int64_t w = r.column * c.stride[1] - c.padding[1] + j * c.dilation[1];
        // A division costs as much as copying a stretch, so it is made only where the stretch crosses the edge.
        const int64_t skip = w < 0 ? ceil_div(-w, c.stride[1]) : 0;
        const bool fits = w + (r.count - 1) * c.stride[1] < c.width;
        const int64_t stop = fits ? r.count : ceil_div(std::max<int64_t>(0, c.width - w), c.stride[1]);
        if (skip >= stop) continue;
        const int64_t column = w + skip * c.stride[1];
        f(i * c.kernel[1] + j, r.at + skip,
          r.image * c.x[0] + first_channel * c.x[1] + h * c.x[2] + column * c.x[3], stop - skip);
      }
    }
  }
}

// Calls f(channel, position) for a stretch whose positions are not adjacent in x: sixteen channels at a time, which
// share cache lines where channels are adjacent.
template <class F>
inline void crosswise(int64_t channels, int64_t count, const F& f) {
  for (int64_t d = 0; d < channels; d += 16)
    for (int64_t i = 0; i < count; i++)
      for (int64_t e = d; e < std::min(channels, d + 16); e++) f(e, i);
}

// Packs the panel of `channels` channels from `first` on, counted over all groups.
inline void pack(float* panel, int64_t width, const float* x, const Conv& c, const Runs& runs, int64_t first,
                 int64_t channels) {
  const int64_t taps = c.kernel[0] * c.kernel[1], step = c.stride[1] * c.x[3], rows = taps * width;
  std::memset(panel, 0, channels * rows * 4);
  stretches(c, runs, first, [&](int64_t row, int64_t at, int64_t offset, int64_t n) {
    float* to = panel + row * width + at;
    const float* from = x + offset;
    if (step == 1) for (int64_t d = 0; d < channels; d++) copy(to + d * rows, from + d * c.x[1], n);
    else crosswise(channels, n, [&](int64_t d, int64_t i) { to[d * rows + i] = from[d * c.x[1] + i * step]; });
  });
}

// Adds a panel to the places that it was packed from.
inline void unpack(float* x, const float* panel, int64_t width, const Conv& c, const Runs& runs, int64_t first,
                   int64_t channels) {
  const int64_t taps = c.kernel[0] * c.kernel[1], step = c.stride[1] * c.x[3], rows = taps * width;
  stretches(c, runs, first, [&](int64_t row, int64_t at, int64_t offset, int64_t n) {
    const float* from = panel + row * width + at;
    float* to = x + offset;
    if (step == 1) for (int64_t d = 0; d < channels; d++) add(to + d * c.x[1], from + d * rows, n);
    else crosswise(channels, n, [&](int64_t d, int64_t i) { to[d * c.x[1] + i * step] += from[d * rows + i]; });
  });
}

}  // namespace
