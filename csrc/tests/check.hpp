// What the C++ tests share. They are meant to run under sanitizers: `make cpp-test`, `make cpp-tsan`.
#pragma once

#include <functional>
#include <string>

// Counts a check; says on stderr what failed. Safe to call from several threads.
void check(bool good, const std::string& what);

// The kind of error that `action` throws, as its stable name; "none" if it throws none.
std::string kind_of(const std::function<void()>& action);

void expect_kind(const std::function<void()>& action, const std::string& wanted, const std::string& what);

// `folder`: where test files may be written.
void header_tests(const std::string& folder);
void stream_tests(const std::string& folder);
void output_tests(const std::string& folder);
void jacobi_tests();
