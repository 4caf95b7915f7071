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
constexpr int64_t ROWS = 64;          // rows of a panel in the backward pass, to cache it with its gradient in L1
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
            v[o][p] = add_with_sign(v[o][p], slope, off);
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

// What the gradient of a product needs from every step: m_k and two factors, for the positions of a panel.
struct Coefficients {
  Vec mean[MAX_STEPS][VECTORS], A[MAX_STEPS][VECTORS], B[MAX_STEPS][VECTORS];
};

// The gradient of a product, summed over STEPS steps. With s = omega^2 (l1) or -omega' sign(t) (the others),
// omega + (p - m_{k+1}) omega' equals s (eps + (m_{k+1} - m_k) sign(t)) for l1.
template <bool GENERAL, int STEPS>
inline Vec product_gradient(Vec product_x, float a, const Coefficients& f, int p, const Penalty penalty) {
  Vec g = {};
  for (int k = 0; k < STEPS; k++) {
    const Vec t = product_x * a - f.mean[k][p];
    Vec slope;
    const Vec w = penalty.template weight<GENERAL>(t, &slope);
    if (GENERAL) g += f.A[k][p] * w - slope * (f.A[k][p] * magnitude(t) - add_with_sign(Vec{}, f.B[k][p], t));
    else g += slope * add_with_sign(f.A[k][p], f.B[k][p], t);
  }
  return g;
}

template <bool GENERAL, int STEPS, bool WEIGHT>
void sweep(const float* a, const float* x, float* grad_x, float* grad_weight, int64_t rows, int vectors,
           const Coefficients& f, const Penalty penalty) {
  for (int64_t d = 0; d < rows; d++) {
    Vec total = {};
    for (int p = 0; p < vectors; p++) {
      const Vec value = load(x + d * PANEL + p * LANES);
      const Vec g = product_gradient<GENERAL, STEPS>(value, a[d], f, p, penalty);
      store(grad_x + d * PANEL + p * LANES, load(grad_x + d * PANEL + p * LANES) + g * a[d]);
      if (WEIGHT) total += g * value;
    }
    if (WEIGHT) grad_weight[d] += sum(total);
  }
}

template <bool GENERAL, bool WEIGHT>
void sweep_steps(int64_t steps, const float* a, const float* x, float* grad_x, float* grad_weight, int64_t rows,
                 int vectors, const Coefficients& f, const Penalty penalty) {
  switch (steps) {
    case 1: return sweep<GENERAL, 1, WEIGHT>(a, x, grad_x, grad_weight, rows, vectors, f, penalty);
    case 2: return sweep<GENERAL, 2, WEIGHT>(a, x, grad_x, grad_weight, rows, vectors, f, penalty);
    case 3: return sweep<GENERAL, 3, WEIGHT>(a, x, grad_x, grad_weight, rows, vectors, f, penalty);
    default: return sweep<GENERAL, 4, WEIGHT>(a, x, grad_x, grad_weight, rows, vectors, f, penalty);
  }
}

// How the backward pass is cut: into chunks of input channels, whose gradients are disjoint, and into ranges of
// positions that read disjoint inputs.
struct Cut {
  int64_t channels, chunks;  // number of channels in a chunk, and of chunks
  int64_t ranges, length;    // number of ranges of positions, and of positions in a range
  explicit Cut(const Conv& c) {
    const int64_t taps = c.kernel[0] * c.kernel[1];
    channels = std::max<int64_t>(1, std::min(c.channels, ROWS / taps));
    chunks = ceil_div(c.channels, channels);
    bool apart = true;
    for (int i = 0; i < 2; i++) apart &= (c.kernel[i] - 1) * c.dilation[i] < c.stride[i];
    const int64_t unit = apart ? PANEL : c.area(), units = ceil_div(c.positions(), unit);
    const int64_t wanted = std::max<int64_t>(1, std::min(units, ceil_div(TASKS, chunks * c.groups)));
    length = ceil_div(units, wanted) * unit;
    ranges = ceil_div(c.positions(), length);
  }
};

