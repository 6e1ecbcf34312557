// What a clone without Git LFS has in place of a large file: a small text that says which one belongs there.
#pragma once

#include <string_view>

#include "status.hpp"

namespace rlspec {

// Throws kLfsPointer where a file with this content, or beginning of it, is such a text.
inline void refuse_lfs_pointer(std::string_view content) {
  constexpr std::string_view kFirstWords = "version https://git-lfs.github.com/spec/";
  if (content.substr(0, kFirstWords.size()) == kFirstWords) {
    throw Error(ErrorKind::kLfsPointer, "run \"git lfs pull\" in the repository that it lies in");
  }
}

}  // namespace rlspec
