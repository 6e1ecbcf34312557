#include "pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace rlspec {

namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Large buffers begin at a multiple of the huge page, so that the system can back them with such pages.
char* map_pages(std::size_t size) {
  const std::size_t slack = size >= 2 * kHugePage ? kHugePage - kPageBytes : 0;
  void* const mapped =
      ::mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<char*>(mapped);
  if (slack == 0) return begin;
  const std::size_t head = (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) ::munmap(begin, head);
  if (slack > head) ::munmap(begin + head + size, slack - head);
  begin += head;
#ifdef MADV_HUGEPAGE
  ::madvise(begin, size / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: it may fail
#endif
  return begin;
}

}  // namespace

Buffer::~Buffer() { pool_->give_back(data_, size_); }

Pool::~Pool() {
  while (!kept_.empty()) unmap_kept(kept_.begin());
}

std::unique_ptr<Buffer> Pool::try_acquire(const Lock& lock, std::uint64_t bytes) {
  const std::uint64_t wanted = whole_pages(std::max<std::uint64_t>(bytes, 1));
  if (wanted < bytes || !has_room(lock, wanted)) return nullptr;
  const auto fit = kept_.lower_bound(wanted);
  // Not one that is much too large: what it wastes would count as used.
  if (fit != kept_.end() && fit->first - wanted <= wanted / 8 && has_room(lock, fit->first)) {
    const auto [size, data] = *fit;
    kept_.erase(fit);
    auto buffer = std::make_unique<Buffer>(shared_from_this(), data, size);
    kept_bytes_ -= size;
    in_use_ += size;
    return buffer;
  }
  while (!kept_.empty() && wanted > bound_ - in_use_ - kept_bytes_) unmap_kept(std::prev(kept_.end()));
  auto buffer = std::make_unique<Buffer>(shared_from_this(), map(wanted), wanted);
  in_use_ += wanted;
  high_water_ = std::max(high_water_, in_use_ + kept_bytes_);
  return buffer;
}

void Pool::stop_keeping() {
  const Lock lock(mutex_);
  keeping_ = false;
  while (!kept_.empty()) unmap_kept(kept_.begin());
}

std::uint64_t Pool::in_use() {
  const Lock lock(mutex_);
  return in_use_;
}

std::uint64_t Pool::high_water() {
  const Lock lock(mutex_);
  return high_water_;
}

void Pool::give_back(char* data, std::size_t size) {
  if (forked()) {
    ::munmap(data, size);
    return;
  }
  {
    const Lock lock(mutex_);
    in_use_ -= size;
    if (keeping_) {
      kept_.emplace(size, data);
      kept_bytes_ += size;
    } else {
      unmap(data, size);
    }
  }
  changed_.notify_all();
}

char* Pool::map(std::size_t size) {
  char* const data = map_pages(size);
  constexpr unsigned kPortable = 1;  // cudaHostRegisterPortable: for copies to any device
  // Memory that cannot be pinned is copied from more slowly, no more.
  if (pinning_.pin != nullptr && pinning_.choose(pinning_.device) == 0 && pinning_.pin(data, size, kPortable) == 0) {
    pinned_.insert(data);
  }
  return data;
}

void Pool::unmap(char* data, std::size_t size) {
  if (pinned_.erase(data) > 0) pinning_.unpin(data);
  ::munmap(data, size);
}

void Pool::unmap_kept(std::multimap<std::size_t, char*>::iterator kept) {
  unmap(kept->second, kept->first);
  kept_bytes_ -= kept->first;
  kept_.erase(kept);
}

}  // namespace rlspec
