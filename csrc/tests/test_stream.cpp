// Tests of the pool and the reader: every byte in its place by every way of reading, the bound kept, nothing stuck.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "file.hpp"
#include "page_cache.hpp"
#include "pool.hpp"
#include "reader.hpp"
#include "source.hpp"
#include "status.hpp"

using namespace std::chrono_literals;
using rlspec::Block;
using rlspec::Io;
using rlspec::Pool;
using rlspec::Reader;
using rlspec::Request;

namespace {

constexpr Io kAll[] = {Io::kAuto, Io::kDirect, Io::kBuffered};

std::string file_of(const std::string& path, std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::string content(bytes, '\0');
  for (char& c : content) c = static_cast<char>(random());
  std::ofstream(path, std::ios::binary) << content;
  return content;
}

Block take(Reader& reader) {
  Block block;
  while (!reader.next(50ms, block)) {
  }
  return block;
}

bool holds(const Block& block, const std::string& content, const Request& request) {
  return block.size == request.end - request.begin && content.compare(request.begin, block.size, block.data, block.size) == 0;
}

void test_pool() {
  const auto pool = std::make_shared<Pool>(10 * rlspec::kPageBytes);
  auto acquire = [&](std::uint64_t bytes) { return pool->try_acquire(pool->lock(), bytes); };
  auto a = acquire(1);
  auto b = acquire(9 * rlspec::kPageBytes);
  check(a && b && a->size() == rlspec::kPageBytes, "whole pages, up to the bound");
  check(!acquire(1), "not a byte more");
  check(!acquire(UINT64_MAX) && !acquire(UINT64_MAX - 100), "sizes that overflow");
  check(reinterpret_cast<std::uintptr_t>(b->data()) % rlspec::kPageBytes == 0, "aligned");
  char* const place = b->data();
  b.reset();
  check(pool->in_use() == rlspec::kPageBytes, "a dropped buffer is not in use");
  b = acquire(9 * rlspec::kPageBytes);
  check(b && b->data() == place, "used pages are used again");
  b.reset();
  auto c = acquire(5 * rlspec::kPageBytes);
  check(c && pool->high_water() <= pool->bound(), "what is kept makes room for another size");
  pool->stop_keeping();
}

std::vector<std::pair<void*, std::size_t>> pinned;  // in the order of pinning
bool can_pin = true;
int chosen = -1;

int choose(int device) {
  chosen = device;
  return 0;
}

int pin(void* data, std::size_t size, unsigned) {
  if (!can_pin) return 1;
  pinned.emplace_back(data, size);
  return 0;
}

int unpin(void* data) {
  const auto is_it = [&](const auto& entry) { return entry.first == data; };
  const auto found = std::find_if(pinned.begin(), pinned.end(), is_it);
  check(found != pinned.end() && *static_cast<volatile char*>(data) == 0, "unpinned once, while it is still mapped");
  if (found != pinned.end()) pinned.erase(found);
  return 0;
}

void test_pinning() {
  {
    const auto pool = std::make_shared<Pool>(10 * rlspec::kPageBytes, rlspec::Pinning{pin, unpin, choose, 3});
    auto a = pool->try_acquire(pool->lock(), 4 * rlspec::kPageBytes);
    check(pinned.size() == 1 && pinned[0].first == a->data() && pinned[0].second == a->size(), "pinned as a whole");
    check(chosen == 3, "for the device asked for");
    a.reset();
    a = pool->try_acquire(pool->lock(), 4 * rlspec::kPageBytes);
    check(pinned.size() == 1, "used again without pinning it again");
    a.reset();
    a = pool->try_acquire(pool->lock(), 8 * rlspec::kPageBytes);
    check(pinned.size() == 1 && pinned[0].first == a->data(), "what made room is pinned no longer");
    can_pin = false;
    auto b = pool->try_acquire(pool->lock(), rlspec::kPageBytes);
    check(b && pinned.size() == 1, "memory that cannot be pinned is memory");
    can_pin = true;
    a.reset();
    pool->stop_keeping();
    check(pinned.empty(), "nor is what is given back");
  }
  check(pinned.empty(), "and the pool leaves nothing pinned");
}

// What is not known to be in the cache is taken for cached; what is, is told to the page, whatever became of the file.
void test_page_cache(const std::string& folder) {
  const std::string path = folder + "/cache.bin";
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{3 * 4096 + 5}, std::size_t{5 << 20}}) {
    const std::string content = file_of(path, size, 8);
    const rlspec::File file(path);
    const rlspec::PageCache cache(file);
    check(cache.held(0, size) == size, "all of a file just written");
    check(cache.held(size / 2, size) == size - size / 2, "to the last byte");
    if (size > 4096) {
      ::fsync(file.descriptor());
      ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
      const std::uint64_t held = cache.held(0, size);
      check(held == 0 || held == size, "none, or all on a file system that keeps its files there");
    }
    std::ofstream(path, std::ios::binary | std::ios::app) << std::string(9000, 'x');
    check(cache.held(0, size + 9000) <= size + 9000 && cache.held(size + 5000, size + 6000) <= 1000, "a grown file");
    check(::truncate(path.c_str(), 0) == 0 && cache.held(0, size) <= size, "a shrunk file");
  }
  std::remove(path.c_str());
}

