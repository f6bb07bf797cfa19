// What the layers of a stack store for one sequence.
//
// A cache does not know its length: a forward pass says at which slot it writes, so taking tokens back costs nothing.
// Caches may share pages; the one that writes to a shared page copies it first.
#pragma once

#include <algorithm>
#include <memory>
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
  // The tokens in these slots, in ascending order, move to the slots from `start` on, none to a later slot.
  virtual void commit(int start, const std::vector<int32_t>& slots) = 0;
};

class Cache {
 public:
  explicit Cache(std::vector<std::unique_ptr<State>> layers) : layers_(std::move(layers)) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  int capacity() const { return int(pages_.size()) * kPageTokens; }
  const std::vector<std::unique_ptr<State>>& layers() const { return layers_; }

  size_t page_numbers() const {
    size_t numbers = 0;
    for (const auto& layer : layers_) numbers += layer->page_numbers();
    return numbers;
  }

  // Room for this many tokens; the contents stay. Throws std::bad_alloc before the capacity changes.
  void reserve(int tokens) {
    while (capacity() < tokens) {
      pages_.push_back(new_page());
      set_page(int(pages_.size()) - 1);
    }
  }

  // Room to write `count` tokens from slot `start` on, in pages of its own. Throws std::bad_alloc.
  void prepare(int start, int count) {
    reserve(start + count);
    for (int index = start / kPageTokens; index * kPageTokens < start + count; index++) {
      if (pages_[index].use_count() == 1) continue;
      Page copy = new_page();
      std::copy_n(pages_[index].get(), page_numbers(), copy.get());
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
    prepare(start, int(slots.size()));
    for (const auto& layer : layers_) layer->commit(start, slots);
  }

  // Where the pages are.
  std::vector<uintptr_t> pages() const {
    std::vector<uintptr_t> found;
    for (const Page& page : pages_) found.push_back(reinterpret_cast<uintptr_t>(page.get()));
    return found;
  }

 private:
  using Page = std::shared_ptr<uint16_t[]>;  // holds a page of every layer, in order

  Page new_page() const { return allocate<uint16_t>(page_numbers()); }

  void set_page(int index) {
    uint16_t* part = pages_[index].get();
    for (const auto& layer : layers_) {
      layer->set_page(index, part);
      part += layer->page_numbers();
    }
  }

  std::vector<std::unique_ptr<State>> layers_;
  std::vector<Page> pages_;
};

}  // namespace fastmtp
