#include "cache.hpp"

namespace fastmtp {

void Cache::move(const int32_t* slots, int count, int start) {
  const int width = round_up(head_size_, kLanes);
  const auto key = [&](int slot, int layer, int head) {
    const int place = slot % kPageTokens;
    return keys(slot / kPageTokens, layer, head) + size_t(place / kLanes) * head_size_ * kLanes + place % kLanes * 2;
  };
  const auto value = [&](int slot, int layer, int head) {
    const int place = slot % kPageTokens;
    return values(slot / kPageTokens, layer, head) + size_t(place / 2) * width * 2 + place % 2;
  };
  for (int layer = 0; layer < layers_; layer++)
    for (int head = 0; head < heads_; head++)
      for (int i = 0; i < count; i++) {
        if (slots[i] == start + i) continue;
        const uint16_t *old_key = key(slots[i], layer, head), *old_value = value(slots[i], layer, head);
        uint16_t *new_key = key(start + i, layer, head), *new_value = value(start + i, layer, head);
        for (int d = 0; d < head_size_; d += 2)
          for (int one = 0; one < 2; one++) new_key[d * kLanes + one] = old_key[d * kLanes + one];
        for (int d = 0; d < head_size_; d++) new_value[2 * d] = old_value[2 * d];
      }
}

}  // namespace fastmtp