void test_every_way(const std::string& folder) {
  const std::string path = folder + "/stream.bin";
  const std::string content = file_of(path, 3 * rlspec::kChunkBytes + 12345, 1);
  std::mt19937 random(2);
  std::vector<Request> requests{{0, 0, content.size()}, {0, 0, 0}, {0, content.size(), content.size()},
                                {0, content.size() - 1, content.size()}, {0, 4096, 8192}, {0, 64, 65}};
  for (int i = 0; i < 60; ++i) {
    const std::uint64_t begin = random() % content.size();
    const std::uint64_t longest = i % 3 == 0 ? content.size() : 9000;
    requests.push_back({0, begin, std::min<std::uint64_t>(content.size(), begin + random() % longest)});
  }
  for (const Io io : kAll) {
    for (const int workers : {1, 4}) {
      for (const std::uint64_t bound : {content.size() + 3 * rlspec::kPageBytes, std::size_t{1} << 28}) {
        const auto pool = std::make_shared<Pool>(bound);
        Reader reader({path}, requests, pool, workers, io);
        for (const Request& request : requests) {
          const Block block = take(reader);
          check(holds(block, content, request), "bytes as in the file");
          check(reinterpret_cast<std::uintptr_t>(block.data) % rlspec::kDataAlign == 0, "aligned in memory");
        }
        check(reader.done() && pool->in_use() == 0 && pool->high_water() <= bound, "the bound is kept");
      }
    }
  }
  std::remove(path.c_str());
}

