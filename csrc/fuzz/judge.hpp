// What every fuzz target asks of a reader: it returns something true, or throws an Error whose message is one line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "header.hpp"
#include "json.hpp"
#include "status.hpp"

inline void require(bool good) {
  if (!good) std::abort();
}

// The tensors lie in order and cover the bytes [start, end) exactly.
inline void require_cover(const rlspec::Header& found, std::uint64_t start, std::uint64_t end) {
  std::uint64_t at = start;
  for (const rlspec::TensorInfo& tensor : found.tensors) {
    require(tensor.begin == at && tensor.end >= tensor.begin && !tensor.dtype.empty());
    at = tensor.end;
  }
  require(at == end);
}

template <class Action>
void judge(Action&& action) {
  try {
    action();
  } catch (const rlspec::Error& error) {
    const std::string_view text = error.what();  // may hold names from the file
    require(text.size() < 1000 && text.find('\n') == std::string_view::npos);
    rlspec::check_utf8(text);
  }
}
