#include "reader.hpp"

#include <algorithm>
#include <utility>

#include "status.hpp"

namespace rlspec {

std::uint64_t pool_bytes(const Request& request) {
  if (request.begin == request.end) return 0;
  return whole_pages(kDataAlign + whole_pages(request.end) - request.begin / kPageBytes * kPageBytes);
}

Reader::Reader(std::vector<std::string> paths, const std::vector<Request>& requests, std::shared_ptr<Pool> pool,
               int workers, Io io)
    : paths_(std::move(paths)), io_(io), pool_(std::move(pool)), sources_(paths_.size()) {
  items_.reserve(requests.size());
  for (const Request& request : requests) {
    if (pool_bytes(request) > pool_->bound()) {
      throw Error(ErrorKind::kTensorTooLarge, std::to_string(pool_bytes(request)) + " bytes wanted, " +
                                                  std::to_string(pool_->bound()) + " allowed");
    }
    items_.emplace_back();
    items_.back().request = request;
    items_.back().at = request.begin;
  }
  try {
    for (int i = 0; i < std::max(workers, 1); ++i) threads_.emplace_back([this] { work(); });
  } catch (...) {
    stop();
    throw;
  }
}

Reader::~Reader() { stop(); }

void Reader::stop() {
  if (pool_->forked()) {
    for (std::thread& thread : threads_) thread.detach();
    if (!threads_.empty()) new std::shared_ptr<Pool>(pool_);  // stays: what they wait for cannot be destroyed
    return;
  }
  {
    const Pool::Lock lock = pool_->lock();
    stopping_ = true;
  }
  pool_->changed().notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  items_.clear();
  pool_->stop_keeping();
}

bool Reader::next(std::chrono::milliseconds patience, Block& out) {
  if (pool_->forked()) throw Error(ErrorKind::kForked, "begin anew in this one");
  Pool::Lock lock = pool_->lock();
  Item& item = items_.at(delivered_);
  const auto stuck = [&] {
    return allocated_ == delivered_ && !item.error && !pool_->has_room(lock, pool_bytes(item.request));
  };
  if (!pool_->changed().wait_for(lock, patience, [&] { return item.ready() || stuck(); })) return false;
  if (item.error) std::rethrow_exception(item.error);
  if (!item.ready()) {
    throw Error(ErrorKind::kBuffersHeld, std::to_string(pool_bytes(item.request)) + " bytes wanted, " +
                                             std::to_string(pool_->bound()) + " allowed");
  }
  Block block{std::move(item.buffer), item.data, static_cast<std::size_t>(item.request.end - item.request.begin)};
  if (allocated_ == delivered_) ++allocated_;  // no bytes, so no thread had to look at it
  ++delivered_;
  taken_ = std::max(taken_, delivered_);
  ahead_ -= pool_bytes(item.request);
  lock.unlock();  // before a buffer may go, whose way back to the pool takes the lock
  pool_->changed().notify_all();
  out = std::move(block);
  return true;
}

bool Reader::done() {
  const Pool::Lock lock = pool_->lock();
  return delivered_ == items_.size();
}

void Reader::work() {
  Bounce bounce;
  Pool::Lock lock = pool_->lock();
  while (!stopping_) {
    Job job;
    if (!take(lock, job)) {
      pool_->changed().wait(lock);
      continue;
    }
    ++job.item->running;
    const std::shared_ptr<const Source> source = job.item->source;
    char* const place = job.item->data + (job.begin - job.item->request.begin);
    std::exception_ptr error;
    lock.unlock();
    try {
      source->read(job.begin, job.end, place, bounce);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    --job.item->running;
    if (error && !job.item->error) job.item->error = error;
    if (job.item->ready()) {
      if (job.item->running == 0) job.item->source.reset();
      pool_->changed().notify_all();
    }
  }
}

// The next chunk to read; false where there is none now.
bool Reader::take(const Pool::Lock& lock, Job& job) {
  for (;;) {
    while (taken_ < allocated_ && (items_[taken_].error || items_[taken_].at == items_[taken_].request.end)) ++taken_;
    if (taken_ == allocated_) {
      if (allocated_ == items_.size() || (ahead_ > 0 && ahead_ >= kReadAheadBytes)) return false;
      if (!allocate(lock, items_[allocated_])) return false;
      ++allocated_;
      continue;
    }
    Item& item = items_[taken_];
    job.item = &item;
    job.begin = item.at;
    job.end = std::min(item.request.end, (item.at / kPageBytes * kPageBytes) + kChunkBytes);
    item.at = job.end;
    return true;
  }
}

// Give `item` its place in memory. False: there is no room now.
bool Reader::allocate(const Pool::Lock& lock, Item& item) {
  const Request& request = item.request;
  const std::uint64_t bytes = pool_bytes(request);
  if (bytes == 0) return true;
  try {
    item.source = source(request.file);
    item.buffer = pool_->try_acquire(lock, bytes);
  } catch (...) {
    item.error = std::current_exception();
    pool_->changed().notify_all();
    ahead_ += bytes;
    return true;
  }
  if (!item.buffer) return false;
  // As far into the buffer as into the page of the file, and on to the next aligned byte.
  const std::uint64_t offset = request.begin % kPageBytes;
  item.data = item.buffer->data() + (offset + kDataAlign - 1) / kDataAlign * kDataAlign;
  ahead_ += bytes;
  return true;
}

std::shared_ptr<const Source> Reader::source(std::size_t file) {
  std::shared_ptr<const Source> open = sources_.at(file).lock();
  if (!open) {
    open = std::make_shared<const Source>(paths_[file], io_);
    sources_[file] = open;
  }
  if (open != latest_[0]) {
    latest_[1] = std::move(latest_[0]);
    latest_[0] = open;
  }
  return open;
}

}  // namespace rlspec
