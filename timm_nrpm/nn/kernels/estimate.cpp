// The estimator of estimator.py over a convolution, forward and backward, on the CPU in float32. kernels/operator.py
// describes what is computed, kernels/compiling.py compiles this file. A linear map is a 1x1 convolution.
//
// Every product of an output with its input is computed in registers, K times, so that the time goes into arithmetic, and
// the memory is a part of the input per thread and what is kept of its outputs. How the work is cut depends on the shapes
// alone, never on the number of threads, and no sum over the pieces is taken in an order that could vary, so results do
// not vary either.

#include "backward.h"
#include "forward.h"

extern "C" {

void nrpm_forward(const Conv* c, const Penalty* penalty, int general, const float* x, const float* weight,
                  const float* plain, float* out, float* state, int threads) {
  const Results results = {x, weight, plain, out, state};
  if (general && state) forward<true, true>(*c, *penalty, results, threads);
  else if (general) forward<true, false>(*c, *penalty, results, threads);
  else if (state) forward<false, true>(*c, *penalty, results, threads);
  else forward<false, false>(*c, *penalty, results, threads);
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
