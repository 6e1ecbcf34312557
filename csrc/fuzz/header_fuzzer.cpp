// Fuzz target: the text of a header. How many bytes of tensors follow is the attacker's choice, too: the first two.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fuzz/judge.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::uint64_t bytes = data[0] | data[1] << 8;
  const std::uint64_t start = 8 + size;
  const std::string_view text(reinterpret_cast<const char*>(data) + 2, size - 2);
  judge([&] { require_cover(rlspec::parse_header(text, start, start + bytes), start, start + bytes); });
  return 0;
}
