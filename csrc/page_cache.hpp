// What the system's page cache holds of a file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "file.hpp"

namespace rlspec {

// Asking reads nothing and causes no reading ahead, unlike preadv2 with RWF_NOWAIT, which starts to fill the cache
// with what it did not find there. The file is mapped but never touched, so it may shrink.
class PageCache {
 public:
  explicit PageCache(const File& file);
  ~PageCache();
  PageCache(const PageCache&) = delete;
  PageCache& operator=(const PageCache&) = delete;

  // How many bytes from `begin` on, up to `end`, are in the cache without a gap. All of them where the system does
  // not tell: of files that are neither this user's nor writable, and where mapping fails.
  std::uint64_t held(std::uint64_t begin, std::uint64_t end) const;

 private:
  unsigned char* mapped_ = nullptr;
  std::size_t size_;
};

}  // namespace rlspec
