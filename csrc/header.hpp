// The header of a safetensors file, read and checked. Nothing in it is believed before it is checked, and no more
// memory is asked for than the file has bytes.
//
//   byte 0        8                    8 + n                                    file size
//   | n (LE u64)  | JSON, n bytes      | tensor | tensor | ... | tensor         |
//                                      ^ data_offsets count from here; the tensors cover the rest exactly
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "status.hpp"

namespace rlspec {

inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library
inline constexpr int kMaxHeaderDepth = 127;                    // the same; a valid header needs 3

struct TensorInfo {
  std::string name;
  std::string_view dtype;            // as the format spells it, e.g. "BF16"; static storage
  std::vector<std::uint64_t> shape;  // empty for a scalar
  std::uint64_t begin;               // byte range [begin, end) in the file
  std::uint64_t end;
};

struct Header {
  std::vector<TensorInfo> tensors;  // in the order of their bytes
  std::vector<std::pair<std::string, std::string>> metadata;
};

// `json`: the header's text. `data_start`, `file_size`: where the tensors begin and end, in bytes.
// Throws Error.
Header parse_header(std::string_view json, std::uint64_t data_start, std::uint64_t file_size);

// `content`: a whole file. Throws Error.
Header parse_file(std::string_view content);

// `path`: as the operating system takes it. Throws Error.
Header read_header(const std::string& path);

}  // namespace rlspec
