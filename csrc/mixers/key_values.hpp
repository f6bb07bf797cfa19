// Keys and values of one layer and one sequence, in bf16, in pages of 256 tokens.
//
// A page holds for each key/value head the keys, then the values (page_numbers in kernels.hpp says in which order).
#pragma once

#include "cache.hpp"

namespace fastmtp {

class KeyValues : public State {
 public:
  KeyValues(int heads, int head_size) : heads_(heads), head_size_(head_size) {}

  size_t page_numbers() const override { return size_t(heads_) * 2 * fastmtp::page_numbers(head_size_); }
  void reserve(int tokens, uint16_t* page) override;
  void commit(int start, const std::vector<int32_t>& slots) override;

  int heads() const { return heads_; }
  int head_size() const { return head_size_; }

  uint16_t* keys(int page, int head) const {
    return pages_[page] + size_t(head) * 2 * fastmtp::page_numbers(head_size_);
  }
  uint16_t* values(int page, int head) const { return keys(page, head) + fastmtp::page_numbers(head_size_); }

 private:
  int heads_, head_size_;
  std::vector<uint16_t*> pages_;  // in the cache's memory
};

}  // namespace fastmtp
