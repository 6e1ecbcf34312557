// Files that are written: their space reserved first, unchanged parts shared or copied with as little work as the file
// system allows, nothing under its final name before it is on the disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "file.hpp"
#include "source.hpp"

namespace rlspec {

// A file to be written. Every method throws kWriteFailed (a full disk, a limit, a device error).
class OutputFile {
 public:
  // `fresh`: a new file, which replaces what is there. Otherwise one that was begun before is gone on with.
  explicit OutputFile(const std::string& path, bool fresh = true);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Shares all bytes of `from` where the file system can (reflink). False: it cannot, nothing was done.
  bool clone(const File& from);

  // Gives the file its size and, where the file system can, its space, so that a full disk is found at once.
  void reserve(std::uint64_t size);

  // Safe to call from several threads on ranges that do not overlap.
  void write(std::uint64_t offset, const char* data, std::size_t count);

  // Copies `count` bytes from byte `from_offset` of `from`. Safe to call from several threads on ranges that do not
  // overlap. Throws kReadFailed, too, also where that file ends early.
  void copy(const Source& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count);

  // Everything so far is on the disk when this returns. To be called before a file is closed that will be gone on with:
  // what the disk fails to write later would be told to nobody.
  void sync();

  // Everything is on the disk when this returns; nothing can be written afterwards.
  void finish();

 private:
  bool share(const File& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count);
  void copy_pages(const Source& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count);
  void copy_plainly(const File& from, std::uint64_t from_offset, std::uint64_t offset, std::uint64_t count);
  void write_pages(std::uint64_t offset, const char* data, std::size_t count);

  int descriptor_;
  int direct_ = -1;  // descriptor for O_DIRECT; -1 where the file system does not say that it takes whole pages
};

// Renames `from`, unless `to` exists. False: the file system has no such operation. Throws kWriteFailed.
bool rename_new(const std::string& from, const std::string& to);

// Swaps two names at one moment. False and kWriteFailed as above.
bool exchange(const std::string& a, const std::string& b);

}  // namespace rlspec
