// The estimator of estimator.py over a convolution, forward and backward, on the CPU in float32. kernels/operator.py
// describes what is computed, kernels/compiling.py compiles this file. A linear map is a 1x1 convolution.
//
// Every product of an output with a panel (panel.h) is computed in registers, K times, so that the time goes into
// arithmetic, and the memory is one panel per thread and what is kept of its outputs. The backward pass cuts a layer
// whose channels are too few for the threads into ranges of positions, each with its own part of the weight's gradient.
// How the work is cut depends on the shapes alone, never on the number of threads, and no sum over the pieces is taken
// in an order that could vary, so results do not vary either.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "panel.h"

namespace {

constexpr int64_t CACHE = 1 << 18;    // bytes of a panel, which fit well into a second-level cache
constexpr int64_t ROWS[2] = {64, 288};  // of a panel in the backward pass: fewest, and most, which L2 holds twice
constexpr int64_t TASKS = 64;         // smallest number of pieces of the work, where the shapes allow it
constexpr int64_t STRETCH = 64;       // summands added up before they join the total
constexpr int64_t GRAIN = 1 << 18;    // smallest number of products that a thread takes at a time
constexpr int64_t SMALL = 1 << 15;    // products that one thread computes before another has woken up
constexpr int MAX_STEPS = 4;          // steps whose coefficients the backward pass holds in registers at once

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

struct Step {
  Vec end, inverse, c;  // m_{k+1}, 1 / S_k, c_k = d m_{k+1} / d m_k
};

// One step of eq. 3 for OUTPUTS rows of the weight times POSITIONS vectors of the panel.
template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS>
inline void advance(const float* a, const float* x, int64_t depth, int64_t width, const Penalty penalty,
                    Vec (&m)[OUTPUTS][POSITIONS], Step (*kept)[POSITIONS]) {
  Vec S[OUTPUTS][POSITIONS] = {}, T[OUTPUTS][POSITIONS] = {}, A[OUTPUTS][POSITIONS] = {}, B[OUTPUTS][POSITIONS] = {};
  // Sums are taken in stretches, so that their error grows with the number and length of these, not with the depth.
  for (int64_t first = 0; first < depth; first += STRETCH) {
    Vec s[OUTPUTS][POSITIONS] = {}, t[OUTPUTS][POSITIONS] = {}, u[OUTPUTS][POSITIONS] = {}, v[OUTPUTS][POSITIONS] = {};
    for (int64_t d = first; d < std::min(depth, first + STRETCH); d++) {
      for (int p = 0; p < POSITIONS; p++) {
        const Vec value = load(x + d * width + p * LANES);
        for (int o = 0; o < OUTPUTS; o++) {
          const Vec off = value * a[o * depth + d] - m[o][p];
          Vec slope;
          const Vec w = penalty.template weight<GENERAL>(off, KEEP ? &slope : nullptr);
          s[o][p] += w;
          t[o][p] += w * off;
          if (KEEP) {
            u[o][p] += GENERAL ? magnitude(off) * slope : slope;
            v[o][p] += times_sign(slope, off);
          }
        }
      }
    }
    for (int o = 0; o < OUTPUTS; o++)
      for (int p = 0; p < POSITIONS; p++) {
        S[o][p] += s[o][p], T[o][p] += t[o][p];
        if (KEEP) A[o][p] += u[o][p], B[o][p] += v[o][p];
      }
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int p = 0; p < POSITIONS; p++) {
      const Vec inverse = 1.0f / S[o][p], move = T[o][p] * inverse;
      if (KEEP) {
        // For l1, sum |t| w^2 = sum (w - eps w^2), which saves one multiplication per product.
        const Vec drop = GENERAL ? A[o][p] : S[o][p] - penalty.eps * A[o][p];
        kept[o][p] = {m[o][p] + move, inverse, (drop - move * B[o][p]) * inverse};
      }
      m[o][p] += move;
    }
  }
}

