// The gradient of the input alone, which attacks follow, where stride is 1 and outputs are few.
//
// Every vector of input positions gathers its gradient in registers, over the outputs and taps that read it. The
// coefficients of the outputs lie in padded rows, so that those of a tap are unaligned loads; nothing is packed or
// added up in memory.

#pragma once

#include "backward.h"
#include "rows.h"

namespace {

// Coefficients of a band of input rows, [outputs][1 + 3 * steps][rows][pitch]: what the gradients of the products start
// from, and for each step mean, A and B. Outside the output all are 0 but the mean, which is far from every product.
struct CoefficientBand {
  static constexpr float FAR = 1e15f;
  int64_t height, in_rows, pitch, plane, output;  // rows of the input and of the output, and distances
  CoefficientBand(const Conv& c, int64_t height)
      : height(height),
        in_rows(height + (c.kernel[0] - 1) * c.dilation[0]),
        pitch(ceil_div(c.width, LANES) * LANES + (c.kernel[1] - 1) * c.dilation[1]),
        plane(in_rows * pitch),
        output((1 + 3 * c.steps) * plane) {}

  void clear(float* to, int64_t steps, int64_t count) const {  // as outside the output, `count` numbers of each plane
    for (int64_t i = 0; i < 1 + 3 * steps; i++, to += plane) std::fill(to, to + count, i % 3 == 1 ? FAR : 0.0f);
  }

  // Computes the inside; what lies outside at the sides is cleared from the start.
  void fill(float* to, const Conv& c, const Tensors& t, int64_t image, int64_t first, int64_t group,
            const Penalty penalty) const {
    const int64_t left = (c.kernel[1] - 1) * c.dilation[1] - c.padding[1];
    const int64_t top = first + c.padding[0] - (c.kernel[0] - 1) * c.dilation[0];
    const int64_t begin = std::max<int64_t>(0, -left), end = std::min(c.out_width, pitch - left);
    for (int64_t o = 0; o < c.outputs; o++)
      for (int64_t r = 0; r < in_rows; r++) {
        float* row = to + o * output + r * pitch;
        const int64_t z = image * c.z[0] + (group * c.outputs + o) * c.z[1] + (top + r) * c.z[2];
        if (top + r < 0 || top + r >= c.out_height)
          clear(row, c.steps, pitch);
        else
          for (int64_t at = begin; at < end; at += LANES)
            fill_vector(row + left + at, c, t, z + at, std::min<int64_t>(LANES, end - at), penalty);
      }
  }

  void fill_vector(float* to, const Conv& c, const Tensors& t, int64_t z, int64_t n, const Penalty penalty) const {
    const int64_t whole = c.positions() * c.groups * c.outputs;
    const Vec grad = load(t.grad + z, n), g = grad * ((1.0f - t.lam) * c.depth());
    store(to, plain_gradient(grad, t.lam, load(t.state + (2 * c.steps + 1) * whole + z, n)));
    Vec mean = load(t.state + z, n);
    to += plane;
    for (int64_t k = 0; k < c.steps; k++, to += 3 * plane) {
      const Vec end = load(t.state + (k + 1) * whole + z, n);
      const Vec G = g * load(t.state + (c.steps + 1 + k) * whole + z, n);
      store(to, mean, n), store(to + plane, G * penalty.eps, n), store(to + 2 * plane, G * (end - mean), n);
      mean = end;
    }
  }
};

// A vector of input positions: its input, its gradient, and the coefficients of the last tap.
struct Source {
  const float *x, *f;
  float* grad;
  int64_t count;
};

// The gradients of CHANNELS channels at POSITIONS sources.
template <int STEPS, int CHANNELS, int POSITIONS>
inline void gather_gradients(const float* a, const Source* sources, int64_t channel, const int64_t* taps,
                             const CoefficientBand& band, const Conv& c, const Penalty penalty) {
  const int64_t count = c.kernel[0] * c.kernel[1];
  Vec x[CHANNELS][POSITIONS], grad[CHANNELS][POSITIONS] = {};
  for (int i = 0; i < CHANNELS; i++)
    for (int p = 0; p < POSITIONS; p++) x[i][p] = load(sources[p].x + (channel + i) * c.x[1], sources[p].count);
  for (int64_t o = 0; o < c.outputs; o++)
    for (int64_t tap = 0; tap < count; tap++) {
      const float* weights = a + (o * c.channels + channel) * count + tap;
      for (int p = 0; p < POSITIONS; p++) {
        const float* from = sources[p].f + o * band.output + taps[tap];
        const Vec start = load(from);
        from += band.plane;
        Coefficients f[STEPS];
        for (int k = 0; k < STEPS; k++, from += 3 * band.plane) {
          const Vec A = load(from + band.plane), B = load(from + 2 * band.plane);
          f[k] = {load(from), A, B, A + B, A - B};
        }
        Vec g[CHANNELS];
        Bits nearest = ~Bits{};
        for (int i = 0; i < CHANNELS; i++)
          g[i] = product_gradient_apart<STEPS>(start, x[i][p], weights[i * count], f, penalty, nearest);
        if (__builtin_expect(has_zero(nearest), 0))
          for (int i = 0; i < CHANNELS; i++)
            g[i] = product_gradient<false, STEPS>(start, x[i][p], weights[i * count], f, penalty);
        for (int i = 0; i < CHANNELS; i++) grad[i][p] += g[i] * weights[i * count];
      }
    }
  for (int i = 0; i < CHANNELS; i++)
    for (int p = 0; p < POSITIONS; p++) store(sources[p].grad + (channel + i) * c.x[1], grad[i][p], sources[p].count);
}

template <int STEPS>
void gather_all(const float* a, const Source* sources, int64_t count, const int64_t* taps, const CoefficientBand& band,
                const Conv& c, const Penalty penalty) {
  int64_t d = 0;
  for (; d + 4 <= c.channels; d += 4)
    for (int64_t i = 0; i < count; i++) gather_gradients<STEPS, 4, 1>(a, sources + i, d, taps, band, c, penalty);
  for (; d < c.channels; d++) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) gather_gradients<STEPS, 1, 4>(a, sources + i, d, taps, band, c, penalty);
    for (; i < count; i++) gather_gradients<STEPS, 1, 1>(a, sources + i, d, taps, band, c, penalty);
  }
}

