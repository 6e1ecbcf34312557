// What can be wrong with a checkpoint file: the kinds, one table of sentences, and the exception that carries both.
#pragma once

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>

namespace rlspec {

enum class ErrorKind {
  kOpenFailed,
  kReadFailed,
  kFileTooShort,
  kLfsPointer,
  kHeaderTooLarge,
  kHeaderTruncated,
  kInvalidUtf8,
  kInvalidJson,
  kTooDeep,
  kDuplicateKey,
  kInvalidEntry,
  kUnknownDtype,
  kSizeOverflow,
  kInvalidOffsets,
  kSizeMismatch,
  kOverlap,
  kGap,
  kPastEnd,
  kTrailingBytes,
  kWriteFailed,
  kTensorTooLarge,
  kBuffersHeld,
  kForked,
};

struct ErrorText {
  ErrorKind kind;
  std::string_view name;      // stable, for programs and tests
  std::string_view sentence;  // for people
};

// In the order of the enumeration (checked below).
inline constexpr std::array<ErrorText, 23> kErrorTexts{{
    {ErrorKind::kOpenFailed, "open_failed", "cannot be opened"},
    {ErrorKind::kReadFailed, "read_failed", "cannot be read"},
    {ErrorKind::kFileTooShort, "file_too_short", "too short for a safetensors file"},
    {ErrorKind::kLfsPointer, "lfs_pointer", "a Git LFS pointer instead of the file"},
    {ErrorKind::kHeaderTooLarge, "header_too_large", "larger than is read"},
    {ErrorKind::kHeaderTruncated, "header_truncated", "the file ends inside the header"},
    {ErrorKind::kInvalidUtf8, "invalid_utf8", "not UTF-8"},
    {ErrorKind::kInvalidJson, "invalid_json", "not valid JSON"},
    {ErrorKind::kTooDeep, "too_deep", "nested too deeply"},
    {ErrorKind::kDuplicateKey, "duplicate_key", "a key is given twice"},
    {ErrorKind::kInvalidEntry, "invalid_entry", "a malformed entry"},
    {ErrorKind::kUnknownDtype, "unknown_dtype", "a tensor has an unknown dtype"},
    {ErrorKind::kSizeOverflow, "size_overflow", "a tensor's size overflows 64 bits"},
    {ErrorKind::kInvalidOffsets, "invalid_offsets", "a tensor ends before it begins"},
    {ErrorKind::kSizeMismatch, "size_mismatch", "a tensor's bytes do not fit its dtype and shape"},
    {ErrorKind::kOverlap, "overlap", "two tensors overlap"},
    {ErrorKind::kGap, "gap", "bytes between two tensors belong to neither"},
    {ErrorKind::kPastEnd, "past_end", "the file is truncated: a tensor lies past its end"},
    {ErrorKind::kTrailingBytes, "trailing_bytes", "bytes after the last tensor belong to none"},
    {ErrorKind::kWriteFailed, "write_failed", "cannot be written"},
    {ErrorKind::kTensorTooLarge, "tensor_too_large", "a tensor does not fit the memory bound"},
    {ErrorKind::kBuffersHeld, "buffers_held", "tensors that are still held use up the memory bound"},
    {ErrorKind::kForked, "forked", "reading was begun by the process that this one was forked from"},
}};

constexpr const ErrorText& error_text(ErrorKind kind) {
  return kErrorTexts[static_cast<std::size_t>(kind)];
}

namespace detail {
constexpr bool table_is_in_order() {
  for (std::size_t i = 0; i < kErrorTexts.size(); ++i) {
    if (kErrorTexts[i].kind != static_cast<ErrorKind>(i)) return false;
  }
  return static_cast<std::size_t>(ErrorKind::kForked) + 1 == kErrorTexts.size();
}
static_assert(table_is_in_order(), "kErrorTexts must list every ErrorKind, in order");
}  // namespace detail

// what() is one line: the sentence of the kind, then the detail.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& detail)
      : std::runtime_error(std::string(error_text(kind).sentence) + (detail.empty() ? "" : ": " + detail)),
        kind_(kind) {}

  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// A name from a file, fit for a one-line message: quoted, control bytes as '?', cut when long.
// `name` must be valid UTF-8; the result is, too.
inline std::string quoted(std::string_view name) {
  constexpr std::size_t kLongest = 120;
  std::string out = "\"";
  for (std::size_t i = 0; i < name.size(); ++i) {
    const auto byte = static_cast<unsigned char>(name[i]);
    const bool starts_character = (byte & 0xC0) != 0x80;
    if (i >= kLongest && starts_character) {
      out += "...";
      break;
    }
    out += byte < 0x20 || byte == 0x7F ? '?' : name[i];
  }
  return out + '"';
}

}  // namespace rlspec