// All steps for OUTPUTS rows of the weight from `output` on and POSITIONS vectors of the panel from `at` on.
template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS>
inline void block(const float* a, const float* panel, int64_t width, const Conv& c, const Penalty penalty,
                  float* means, int64_t at, float* state, int64_t plane) {
  Vec m[OUTPUTS][POSITIONS];
  for (int o = 0; o < OUTPUTS; o++)
    for (int p = 0; p < POSITIONS; p++) m[o][p] = load(means + o * PANEL + at + p * LANES);
  for (int64_t k = 0; k < c.steps; k++) {
    Step kept[OUTPUTS][POSITIONS];
    advance<GENERAL, KEEP, OUTPUTS, POSITIONS>(a, panel + at, c.depth(), width, penalty, m, kept);
    if (KEEP)
      for (int o = 0; o < OUTPUTS; o++)
        for (int p = 0; p < POSITIONS; p++) {
          float* to = state + o * PANEL + at + p * LANES;
          if (k + 1 < c.steps) store(to + k * plane, kept[o][p].end);
          // The factors 1 / S_j of earlier steps are multiplied by the derivatives of later steps.
          for (int64_t j = 0; j < k; j++) {
            float* earlier = to + (c.steps - 1 + j) * plane;
            store(earlier, load(earlier) * kept[o][p].c);
          }
          store(to + (c.steps - 1 + k) * plane, kept[o][p].inverse);
          float* whole = to + (2 * c.steps - 1) * plane;
          store(whole, k ? load(whole) * kept[o][p].c : kept[o][p].c);
        }
  }
  for (int o = 0; o < OUTPUTS; o++)
    for (int p = 0; p < POSITIONS; p++) store(means + o * PANEL + at + p * LANES, m[o][p]);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float, Free> Buffer;

Buffer buffer(int64_t floats) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<int64_t>(floats, 16) * 4)) std::abort();
  return Buffer(static_cast<float*>(p));
}

template <bool GENERAL, bool KEEP>
void forward(const Conv& c, const Penalty penalty, const float* x, const float* weight, const float* plain,
             float* out, float* state, int threads) {
  const int64_t depth = c.depth(), positions = c.positions();
  const int64_t vectors = std::max<int64_t>(1, std::min<int64_t>(VECTORS, CACHE / (depth * LANES * 4)));
  const int64_t width = vectors * LANES, panels = ceil_div(positions, width);
  // If panels are few, the outputs are cut into chunks of at least sixteen as well, so that packing takes little time.
  const int64_t cut = std::max<int64_t>(1, std::min(TASKS / std::max<int64_t>(1, panels * c.groups), c.outputs / 16));
  int64_t chunk = ceil_div(ceil_div(c.outputs, cut), 4) * 4;
  if (KEEP) chunk = std::min(chunk, std::max<int64_t>(4, 2 * CACHE / (2 * c.steps * PANEL * 4) / 4 * 4));
  const int64_t chunks = ceil_div(c.outputs, chunk);
  const float size_of_sum = depth;
  const int64_t grain = 1 + GRAIN / (width * chunk * depth * c.steps);
  if (positions * c.groups * c.outputs * depth * c.steps < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    Buffer panel = buffer(depth * width), means = buffer(chunk * PANEL);
    Buffer steps = buffer(KEEP ? c.steps * 2 * chunk * PANEL : 0);
    Positions at_hand;
    int64_t packed = -1;
#pragma omp for schedule(dynamic, grain)
    for (int64_t task = 0; task < panels * c.groups * chunks; task++) {
      const int64_t first_output = task % chunks * chunk, group = task / chunks / panels;
      const int64_t first = task / chunks % panels * width, size = std::min(width, positions - first);
      const int64_t outputs = std::min(chunk, c.outputs - first_output), plane = chunk * PANEL;
      const int64_t channel = group * c.outputs + first_output;  // the first output of this task
      at_hand.set(c, first, size);
      if (packed != task / chunks) pack(panel.get(), width, x, c, at_hand.in, group * c.channels, c.channels);
      packed = task / chunks;
      for (int64_t o = 0; o < outputs; o++) {
        float* row = means.get() + o * PANEL;
        gather(row, plain + (channel + o) * c.z[1], c, at_hand.out);
        for (int64_t i = 0; i < size; i++) row[i] /= size_of_sum;
        std::fill(row + size, row + width, 0.0f);
      }
      const float* a = weight + channel * depth;
      int64_t o = 0;
      for (; o + 4 <= outputs; o += 4)
        for (int64_t at = 0; at < size; at += LANES)
          block<GENERAL, KEEP, 4, 1>(a + o * depth, panel.get(), width, c, penalty, means.get() + o * PANEL, at,
                                     steps.get() + o * PANEL, plane);
      for (; o < outputs; o++) {
        int64_t at = 0;
        for (; at + PANEL <= width && size > PANEL / 2; at += PANEL)
          block<GENERAL, KEEP, 1, VECTORS>(a + o * depth, panel.get(), width, c, penalty, means.get() + o * PANEL, at,
                                           steps.get() + o * PANEL, plane);
        for (; at < size; at += LANES)
          block<GENERAL, KEEP, 1, 1>(a + o * depth, panel.get(), width, c, penalty, means.get() + o * PANEL, at,
                                     steps.get() + o * PANEL, plane);
      }
      for (o = 0; o < outputs; o++) {
        float* row = means.get() + o * PANEL;
        for (int64_t i = 0; i < size; i++) row[i] *= size_of_sum;
        scatter(out + (channel + o) * c.z[1], row, c, at_hand.out);
        if (KEEP) {
          const int64_t whole = positions * c.groups * c.outputs;
          for (int64_t k = 0; k < c.steps * 2; k++)
            scatter(state + k * whole + (channel + o) * c.z[1], steps.get() + k * plane + o * PANEL, c, at_hand.out);
        }
      }
    }
  }
}

