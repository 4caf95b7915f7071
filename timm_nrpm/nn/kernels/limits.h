// Loops with the arithmetic of the passes over numbers in the first-level cache, and nothing else.

#pragma once

#include "backward.h"
#include "forward.h"

namespace {

constexpr int LIMIT_STEPS = 3;

template <bool KEEP>
float limit_of_forward(const float* numbers, int64_t count, int64_t rounds, int threads) {
  const Penalty penalty = {1e-3f, 1, 0, 0, 0};
  float result = 0;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    Sums<1, VECTORS> sums;
    const Vec m[1][VECTORS] = {{Vec{} + 0.5f, Vec{} + 0.5f, Vec{} + 0.5f, Vec{} + 0.5f}};
    const int64_t row = 0;
    for (int64_t round = 0; round < rounds; round++) {
      const float a = 1.0f + 1e-6f * round;
      for (int64_t i = 0; i + PANEL <= count; i += PANEL) {
        const float* const at = numbers + i;
        const float* const x[VECTORS] = {at, at + LANES, at + 2 * LANES, at + 3 * LANES};
        add_products<false, KEEP>(&a, x, &row, 1, 0, penalty, m, sums);
      }
    }
    for (int v = 0; v < VECTORS; v++)
      result += sum(sums.S[0][v]) + sum(sums.T[0][v]) + sum(sums.A[0][v]) + sum(sums.B[0][v]);
  }
  return result;
}

float limit_of_backward(const float* numbers, int64_t count, int64_t rounds, int threads) {
  const Penalty penalty = {1e-3f, 1, 0, 0, 0};
  float result = 0;
#pragma omp parallel num_threads(threads) reduction(+ : result)
  {
    Coefficients f[LIMIT_STEPS];
    for (int k = 0; k < LIMIT_STEPS; k++) f[k] = {Vec{} + (0.5f + k), Vec{}, Vec{}, Vec{} + 0.3f, Vec{} + 0.2f};
    Vec grad_x[VECTORS] = {}, grad_a[VECTORS] = {};
    Bits nearest = ~Bits{};
    for (int64_t round = 0; round < rounds; round++) {
      const float a = 1.0f + 1e-6f * round;
      for (int64_t i = 0; i + PANEL <= count; i += PANEL)
        for (int v = 0; v < VECTORS; v++) {
          const Vec value = load(numbers + i + v * LANES);
          const Vec g = product_gradient_apart<LIMIT_STEPS>(Vec{}, value, a, f, penalty, nearest);
          grad_x[v] += g * a;
          grad_a[v] += g * value;
        }
    }
    for (int v = 0; v < VECTORS; v++) result += sum(grad_x[v]) + sum(grad_a[v]);
    result += has_zero(nearest);
  }
  return result;
}

}  // namespace
