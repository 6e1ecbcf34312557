// A strict reader for JSON (RFC 8259) that walks the text once and builds no tree, so that a hostile header costs
// no more memory than its own text. It refuses what general parsers let pass: keys given twice, nesting past a limit,
// which would otherwise overflow the stack, and numbers that no double holds.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>

#include "status.hpp"

namespace rlspec {

// Throws kInvalidUtf8, naming the byte, unless `text` is UTF-8 without overlong forms and surrogates.
void check_utf8(std::string_view text);

// Each method consumes one value, or throws kInvalidJson, kTooDeep or kDuplicateKey with the byte position.
class JsonReader {
 public:
  enum class Type { kObject, kArray, kString, kNumber, kLiteral };

  // `text` must outlive the reader and be UTF-8 (see check_utf8).
  JsonReader(std::string_view text, int max_depth) : text_(text), max_depth_(max_depth) {}

  // The type of the next value, by its first character; consumes white space only.
  Type type();

  // Calls member(key) for every member; the callback must consume the member's value.
  template <class Member>
  void object(Member&& member) {
    enter('{');
    std::unordered_set<std::string> seen;
    for (bool first = true; more(first, '}'); first = false) {
      std::string key = string();
      if (!seen.insert(key).second) throw Error(ErrorKind::kDuplicateKey, quoted(key));
      expect(':');
      member(key);
    }
    --depth_;
  }

  // Calls element() for every element; the callback must consume it.
  template <class Element>
  void array(Element&& element) {
    enter('[');
    for (bool first = true; more(first, ']'); first = false) element();
    --depth_;
  }

  std::string string();

  // A number without sign, fraction and exponent that fits 64 bits. Other numbers: kInvalidEntry.
  std::uint64_t unsigned_integer();

  // True: the next value was null, which is consumed.
  bool null();

  // Any value, checked but not kept.
  void skip();

  // Nothing but white space may follow.
  void end();

 private:
  void enter(char open);
  bool more(bool first, char close);  // true: another item follows; false: the container is closed
  void expect(char wanted);
  void skip_space();
  char peek();  // the next character after white space; throws at the end
  std::string_view number();
  bool word(std::string_view wanted);
  void literal();
  void escape(std::string& out);
  unsigned hex4();
  [[noreturn]] void fail(const char* what) const;

  std::string_view text_;
  std::size_t at_ = 0;
  int depth_ = 0;
  int max_depth_;
};

}  // namespace rlspec
