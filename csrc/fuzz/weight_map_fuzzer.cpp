// Fuzz target: the index of a sharded checkpoint.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "fuzz/judge.hpp"
#include "weight_map.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  judge([&] { rlspec::parse_weight_map(text); });
  return 0;
}
