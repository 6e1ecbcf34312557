// Tests of the device's solver, on the host under sanitizers. What it computes is held against LAPACK in Python.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/interface.hpp"

namespace {

// The arrays of one call, of exactly the size that is asked for, so that a sanitizer sees the next byte.
struct Call {
  int batch, n;
  std::vector<double> g, v, left, right, values, workspace;
  std::vector<int> status, sweeps;

  // Random matrices; the start is the identity.
  Call(int batch, int n, unsigned seed)
      : batch(batch), n(n), g(size()), v(size(), 0.0), left(size()), right(size()), values(column_count()),
        workspace(static_cast<std::size_t>(rlspec_jacobi_workspace(batch, n)), std::nan("")),
        status(static_cast<std::size_t>(batch)), sweeps(static_cast<std::size_t>(batch)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (double& x : g) x = normal(random);
    for (std::size_t i = 0; i < column_count(); ++i) v[i * side() + i % side()] = 1.0;
  }

  std::size_t side() const { return static_cast<std::size_t>(n); }
  std::size_t column_count() const { return static_cast<std::size_t>(batch) * side(); }
  std::size_t size() const { return column_count() * side(); }

  void solve(std::uintptr_t shuffled, int most_sweeps = 30) {
    const rlspec::Arrays arrays{g.data(), v.data(), left.data(), right.data(), values.data(),
                                status.data(), sweeps.data(), workspace.data()};
    rlspec_jacobi(8, batch, n, most_sweeps, arrays, reinterpret_cast<void*>(shuffled));
  }

  // The largest entry of U S Vᵀ - A.
  double residual(const std::vector<double>& a) const {
    double worst = 0.0;
    for (std::size_t matrix = 0; matrix < static_cast<std::size_t>(batch); ++matrix) {
      const std::size_t at = matrix * side() * side();
      for (std::size_t j = 0; j < side(); ++j) {
        for (std::size_t i = 0; i < side(); ++i) {
          double entry = -a[at + j * side() + i];
          for (std::size_t k = 0; k < side(); ++k) {
            entry += left[at + k * side() + i] * values[matrix * side() + k] * right[at + k * side() + j];
          }
          worst = std::fmax(worst, std::fabs(entry));
        }
      }
    }
    return worst;
  }
};

void test_every_size() {
  for (const int n : {1, 2, 15, 16, 17, 32, 33, 47}) {
    Call call(2, n, 1);
    const std::vector<double> a = call.g;
    call.solve(0);
    check(call.status == std::vector<int>(2, rlspec::kConverged), "converged, n = " + std::to_string(n));
    check(call.residual(a) < 1e-13, "decomposed, n = " + std::to_string(n));
  }
  Call none(0, 5, 1);
  none.solve(0);
}

void test_any_order() {
  Call plain(3, 40, 2);
  plain.solve(0);
  for (const std::uintptr_t seed : {std::uintptr_t{1}, std::uintptr_t{2}}) {
    Call shuffled(3, 40, 2);
    shuffled.solve(seed);
    check(shuffled.left == plain.left && shuffled.right == plain.right && shuffled.values == plain.values &&
              shuffled.sweeps == plain.sweeps,
          "the same bits in any order of lanes and teams");
  }
}

void test_what_cannot_be_done() {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(), 1e200}) {
    Call call(3, 20, 3);
    call.g[call.side() * call.side() + 7] = bad;
    call.solve(0);
    check(call.status == std::vector<int>{rlspec::kConverged, rlspec::kNotFinite, rlspec::kConverged},
          "only the matrix that is not finite fails");
  }
  Call call(1, 40, 4);
  call.solve(0, 2);
  check(call.status[0] == rlspec::kRunning && call.sweeps[0] == 2, "sweeps that are not enough are told");
}

void test_left_vectors_of_nothing() {
  Call call(2, 35, 5);
  for (std::size_t i = 0; i < call.g.size(); ++i) {
    if (i / call.side() % 2 == 0 || i < call.side() * call.side()) call.g[i] = 0.0;
  }
  const std::vector<double> a = call.g;
  call.solve(0);
  check(call.residual(a) < 1e-13, "zero and singular matrices are decomposed");
  double worst = 0.0;
  for (std::size_t c = 0; c < call.column_count(); ++c) {
    const std::size_t matrix = c / call.side();
    for (std::size_t d = matrix * call.side(); d <= c; ++d) {
      double product = c == d ? -1.0 : 0.0;
      for (std::size_t i = 0; i < call.side(); ++i) product += call.left[c * call.side() + i] * call.left[d * call.side() + i];
      worst = std::fmax(worst, std::fabs(product));
    }
  }
  check(worst < 1e-13, "and their left vectors are orthonormal");
}

}  // namespace

void jacobi_tests() {
  test_every_size();
  test_any_order();
  test_what_cannot_be_done();
  test_left_vectors_of_nothing();
}
