#include "mixers/key_values.hpp"

namespace fastmtp {

void KeyValues::reserve(int tokens, uint16_t* page) {
  pages_.resize(tokens / kPageTokens);
  pages_.back() = page;
}

void KeyValues::commit(int start, const std::vector<int32_t>& slots) {
  const int width = round_up(head_size_, kLanes);
  const auto key = [&](int slot, int head) {
    const int place = slot % kPageTokens;
    return keys(slot / kPageTokens, head) + size_t(place / kLanes) * head_size_ * kLanes + place % kLanes * 2;
  };
  const auto value = [&](int slot, int head) {
    const int place = slot % kPageTokens;
    return values(slot / kPageTokens, head) + size_t(place / 2) * width * 2 + place % 2;
  };
  for (int head = 0; head < heads_; head++)
    for (int i = 0; i < int(slots.size()); i++) {
      if (slots[i] == start + i) continue;
      const uint16_t *old_key = key(slots[i], head), *old_value = value(slots[i], head);
      uint16_t *new_key = key(start + i, head), *new_value = value(start + i, head);
      for (int d = 0; d < head_size_; d += 2)
        for (int one = 0; one < 2; one++) new_key[d * kLanes + one] = old_key[d * kLanes + one];
      for (int d = 0; d < head_size_; d++) new_value[2 * d] = old_value[2 * d];
    }
}

}  // namespace fastmtp
