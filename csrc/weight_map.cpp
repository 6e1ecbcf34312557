#include "weight_map.hpp"

#include "file.hpp"
#include "header.hpp"
#include "json.hpp"
#include "lfs.hpp"
#include "status.hpp"

namespace rlspec {

WeightMap parse_weight_map(std::string_view text) {
  refuse_lfs_pointer(text);
  check_utf8(text);
  WeightMap map;
  bool found = false;
  JsonReader json(text, kMaxHeaderDepth);
  const auto expect = [&](JsonReader::Type wanted) {
    if (json.type() != wanted) {
      throw Error(ErrorKind::kInvalidEntry, "expected a weight_map from tensor names to file names");
    }
  };
  expect(JsonReader::Type::kObject);
  json.object([&](const std::string& key) {
    if (key != "weight_map") return json.skip();
    found = true;
    expect(JsonReader::Type::kObject);
    json.object([&](const std::string& tensor) {
      expect(JsonReader::Type::kString);
      map.emplace_back(tensor, json.string());
    });
  });
  json.end();
  if (!found) throw Error(ErrorKind::kInvalidEntry, "expected a weight_map from tensor names to file names");
  return map;
}

WeightMap read_weight_map(const std::string& path) {
  const File file(path);
  if (file.size() > kMaxHeaderBytes) {
    throw Error(ErrorKind::kHeaderTooLarge,
                std::to_string(file.size()) + " bytes, at most " + std::to_string(kMaxHeaderBytes));
  }
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  return parse_weight_map(text);
}

}  // namespace rlspec
