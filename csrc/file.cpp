#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "status.hpp"

namespace rlspec {

namespace {
std::string reason(int code) { return std::generic_category().message(code); }
}  // namespace

// O_NONBLOCK: opening a FIFO would otherwise wait for a writer; regular files ignore it.
File::File(const std::string& path) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) throw Error(ErrorKind::kOpenFailed, reason(errno));
  struct stat info {};
  const int failed = ::fstat(descriptor_, &info) != 0 ? errno : 0;
  if (failed != 0 || !S_ISREG(info.st_mode)) {
    ::close(descriptor_);
    throw Error(ErrorKind::kOpenFailed, failed != 0 ? reason(failed) : "not a regular file");
  }
  size_ = static_cast<std::uint64_t>(info.st_size);
}

File::~File() { ::close(descriptor_); }

void File::read(std::uint64_t offset, char* out, std::size_t count) const {
  while (count > 0) {
    const ssize_t got = ::pread(descriptor_, out, count, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(ErrorKind::kReadFailed, reason(errno));
    if (got == 0) throw Error(ErrorKind::kReadFailed, "the file became shorter while it was read");
    out += got;
    offset += static_cast<std::uint64_t>(got);
    count -= static_cast<std::size_t>(got);
  }
}

}  // namespace rlspec
