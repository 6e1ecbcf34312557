#include "output.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

#include "status.hpp"

namespace rlspec {

namespace {

[[noreturn]] void fail(int code) {
  throw Error(ErrorKind::kWriteFailed, std::generic_category().message(code));
}

bool rename_with(const std::string& from, const std::string& to, unsigned flags) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) == 0) return true;
  if (errno == ENOSYS || errno == EINVAL) return false;
  fail(errno);
}

}  // namespace

OutputFile::OutputFile(const std::string& path)
    : descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666)) {
  if (descriptor_ < 0) fail(errno);
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

bool OutputFile::clone(const File& from) { return ::ioctl(descriptor_, FICLONE, from.descriptor()) == 0; }

void OutputFile::reserve(std::uint64_t size) {
  if (size == 0) return;
  // Not posix_fallocate: where the file system cannot reserve, that writes every block.
  while (::fallocate(descriptor_, 0, 0, static_cast<off_t>(size)) != 0) {
    if (errno == EINTR) continue;
    if (errno != EOPNOTSUPP && errno != ENOSYS) fail(errno);
    if (::ftruncate(descriptor_, static_cast<off_t>(size)) != 0) fail(errno);
    return;
  }
}

void OutputFile::write(std::uint64_t offset, const char* data, std::size_t count) {
  while (count > 0) {
    const ssize_t put = ::pwrite(descriptor_, data, count, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(errno);
    if (put == 0) fail(ENOSPC);
    data += put;
    offset += static_cast<std::uint64_t>(put);
    count -= static_cast<std::size_t>(put);
  }
}

void OutputFile::copy(const File& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count) {
  while (count > 0) {
    auto source = static_cast<off_t>(from_offset);
    auto target = static_cast<off_t>(offset);
    const ssize_t put = ::copy_file_range(from.descriptor(), &source, descriptor_, &target, count, 0);
    if (put < 0 && errno == EINTR) continue;
    // Two file systems, an old kernel, the end of the source, or a device error: reading and writing either does it
    // or tells which of the two files is at fault.
    if (put <= 0) break;
    from_offset += static_cast<std::uint64_t>(put);
    offset += static_cast<std::uint64_t>(put);
    count -= static_cast<std::uint64_t>(put);
  }
  std::vector<char> buffer(std::min<std::uint64_t>(count, std::uint64_t{1} << 20));
  while (count > 0) {
    const std::size_t part = std::min<std::uint64_t>(count, buffer.size());
    from.read(from_offset, buffer.data(), part);
    write(offset, buffer.data(), part);
    from_offset += part;
    offset += part;
    count -= part;
  }
}

void OutputFile::finish() {
  const int synced = ::fsync(descriptor_) == 0 ? 0 : errno;
  const int closed = ::close(descriptor_) == 0 ? 0 : errno;
  descriptor_ = -1;
  if (synced != 0) fail(synced);
  if (closed != 0) fail(closed);
}

bool rename_new(const std::string& from, const std::string& to) { return rename_with(from, to, RENAME_NOREPLACE); }

bool exchange(const std::string& a, const std::string& b) { return rename_with(a, b, RENAME_EXCHANGE); }

}  // namespace rlspec
