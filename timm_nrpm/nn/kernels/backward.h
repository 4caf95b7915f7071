// The backward pass: every product again, and its gradient. A layer whose channels are too few for the threads is cut
// into ranges of positions, each with its own part of the weight's gradient.

#pragma once

#include "panel.h"
#include "penalty.h"

namespace {

constexpr int64_t ROWS[2] = {64, 288};  // of a panel in the backward pass: fewest, and most, which L2 holds twice
constexpr int MAX_STEPS = 4;          // steps whose coefficients the backward pass holds in registers at once

// What the gradient of a product needs from one step, for a vector of positions: m_k, two factors and, for l1, A + B
// and A - B.
struct Coefficients {
  Vec mean, A, B, plus, minus;
};

// The gradient of a product, from its start `g` on, summed over STEPS steps. With s = omega^2 (l1) or
// -omega' sign(t) (the others), omega + (p - m_{k+1}) omega' equals s (eps + (m_{k+1} - m_k) sign(t)) for l1.
template <bool GENERAL, int STEPS>
inline Vec product_gradient(Vec g, Vec x, float a, const Coefficients* f, const Penalty penalty) {
  for (int k = 0; k < STEPS; k++) {
    const Vec t = x * a - f[k].mean;
    Vec slope;
    const Vec w = penalty.template weight<GENERAL>(t, &slope);
    if (GENERAL) g += f[k].A * w - slope * (f[k].A * magnitude(t) - add_with_sign(Vec{}, f[k].B, t));
    else g += slope * add_with_sign(f[k].A, f[k].B, t);
  }
  return g;
}

// The same for l1 where no distance t is exactly 0. `nearest` falls to the bits of the smallest |t|, which cost less
// than to treat 0 separately.
template <int STEPS>
inline Vec product_gradient_apart(Vec g, Vec x, float a, const Coefficients* f, const Penalty penalty, Bits& nearest) {
  for (int k = 0; k < STEPS; k++) {
    const Vec t = x * a - f[k].mean, w = reciprocal(magnitude(t) + penalty.eps);
    const Bits distance = (Bits)magnitude(t);
    nearest = distance < nearest ? distance : nearest;
    g += w * w * ((Int)t < 0 ? f[k].minus : f[k].plus);
  }
  return g;
}

// What the backward pass reads and adds to for a block of outputs.
template <int OUTPUTS>
struct Block {
  const float* a[OUTPUTS];   // rows of the weight
  float* grad_a[OUTPUTS];    // their gradients
  const Coefficients* f;     // [vectors][OUTPUTS][STEPS]
  const Vec* start;          // [vectors][OUTPUTS], what is the same for all products of an output
};

template <bool GENERAL, int STEPS, bool WEIGHT, int OUTPUTS>
inline void product_gradients(const Block<OUTPUTS>& b, Vec value, int64_t d, int p, const Penalty penalty,
                              float* grad_x, Vec (&totals)[OUTPUTS]) {
  const Coefficients* f = b.f + p * OUTPUTS * STEPS;
  const Vec* start = b.start + p * OUTPUTS;
  Vec g[OUTPUTS];
  Bits nearest = ~Bits{};
  for (int o = 0; o < OUTPUTS; o++)
    g[o] = GENERAL ? product_gradient<true, STEPS>(start[o], value, b.a[o][d], f + o * STEPS, penalty)
                   : product_gradient_apart<STEPS>(start[o], value, b.a[o][d], f + o * STEPS, penalty, nearest);
  if (!GENERAL && __builtin_expect(has_zero(nearest), 0))
    for (int o = 0; o < OUTPUTS; o++)
      g[o] = product_gradient<false, STEPS>(start[o], value, b.a[o][d], f + o * STEPS, penalty);
  Vec grad = load(grad_x);
  for (int o = 0; o < OUTPUTS; o++) {
    grad += g[o] * b.a[o][d];
    if (WEIGHT) totals[o] += g[o] * value;
  }
  store(grad_x, grad);
}

template <bool GENERAL, int STEPS, bool WEIGHT, int OUTPUTS>
void sweep(const Block<OUTPUTS>& b, const float* x, float* grad_x, int64_t rows, int vectors, const Penalty penalty) {
  if (WEIGHT) {
    for (int64_t d = 0; d < rows; d++) {
      Vec totals[OUTPUTS] = {};
      for (int p = 0; p < vectors; p++) {
        const int64_t at = d * PANEL + p * LANES;
        product_gradients<GENERAL, STEPS, true>(b, load(x + at), d, p, penalty, grad_x + at, totals);
      }
      if constexpr (OUTPUTS == 4) add_sums(totals, b.grad_a, d);
      else for (int o = 0; o < OUTPUTS; o++) b.grad_a[o][d] += sum(totals[o]);
    }
  } else {
    Vec totals[OUTPUTS];
    for (int p = 0; p < vectors; p++)
      for (int64_t d = 0; d < rows; d++) {
        const int64_t at = d * PANEL + p * LANES;
        product_gradients<GENERAL, STEPS, false>(b, load(x + at), d, p, penalty, grad_x + at, totals);
      }
  }
}

template <bool GENERAL, bool WEIGHT, int OUTPUTS>
void sweep_steps(int64_t steps, const Block<OUTPUTS>& b, const float* x, float* grad_x, int64_t rows, int vectors,
                 const Penalty penalty) {
  switch (steps) {
    case 1: return sweep<GENERAL, 1, WEIGHT>(b, x, grad_x, rows, vectors, penalty);
    case 2: return sweep<GENERAL, 2, WEIGHT>(b, x, grad_x, rows, vectors, penalty);
    case 3: return sweep<GENERAL, 3, WEIGHT>(b, x, grad_x, rows, vectors, penalty);
    default: return sweep<GENERAL, 4, WEIGHT>(b, x, grad_x, rows, vectors, penalty);
  }
}

// How the backward pass is cut: into chunks of input channels, whose gradients are disjoint, and into ranges of
// positions that read disjoint inputs.
struct Cut {
  int64_t channels, chunks;  // number of channels in a chunk, and of chunks
  int64_t ranges, length;    // number of ranges of positions, and of positions in a range
  explicit Cut(const Conv& c) {
    const int64_t taps = c.kernel[0] * c.kernel[1];
    bool apart = true;
    for (int i = 0; i < 2; i++) apart &= (c.kernel[i] - 1) * c.dilation[i] < c.stride[i];
    const int64_t unit = apart ? PANEL : c.area(), units = ceil_div(c.positions(), unit);
    // Large chunks share what is prepared for an output, but there should be enough pieces.
    const int64_t most = std::max(ROWS[0], std::min(ROWS[1], 2 * c.channels * taps * c.groups * units / TASKS));
    chunks = ceil_div(c.channels, std::max<int64_t>(1, most / taps));
    channels = ceil_div(c.channels, chunks);
    chunks = ceil_div(c.channels, channels);
    const int64_t wanted = std::max<int64_t>(1, std::min(units, ceil_div(TASKS, chunks * c.groups)));
    length = ceil_div(units, wanted) * unit;
    ranges = ceil_div(c.positions(), length);
  }
};

// The tensors of a backward pass, and lambda.
struct Tensors {
  const float *x, *weight, *state, *grad;
  float *grad_x, *grad_weight, lam;
};

// The positions of a panel in the tensors shaped like the output.
struct Place {
  const Conv& c;
  const Positions& positions;
  int64_t size;
  bool whole;  // whether the positions are adjacent in memory and fill the panel
  Place(const Conv& c, const Positions& positions, int64_t size)
      : c(c), positions(positions), size(size), whole(size == PANEL && c.z[3] == 1 && positions.out.count == 1) {}

