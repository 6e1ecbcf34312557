// Fuzz target for what hostile files control: the header of a shard and the index. The first byte chooses which.
// Besides not crashing, what is accepted must be true: tensors in order that cover their bytes exactly.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "header.hpp"
#include "json.hpp"
#include "status.hpp"
#include "weight_map.hpp"

namespace {

void require(bool good) {
  if (!good) std::abort();
}

// Of a message that may hold names from the file.
void require_one_line(const rlspec::Error& error) {
  const std::string_view text = error.what();
  require(text.size() < 1000 && text.find('\n') == std::string_view::npos);
  rlspec::check_utf8(text);
}

void header(std::string_view text) {
  // The data's size is the attacker's choice too: two bytes of the input.
  if (text.size() < 2) return;
  const std::uint64_t bytes = static_cast<unsigned char>(text[0]) | static_cast<unsigned char>(text[1]) << 8;
  const std::uint64_t start = 8 + text.size();
  const rlspec::Header found = rlspec::parse_header(text.substr(2), start, start + bytes);
  std::uint64_t at = start;
  for (const rlspec::TensorInfo& tensor : found.tensors) {
    require(tensor.begin == at && tensor.end >= tensor.begin && !tensor.dtype.empty());
    at = tensor.end;
  }
  require(at == start + bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    if (data[0] == 'i') {
      rlspec::parse_weight_map(text);
    } else {
      header(text);
    }
  } catch (const rlspec::Error& error) {
    require_one_line(error);
  }
  return 0;
}
