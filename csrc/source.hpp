// A file that tensors are read from, by whichever way suits its bytes: from the page cache where they are in it,
// past the page cache where they are not, and plainly where the file system offers neither.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "file.hpp"
#include "page_cache.hpp"

namespace rlspec {

enum class Io {
  kAuto,      // as above
  kDirect,    // past the page cache wherever the file system can
  kBuffered,  // through the page cache
};

inline constexpr std::size_t kBounceBytes = std::size_t{1} << 20;

// Where a thread reads what cannot be read straight to its place; allocated when first needed.
class Bounce {
 public:
  Bounce() = default;
  ~Bounce();
  Bounce(const Bounce&) = delete;
  Bounce& operator=(const Bounce&) = delete;
  char* data();  // kBounceBytes, aligned to a page. Throws std::bad_alloc.

 private:
  char* data_ = nullptr;
};

class Source {
 public:
  Source(const std::string& path, Io io);  // throws kOpenFailed
  ~Source();
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  const File& file() const noexcept { return file_; }

  // Reads the bytes [begin, end) to `out`. What lies in memory before `out`, as far as the page of the file that
  // holds `begin` reaches, and behind, to the end of the page that holds `end`, is overwritten. Safe to call from
  // several threads. Throws kReadFailed, also where the file ends early.
  void read(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const;

 private:
  void read_plain(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const;
  bool read_direct(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const;
  bool read_pages(std::uint64_t begin, std::size_t count, std::size_t needed, char* out) const;

  File file_;
  PageCache cache_;
  Io io_;
  int direct_ = -1;                // descriptor for O_DIRECT; -1 where that is refused
  std::size_t memory_align_ = 512;  // of memory that is read into directly
  mutable std::atomic<bool> works_direct_{true};
};

}  // namespace rlspec
