// What a library of the solver offers: C, so that whoever has arrays can call it, whatever made them.
#pragma once

#include <cstdint>

#include "jacobi.hpp"

#if defined(_WIN32)
#define RLSPEC_API extern "C" __declspec(dllexport)
#else
#define RLSPEC_API extern "C" __attribute__((visibility("default")))
#endif

namespace rlspec {

// What the caller gives; pointers as in Jacobi. `workspace`: workspace_numbers() numbers.
struct Arrays {
  void *g, *v, *left, *right, *values;
  int *status, *sweeps;
  void* workspace;
};

inline std::int64_t workspace_numbers(std::int64_t batch, std::int64_t n) {
  const std::int64_t games = (n + kWindow - 1) / kWindow;
  return batch * (n + 1 + games);
}

template <class Real>
Jacobi<Real> job_of(int batch, int n, int most_sweeps, const Arrays& arrays) {
  const auto real = [](void* pointer) { return static_cast<Real*>(pointer); };
  Jacobi<Real> job{batch, n, most_sweeps, real(arrays.g), real(arrays.v), real(arrays.left), real(arrays.right),
                   real(arrays.values), arrays.status, arrays.sweeps, real(arrays.workspace), nullptr, nullptr};
  job.least = job.norms + std::int64_t{batch} * n;
  job.cosines = job.least + batch;
  return job;
}

}  // namespace rlspec

// Numbers of workspace for a batch of n x n.
RLSPEC_API std::int64_t rlspec_jacobi_workspace(std::int64_t batch, std::int64_t n);

// `width`: bytes of a number, 4 or 8. `stream`: where a device does it. Returns 0, or the runtime's error.
RLSPEC_API int rlspec_jacobi(int width, int batch, int n, int most_sweeps, rlspec::Arrays arrays, void* stream);

// The error in words.
RLSPEC_API const char* rlspec_error(int error);
