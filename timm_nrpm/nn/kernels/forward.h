// The forward pass, for blocks of outputs and positions, in registers: the plain sums, the steps of eq. 3, the mixing.

#pragma once

#include "panel.h"
#include "penalty.h"
#include "rows.h"

namespace {

constexpr int64_t STRETCH = 144;    // summands added up before they join the total
constexpr int64_t GRAIN = 1 << 18;  // smallest number of products that a thread takes at a time

// The plain means of OUTPUTS rows of the weight at POSITIONS vectors of positions.
template <int OUTPUTS, int POSITIONS>
inline void plain_means(const float* a, const float* const (&x)[POSITIONS], const int64_t* rows, int64_t depth,
                        Vec (&means)[OUTPUTS][POSITIONS]) {
  Vec total[OUTPUTS][POSITIONS] = {};
  for (int64_t first = 0; first < depth; first += STRETCH) {
    Vec sums[OUTPUTS][POSITIONS] = {};
    for (int64_t d = first; d < std::min(depth, first + STRETCH); d++)
      for (int p = 0; p < POSITIONS; p++) {
        const Vec value = load(x[p] + rows[d]);
        for (int o = 0; o < OUTPUTS; o++) sums[o][p] += value * a[o * depth + d];
      }
    for (int o = 0; o < OUTPUTS; o++)
      for (int p = 0; p < POSITIONS; p++) total[o][p] += sums[o][p];
  }
  const float share = 1.0f / depth;
  for (int o = 0; o < OUTPUTS; o++)
    for (int p = 0; p < POSITIONS; p++) means[o][p] = total[o][p] * share;
}

struct Step {
  Vec end, inverse, c;  // m_{k+1}, 1 / S_k, c_k = d m_{k+1} / d m_k
};

// The sums of a step: omega(t), omega(t) t, and what c_k needs, |t| s and s sign(t) with s = -omega'(t) sign(t); for l1
// the third is s alone.
template <int OUTPUTS, int POSITIONS>
struct Sums {
  Vec S[OUTPUTS][POSITIONS] = {}, T[OUTPUTS][POSITIONS] = {}, A[OUTPUTS][POSITIONS] = {}, B[OUTPUTS][POSITIONS] = {};
};

template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS>
inline void add_products(const float* a, const float* const (&x)[POSITIONS], const int64_t* rows, int64_t depth,
                         int64_t first, const Penalty penalty, const Vec (&m)[OUTPUTS][POSITIONS],
                         Sums<OUTPUTS, POSITIONS>& sums) {
  for (int64_t d = first; d < std::min(depth, first + STRETCH); d++) {
    for (int p = 0; p < POSITIONS; p++) {
      const Vec value = load(x[p] + rows[d]);
      for (int o = 0; o < OUTPUTS; o++) {
        const Vec off = value * a[o * depth + d] - m[o][p];
        Vec slope;
        const Vec w = penalty.template weight<GENERAL>(off, KEEP ? &slope : nullptr);
        sums.S[o][p] += w;
        sums.T[o][p] += w * off;
        if (KEEP) {
          sums.A[o][p] += GENERAL ? magnitude(off) * slope : slope;
          sums.B[o][p] += times_sign(slope, off);
        }
      }
    }
  }
}

// One step of eq. 3 for OUTPUTS rows of the weight times POSITIONS vectors of positions.
template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS>
inline void advance(const float* a, const float* const (&x)[POSITIONS], const int64_t* rows, int64_t depth,
                    const Penalty penalty, Vec (&m)[OUTPUTS][POSITIONS], Step (*kept)[POSITIONS]) {
  Sums<OUTPUTS, POSITIONS> total;
  add_products<GENERAL, KEEP>(a, x, rows, depth, 0, penalty, m, total);
  // Sums are taken in stretches, so that their error grows with the number and length of these, not with the depth.
  for (int64_t first = STRETCH; first < depth; first += STRETCH) {
    Sums<OUTPUTS, POSITIONS> more;
    add_products<GENERAL, KEEP>(a, x, rows, depth, first, penalty, m, more);
    for (int o = 0; o < OUTPUTS; o++)
      for (int p = 0; p < POSITIONS; p++) {
        total.S[o][p] += more.S[o][p], total.T[o][p] += more.T[o][p];
        if (KEEP) total.A[o][p] += more.A[o][p], total.B[o][p] += more.B[o][p];
      }
  }
  for (int o = 0; o < OUTPUTS; o++) {
    for (int p = 0; p < POSITIONS; p++) {
      const Vec S = total.S[o][p], inverse = 1.0f / S, move = total.T[o][p] * inverse;
      if (KEEP) {
        // For l1, sum |t| w^2 = sum (w - eps w^2), which saves one multiplication per product.
        const Vec drop = GENERAL ? total.A[o][p] : S - penalty.eps * total.A[o][p];
        kept[o][p] = {m[o][p] + move, inverse, (drop - move * total.B[o][p]) * inverse};
      }
      m[o][p] += move;
    }
  }
}

// A vector of positions: its input, and where the first output's numbers lie.
struct Site {
  const float* x;
  float *out, *state;
  int64_t count;
};

// Distances from an output to the next, from one number of the state to the next, and from `Site.x` to each product.
struct Layout {
  int64_t output, plane;
  const int64_t* rows;
};

// What is the same for all blocks of a layer.
struct Layer {
  const Conv& c;
  const Penalty penalty;
  const float lam;
};

// All steps for OUTPUTS rows of the weight at POSITIONS sites from their plain means on, and the mixing.
template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS>
inline void block(const float* a, const Site* sites, const Layout& layout, const Layer& layer,
                  const Vec (&means)[OUTPUTS][POSITIONS]) {
  const Conv& c = layer.c;
  const float size_of_sum = c.depth(), lam = layer.lam;
  const float* x[POSITIONS];
  Vec m[OUTPUTS][POSITIONS];
  for (int p = 0; p < POSITIONS; p++) {
    x[p] = sites[p].x;
    for (int o = 0; o < OUTPUTS; o++) {
      m[o][p] = means[o][p];
      if (KEEP) store(sites[p].state + o * layout.output, means[o][p], sites[p].count);
    }
  }
  for (int64_t k = 0; k < c.steps; k++) {
    Step kept[OUTPUTS][POSITIONS];
    advance<GENERAL, KEEP>(a, x, layout.rows, c.depth(), layer.penalty, m, kept);
    if (!KEEP) continue;
    for (int p = 0; p < POSITIONS; p++) {
      const int64_t n = sites[p].count;
      for (int o = 0; o < OUTPUTS; o++) {
        float* to = sites[p].state + o * layout.output;
        float* factors = to + (c.steps + 1) * layout.plane;
        float* product = to + (2 * c.steps + 1) * layout.plane;
        const Step& step = kept[o][p];
        store(to + (k + 1) * layout.plane, step.end, n);
        // The factors 1 / S_j of earlier steps are multiplied by the derivatives of later steps.
        for (int64_t j = 0; j < k; j++) {
          float* earlier = factors + j * layout.plane;
          store(earlier, load(earlier, n) * step.c, n);
        }
        store(factors + k * layout.plane, step.inverse, n);
        store(product, k ? load(product, n) * step.c : step.c, n);
      }
    }
  }
  for (int p = 0; p < POSITIONS; p++)
    for (int o = 0; o < OUTPUTS; o++) {
      const Vec mixed = m[o][p] + lam * (means[o][p] - m[o][p]);
      store(sites[p].out + o * layout.output, mixed * size_of_sum, sites[p].count);
    }
}

// The same with the plain means, of which TOGETHER sites at a time have enough independent sums to hide the latency of
// an addition, where a block has few positions since a step needs more registers.
template <bool GENERAL, bool KEEP, int OUTPUTS, int POSITIONS, int TOGETHER>
inline void blocks(const float* a, const Site* sites, const Layout& layout, const Layer& layer) {
  const float* x[TOGETHER];
  for (int p = 0; p < TOGETHER; p++) x[p] = sites[p].x;
  Vec all[OUTPUTS][TOGETHER];
  plain_means(a, x, layout.rows, layer.c.depth(), all);
  for (int i = 0; i < TOGETHER; i += POSITIONS) {
    Vec means[OUTPUTS][POSITIONS];
    for (int o = 0; o < OUTPUTS; o++)
      for (int p = 0; p < POSITIONS; p++) means[o][p] = all[o][i + p];
    block<GENERAL, KEEP>(a, sites + i, layout, layer, means);
  }
}

template <bool GENERAL, bool KEEP, int OUTPUTS>
void estimate(const float* a, const Site* sites, int64_t count, const Layout& layout, const Layer& layer) {
  int64_t i = 0;
  if constexpr (OUTPUTS == 1) {
    // Six sums of each kind and their means stay in registers, of which AVX-512 has 32: eight do not, and are slower.
    if constexpr (!KEEP)
      for (; i + 6 <= count; i += 6) blocks<GENERAL, KEEP, 1, 6, 6>(a, sites + i, layout, layer);
    for (; i + 4 <= count; i += 4) blocks<GENERAL, KEEP, 1, 4, 4>(a, sites + i, layout, layer);
    for (; i + 2 <= count; i += 2) blocks<GENERAL, KEEP, 1, 2, 2>(a, sites + i, layout, layer);
  } else {
    for (; i + 4 <= count; i += 4) blocks<GENERAL, KEEP, OUTPUTS, 1, 4>(a, sites + i, layout, layer);
  }
  for (; i < count; i++) blocks<GENERAL, KEEP, OUTPUTS, 1, 1>(a, sites + i, layout, layer);
}

// The tensors of a forward pass, and lambda.
struct Results {
  const float *x, *weight;
  float *out, *state, lam;
};

// The positions of a panel, for one block of outputs after another.
template <bool GENERAL, bool KEEP>
struct PanelPass {
  const Conv& c;
  const Penalty penalty;
  const Results& t;
  const int64_t whole = c.positions() * c.groups * c.outputs;  // numbers in the output
  const int64_t planes = KEEP ? 2 * c.steps + 2 : 0;               // of the state
  Buffer sums = buffer(4 * PANEL), steps = buffer(planes * 4 * PANEL);

