#include "json.hpp"

#include <algorithm>
#include <limits>
#include <locale>
#include <sstream>

namespace rlspec {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Whether a well-formed number lies past the largest double. Too small a one does not: it is rounded to zero.
bool overflows(std::string_view number) {
  const std::size_t digits = std::min(number.find_first_of("eE"), number.size());
  const std::size_t exponent = number.size() - digits;
  if (digits <= 200 && exponent <= 3) return false;  // below 1e200 * 1e99; the slow way is for few
  std::istringstream stream{std::string(number)};
  stream.imbue(std::locale::classic());
  double value = 0;
  stream >> value;
  return stream.fail() && (value > 1 || value < -1);
}

// `code` is a scalar value: never a surrogate, at most 0x10FFFF.
void append_utf8(std::string& out, unsigned code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

}  // namespace

void check_utf8(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  for (std::size_t i = 0; i < text.size();) {
    const unsigned lead = byte(i);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    // The second byte's range is what keeps out overlong forms, surrogates and values past U+10FFFF.
    unsigned low = 0x80, high = 0xBF;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
    bool good = lead >= 0xC2 && lead <= 0xF4 && length <= text.size() - i;
    for (std::size_t j = 1; good && j < length; ++j) {
      good = byte(i + j) >= low && byte(i + j) <= high;
      low = 0x80;
      high = 0xBF;
    }
    if (!good) throw Error(ErrorKind::kInvalidUtf8, "at byte " + std::to_string(i));
    i += length;
  }
}

JsonReader::Type JsonReader::type() {
  switch (const char c = peek()) {
    case '{': return Type::kObject;
    case '[': return Type::kArray;
    case '"': return Type::kString;
    default: return c == '-' || is_digit(c) ? Type::kNumber : Type::kLiteral;
  }
}

std::string JsonReader::string() {
  expect('"');
  std::string out;
  for (;;) {
    if (at_ == text_.size()) fail("unterminated string");
    const char c = text_[at_++];
    if (c == '"') return out;
    if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
    if (c == '\\') {
      escape(out);
    } else {
      out += c;
    }
  }
}

std::uint64_t JsonReader::unsigned_integer() {
  const std::size_t start = at_;
  const std::string_view digits = number();
  std::uint64_t value = 0;
  for (const char c : digits) {
    const auto digit = static_cast<std::uint64_t>(c - '0');
    constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
    if (!is_digit(c) || value > (kMax - digit) / 10) {
      throw Error(ErrorKind::kInvalidEntry,
                  "expected an unsigned 64-bit integer at byte " + std::to_string(start));
    }
    value = value * 10 + digit;
  }
  return value;
}

bool JsonReader::null() {
  peek();
  return word("null");
}

void JsonReader::skip() {
  switch (type()) {
    case Type::kObject: object([this](const std::string&) { skip(); }); break;
    case Type::kArray: array([this] { skip(); }); break;
    case Type::kString: string(); break;
    case Type::kNumber: number(); break;
    case Type::kLiteral: literal(); break;
  }
}

void JsonReader::end() {
  skip_space();
  if (at_ != text_.size()) fail("text after the value");
}

void JsonReader::enter(char open) {
  expect(open);
  if (++depth_ > max_depth_) {
    throw Error(ErrorKind::kTooDeep, "more than " + std::to_string(max_depth_) + " levels");
  }
}

bool JsonReader::more(bool first, char close) {
  const char c = peek();
  if (c == close) {
    ++at_;
    return false;
  }
  if (!first) {
    expect(',');
    if (peek() == close) fail("trailing comma");
  }
  return true;
}

void JsonReader::expect(char wanted) {
  if (peek() != wanted) {
    const char message[] = {'e', 'x', 'p', 'e', 'c', 't', 'e', 'd', ' ', wanted, '\0'};
    fail(message);
  }
  ++at_;
}

void JsonReader::skip_space() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
    ++at_;
  }
}

char JsonReader::peek() {
  skip_space();
  if (at_ == text_.size()) fail("unexpected end");
  return text_[at_];
}

std::string_view JsonReader::number() {
  peek();
  const std::size_t start = at_;
  const auto take = [&](const char* set) {
    const bool hit = at_ < text_.size() && std::string_view(set).find(text_[at_]) != std::string_view::npos;
    at_ += hit;
    return hit;
  };
  const auto digits = [&] {
    const std::size_t first = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    if (at_ == first) fail("malformed number");
  };
  take("-");
  if (!take("0")) digits();  // a leading zero stands alone
  if (take(".")) digits();
  if (take("eE")) {
    take("+-");
    digits();
  }
  const std::string_view text = text_.substr(start, at_ - start);
  if (overflows(text)) fail("number out of range");
  return text;
}

void JsonReader::literal() {
  if (!word("true") && !word("false") && !word("null")) fail("expected a value");
}

bool JsonReader::word(std::string_view wanted) {
  const bool found = text_.compare(at_, wanted.size(), wanted) == 0;
  if (found) at_ += wanted.size();
  return found;
}

void JsonReader::escape(std::string& out) {
  if (at_ == text_.size()) fail("unterminated string");
  switch (text_[at_++]) {
    case '"': out += '"'; return;
    case '\\': out += '\\'; return;
    case '/': out += '/'; return;
    case 'b': out += '\b'; return;
    case 'f': out += '\f'; return;
    case 'n': out += '\n'; return;
    case 'r': out += '\r'; return;
    case 't': out += '\t'; return;
    case 'u': break;
    default: fail("unknown escape");
  }
  unsigned code = hex4();
  if (code >= 0xDC00 && code <= 0xDFFF) fail("lone surrogate");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (text_.compare(at_, 2, "\\u") != 0) fail("lone surrogate");
    at_ += 2;
    const unsigned low = hex4();
    if (low < 0xDC00 || low > 0xDFFF) fail("lone surrogate");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(out, code);
}

unsigned JsonReader::hex4() {
  unsigned code = 0;
  for (int i = 0; i < 4; ++i) {
    if (at_ == text_.size()) fail("unterminated string");
    const char c = text_[at_++];
    const std::size_t digit = std::string_view("0123456789abcdefABCDEF").find(c);
    if (digit == std::string_view::npos) fail("malformed \\u escape");
    code = code * 16 + static_cast<unsigned>(digit < 16 ? digit : digit - 6);
  }
  return code;
}

void JsonReader::fail(const char* what) const {
  throw Error(ErrorKind::kInvalidJson, std::string(what) + " at byte " + std::to_string(at_));
}

}  // namespace rlspec
