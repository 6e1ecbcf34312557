// The solver's library as a device has it, but on the host: for tests in Python. `stream` is the seed of the orders.
#include "cuda/interface.hpp"
#include "host_team.hpp"

std::int64_t rlspec_jacobi_workspace(std::int64_t batch, std::int64_t n) {
  return rlspec::workspace_numbers(batch, n);
}

int rlspec_jacobi(int width, int batch, int n, int most_sweeps, rlspec::Arrays arrays, void* stream) {
  const auto seed = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(stream));
  if (width == 8) {
    rlspec::solve_on_host(rlspec::job_of<double>(batch, n, most_sweeps, arrays), seed);
  } else {
    rlspec::solve_on_host(rlspec::job_of<float>(batch, n, most_sweeps, arrays), seed);
  }
  return 0;
}

const char* rlspec_error(int) { return "no error"; }