  template <int OUTPUTS>
  void run(int64_t channel, const float* panel, const int64_t* rows, const Positions& at_hand, int64_t size) {
    const float* a = t.weight + channel * c.depth();
    const bool adjacent = c.z[3] == 1 && at_hand.out.count == 1;
    const Run& r = at_hand.out.run[0];
    const int64_t start = channel * c.z[1] + r.image * c.z[0] + r.row * c.z[2] + r.column * c.z[3];
    const Layout layout = {adjacent ? c.z[1] : PANEL, adjacent ? whole : 4 * PANEL, rows};
    Site sites[VECTORS];
    int64_t count = 0;
    for (int64_t at = 0; at < size; at += LANES) {
      const int64_t n = std::min<int64_t>(LANES, size - at);
      if (adjacent) sites[count++] = {panel + at, t.out + start + at, t.state + start + at, n};
      else sites[count++] = {panel + at, sums.get() + at, steps.get() + at, n};
    }
    estimate<GENERAL, KEEP, OUTPUTS>(a, sites, count, layout, {c, penalty, t.lam});
    if (adjacent) return;
    for (int o = 0; o < OUTPUTS; o++) {
      const int64_t to = (channel + o) * c.z[1];
      scatter(t.out + to, sums.get() + o * PANEL, c, at_hand.out);
      for (int64_t k = 0; k < planes; k++)
        scatter(t.state + k * whole + to, steps.get() + (k * 4 + o) * PANEL, c, at_hand.out);
    }
  }
};

template <bool GENERAL, bool KEEP>
void forward_panels(const Conv& c, const Penalty penalty, const Results& t, int threads) {
  const int64_t depth = c.depth(), positions = c.positions();
  const int64_t vectors = std::max<int64_t>(1, std::min<int64_t>(VECTORS, CACHE / (depth * LANES * 4)));
  const int64_t width = vectors * LANES, panels = ceil_div(positions, width);
  // If panels are few, the outputs are cut into chunks of at least sixteen as well, so that packing takes little time.
  const int64_t cut = std::max<int64_t>(1, std::min(TASKS / std::max<int64_t>(1, panels * c.groups), c.outputs / 16));
  const int64_t chunk = ceil_div(ceil_div(c.outputs, cut), 4) * 4, chunks = ceil_div(c.outputs, chunk);
  const int64_t grain = 1 + GRAIN / (width * chunk * depth * c.steps);
#pragma omp parallel num_threads(threads)
  {
    Buffer panel = buffer(depth * width);
    std::unique_ptr<int64_t[]> rows(new int64_t[depth]);
    for (int64_t d = 0; d < depth; d++) rows[d] = d * width;
    PanelPass<GENERAL, KEEP> pass{c, penalty, t};
    Positions at_hand;
    int64_t packed = -1;
#pragma omp for schedule(dynamic, grain)
    for (int64_t task = 0; task < panels * c.groups * chunks; task++) {
      const int64_t group = task / chunks / panels, first = task / chunks % panels * width;
      const int64_t size = std::min(width, positions - first);
      at_hand.set(c, first, size);
      if (packed != task / chunks) pack(panel.get(), width, t.x, c, at_hand.in, group * c.channels, c.channels);
      packed = task / chunks;
      int64_t o = task % chunks * chunk;
      const int64_t stop = std::min(c.outputs, o + chunk);
      for (; o + 4 <= stop; o += 4)
        pass.template run<4>(group * c.outputs + o, panel.get(), rows.get(), at_hand, size);
      for (; o < stop; o++) pass.template run<1>(group * c.outputs + o, panel.get(), rows.get(), at_hand, size);
    }
  }
}

template <bool GENERAL, bool KEEP>
void forward_rows(const Conv& c, const Penalty penalty, const Results& t, int threads) {
  const Band band(c, band_height(c));
  const int64_t bands = ceil_div(c.out_height, band.height), depth = c.depth();
  const int64_t vectors = ceil_div(c.out_width, LANES);
  const int64_t grain = 1 + GRAIN / (band.height * c.out_width * c.outputs * depth * c.steps);
#pragma omp parallel num_threads(threads)
  {
    Buffer input = buffer(c.channels * band.plane);
    std::memset(input.get(), 0, c.channels * band.plane * 4);
    std::unique_ptr<int64_t[]> rows(new int64_t[depth]);
    std::unique_ptr<Site[]> sites(new Site[band.height * vectors]);
    band.offsets(rows.get(), c);
    const Layout layout = {c.z[1], c.positions() * c.groups * c.outputs, rows.get()};
#pragma omp for schedule(dynamic, grain)
    for (int64_t task = 0; task < c.batch * c.groups * bands; task++) {
      const int64_t first = task % bands * band.height, group = task / bands % c.groups;
      const int64_t image = task / bands / c.groups;
      band.pack(input.get(), t.x, c, image, first, group * c.channels);
      const int64_t channel = group * c.outputs, height = std::min(band.height, c.out_height - first);
      int64_t count = 0;
      for (int64_t row = 0; row < height; row++)
        for (int64_t at = 0; at < c.out_width; at += LANES) {
          const int64_t z = image * c.z[0] + channel * c.z[1] + (first + row) * c.z[2] + at;
          sites[count++] = {input.get() + row * c.stride[0] * band.line + at, t.out + z, t.state + z,
                            std::min<int64_t>(LANES, c.out_width - at)};
        }
      const auto shifted = [&](int64_t o) {  // to the next outputs
        for (int64_t i = 0; i < count; i++)
          sites[i].out += o * c.z[1], sites[i].state += o * c.z[1];
      };
      const float* a = t.weight + channel * depth;
      int64_t o = 0;
      for (; o + 4 <= c.outputs; o += 4, shifted(4))
        estimate<GENERAL, KEEP, 4>(a + o * depth, sites.get(), count, layout, {c, penalty, t.lam});
      for (; o < c.outputs; o++, shifted(1))
        estimate<GENERAL, KEEP, 1>(a + o * depth, sites.get(), count, layout, {c, penalty, t.lam});
    }
  }
}

template <bool GENERAL, bool KEEP>
void forward(const Conv& c, const Penalty penalty, const Results& t, int threads) {
  if (c.positions() * c.groups * c.outputs * c.depth() * c.steps < SMALL) threads = 1;
  if (rows_pay(c)) forward_rows<GENERAL, KEEP>(c, penalty, t, threads);
  else forward_panels<GENERAL, KEEP>(c, penalty, t, threads);
}

}  // namespace
