// cuSOLVER's batched symmetric eigen-solver, by the same C as the solver of our own.
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "interface.hpp"

#if CUSOLVER_VER_MAJOR < 11 || (CUSOLVER_VER_MAJOR == 11 && CUSOLVER_VER_MINOR < 7)
#error "cusolverDnXsyevBatched came with CUDA 12.6.2"
#endif

namespace {

constexpr int kMadeNoHandle = -1;

// One handle a device for as long as the process lives: making one takes milliseconds.
struct Handle {
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t parameters = nullptr;
  std::mutex mutex;  // a handle serves one stream at a time

  Handle() {
    if (cusolverDnCreate(&solver) != CUSOLVER_STATUS_SUCCESS) solver = nullptr;
    if (cusolverDnCreateParams(&parameters) != CUSOLVER_STATUS_SUCCESS) parameters = nullptr;
  }
};

Handle* handle_of_this_device() {
  static std::mutex mutex;
  static auto* handles = new std::map<int, Handle>();  // never destroyed: the driver may be gone by then
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Handle* handle = &(*handles)[device];
  return handle->solver == nullptr || handle->parameters == nullptr ? nullptr : handle;
}

cudaDataType type_of(int width) { return width == 8 ? CUDA_R_64F : CUDA_R_32F; }

}  // namespace

// Bytes of workspace, on the device and on the host, for `batch` matrices of n x n at `a`.
RLSPEC_API int rlspec_syev_workspace(int width, std::int64_t batch, std::int64_t n, const void* a, const void* values,
                                     std::size_t* on_device, std::size_t* on_host) {
  Handle* handle = handle_of_this_device();
  if (handle == nullptr) return kMadeNoHandle;
  const std::lock_guard<std::mutex> lock(handle->mutex);
  const cudaDataType type = type_of(width);
  return static_cast<int>(cusolverDnXsyevBatched_bufferSize(handle->solver, handle->parameters, CUSOLVER_EIG_MODE_VECTOR,
                                                           CUBLAS_FILL_MODE_LOWER, n, type, a, n, type, values, type,
                                                           on_device, on_host, batch));
}

// `a`: batch x n x n; the eigenvectors replace it, one after another. `values`: batch x n, ascending. `info`: batch; not 0
// where it failed. Returns 0, or cuSOLVER's error.
RLSPEC_API int rlspec_syev(int width, std::int64_t batch, std::int64_t n, void* a, void* values, int* info,
                           void* on_device, std::size_t device_bytes, void* on_host, std::size_t host_bytes,
                           void* stream) {
  Handle* handle = handle_of_this_device();
  if (handle == nullptr) return kMadeNoHandle;
  const std::lock_guard<std::mutex> lock(handle->mutex);
  const cusolverStatus_t set = cusolverDnSetStream(handle->solver, static_cast<cudaStream_t>(stream));
  if (set != CUSOLVER_STATUS_SUCCESS) return static_cast<int>(set);
  const cudaDataType type = type_of(width);
  return static_cast<int>(cusolverDnXsyevBatched(handle->solver, handle->parameters, CUSOLVER_EIG_MODE_VECTOR,
                                                 CUBLAS_FILL_MODE_LOWER, n, type, a, n, type, values, type, on_device,
                                                 device_bytes, on_host, host_bytes, info, batch));
}
