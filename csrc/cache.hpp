// What the layers of a stack store for one sequence.
//
// A cache does not know its length: a forward pass says at which slot it writes, so taking tokens back costs nothing.
// Caches may share pages; the one that writes to a shared page copies it first.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.hpp"
#include "memory.hpp"

namespace fastmtp {

// One layer's part of a cache; made by the layer's mixer.
class State {
 public:
  virtual ~State() = default;

  // How many bf16 numbers a page of kPageTokens tokens takes.
  virtual size_t page_numbers() const = 0;
  // Page number `index`, the next one or one that there is already, is at `page` from now on.
  virtual void set_page(int index, uint16_t* page) = 0;
  // Another page gets the first tokens of one; its other slots may hold anything.
  virtual void copy_page(const uint16_t* page, uint16_t* copy, int tokens) const = 0;
  // The tokens in these slots, in ascending order, move to the slots from `start` on, none to a later slot.
  virtual void commit(int start, const std::vector<int32_t>& slots) = 0;
};

using Page = std::shared_ptr<uint16_t[]>;  // holds a page of every layer, in order

// Memory for the pages of one stack's caches. New memory is slow to write to first, so some that was written to is kept.
class Pages : public std::enable_shared_from_this<Pages> {
 public:
  explicit Pages(size_t numbers) : numbers(numbers) {}

  // With any contents. Throws std::bad_alloc.
  Page take() {
    Buffer<uint16_t> memory = spare();
    if (!memory) memory = allocate<uint16_t>(numbers);
    const Free free = memory.get_deleter();
    return Page(memory.release(), [pool = shared_from_this(), free](uint16_t* page) {
      pool->give(Buffer<uint16_t>(page, free));
    });
  }

  // Has one more page for later, written to; false if there are enough. Throws std::bad_alloc.
  bool prepare() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (spare_.size() >= kSpare) return false;
    }
    Buffer<uint16_t> memory = allocate<uint16_t>(numbers);
    std::fill_n(memory.get(), numbers, uint16_t(0));
    give(std::move(memory));
    return true;
  }

  const size_t numbers;  // bf16 numbers of a page

 private:
  // For the copy of a shared page, and the one after it.
  static constexpr size_t kSpare = 2;

  Buffer<uint16_t> spare() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.empty()) return nullptr;
    Buffer<uint16_t> memory = std::move(spare_.back());
    spare_.pop_back();
    return memory;
  }

  void give(Buffer<uint16_t> memory) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.size() < kSpare) spare_.push_back(std::move(memory));
  }

  std::mutex mutex_;
  std::vector<Buffer<uint16_t>> spare_;
};

class Cache {
 public:
  Cache(std::vector<std::unique_ptr<State>> layers, std::shared_ptr<Pages> memory)
      : layers_(std::move(layers)), memory_(std::move(memory)) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  int capacity() const { return int(pages_.size()) * kPageTokens; }
  const std::vector<std::unique_ptr<State>>& layers() const { return layers_; }
  Pages& memory() const { return *memory_; }

  size_t page_numbers() const { return memory_->numbers; }

  // Room for this many tokens; the contents stay. Throws std::bad_alloc before the capacity changes.
  void reserve(int tokens) {
    while (capacity() < tokens) {
      pages_.push_back(memory_->take());
      set_page(int(pages_.size()) - 1);
    }
  }

  // Room to write `count` tokens from slot `start` on, in pages of its own, which keep what is in the first `kept` slots.
  // Throws std::bad_alloc.
  void prepare(int start, int count, int kept) {
    reserve(start + count);
    for (int index = start / kPageTokens; index * kPageTokens < start + count; index++) {
      if (pages_[index].use_count() == 1) continue;
      Page copy = memory_->take();
      const int tokens = std::clamp(kept - index * kPageTokens, 0, kPageTokens);
      size_t part = 0;
      for (const auto& layer : layers_) {
        layer->copy_page(pages_[index].get() + part, copy.get() + part, tokens);
        part += layer->page_numbers();
      }
      pages_[index] = std::move(copy);
      set_page(index);
    }
  }

  // An empty cache gets the first tokens of another one of the same shape, in the same pages.
  void share(const Cache& source, int tokens) {
    for (int index = 0; index * kPageTokens < tokens; index++) {
      pages_.push_back(source.pages_[index]);
      set_page(index);
    }
  }

  void commit(int start, const std::vector<int32_t>& slots) {
    if (slots.empty()) return;
    prepare(start, int(slots.size()), slots.back() + 1);
    for (const auto& layer : layers_) layer->commit(start, slots);
  }

  // Where the pages are.
  std::vector<uintptr_t> pages() const {
    std::vector<uintptr_t> found;
    for (const Page& page : pages_) found.push_back(reinterpret_cast<uintptr_t>(page.get()));
    return found;
  }

 private:
  void set_page(int index) {
    uint16_t* part = pages_[index].get();
    for (const auto& layer : layers_) {
      layer->set_page(index, part);
      part += layer->page_numbers();
    }
  }

  std::vector<std::unique_ptr<State>> layers_;
  std::shared_ptr<Pages> memory_;
  std::vector<Page> pages_;
};

}  // namespace fastmtp
