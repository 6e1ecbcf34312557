// A regular file, open for reading; closed when it goes out of scope.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace rlspec {

class File {
 public:
  explicit File(const std::string& path);  // throws kOpenFailed, also for what is no regular file
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const noexcept { return size_; }
  int descriptor() const noexcept { return descriptor_; }

  // Reads exactly `count` bytes from byte `offset`; throws kReadFailed, also where the file ends early.
  void read(std::uint64_t offset, char* out, std::size_t count) const;

 private:
  int descriptor_;
  std::uint64_t size_ = 0;
};

}  // namespace rlspec
