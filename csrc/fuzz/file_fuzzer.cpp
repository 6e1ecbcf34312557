// Fuzz target: a whole safetensors file, the length of its header included.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fuzz/judge.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view content(reinterpret_cast<const char*>(data), size);
  judge([&] {
    const rlspec::Header found = rlspec::parse_file(content);
    std::uint64_t length = 0;  // at most `size`, so that four bytes say it
    for (int i = 3; i >= 0; --i) length = length << 8 | data[i];
    require_cover(found, 8 + length, size);
  });
  return 0;
}
