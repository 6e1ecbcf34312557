// The solver on a device: a block of threads is a team, and a launch does a step for all matrices.
#include <cuda_runtime.h>

#include "interface.hpp"

namespace rlspec {
namespace {

// Four blocks on a multiprocessor: left to itself, the compiler spills to make room for more.
template <class Step>
__global__ void __launch_bounds__(kLanes, 4) run(Step step) {
  __shared__ typename Step::Shared shared;
  step(DeviceTeam(), static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), &shared);
}

template <class Real>
int solve_on_device(const Jacobi<Real>& job, cudaStream_t stream) {
  solve(job, [stream](int teams, int batch, auto step) {
    run<<<dim3(static_cast<unsigned>(teams), static_cast<unsigned>(batch)), kLanes, 0, stream>>>(step);
  });
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace rlspec

std::int64_t rlspec_jacobi_workspace(std::int64_t batch, std::int64_t n) {
  return rlspec::workspace_numbers(batch, n);
}

int rlspec_jacobi(int width, int batch, int n, int most_sweeps, rlspec::Arrays arrays, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return width == 8 ? rlspec::solve_on_device(rlspec::job_of<double>(batch, n, most_sweeps, arrays), on)
                    : rlspec::solve_on_device(rlspec::job_of<float>(batch, n, most_sweeps, arrays), on);
}

const char* rlspec_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