// What the gradient of a product needs from one step, for a vector of positions: m_k, two factors and, for l1, A + B and
// A - B.
struct Coefficients {
  Vec mean, A, B, plus, minus;
};

// The gradient of a product, summed over STEPS steps. With s = omega^2 (l1) or -omega' sign(t) (the others),
// omega + (p - m_{k+1}) omega' equals s (eps + (m_{k+1} - m_k) sign(t)) for l1.
template <bool GENERAL, int STEPS>
inline Vec product_gradient(Vec x, float a, const Coefficients* f, const Penalty penalty) {
  Vec g = {};
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
inline Vec product_gradient_apart(Vec x, float a, const Coefficients* f, const Penalty penalty, Bits& nearest) {
  Vec g = {};
  for (int k = 0; k < STEPS; k++) {
    const Vec t = x * a - f[k].mean, w = reciprocal(magnitude(t) + penalty.eps);
    const Bits distance = (Bits)magnitude(t);
    nearest = distance < nearest ? distance : nearest;
    g += w * w * ((Int)t < 0 ? f[k].minus : f[k].plus);
  }
  return g;
}

inline bool has_zero(Bits v) {
#if defined(__AVX512F__)
  return _mm512_testn_epi32_mask((__m512i)v, (__m512i)v);
#else
  const Int zero = v == 0;
  int32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= zero[i];
  return any;
#endif
}

// What the backward pass reads and adds to for a block of outputs.
template <int OUTPUTS>
struct Block {
  const float* a[OUTPUTS];   // rows of the weight
  float* grad_a[OUTPUTS];    // their gradients
  const Coefficients* f;     // [vectors][OUTPUTS][STEPS]
};

template <bool GENERAL, int STEPS, bool WEIGHT, int OUTPUTS>
inline void product_gradients(const Block<OUTPUTS>& b, Vec value, int64_t d, int p, const Penalty penalty,
                              float* grad_x, Vec (&totals)[OUTPUTS]) {
  const Coefficients* f = b.f + p * OUTPUTS * STEPS;
  Vec g[OUTPUTS];
  Bits nearest = ~Bits{};
  for (int o = 0; o < OUTPUTS; o++)
    g[o] = GENERAL ? product_gradient<true, STEPS>(value, b.a[o][d], f + o * STEPS, penalty)
                   : product_gradient_apart<STEPS>(value, b.a[o][d], f + o * STEPS, penalty, nearest);
  if (!GENERAL && __builtin_expect(has_zero(nearest), 0))
    for (int o = 0; o < OUTPUTS; o++) g[o] = product_gradient<false, STEPS>(value, b.a[o][d], f + o * STEPS, penalty);
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

// The tensors of a backward pass.
struct Tensors {
  const float *x, *weight, *plain, *end, *state, *grad;
  float *grad_x, *grad_weight;
};

// The positions of a panel in the tensors shaped like the output.
struct Place {
  const Conv& c;
  const Positions& positions;
  int64_t size;
  bool whole;  // whether the positions are adjacent in memory and fill the panel
  Place(const Conv& c, const Positions& positions, int64_t size)
      : c(c), positions(positions), size(size), whole(size == PANEL && c.z[3] == 1 && positions.out.count == 1) {}

  // The numbers of one output, copied to `copied`, which they do not fill, unless they lie in memory as they are needed.
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

// The coefficients of one output for `held` steps from k on, `[vectors][stride]`. Positions past the last one have no
// gradient.
template <bool GENERAL>
void coefficients(Coefficients* f, int64_t stride, const Tensors& t, const Place& place, int64_t channel, int64_t k,
                  int64_t held, const Penalty penalty) {
  const Conv& c = place.c;
  const int64_t whole = c.positions() * c.groups * c.outputs, vectors = ceil_div(place.size, LANES);
  const float size_of_sum = c.depth();
  alignas(64) float lines[4][PANEL];
  if (!place.whole) {
    std::fill(lines[0], lines[0] + PANEL, 0.0f);
    for (int i = 1; i < 4; i++) std::fill(lines[i], lines[i] + PANEL, 1.0f);
  }
  const float* g = place.line(t.grad, channel, lines[0]);
  const float* mean = place.line(k ? t.state + (k - 1) * whole : t.plain, channel, lines[1]);
  for (int64_t i = 0; i < held; i++, k++) {
    const bool last = k + 1 == c.steps;
    const float* next = place.line(last ? t.end : t.state + k * whole, channel, lines[1 + (i + 1) % 2]);
    const float* inverse = place.line(t.state + (c.steps - 1 + k) * whole, channel, lines[3]);
    for (int64_t p = 0; p < vectors; p++) {
      const int64_t at = p * LANES;
      const Vec m = k ? load(mean + at) : load(mean + at) / size_of_sum;
      const Vec end = last ? load(next + at) / size_of_sum : load(next + at);
      const Vec G = load(g + at) * size_of_sum * load(inverse + at);
      const Vec A = GENERAL ? G : G * penalty.eps, B = G * (end - m);
      f[p * stride + i] = {m, A, B, A + B, A - B};
    }
    mean = next;
  }
}

// Adds the gradients of OUTPUTS outputs from `channel` on to the gradient of a panel and, if `into` is given, to that of
// the weight, whose rows are read from the input `first` on.
template <bool GENERAL, int OUTPUTS>
void differentiate(const Tensors& t, const Place& place, int64_t channel, int64_t first, int64_t rows, float* into,
                   const float* panel, float* grad_panel, const Penalty penalty) {
  const Conv& c = place.c;
  const int64_t depth = c.depth();
  const int vectors = ceil_div(place.size, LANES);
  Coefficients f[VECTORS * OUTPUTS * MAX_STEPS];
  Block<OUTPUTS> b;
  b.f = f;
  for (int o = 0; o < OUTPUTS; o++) {
    b.a[o] = t.weight + (channel + o) * depth + first;
    b.grad_a[o] = into + (channel + o) * depth + first;
  }
  for (int64_t k = 0, held; k < c.steps; k += held) {
    held = std::min<int64_t>(MAX_STEPS, c.steps - k);
    for (int o = 0; o < OUTPUTS; o++)
      coefficients<GENERAL>(f + o * held, OUTPUTS * held, t, place, channel + o, k, held, penalty);
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

extern "C" {

void nrpm_forward(const Conv* c, const Penalty* penalty, int general, const float* x, const float* weight,
                  const float* plain, float* out, float* state, int threads) {
  if (general && state) forward<true, true>(*c, *penalty, x, weight, plain, out, state, threads);
  else if (general) forward<true, false>(*c, *penalty, x, weight, plain, out, state, threads);
  else if (state) forward<false, true>(*c, *penalty, x, weight, plain, out, state, threads);
  else forward<false, false>(*c, *penalty, x, weight, plain, out, state, threads);
}

void nrpm_backward(const Conv* c, const Penalty* penalty, int general, const float* x, const float* weight,
                   const float* plain, const float* end, const float* state, const float* grad, float* grad_x,
                   float* grad_weight, int threads) {
  const Tensors tensors = {x, weight, plain, end, state, grad, grad_x, grad_weight};
  if (general) backward<true>(*c, *penalty, tensors, threads);
  else backward<false>(*c, *penalty, tensors, threads);
}

// The machine's limit, to which the benchmark compares the kernels: in every thread, |x|, an addition, a reciprocal and
// two multiply-adds, `rounds` times, for `count` numbers that stay in the first-level cache.
float nrpm_limit(const float* numbers, int64_t count, int64_t rounds, int threads) {
  float result = 0;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    Vec S[VECTORS] = {}, T[VECTORS] = {};
    for (int64_t round = 0; round < rounds; round++) {
      const float a = 1.0f + 1e-6f * round;
      for (int64_t i = 0; i + PANEL <= count; i += PANEL)
        for (int v = 0; v < VECTORS; v++) {
          const Vec t = load(numbers + i + v * LANES) * a - 0.5f;
          const Vec w = reciprocal(magnitude(t) + 1e-3f);
          S[v] += w;
          T[v] += w * t;
        }
    }
    for (int v = 0; v < VECTORS; v++) result += sum(S[v]) + sum(T[v]);
  }
  return result;
}

}  // extern "C"
