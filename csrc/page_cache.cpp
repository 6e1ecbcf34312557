#include "page_cache.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>

namespace rlspec {

PageCache::PageCache(const File& file) : size_(file.size()) {
  if (size_ == 0) return;
  void* const mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.descriptor(), 0);
  if (mapped != MAP_FAILED) mapped_ = static_cast<unsigned char*>(mapped);
}

PageCache::~PageCache() {
  if (mapped_ != nullptr) ::munmap(mapped_, size_);
}

std::uint64_t PageCache::held(std::uint64_t begin, std::uint64_t end) const {
  if (mapped_ == nullptr) return end - begin;
  static const auto kPage = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  std::array<unsigned char, 256> pages;
  std::uint64_t page = begin / kPage * kPage;
  while (page < std::min<std::uint64_t>(end, size_)) {  // what the file has grown by since it was opened is not asked for
    const std::uint64_t left = (std::min<std::uint64_t>(end, size_) - page + kPage - 1) / kPage;
    const std::uint64_t count = std::min<std::uint64_t>(pages.size(), left);
    if (::mincore(mapped_ + page, count * kPage, pages.data()) != 0) return end - begin;
    for (std::uint64_t i = 0; i < count; ++i, page += kPage) {
      if ((pages[i] & 1U) == 0) return std::max(page, begin) - begin;
    }
  }
  return std::min(std::max(page, begin), end) - begin;
}

}  // namespace rlspec
