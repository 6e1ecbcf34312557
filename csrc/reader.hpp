// Byte ranges of files, read ahead by worker threads and handed out in the order asked for.
//
//   requests   0 ... delivered ......... allocated ............ end
//              handed out  | read, or being read | not looked at
//                            <= kReadAheadBytes, or one request
//
// A request is given its buffer in its turn, never before an earlier one, so that those ahead cannot starve it; its
// bytes are then read in chunks by as many threads as are free.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"
#include "source.hpp"

namespace rlspec {

inline constexpr std::size_t kDataAlign = 64;  // of the first byte of every block in memory
inline constexpr std::uint64_t kChunkBytes = std::uint64_t{1} << 20;
inline constexpr std::uint64_t kReadAheadBytes = std::uint64_t{32} << 20;

// Bytes [begin, end) of the file `file` (an index into the reader's paths).
struct Request {
  std::size_t file;
  std::uint64_t begin;
  std::uint64_t end;
};

// What was asked for: `size` bytes at `data`, which lies in `buffer` (null for no bytes).
struct Block {
  std::unique_ptr<Buffer> buffer;
  char* data = nullptr;
  std::size_t size = 0;
};

// What a request takes from the pool: its bytes, the rest of the pages at both ends, and room to align.
std::uint64_t pool_bytes(const Request& request);

class Reader {
 public:
  // Throws kTensorTooLarge where one request alone is more than the pool holds.
  Reader(std::vector<std::string> paths, const std::vector<Request>& requests, std::shared_ptr<Pool> pool, int workers,
         Io io);
  ~Reader();  // joins the threads; blocks that were handed out stay valid
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // The next block goes to `out`. False: it was not read within `patience`; ask again. Throws what went wrong with
  // it, and kBuffersHeld where blocks handed out earlier leave it no room. Only after a kBuffersHeld may the caller
  // go on.
  bool next(std::chrono::milliseconds patience, Block& out);

  bool done();  // every block was handed out

 private:
  struct Item {
    Request request;
    std::unique_ptr<Buffer> buffer;
    char* data = nullptr;
    std::uint64_t at = 0;        // first byte of the file that no thread has taken on
    std::size_t running = 0;     // chunks being read
    std::exception_ptr error;
    std::shared_ptr<const Source> source;  // until the bytes are read

    bool ready() const { return error || (at == request.end && running == 0); }
  };
  struct Job {
    Item* item = nullptr;
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };

  void work();
  bool take(const Pool::Lock& lock, Job& job);
  bool allocate(const Pool::Lock& lock, Item& item);
  std::shared_ptr<const Source> source(std::size_t file);
  void stop();

  const std::vector<std::string> paths_;
  const Io io_;
  const std::shared_ptr<Pool> pool_;  // its lock guards all that follows
  std::vector<Item> items_;
  std::vector<std::weak_ptr<const Source>> sources_;  // open while they are read from
  std::array<std::shared_ptr<const Source>, 2> latest_;  // and the last two: requests may alternate between a pair
  std::size_t delivered_ = 0;
  std::size_t allocated_ = 0;
  std::size_t taken_ = 0;  // requests before this one have no chunk left to take
  std::uint64_t ahead_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace rlspec
