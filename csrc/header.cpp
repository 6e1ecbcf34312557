#include "header.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "file.hpp"
#include "json.hpp"
#include "lfs.hpp"

namespace rlspec {

namespace {

struct Dtype {
  std::string_view name;
  unsigned bits;
};

// Every dtype of the format. F4 and F6 are packed: their tensors must fill whole bytes.
constexpr std::array<Dtype, 22> kDtypes{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};

// Byte count of a tensor; nullopt where 64 bits overflow. Throws kSizeMismatch for a fraction of a byte.
std::optional<std::uint64_t> byte_count(const TensorInfo& tensor, unsigned bits) {
  std::uint64_t product = 1;
  const auto multiply = [&](std::uint64_t factor) {
    return !__builtin_mul_overflow(product, factor, &product);
  };
  for (const std::uint64_t size : tensor.shape) {
    if (!multiply(size)) return std::nullopt;
  }
  if (!multiply(bits)) return std::nullopt;
  if (product % 8 != 0) {
    throw Error(ErrorKind::kSizeMismatch, quoted(tensor.name) + " does not fill whole bytes");
  }
  return product / 8;
}

void expect_type(JsonReader& json, JsonReader::Type wanted, const std::string& what) {
  if (json.type() != wanted) throw Error(ErrorKind::kInvalidEntry, what);
}

// {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}; begin and end are still relative.
TensorInfo read_entry(JsonReader& json, const std::string& name) {
  TensorInfo tensor{name, {}, {}, 0, 0};
  const std::string label = quoted(name);
  unsigned bits = 0;
  bool has_shape = false;
  std::vector<std::uint64_t> offsets;
  const auto integers = [&](const char* what, std::vector<std::uint64_t>& out) {
    expect_type(json, JsonReader::Type::kArray, label + ": " + what + " is not a list");
    json.array([&] {
      expect_type(json, JsonReader::Type::kNumber, label + ": " + what + " holds something else than integers");
      out.push_back(json.unsigned_integer());
    });
  };
  expect_type(json, JsonReader::Type::kObject, label + " is not an object");
  json.object([&](const std::string& key) {
    if (key == "dtype") {
      expect_type(json, JsonReader::Type::kString, label + ": dtype is not a string");
      const std::string dtype = json.string();
      const auto* found = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const Dtype& d) { return d.name == dtype; });
      if (found == kDtypes.end()) throw Error(ErrorKind::kUnknownDtype, label + " has " + quoted(dtype));
      tensor.dtype = found->name;
      bits = found->bits;
    } else if (key == "shape") {
      integers("shape", tensor.shape);
      has_shape = true;
    } else if (key == "data_offsets") {
      integers("data_offsets", offsets);
    } else {
      json.skip();
    }
  });
  if (bits == 0 || !has_shape || offsets.size() != 2) {
    throw Error(ErrorKind::kInvalidEntry, label + " wants dtype, shape and two data_offsets");
  }
  tensor.begin = offsets[0];
  tensor.end = offsets[1];
  if (tensor.begin > tensor.end) {
    throw Error(ErrorKind::kInvalidOffsets, label + " lies at [" + std::to_string(tensor.begin) + ", " +
                                                std::to_string(tensor.end) + ")");
  }
  const std::optional<std::uint64_t> bytes = byte_count(tensor, bits);
  if (!bytes) throw Error(ErrorKind::kSizeOverflow, label);
  if (*bytes != tensor.end - tensor.begin) {
    throw Error(ErrorKind::kSizeMismatch, label + " has " + std::to_string(tensor.end - tensor.begin) +
                                              " bytes, its dtype and shape want " + std::to_string(*bytes));
  }
  return tensor;
}

// The tensors, sorted by their bytes, must tile [0, data_size) exactly.
void check_cover(const std::vector<TensorInfo>& tensors, std::uint64_t data_size) {
  std::uint64_t covered = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.end > data_size) {
      throw Error(ErrorKind::kPastEnd, quoted(tensor.name) + " ends at byte " + std::to_string(tensor.end) + " of " +
                                           std::to_string(data_size));
    }
    if (tensor.begin < covered) throw Error(ErrorKind::kOverlap, quoted(tensor.name) + " and the one before it");
    if (tensor.begin > covered) throw Error(ErrorKind::kGap, "before " + quoted(tensor.name));
    covered = tensor.end;
  }
  if (covered != data_size) {
    throw Error(ErrorKind::kTrailingBytes, std::to_string(data_size - covered) + " of them");
  }
}

constexpr std::uint64_t kPrefix = 8;      // bytes of the header's length
constexpr std::uint64_t kBeginning = 64;  // enough to know what else it may be

// Where the tensors begin in a file of `file_size` bytes. `beginning`: its first kBeginning bytes, or all of them.
std::uint64_t data_start(std::string_view beginning, std::uint64_t file_size) {
  refuse_lfs_pointer(beginning);
  if (file_size < kPrefix) throw Error(ErrorKind::kFileTooShort, std::to_string(file_size) + " bytes");
  std::uint64_t length = 0;
  for (std::size_t i = kPrefix; i-- > 0;) length = length << 8 | static_cast<unsigned char>(beginning[i]);
  if (length > kMaxHeaderBytes) {
    throw Error(ErrorKind::kHeaderTooLarge,
                std::to_string(length) + " bytes, at most " + std::to_string(kMaxHeaderBytes));
  }
  if (length > file_size - kPrefix) {
    throw Error(ErrorKind::kHeaderTruncated,
                std::to_string(length) + " bytes claimed, " + std::to_string(file_size - kPrefix) + " there");
  }
  return kPrefix + length;
}

}  // namespace

Header parse_header(std::string_view text, std::uint64_t data_start, std::uint64_t file_size) {
  check_utf8(text);
  Header header;
  JsonReader json(text, kMaxHeaderDepth);
  json.object([&](const std::string& name) {
    if (name == "__metadata__") {
      if (json.null()) return;
      expect_type(json, JsonReader::Type::kObject, "__metadata__ is not an object");
      json.object([&](const std::string& key) {
        expect_type(json, JsonReader::Type::kString, "__metadata__ holds something else than strings");
        header.metadata.emplace_back(key, json.string());
      });
    } else {
      header.tensors.push_back(read_entry(json, name));
    }
  });
  json.end();
  std::sort(header.tensors.begin(), header.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_cover(header.tensors, file_size - data_start);
  for (TensorInfo& tensor : header.tensors) {  // cannot overflow: every end is at most file_size - data_start
    tensor.begin += data_start;
    tensor.end += data_start;
  }
  return header;
}

Header parse_file(std::string_view content) {
  const std::uint64_t start = data_start(content.substr(0, kBeginning), content.size());
  return parse_header(content.substr(kPrefix, start - kPrefix), start, content.size());
}

Header read_header(const std::string& path) {
  const File file(path);
  std::string beginning(std::min<std::uint64_t>(kBeginning, file.size()), '\0');
  file.read(0, beginning.data(), beginning.size());
  const std::uint64_t start = data_start(beginning, file.size());
  std::string text(start - kPrefix, '\0');
  file.read(kPrefix, text.data(), text.size());
  return parse_header(text, start, file.size());
}

}  // namespace rlspec
