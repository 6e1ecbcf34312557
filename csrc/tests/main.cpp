// Runs all C++ tests, prints "N passed, N failed" and exits with 1 on any failure.
#include <atomic>
#include <cstdio>

#include "check.hpp"
#include "status.hpp"

namespace {
std::atomic<int> passed{0};
std::atomic<int> failed{0};
}  // namespace

void check(bool good, const std::string& what) {
  ++(good ? passed : failed);
  if (!good) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

std::string kind_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const rlspec::Error& error) {
    return std::string(rlspec::error_text(error.kind()).name);
  }
  return "none";
}

void expect_kind(const std::function<void()>& action, const std::string& wanted, const std::string& what) {
  const std::string found = kind_of(action);
  check(found == wanted, what + ": wanted " + wanted + ", found " + found);
}

// The one argument is a folder to write test files in.
int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "/tmp";
  header_tests(folder);
  stream_tests(folder);
  output_tests(folder);
  jacobi_tests();
  std::printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed == 0 ? 0 : 1;
}
