#include "cache.hpp"

namespace fastmtp {

void Cache::reserve(int tokens) {
  while (capacity() < tokens) {
    Buffer<uint16_t> page = allocate<uint16_t>(page_bytes() / sizeof(uint16_t));
    uint16_t* part = page.get();
    for (const auto& layer : layers_) {
      layer->reserve(capacity() + kPageTokens, part);
      part += layer->page_numbers();
    }
    pages_.push_back(std::move(page));
  }
}

void Cache::commit(int start, const std::vector<int32_t>& slots) {
  for (const auto& layer : layers_) layer->commit(start, slots);
}

size_t Cache::page_bytes() const {
  size_t numbers = 0;
  for (const auto& layer : layers_) numbers += layer->page_numbers();
  return numbers * sizeof(uint16_t);
}

}  // namespace fastmtp