template <bool GENERAL>
void backward(const Conv& c, const Penalty penalty, const float* x, const float* weight, const float* plain,
              const float* end, const float* state, const float* grad, float* grad_x, float* grad_weight, int threads) {
  const int64_t depth = c.depth(), positions = c.positions(), taps = c.kernel[0] * c.kernel[1];
  const int64_t whole = positions * c.groups * c.outputs, weights = c.groups * c.outputs * depth;
  const Cut cut(c);
  Buffer parts = buffer(grad_weight && cut.ranges > 1 ? (cut.ranges - 1) * weights : 0);
  if (grad_weight && cut.ranges > 1) std::memset(parts.get(), 0, (cut.ranges - 1) * weights * 4);
  const float size_of_sum = depth;
  if (whole * depth * c.steps < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    const int64_t most = cut.channels * taps;
    Buffer panel = buffer(most * PANEL), grad_panel = buffer(most * PANEL), lines = buffer(5 * PANEL);
    Coefficients f;
    Positions at_hand;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < cut.ranges * cut.chunks * c.groups; task++) {
      const int64_t group = task % c.groups, first = task / c.groups % cut.chunks * cut.channels;
      const int64_t range = task / c.groups / cut.chunks, last = std::min(c.channels, first + cut.channels);
      const int64_t rows = (last - first) * taps;
      float* into = !grad_weight ? nullptr : range == 0 ? grad_weight : parts.get() + (range - 1) * weights;
      const int64_t stop = std::min(positions, (range + 1) * cut.length);
      for (int64_t at = range * cut.length; at < stop; at += PANEL) {
        const int64_t size = std::min<int64_t>(PANEL, stop - at);
        const int vectors = ceil_div(size, LANES);
        at_hand.set(c, at, size);
        pack(panel.get(), PANEL, x, c, at_hand.in, group * c.channels + first, last - first);
        std::memset(grad_panel.get(), 0, rows * PANEL * 4);
        for (int64_t o = 0; o < c.outputs; o++) {
          const int64_t channel = group * c.outputs + o;
          const auto line = [&](const float* from, int64_t i) {  // padded with 1, a mean unlike the products
            float* to = lines.get() + i * PANEL;
            std::fill(to + size, to + PANEL, 1.0f);
            gather(to, from + channel * c.z[1], c, at_hand.out);
            return to;
          };
          const float* a = weight + channel * depth + first * taps;
          float* grad_a = into ? into + channel * depth + first * taps : nullptr;
          float *g = line(grad, 0), *mean = line(plain, 1);
          for (int64_t i = 0; i < size; i++) g[i] *= size_of_sum, mean[i] /= size_of_sum;
          std::fill(g + size, g + PANEL, 0.0f);
          for (int64_t k = 0, held; k < c.steps; k += held) {
            held = std::min<int64_t>(MAX_STEPS, c.steps - k);
            for (int64_t i = 0; i < held; i++) {
              const bool last_step = k + i + 1 == c.steps;
              float* next = line(last_step ? end : state + (k + i) * whole, 2 + (k + i) % 2);
              if (last_step) for (int64_t j = 0; j < size; j++) next[j] /= size_of_sum;
              const float* inverse = line(state + (c.steps - 1 + k + i) * whole, 4);
              for (int p = 0; p < vectors; p++) {
                const Vec m = load(mean + p * LANES), G = load(g + p * LANES) * load(inverse + p * LANES);
                f.mean[i][p] = m;
                f.A[i][p] = GENERAL ? G : G * penalty.eps;
                f.B[i][p] = G * (load(next + p * LANES) - m);
              }
              mean = next;
            }
            if (grad_a) sweep_steps<GENERAL, true>(held, a, panel.get(), grad_panel.get(), grad_a, rows, vectors, f, penalty);
            else sweep_steps<GENERAL, false>(held, a, panel.get(), grad_panel.get(), grad_a, rows, vectors, f, penalty);
          }
        }
        if (grad_x) unpack(grad_x, grad_panel.get(), PANEL, c, at_hand.in, group * c.channels + first, last - first);
      }
    }
    if (grad_weight && cut.ranges > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < weights; i++)
        for (int64_t range = 0; range + 1 < cut.ranges; range++) grad_weight[i] += parts.get()[range * weights + i];
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
  if (general) backward<true>(*c, *penalty, x, weight, plain, end, state, grad, grad_x, grad_weight, threads);
  else backward<false>(*c, *penalty, x, weight, plain, end, state, grad, grad_x, grad_weight, threads);
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
