// Rows of the input, padded, of which every product of a vector of adjacent positions is one unaligned load.
//
// Where outputs are few, packing a panel would take as long as computing with it: each number is copied here once, and
// not once per tap.

#pragma once

#include "panel.h"
#include "penalty.h"

namespace {

// The input of a band of output rows, [channels][rows][stride][pitch]: columns that one tap reads at adjacent positions
// are adjacent.
struct Band {
  int64_t height, in_rows;     // number of rows of the output, and of the input that they read
  int64_t pitch, line, plane;  // distances between phases of the stride, rows and channels
  Band(const Conv& c, int64_t height)
      : height(height),
        in_rows((height - 1) * c.stride[0] + (c.kernel[0] - 1) * c.dilation[0] + 1),
        pitch((c.kernel[1] - 1) * c.dilation[1] / c.stride[1] + ceil_div(c.out_width, LANES) * LANES),
        line(c.stride[1] * pitch),
        plane(in_rows * line) {}

  // Where the products of a position lie, relative to its first one.
  void offsets(int64_t* rows, const Conv& c) const {
    for (int64_t d = 0; d < c.channels; d++)
      for (int64_t i = 0; i < c.kernel[0]; i++)
        for (int64_t j = 0; j < c.kernel[1]; j++) {
          const int64_t column = j * c.dilation[1];
          *rows++ = d * plane + i * c.dilation[0] * line + column % c.stride[1] * pitch + column / c.stride[1];
        }
  }

  // Copies the input of the output rows from `first` on, from channel `channel` on, counted over all groups. What lies
  // in the padding at the sides is never written: it is 0 from the start.
  void pack(float* to, const float* x, const Conv& c, int64_t image, int64_t first, int64_t channel) const {
    const int64_t step = c.stride[1];
    for (int64_t phase = 0; phase < step; phase++) {
      const int64_t begin = ceil_div(std::max<int64_t>(0, c.padding[1] - phase), step);
      const int64_t end = std::min(pitch, ceil_div(std::max<int64_t>(0, c.width + c.padding[1] - phase), step));
      if (begin >= end) continue;
      const float* source = x + image * c.x[0] + channel * c.x[1] + (begin * step + phase - c.padding[1]) * c.x[3];
      for (int64_t d = 0; d < c.channels; d++)
        for (int64_t r = 0; r < in_rows; r++) {
          const int64_t h = first * c.stride[0] - c.padding[0] + r;
          float* row = to + d * plane + r * line + phase * pitch + begin;
          const float* from = source + d * c.x[1] + h * c.x[2];
          if (h < 0 || h >= c.height) std::memset(row, 0, (end - begin) * 4);
          else if (step * c.x[3] == 1) copy(row, from, end - begin);
          else for (int64_t i = 0; i < end - begin; i++) row[i] = from[i * step * c.x[3]];
        }
    }
  }
};

// Number of rows of the output in a band whose input fits the cache, cut further where pieces would be few; 0 if none
// fits.
inline int64_t band_height(const Conv& c) {
  const Band one(c, 1), two(c, 2);
  const int64_t room = CACHE / 4 - c.channels * one.plane, more = c.channels * (two.plane - one.plane);
  if (room < 0) return 0;
  const int64_t bands = std::max<int64_t>(1, std::min(c.out_height, TASKS / (c.batch * c.groups)));
  return std::min({c.out_height, 1 + room / more, ceil_div(c.out_height, bands)});
}

// Whether vectors that are cut at the end of each row lose less than packing a panel costs.
inline bool rows_pay(const Conv& c) {
  if (c.z[3] != 1 || c.kernel[0] * c.kernel[1] == 1 || !band_height(c)) return false;
  const double lost = (double)ceil_div(c.out_width, LANES) * LANES / c.out_width - 1;
  return lost < 0.02 + 3.0 / (c.outputs * c.steps);
}

}  // namespace