void test_held(const std::string& folder) {
  const std::string path = folder + "/held.bin";
  const std::string content = file_of(path, 100'000, 3);
  const std::vector<Request> requests{{0, 0, 40'000}, {0, 40'000, 80'000}, {0, 80'000, 100'000}};
  const auto pool = std::make_shared<Pool>(60'000);
  std::vector<Block> kept;
  {
    Reader reader({path}, requests, pool, 2, Io::kAuto);
    kept.push_back(take(reader));
    expect_kind([&] { take(reader); }, "buffers_held", "no room for the next");
    kept.clear();
    kept.push_back(take(reader));
    check(holds(kept[0], content, requests[1]), "it goes on once there is room");
  }
  check(holds(kept[0], content, requests[1]), "a block outlives its reader");
  kept.clear();
  check(pool->in_use() == 0, "and gives its memory back");
  expect_kind([&] { Reader({path}, {{0, 0, 60'000}}, pool, 1, Io::kAuto); }, "tensor_too_large", "past the bound");
  std::remove(path.c_str());
}

void test_errors(const std::string& folder) {
  const std::string path = folder + "/short.bin";
  const std::string content = file_of(path, 50'000, 4);
  for (const Io io : kAll) {
    const auto pool = std::make_shared<Pool>(1 << 20);
    Reader reader({path, folder + "/none"}, {{0, 10, 20}, {0, 40'000, 50'001}, {1, 0, 1}}, pool, 3, io);
    check(holds(take(reader), content, {0, 10, 20}), "what lies before the end is read");
    expect_kind([&] { take(reader); }, "read_failed", "a file that ends early");
    Reader missing({folder + "/none"}, {{0, 0, 1}}, pool, 1, io);
    expect_kind([&] { take(missing); }, "open_failed", "no file");
  }
  // Cut while it is read: an error or the bytes, never anything else, and no signal.
  for (int trial = 0; trial < 30; ++trial) {
    const std::string whole = file_of(path, 1 << 20, 5);
    const auto pool = std::make_shared<Pool>(1 << 22);
    std::vector<Request> requests;
    for (std::uint64_t at = 0; at < whole.size(); at += 1 << 14) requests.push_back({0, at, at + (1 << 14)});
    Reader reader({path}, requests, pool, 2, kAll[trial % 3]);
    std::thread cutter([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(40 * trial));
      check(::truncate(path.c_str(), 1000) == 0, "cut");
    });
    try {
      for (const Request& request : requests) {
        const Block block = take(reader);
        check(block.size == request.end - request.begin, "whole blocks only");
      }
    } catch (const rlspec::Error& error) {
      check(error.kind() == rlspec::ErrorKind::kReadFailed, "a named error");
    }
    cutter.join();
  }
  std::remove(path.c_str());
}

// Readers that are dropped at any moment, and blocks that another thread drops.
std::size_t open_files() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

void test_many_files(const std::string& folder) {
  constexpr int kFiles = 60;
  std::vector<std::string> paths, contents;
  std::vector<Request> requests;
  std::uint64_t all = 0;
  for (int i = 0; i < kFiles; ++i) {
    paths.push_back(folder + "/many" + std::to_string(i));
    contents.push_back(file_of(paths.back(), 5000, static_cast<unsigned>(i)));
    for (const std::uint64_t begin : {0, 2000}) {
      requests.push_back({static_cast<std::size_t>(i), begin, begin + 3000});
      all += rlspec::pool_bytes(requests.back());
    }
  }
  const std::size_t before = open_files();
  const auto pool = std::make_shared<Pool>(all);
  Reader reader(paths, requests, pool, 4, Io::kAuto);
  std::size_t most = 0;
  for (int i = 0; i < 400 && (pool->in_use() < all || open_files() > before + 4); ++i) {
    most = std::max(most, open_files());
    std::this_thread::sleep_for(5ms);
  }
  check(pool->in_use() == all, "all is read ahead");
  check(open_files() <= before + 4, "two files stay open when all is read");
  check(most <= before + 2 * (4 + 3) + 1, "no more are open than are read from");
  for (const Request& request : requests) {
    check(holds(take(reader), contents[request.file], request), "the bytes of many files");
  }
  for (const std::string& path : paths) std::remove(path.c_str());
}

void test_abandoned(const std::string& folder) {
  const std::string path = folder + "/abandoned.bin";
  const std::string content = file_of(path, 1 << 20, 6);
  std::vector<Request> requests;
  for (std::uint64_t at = 0; at + 30'000 < content.size(); at += 30'000) requests.push_back({0, at, at + 30'000});
  for (int trial = 0; trial < 40; ++trial) {
    const auto pool = std::make_shared<Pool>(200'000);
    Reader reader({path}, requests, pool, 4, kAll[trial % 3]);
    std::thread dropper;
    for (int i = 0; i < trial % 20; ++i) {
      auto block = std::make_shared<Block>(take(reader));
      check(holds(*block, content, requests[i]), "in order");
      if (dropper.joinable()) dropper.join();
      dropper = std::thread([block = std::move(block)]() mutable { block.reset(); });
    }
    if (dropper.joinable()) dropper.join();
  }
  std::remove(path.c_str());
}

}  // namespace

void stream_tests(const std::string& folder) {
  test_pool();
  test_pinning();
  test_page_cache(folder);
  test_every_way(folder);
  test_held(folder);
  test_errors(folder);
  test_many_files(folder);
  test_abandoned(folder);
}