  // The numbers of one output, copied to `copied`, which they do not fill, unless they lie in memory as they are
  // needed.
  const float* line(const float* from, int64_t channel, float* copied) const {
    from += channel * c.z[1];
    if (whole) {
      const Run& r = positions.out.run[0];
      return from + r.image * c.z[0] + r.row * c.z[2] + r.column * c.z[3];
    }
    gather(copied, from, c, positions.out);
    return copied;
  }
};

// What a product receives through the plain sum, mixed in or as the start of the steps, given the product of all c.
inline Vec plain_gradient(Vec grad, float lam, Vec product) { return grad * (lam + (1.0f - lam) * product); }

// The coefficients of one output for `held` steps from k on, `[vectors][stride]`, and what its products start from,
// `[vectors][outputs]`. Positions past the last one have no gradient.
template <bool GENERAL>
void coefficients(Coefficients* f, int64_t stride, Vec* start, int64_t outputs, const Tensors& t, const Place& place,
                  int64_t channel, int64_t k, int64_t held, const Penalty penalty) {
  const Conv& c = place.c;
  const int64_t whole = c.positions() * c.groups * c.outputs, vectors = ceil_div(place.size, LANES);
  const float share = (1.0f - t.lam) * c.depth();
  alignas(64) float lines[4][PANEL];
  if (!place.whole) {
    std::fill(lines[0], lines[0] + PANEL, 0.0f);
    for (int i = 1; i < 4; i++) std::fill(lines[i], lines[i] + PANEL, 1.0f);
  }
  const float* g = place.line(t.grad, channel, lines[0]);
  if (!k) {
    const float* product = place.line(t.state + (2 * c.steps + 1) * whole, channel, lines[3]);
    for (int64_t p = 0; p < vectors; p++)
      start[p * outputs] = plain_gradient(load(g + p * LANES), t.lam, load(product + p * LANES));
  }
  const float* mean = place.line(t.state + k * whole, channel, lines[1]);
  for (int64_t i = 0; i < held; i++, k++) {
    const float* next = place.line(t.state + (k + 1) * whole, channel, lines[1 + (i + 1) % 2]);
    const float* inverse = place.line(t.state + (c.steps + 1 + k) * whole, channel, lines[3]);
    for (int64_t p = 0; p < vectors; p++) {
      const int64_t at = p * LANES;
      const Vec m = load(mean + at), G = load(g + at) * share * load(inverse + at);
      const Vec A = GENERAL ? G : G * penalty.eps, B = G * (load(next + at) - m);
      f[p * stride + i] = {m, A, B, A + B, A - B};
    }
    mean = next;
  }
}

// Adds the gradients of OUTPUTS outputs from `channel` on to the gradient of a panel and, if `into` is given, to that
// of the weight, whose rows are read from the input `first` on.
template <bool GENERAL, int OUTPUTS>
void differentiate(const Tensors& t, const Place& place, int64_t channel, int64_t first, int64_t rows, float* into,
                   const float* panel, float* grad_panel, const Penalty penalty) {
  const Conv& c = place.c;
  const int64_t depth = c.depth();
  const int vectors = ceil_div(place.size, LANES);
  Coefficients f[VECTORS * OUTPUTS * MAX_STEPS];
  Vec start[VECTORS * OUTPUTS];
  Block<OUTPUTS> b;
  b.f = f, b.start = start;
  for (int o = 0; o < OUTPUTS; o++) {
    b.a[o] = t.weight + (channel + o) * depth + first;
    b.grad_a[o] = into + (channel + o) * depth + first;
  }
  for (int64_t k = 0, held; k < c.steps; k += held) {
    held = std::min<int64_t>(MAX_STEPS, c.steps - k);
    for (int o = 0; o < OUTPUTS; o++)
      coefficients<GENERAL>(f + o * held, OUTPUTS * held, start + o, OUTPUTS, t, place, channel + o, k, held, penalty);
    if (k) std::fill(start, start + VECTORS * OUTPUTS, Vec{});
    if (into) sweep_steps<GENERAL, true>(held, b, panel, grad_panel, rows, vectors, penalty);
    else sweep_steps<GENERAL, false>(held, b, panel, grad_panel, rows, vectors, penalty);
  }
}

template <bool GENERAL>
void backward(const Conv& c, const Penalty penalty, const Tensors& t, int threads) {
  const int64_t positions = c.positions(), taps = c.kernel[0] * c.kernel[1];
  const int64_t weights = c.groups * c.outputs * c.depth();
  const Cut cut(c);
  Buffer parts = buffer(t.grad_weight && cut.ranges > 1 ? (cut.ranges - 1) * weights : 0);
  if (t.grad_weight && cut.ranges > 1) std::memset(parts.get(), 0, (cut.ranges - 1) * weights * 4);
  if (positions * weights * c.steps < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    const int64_t most = cut.channels * taps;
    Buffer panel = buffer(most * PANEL), grad_panel = buffer(most * PANEL);
    Positions at_hand;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < cut.ranges * cut.chunks * c.groups; task++) {
      const int64_t group = task % c.groups, first = task / c.groups % cut.chunks * cut.channels;
      const int64_t range = task / c.groups / cut.chunks, last = std::min(c.channels, first + cut.channels);
      const int64_t rows = (last - first) * taps;
      float* into = !t.grad_weight ? nullptr : range == 0 ? t.grad_weight : parts.get() + (range - 1) * weights;
      const int64_t stop = std::min(positions, (range + 1) * cut.length);
      for (int64_t at = range * cut.length; at < stop; at += PANEL) {
        const int64_t size = std::min<int64_t>(PANEL, stop - at);
        at_hand.set(c, at, size);
        pack(panel.get(), PANEL, t.x, c, at_hand.in, group * c.channels + first, last - first);
        std::memset(grad_panel.get(), 0, rows * PANEL * 4);
        const Place place(c, at_hand, size);
        int64_t o = 0;
        for (; o + 4 <= c.outputs; o += 4)
          differentiate<GENERAL, 4>(t, place, group * c.outputs + o, first * taps, rows, into, panel.get(),
                                    grad_panel.get(), penalty);
        for (; o < c.outputs; o++)
          differentiate<GENERAL, 1>(t, place, group * c.outputs + o, first * taps, rows, into, panel.get(),
                                    grad_panel.get(), penalty);
        if (t.grad_x)
          unpack(t.grad_x, grad_panel.get(), PANEL, c, at_hand.in, group * c.channels + first, last - first);
      }
    }
    if (t.grad_weight && cut.ranges > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < weights; i++)
        for (int64_t range = 0; range + 1 < cut.ranges; range++) t.grad_weight[i] += parts.get()[range * weights + i];
    }
  }
}

}  // namespace
