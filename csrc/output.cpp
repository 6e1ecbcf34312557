#include "output.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <future>
#include <memory>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "pool.hpp"
#include "status.hpp"

namespace rlspec {

namespace {

constexpr std::size_t kCopyBytes = std::size_t{1} << 23;

[[noreturn]] void fail(int code) {
  throw Error(ErrorKind::kWriteFailed, std::generic_category().message(code));
}

// Network file systems do not tell their alignment, and copy on the server better than by way of here.
int open_direct(const std::string& path) {
#ifdef STATX_DIOALIGN
  const int direct = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_DIRECT);
  if (direct < 0) return -1;
  struct statx info {};
  if (::statx(direct, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0 &&
      info.stx_dio_offset_align != 0 && info.stx_dio_offset_align <= kPageBytes &&
      info.stx_dio_mem_align <= kPageBytes) {
    return direct;
  }
  ::close(direct);
#else
  static_cast<void>(path);
#endif
  return -1;
}

struct Free {
  void operator()(char* data) const { std::free(data); }
};
using Pages = std::unique_ptr<char, Free>;

Pages allocate_pages(std::size_t bytes) {
  Pages pages(static_cast<char*>(std::aligned_alloc(kPageBytes, bytes)));
  if (!pages) throw std::bad_alloc();
  return pages;
}

bool rename_with(const std::string& from, const std::string& to, unsigned flags) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), flags) == 0) return true;
  if (errno == ENOSYS || errno == EINVAL) return false;
  fail(errno);
}

}  // namespace

OutputFile::OutputFile(const std::string& path, bool fresh)
    : descriptor_(::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | (fresh ? O_CREAT | O_TRUNC : 0), 0666)) {
  if (descriptor_ < 0) fail(errno);
  direct_ = open_direct(path);
}

OutputFile::~OutputFile() {
  if (direct_ >= 0) ::close(direct_);
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

void OutputFile::copy(const Source& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count) {
  const std::uint64_t head = whole_pages(offset) - offset;
  if (direct_ < 0 || (from_offset - offset) % kPageBytes != 0 || count < head + kCopyBytes) {
    copy_plainly(from.file(), from_offset, offset, count);
    return;
  }
  const std::uint64_t pages = (count - head) / kPageBytes * kPageBytes;
  const std::uint64_t done = head + pages;
  copy_plainly(from.file(), from_offset, offset, head);
  if (!share(from.file(), from_offset + head, offset + head, pages)) {
    copy_pages(from, from_offset + head, offset + head, pages);
  }
  copy_plainly(from.file(), from_offset + done, offset + done, count - done);
}

bool OutputFile::share(const File& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count) {
  file_clone_range range{};
  range.src_fd = from.descriptor();
  range.src_offset = from_offset;
  range.src_length = count;
  range.dest_offset = offset;
  return ::ioctl(descriptor_, FICLONERANGE, &range) == 0;
}

// Past the page cache: copying inside the kernel passes every byte through it, at a price in processor time that slows
// down whoever computes meanwhile. One piece is read while the one before it is written.
void OutputFile::copy_pages(const Source& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count) {
  Pages here = allocate_pages(kCopyBytes), next = allocate_pages(kCopyBytes);
  Bounce bounce;
  const auto size_at = [&](std::uint64_t done) { return std::min<std::uint64_t>(kCopyBytes, count - done); };
  const auto read = [&](std::uint64_t done, char* out) {
    from.read(from_offset + done, from_offset + done + size_at(done), out, bounce);
  };
  read(0, here.get());
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t size = size_at(done), then = done + size;
    std::future<void> reading;
    if (then < count) reading = std::async(std::launch::async, read, then, next.get());
    write_pages(offset + done, here.get(), size);
    if (reading.valid()) reading.get();
    std::swap(here, next);
    done = then;
  }
}

// Pages that nobody writes to otherwise; what direct writing cannot do, plain writing does or tells why not.
void OutputFile::write_pages(std::uint64_t offset, const char* data, std::size_t count) {
  while (count > 0) {
    const ssize_t put = ::pwrite(direct_, data, count, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) break;
    data += put;
    offset += static_cast<std::uint64_t>(put);
    count -= static_cast<std::size_t>(put);
    if (put % kPageBytes != 0) break;
  }
  write(offset, data, count);
}

void OutputFile::copy_plainly(const File& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count) {
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

void OutputFile::sync() {
  if (::fsync(descriptor_) != 0) fail(errno);
}

void OutputFile::finish() {
  if (direct_ >= 0) ::close(direct_);
  direct_ = -1;
  const int synced = ::fsync(descriptor_) == 0 ? 0 : errno;
  const int closed = ::close(descriptor_) == 0 ? 0 : errno;
  descriptor_ = -1;
  if (synced != 0) fail(synced);
  if (closed != 0) fail(closed);
}

bool rename_new(const std::string& from, const std::string& to) { return rename_with(from, to, RENAME_NOREPLACE); }

bool exchange(const std::string& a, const std::string& b) { return rename_with(a, b, RENAME_EXCHANGE); }

}  // namespace rlspec
