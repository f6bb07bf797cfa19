// Keys and values of one layer and one sequence, in bf16, in pages of 256 tokens.
//
// A page holds for each key/value head the keys, then the values (kernels.hpp describes their layout).
#pragma once

#include "cache.hpp"

namespace fastmtp {

class KeyValues : public State {
 public:
  KeyValues(int heads, int head_size) : heads(heads), head_size(head_size) {}

  size_t page_numbers() const override { return 2 * heads * head_numbers(head_size); }

  void set_page(int index, uint16_t* page) override {
    pages_.resize(std::max<size_t>(pages_.size(), index + 1));
    pages_[index] = page;
  }

  void copy_page(const uint16_t* page, uint16_t* copy, int tokens) const override {
    for (int head = 0; head < heads; head++) {
      std::copy_n(page, key_offset(round_up(tokens, kLanes), head_size), copy);
      page += head_numbers(head_size), copy += head_numbers(head_size);
      std::copy_n(page, value_offset(round_up(tokens, 2), head_size), copy);
      page += head_numbers(head_size), copy += head_numbers(head_size);
    }
  }

  void commit(int start, const std::vector<int32_t>& slots) override {
    for (int i = 0; i < int(slots.size()); i++) {
      const int from = slots[i], to = start + i;
      for (int head = 0; from != to && head < heads; head++) {
        const uint16_t* key = keys(from / kPageTokens, head) + key_offset(from % kPageTokens, head_size);
        const uint16_t* value = values(from / kPageTokens, head) + value_offset(from % kPageTokens, head_size);
        uint16_t* new_key = keys(to / kPageTokens, head) + key_offset(to % kPageTokens, head_size);
        uint16_t* new_value = values(to / kPageTokens, head) + value_offset(to % kPageTokens, head_size);
        for (int d = 0; d < head_size; d++) {
          new_key[d / 2 * 2 * kLanes + d % 2] = key[d / 2 * 2 * kLanes + d % 2];
          new_value[2 * d] = value[2 * d];
        }
      }
    }
  }

  uint16_t* keys(int page, int head) const { return pages_[page] + 2 * head * head_numbers(head_size); }
  uint16_t* values(int page, int head) const { return keys(page, head) + head_numbers(head_size); }

  const int heads, head_size;

 private:
  std::vector<uint16_t*> pages_;  // in the cache's memory
};

}  // namespace fastmtp
