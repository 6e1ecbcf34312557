// model.safetensors.index.json: which shard holds which tensor. As little is believed as of a header.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rlspec {

using WeightMap = std::vector<std::pair<std::string, std::string>>;  // tensor, file; in the order of the text

// Whether the file names may be opened is for the caller to judge. Throws Error.
WeightMap parse_weight_map(std::string_view json);

// `path`: as the operating system takes it. Throws Error.
WeightMap read_weight_map(const std::string& path);

}  // namespace rlspec
