// Tests of the files that are written.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "file.hpp"
#include "output.hpp"
#include "pool.hpp"
#include "source.hpp"

using rlspec::File;
using rlspec::Io;
using rlspec::OutputFile;
using rlspec::Source;

namespace {

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string random_bytes(std::size_t count) {
  std::mt19937 random(7);
  std::string out(count, '\0');
  for (char& c : out) c = static_cast<char>(random());
  return out;
}

void test_parts(const std::string& folder) {
  const std::string from = folder + "/from.bin";
  const std::string to = folder + "/to.bin";
  const std::string source = random_bytes(3'000'000);
  std::ofstream(from, std::ios::binary) << source;
  {
    OutputFile out(to);
    out.reserve(3'000'100);
    std::vector<std::thread> threads;
    threads.emplace_back([&] { out.copy(Source(from, Io::kAuto), 5, 100, 1'999'995); });
    threads.emplace_back([&] { out.write(0, source.data(), 100); });
    threads.emplace_back([&] { out.write(2'000'095, source.data(), 1'000'005); });
    for (std::thread& thread : threads) thread.join();
    out.finish();
  }
  check(content_of(to) == source.substr(0, 100) + source.substr(5, 1'999'995) + source.substr(0, 1'000'005),
        "header, copied and written parts");
  {
    OutputFile out(to);
    if (out.clone(File(from))) check(content_of(to) == source, "a clone is the same");
    expect_kind([&] { out.copy(Source(from, Io::kAuto), 2'999'999, 0, 2); }, "read_failed", "the source ends early");
    expect_kind([&] { out.copy(Source(from, Io::kAuto), 4'000'000, 0, 1); }, "read_failed", "past the source's end");
  }
  expect_kind([&] { OutputFile(folder + "/none/x"); }, "write_failed", "no folder");
  std::remove(from.c_str());
  std::remove(to.c_str());
}

// Large copies go past the page cache, page by page; their ends and what is written beside them do not.
void test_gone_on_with(const std::string& folder) {
  const std::string path = folder + "/again.bin";
  {
    OutputFile out(path);
    out.reserve(9);
    out.write(0, "one", 3);
    out.sync();
  }
  {
    OutputFile out(path, false);
    out.write(6, "two", 3);
    out.sync();
  }
  {
    OutputFile out(path, false);
    out.write(3, "---", 3);
    out.finish();
  }
  check(content_of(path) == "one---two", "a file that was closed is gone on with");
  OutputFile(path).finish();
  check(content_of(path).empty(), "a fresh one is empty");
  ::unlink(path.c_str());
  expect_kind([&] { OutputFile(path, false); }, "write_failed", "nothing to go on with");
}

void test_large_copies(const std::string& folder) {
  const std::string from = folder + "/large.bin";
  const std::string to = folder + "/large-copy.bin";
  const std::string source = random_bytes(30'000'001);
  std::ofstream(from, std::ios::binary) << source;
  const std::uint64_t shift = 3 * rlspec::kPageBytes;
  for (const std::uint64_t begin : {std::uint64_t{0}, std::uint64_t{4096}, std::uint64_t{777}}) {
    for (const bool cold : {false, true}) {
      if (cold) ::posix_fadvise(File(from).descriptor(), 0, 0, POSIX_FADV_DONTNEED);
      const std::string beside(shift + begin, 'h'), behind(500, 't');
      OutputFile out(to);
      out.reserve(shift + source.size() + behind.size());
      std::thread writer([&] {
        out.write(0, beside.data(), beside.size());
        out.write(shift + source.size(), behind.data(), behind.size());
      });
      const std::uint64_t middle = 17'000'000;  // two calls that share a page
      std::thread first([&] { out.copy(Source(from, Io::kAuto), begin, shift + begin, middle - begin); });
      out.copy(Source(from, Io::kAuto), middle, shift + middle, source.size() - middle);
      first.join();
      writer.join();
      out.finish();
      check(content_of(to) == beside + source.substr(begin) + behind, "pages, ends and neighbours");
    }
  }
  {
    OutputFile out(to);
    const auto cut = [&] { out.copy(Source(from, Io::kAuto), 4096, 4096, source.size()); };
    expect_kind(cut, "read_failed", "the source of a large copy ends early");
  }
  std::remove(from.c_str());
  std::remove(to.c_str());
}

void test_limit(const std::string& folder) {
  const std::string path = folder + "/limit.bin";
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  {
    OutputFile out(path);
    expect_kind([&] { out.reserve(1001); }, "write_failed", "no room for the whole");
    const std::string data(2000, 'x');
    expect_kind([&] { out.write(0, data.data(), data.size()); }, "write_failed", "no room for the part");
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, handler);
  std::remove(path.c_str());
}

void test_renames(const std::string& folder) {
  const std::string a = folder + "/a.bin";
  const std::string b = folder + "/b.bin";
  std::ofstream(a) << "a";
  std::ofstream(b) << "b";
  if (rlspec::exchange(a, b)) check(content_of(a) == "b" && content_of(b) == "a", "swapped");
  const std::string before = content_of(b);
  const std::string kind = kind_of([&] { check(!rlspec::rename_new(a, b), "refused or impossible"); });
  check((kind == "write_failed" || kind == "none") && content_of(b) == before, "what is there stays");
  expect_kind([&] { rlspec::exchange(a, folder + "/none"); }, "write_failed", "nothing to swap with");
  std::remove(a.c_str());
  std::remove(b.c_str());
}

}  // namespace

void output_tests(const std::string& folder) {
  test_parts(folder);
  test_gone_on_with(folder);
  test_large_copies(folder);
  test_limit(folder);
  test_renames(folder);
}
