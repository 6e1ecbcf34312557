// Memory that tensors are read into. The bound on it lives here and nowhere else: bytes in use and bytes kept for
// the next tensor together never pass it.
#pragma once

#include <unistd.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace rlspec {

inline constexpr std::size_t kPageBytes = 4096;

// `bytes` rounded up to whole pages.
constexpr std::uint64_t whole_pages(std::uint64_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// How memory is pinned, so that a GPU can copy from it while the program goes on: functions of the GPU's runtime,
// which whoever makes a pool has loaded. They return 0 when they succeed. Null: nothing is pinned.
struct Pinning {
  int (*pin)(void* data, std::size_t size, unsigned flags) = nullptr;
  int (*unpin)(void* data) = nullptr;
  int (*choose)(int device) = nullptr;  // called before `pin`: the runtime's choice of a device is a thread's own
  int device = 0;
};

class Pool;

// Pages of a pool, which get them back when this goes out of scope; it may outlive all but the pool's memory.
class Buffer {
 public:
  Buffer(std::shared_ptr<Pool> pool, char* data, std::size_t size) : pool_(std::move(pool)), data_(data), size_(size) {}
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const noexcept { return data_; }  // aligned to kPageBytes
  std::size_t size() const noexcept { return size_; }

 private:
  std::shared_ptr<Pool> pool_;
  char* data_;
  std::size_t size_;
};

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  explicit Pool(std::uint64_t bound, Pinning pinning = {}) : bound_(bound), pinning_(pinning), process_(::getpid()) {}
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  using Lock = std::unique_lock<std::mutex>;

  // Room comes and goes with buffers that other threads drop, so whoever waits for it waits here: hold the lock,
  // look, and wait for changed(), which is notified whenever a buffer comes back.
  Lock lock() { return Lock(mutex_); }
  std::condition_variable& changed() { return changed_; }

  bool has_room(const Lock&, std::uint64_t bytes) const { return bytes <= bound_ - in_use_; }

  // A buffer of at least `bytes`, or null where there is no room. Throws std::bad_alloc.
  std::unique_ptr<Buffer> try_acquire(const Lock&, std::uint64_t bytes);

  // Give memory that nobody uses back to the system, now and from now on.
  void stop_keeping();

  // Whether this is a fork of the process that made the pool: other threads do not exist here, and one of them may have
  // held the lock, which is then held for ever.
  bool forked() const noexcept { return process_ != ::getpid(); }

  std::uint64_t bound() const noexcept { return bound_; }
  std::uint64_t in_use();
  std::uint64_t high_water();  // the most bytes, in use and kept, there ever were

 private:
  friend class Buffer;
  void give_back(char* data, std::size_t size);
  void unmap_kept(std::multimap<std::size_t, char*>::iterator kept);
  char* map(std::size_t size);  // pinned where it can be
  void unmap(char* data, std::size_t size);

  const std::uint64_t bound_;
  const Pinning pinning_;
  const pid_t process_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<std::size_t, char*> kept_;  // by size; fresh pages cost more than used ones, pinning them more still
  std::set<char*> pinned_;
  std::uint64_t kept_bytes_ = 0;
  std::uint64_t in_use_ = 0;
  std::uint64_t high_water_ = 0;
  bool keeping_ = true;
};

}  // namespace rlspec
