// Algorithm 1 over a convolution, forward and backward, on the CPU in float32. kernels/operator.py
// describes what is computed, kernels/compiling.py compiles this file. A linear map is a 1x1 convolution.
//
// Every product of an output with its input is computed in registers, K times, so that the time goes into arithmetic,
// and the memory is a part of the input per thread and what is kept of its outputs. How the work is cut depends on the
// shapes alone, never on the number of threads, and no sum over the pieces is taken in an order that could vary, so
// results do not vary either.

#include "backward.h"
#include "backward_rows.h"
#include "forward.h"
#include "limits.h"

extern "C" {

void nrpm_forward(const Conv* c, const Penalty* penalty, int general, float lam, const float* x, const float* weight,
                  float* out, float* state, int threads) {
  const Results results = {x, weight, out, state, lam};
  if (general && state) forward<true, true>(*c, *penalty, results, threads);
  else if (general) forward<true, false>(*c, *penalty, results, threads);
  else if (state) forward<false, true>(*c, *penalty, results, threads);
  else forward<false, false>(*c, *penalty, results, threads);
}

void nrpm_backward(const Conv* c, const Penalty* penalty, int general, float lam, const float* x, const float* weight,
                   const float* state, const float* grad, float* grad_x, float* grad_weight, int threads) {
  const Tensors tensors = {x, weight, state, grad, grad_x, grad_weight, lam};
  if (general) backward<true>(*c, *penalty, tensors, threads);
  else if (!grad_weight && gathering_pays(*c)) backward_rows(*c, *penalty, tensors, threads);
  else backward<false>(*c, *penalty, tensors, threads);
}

// The machine's limit, to which the benchmark compares the kernels: in every thread, the arithmetic of l1 for each
// product and step, `rounds` times for `count` numbers that stay in the first-level cache. `pass` is 0 for the forward
// pass, 1 for the forward pass that keeps what a gradient needs, and 2 for the backward pass, which makes LIMIT_STEPS
// steps.
float nrpm_limit(const float* numbers, int64_t count, int64_t rounds, int pass, int threads) {
  if (pass == 2) return limit_of_backward(numbers, count, rounds, threads);
  if (pass == 1) return limit_of_forward<true>(numbers, count, rounds, threads);
  return limit_of_forward<false>(numbers, count, rounds, threads);
}

}  // extern "C"
