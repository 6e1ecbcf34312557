// Tests of the JSON reader, the header checks and the index.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "header.hpp"
#include "json.hpp"
#include "weight_map.hpp"

using rlspec::ErrorKind;

namespace {

std::string repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

void test_json() {
  const auto skip = [](const std::string& text, int depth = 8) {
    return [text, depth] {
      rlspec::JsonReader json(text, depth);
      json.skip();
      json.end();
    };
  };
  for (const char* good : {"{}", "[]", "0", "-0", "1.5e+3", "10", "\"\"", "true", " null\n", "1e308", "1e-999", "0e999", "[1, [2], {\"a\": {}}]",
                           "\"\\ud83d\\ude00\"", "\"\\u00e9\\n\""}) {
    expect_kind(skip(good), "none", good);
  }
  for (const char* bad : {"", " ", "{", "[", "[1,]", "[,]", "{\"a\":1,}", "{\"a\" 1}", "{a:1}", "01", "+1", "1.", ".5",
                          "1e", "-", "tru", "nul", "True", "\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"",
                          "\"\\ud800\\u0041\"", "\"\n\"", "1 2", "[1 2]", "{}}", "'a'", "NaN", "//\n1",
                          "nullx", "1e309", "-1e309", "1.8e308"}) {
    expect_kind(skip(bad), "invalid_json", bad);
  }
  expect_kind(skip("{\"a\":1,\"\\u0061\":2}"), "duplicate_key", "one key under two spellings");
  expect_kind(skip("[{\"a\":{\"b\":1,\"b\":1}}]"), "duplicate_key", "duplicate below the top");
  expect_kind(skip(repeat("[", 8) + repeat("]", 8)), "none", "at the depth limit");
  expect_kind(skip(repeat("[", 9) + repeat("]", 9)), "too_deep", "past the depth limit");
  expect_kind(skip(repeat("[", 1000000)), "too_deep", "a million brackets");

  const auto integer = [](const std::string& text) {
    return [text] { rlspec::JsonReader(text, 1).unsigned_integer(); };
  };
  rlspec::JsonReader largest("18446744073709551615", 1);
  check(largest.unsigned_integer() == UINT64_MAX, "2^64 - 1 is read exactly");
  for (const char* bad : {"18446744073709551616", "99999999999999999999999", "-1", "-0", "1.0", "1e3"}) {
    expect_kind(integer(bad), "invalid_entry", bad);
  }

  rlspec::JsonReader escaped("\"a\\u00e9\\ud83d\\ude00\\\"\\\\\\/\\b\\f\\n\\r\\t\"", 1);
  check(escaped.string() == "a\xC3\xA9\xF0\x9F\x98\x80\"\\/\b\f\n\r\t", "escapes decode to UTF-8");
}

void test_utf8() {
  const auto utf8 = [](const std::string& text) { return [text] { rlspec::check_utf8(text); }; };
  for (const char* good : {"", "a", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                           "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    expect_kind(utf8(good), "none", "UTF-8 boundary");
  }
  for (const char* bad : {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xC2", "\xC2\x41", "\xE0\x9F\xBF", "\xED\xA0\x80",
                          "\xE1\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    expect_kind(utf8(bad), "invalid_utf8", "not UTF-8");
  }
}

constexpr std::uint64_t kStart = 1000;
const std::string kPointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 4976698672\n";

// Parses `json` as the header of a file with `data` bytes of tensors.
std::function<void()> header(const std::string& json, std::uint64_t data) {
  return [=] { rlspec::parse_header(json, kStart, kStart + data); };
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" + offsets + "]}";
}

void test_header() {
  const std::string valid = "{\"__metadata__\":{\"format\":\"pt\"}," + entry("b", "BF16", "2,3", "8,20") + "," +
                            entry("a", "F64", "", "0,8") + "," + entry("e", "I8", "0,7", "20,20") + "}  ";
  const rlspec::Header parsed = rlspec::parse_header(valid, kStart, kStart + 20);
  check(parsed.tensors.size() == 3 && parsed.tensors[0].name == "a" && parsed.tensors[1].name == "b",
        "tensors come in the order of their bytes");
  check(parsed.tensors[1].begin == kStart + 8 && parsed.tensors[1].end == kStart + 20, "ranges are the file's");
  check(parsed.tensors[0].shape.empty() && parsed.tensors[1].dtype == "BF16", "dtype and shape");
  check(parsed.metadata.size() == 1 && parsed.metadata[0].second == "pt", "metadata");
  expect_kind(header("{}", 0), "none", "no tensors");
  expect_kind(header(" \t\r\n{}", 0), "none", "blanks before the object");
  expect_kind(header("{\"__metadata__\": null}", 0), "none", "no metadata, said in so many words");
  expect_kind(header("{" + entry("a", "F4", "2", "0,1") + "}", 1), "none", "two F4 fill a byte");

  struct Case {
    const char* kind;
    std::string json;
    std::uint64_t data;
  };
  const std::vector<Case> cases{
      {"invalid_json", "", 0},
      {"invalid_json", " ", 0},
      {"invalid_json", "\xEF\xBB\xBF{}", 0},
      {"invalid_json", "{\"__metadata__\": nullx}", 0},
      {"duplicate_key", "{\"__metadata__\": null, \"__metadata__\": null}", 0},
      {"invalid_json", "[]", 0},
      {"invalid_json", "{} x", 0},
      {"invalid_utf8", "{\"\xC0\x80\":0}", 0},
      {"invalid_entry", "{\"a\":0}", 0},
      {"invalid_entry", "{\"a\":{}}", 0},
      {"invalid_entry", "{\"a\":{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,4]}}", 4},
      {"invalid_entry", "{\"a\":{\"dtype\":7,\"shape\":[],\"data_offsets\":[0,4]}}", 4},
      {"invalid_entry", "{" + entry("a", "F32", "1", "0,4,4") + "}", 4},
      {"invalid_entry", "{" + entry("a", "F32", "-1", "0,4") + "}", 4},
      {"invalid_entry", "{" + entry("a", "F32", "\"1\"", "0,4") + "}", 4},
      {"invalid_entry", "{\"__metadata__\":{\"a\":1}}", 0},
      {"invalid_entry", "{\"__metadata__\":[]}", 0},
      {"too_deep", "{\"a\":{\"x\":" + repeat("[", 126) + repeat("]", 126) + "}}", 0},
      {"duplicate_key", "{" + entry("a", "F32", "1", "0,4") + "," + entry("a", "F32", "1", "0,4") + "}", 4},
      {"duplicate_key", "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
      {"unknown_dtype", "{" + entry("a", "F33", "1", "0,4") + "}", 4},
      {"size_overflow", "{" + entry("a", "F32", "4294967296,4294967296", "0,4") + "}", 4},
      {"size_overflow", "{" + entry("a", "F32", "4611686018427387904", "0,0") + "}", 0},  // 2^62 * 32 bits
      {"size_overflow", "{" + entry("a", "F32", "9223372036854775808,2,0", "0,0") + "}", 0},
      {"invalid_offsets", "{" + entry("a", "F32", "1", "4,0") + "}", 4},
      {"size_mismatch", "{" + entry("a", "F32", "1", "0,8") + "}", 8},
      {"size_mismatch", "{" + entry("a", "F4", "3", "0,1") + "}", 1},
      {"overlap", "{" + entry("a", "F32", "2", "0,8") + "," + entry("b", "F32", "1", "4,8") + "}", 8},
      {"gap", "{" + entry("a", "F32", "1", "0,4") + "," + entry("b", "F32", "1", "8,12") + "}", 12},
      {"gap", "{" + entry("a", "F32", "1", "4,8") + "}", 8},
      {"past_end", "{" + entry("a", "F32", "1", "0,4") + "}", 3},
      {"past_end", "{" + entry("a", "U8", "1", "18446744073709551614,18446744073709551615") + "}", 3},
      {"trailing_bytes", "{" + entry("a", "F32", "1", "0,4") + "}", 5},
      {"trailing_bytes", "{}", 1},
  };
  for (const Case& c : cases) expect_kind(header(c.json, c.data), c.kind, c.json.substr(0, 100));

  for (std::size_t length = 0; length < valid.size() - 2; ++length) {
    expect_kind(header(valid.substr(0, length), 20), "invalid_json", "cut after byte " + std::to_string(length));
  }

  // Whatever the bytes, the outcome is a header or an Error: the sanitizers look for anything else.
  std::mt19937 random(0);
  int survived = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = valid;
    for (unsigned edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = random() % text.size();
      switch (random() % 3) {
        case 0: text[at] = static_cast<char>(random()); break;
        case 1: text.erase(at, 1 + random() % 3); break;
        default: text.insert(at, 1, "{}[]\",:0\\u-9e."[random() % 15]); break;
      }
      if (text.empty()) text = "{";
    }
    survived += kind_of(header(text, 20)) == "none";
  }
  check(survived > 0 && survived < 20000, "some mutants are harmless, most are refused");
}

void test_file(const std::string& folder) {
  const std::string path = folder + "/header_test.safetensors";
  const auto write = [&](const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; };
  const auto read = [&] { rlspec::read_header(path); };
  const auto prefix = [](std::uint64_t length) {
    std::string out;
    for (int i = 0; i < 8; ++i) out += static_cast<char>(length >> 8 * i & 0xFF);
    return out;
  };
  const std::string json = "{" + entry("a", "F32", "1", "0,4") + "}";
  write(prefix(json.size()) + json + "1234");
  expect_kind(read, "none", "a whole file");
  write(prefix(json.size()) + json + "123");
  expect_kind(read, "past_end", "one byte short");
  write(prefix(json.size() + 5) + json + "1234");
  expect_kind(read, "header_truncated", "header longer than the file");
  write(prefix(100'000'001) + json);
  expect_kind(read, "header_too_large", "header past the cap");
  write(prefix(UINT64_MAX) + json);
  expect_kind(read, "header_too_large", "header of 2^64 - 1 bytes");
  write(prefix(UINT64_MAX - 7) + json);  // and 8 wraps to 0
  expect_kind(read, "header_too_large", "a header that wraps");
  for (const std::string& pointer : {kPointer, kPointer.substr(0, 40)}) {
    write(pointer);
    expect_kind(read, "lfs_pointer", "a pointer of Git LFS");
  }
  write(kPointer.substr(0, 30));
  expect_kind(read, "header_too_large", "something like a pointer");
  write("1234567");
  expect_kind(read, "file_too_short", "seven bytes");
  write("");
  expect_kind(read, "file_too_short", "empty file");
  std::remove(path.c_str());
  expect_kind(read, "open_failed", "no file");
  expect_kind([&] { rlspec::read_header(folder); }, "open_failed", "a folder");
}

void test_messages() {
  check(rlspec::quoted("a\nb\x7F") == "\"a?b?\"", "control bytes do not reach a message");
  const std::string cut = rlspec::quoted(repeat("\xC3\xA9", 100));
  check(cut.size() < 130 && kind_of([&] { rlspec::check_utf8(cut); }) == "none", "a cut name is still UTF-8");
}

void test_weight_map() {
  const auto parse = [](const std::string& text) { return [text] { rlspec::parse_weight_map(text); }; };
  const rlspec::WeightMap map = rlspec::parse_weight_map(
      R"({"metadata": {"total_size": 8, "x": [1.5, null]}, "weight_map": {"b": "2.safetensors", "a": "1.safetensors"}})");
  const rlspec::WeightMap wanted{{"b", "2.safetensors"}, {"a", "1.safetensors"}};
  check(map == wanted, "the order of the text is kept");
  for (const char* bad : {"[]", "{}", "1", R"({"weight_map": []})", R"({"weight_map": {"a": 1}})",
                          R"({"weight_map": {"a": null}})"}) {
    expect_kind(parse(bad), "invalid_entry", bad);
  }
  expect_kind(parse(R"({"weight_map": {}, "weight_map": {}})"), "duplicate_key", "two maps");
  expect_kind(parse(R"({"weight_map": {"a": "x", "\u0061": "y"}})"), "duplicate_key", "one tensor twice");
  expect_kind(parse(R"({"weight_map": {}} {})"), "invalid_json", "text behind the index");
  expect_kind(parse(kPointer), "lfs_pointer", "a pointer of Git LFS");
  expect_kind(parse("{\"weight_map\": {\"\xFF\": \"x\"}}"), "invalid_utf8", "not UTF-8");
  expect_kind(parse("{\"a\":" + repeat("[", 100000)), "too_deep", "deep metadata");
}

}  // namespace

void header_tests(const std::string& folder) {
  test_json();
  test_utf8();
  test_header();
  test_messages();
  test_file(folder);
  test_weight_map();
}