// Number of input rows in a band whose coefficients fit the cache, cut further where pieces would be few; 0 if none
// fits.
inline int64_t coefficient_height(const Conv& c) {
  const CoefficientBand one(c, 1);
  const int64_t room = CACHE / 4 - c.outputs * one.output, more = c.outputs * (1 + 3 * c.steps) * one.pitch;
  if (room < 0) return 0;
  const int64_t bands = std::max<int64_t>(1, std::min(c.height, TASKS / (c.batch * c.groups)));
  return std::min({c.height, 1 + room / more, ceil_div(c.height, bands)});
}

inline bool gathering_pays(const Conv& c) {
  if (c.stride[0] * c.stride[1] != 1 || c.x[3] != 1 || c.z[3] != 1 || c.steps > MAX_STEPS) return false;
  if (c.kernel[0] * c.kernel[1] == 1 || coefficient_height(c) < std::min<int64_t>(c.height, 4)) return false;
  const double lost = (double)ceil_div(c.width, LANES) * LANES / c.width - 1;
  return lost < 0.05 + 5.0 / (c.outputs * c.steps);
}

inline void backward_rows(const Conv& c, const Penalty penalty, const Tensors& t, int threads) {
  const CoefficientBand band(c, coefficient_height(c));
  const int64_t bands = ceil_div(c.height, band.height), taps = c.kernel[0] * c.kernel[1];
  const int64_t vectors = ceil_div(c.width, LANES), size = c.outputs * band.output;
  if (c.positions() * c.groups * c.outputs * c.depth() * c.steps < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    Buffer coefficients = buffer(size);
    std::unique_ptr<int64_t[]> offsets(new int64_t[taps]);
    std::unique_ptr<Source[]> sources(new Source[band.height * vectors]);
    for (int64_t o = 0; o < c.outputs; o++) band.clear(coefficients.get() + o * band.output, c.steps, band.plane);
    for (int64_t i = 0; i < taps; i++)
      offsets[i] = (c.kernel[0] - 1 - i / c.kernel[1]) * c.dilation[0] * band.pitch +
                   (c.kernel[1] - 1 - i % c.kernel[1]) * c.dilation[1];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < c.batch * c.groups * bands; task++) {
      const int64_t first = task % bands * band.height, group = task / bands % c.groups;
      const int64_t image = task / bands / c.groups;
      band.fill(coefficients.get(), c, t, image, first, group, penalty);
      int64_t count = 0;
      for (int64_t row = 0; row < std::min(band.height, c.height - first); row++)
        for (int64_t at = 0; at < c.width; at += LANES) {
          const int64_t x = image * c.x[0] + group * c.channels * c.x[1] + (first + row) * c.x[2] + at;
          sources[count++] = {t.x + x, coefficients.get() + row * band.pitch + at, t.grad_x + x,
                              std::min<int64_t>(LANES, c.width - at)};
        }
      const float* a = t.weight + group * c.outputs * c.depth();
      switch (c.steps) {
        case 1: gather_all<1>(a, sources.get(), count, offsets.get(), band, c, penalty); break;
        case 2: gather_all<2>(a, sources.get(), count, offsets.get(), band, c, penalty); break;
        case 3: gather_all<3>(a, sources.get(), count, offsets.get(), band, c, penalty); break;
        default: gather_all<4>(a, sources.get(), count, offsets.get(), band, c, penalty);
      }
    }
  }
}

}  // namespace
