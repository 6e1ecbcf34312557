#include "source.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.hpp"
#include "status.hpp"

namespace rlspec {

namespace {

// A long memcpy is one string instruction, which some processors carry out at a sixth of their speed where the two
// ends lie differently in their cache lines; short ones are vector loops.
void copy_bytes(char* to, const char* from, std::size_t count) {
  constexpr std::size_t kShort = 1024;
  for (; count >= kShort; count -= kShort, to += kShort, from += kShort) std::memcpy(to, from, kShort);
  std::memcpy(to, from, count);
}

// Kernels copy by that instruction, too. What would be slow for them goes through memory that lies as the source
// does, in pieces that stay in the processor's cache until they are moved on.
struct Piece {
  static constexpr std::size_t kLine = 64;
  static constexpr std::size_t kBytes = std::size_t{1} << 18;

  Piece(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) : place(out), size(end - begin), out_(out) {
    if ((reinterpret_cast<std::uintptr_t>(out) - begin) % kLine == 0) return;
    const std::size_t offset = begin % kPageBytes;
    place = bounce.data() + offset;
    size = std::min<std::uint64_t>(end - begin, kBytes - offset);
  }

  void arrived(std::size_t count) const {
    if (place != out_) copy_bytes(out_, place, count);
  }

  char* place;
  std::size_t size;

 private:
  char* out_;
};

static_assert(Piece::kBytes <= kBounceBytes);

}  // namespace

Bounce::~Bounce() { std::free(data_); }

char* Bounce::data() {
  if (data_ == nullptr) data_ = static_cast<char*>(std::aligned_alloc(kPageBytes, kBounceBytes));
  if (data_ == nullptr) throw std::bad_alloc();
  return data_;
}

Source::Source(const std::string& path, Io io) : file_(path), cache_(file_), io_(io) {
  if (io == Io::kBuffered) return;
  direct_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
  if (direct_ < 0) return;
#ifdef STATX_DIOALIGN
  struct statx info {};
  if (::statx(direct_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0) {
    // Zero: no direct reads of this file. Offsets and lengths are multiples of a page.
    works_direct_ = info.stx_dio_offset_align != 0 && info.stx_dio_offset_align <= kPageBytes;
    memory_align_ = std::max<std::size_t>(1, info.stx_dio_mem_align);
  }
#endif
}

Source::~Source() {
  if (direct_ >= 0) ::close(direct_);
}

void Source::read(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const {
  if (io_ == Io::kAuto && direct_ >= 0 && works_direct_) {
    const std::uint64_t held = cache_.held(begin, end);
    read_plain(begin, begin + held, out, bounce);
    begin += held;
    out += held;
  }
  if (begin < end && !read_direct(begin, end, out, bounce)) read_plain(begin, end, out, bounce);
}

void Source::read_plain(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const {
  while (begin < end) {
    const Piece piece(begin, end, out, bounce);
    file_.read(begin, piece.place, piece.size);
    piece.arrived(piece.size);
    begin += piece.size;
    out += piece.size;
  }
}

// False, with nothing promised about `out`, where the file system cannot do it.
bool Source::read_direct(std::uint64_t begin, std::uint64_t end, char* out, Bounce& bounce) const {
  if (direct_ < 0) return false;
  std::uint64_t page = begin / kPageBytes * kPageBytes;
  const std::uint64_t last = whole_pages(end);
  char* place = out - (begin - page);
  if (reinterpret_cast<std::uintptr_t>(place) % memory_align_ == 0) {
    return read_pages(page, last - page, end - page, place);
  }
  while (page < last) {
    const std::size_t count = std::min<std::uint64_t>(kBounceBytes, last - page);
    const std::uint64_t from = std::max(page, begin);
    const std::uint64_t to = std::min(page + count, end);
    if (!read_pages(page, count, to - page, bounce.data())) return false;
    copy_bytes(out + (from - begin), bounce.data() + (from - page), to - from);
    page += count;
  }
  return true;
}

// Whole pages; the file may end inside the last, but not before `needed` bytes.
bool Source::read_pages(std::uint64_t begin, std::size_t count, std::size_t needed, char* out) const {
  std::size_t done = 0;
  while (works_direct_ && done < needed) {
    const ssize_t got = ::pread(direct_, out + done, count - done, static_cast<off_t>(begin + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) works_direct_ = false;
    // After an error, and where the file ends or a read stops inside a page, the plain read that follows decides.
    if (got <= 0) return false;
    done += static_cast<std::size_t>(got);
    if (done < needed && done % kPageBytes != 0) return false;
  }
  return done >= needed;
}

}  // namespace rlspec
