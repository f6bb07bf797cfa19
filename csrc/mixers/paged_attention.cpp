#include "mixers/paged_attention.hpp"

#include <algorithm>

namespace fastmtp {
namespace {

// With few rows the pages are shared out among the threads; with many there is work for all without that, and the
// partial results of every page would take too much memory.
constexpr int kRowsByPage = 16;

}  // namespace

PagedAttention::PagedAttention(const AttentionShape& shape, int window, const Batch& batch,
                               std::vector<KeyValues*> states)
    : shape_(shape), window_(window), batch_(batch), states_(std::move(states)),
      partial_size_(kPartialHeader + round_up(shape.head_size, kLanes)), by_page_(batch.rows <= kRowsByPage) {
  const int group = shape.heads / shape.key_heads;
  int row = 0;
  for (size_t s = 0; s < batch.segments.size(); s++) {
    const int queries = batch.segments[s].count * group;
    for (int first = 0; first < queries; first += kTileQueries)
      tiles_.push_back({int(s), row, first, std::min(kTileQueries, queries - first)});
    row += batch.segments[s].count;
  }
  if (by_page_)
    for (int position : batch.positions) pages_ = std::max(pages_, position / kPageTokens + 1);

  int first = 0;
  for (int tile = 1; tile <= int(tiles_.size()); tile++) {
    // Tiles of a segment that are not too many share a page while it is in the cache of one core.
    if (by_page_ && tile < int(tiles_.size()) && tiles_[tile].segment == tiles_[first].segment) continue;
    add_items(first, tile - 1);
    first = tile;
  }

  const size_t results = size_t(batch.rows) * shape.heads * pages_;
  batch.runtime.partials.reserve((results + size_t(batch.runtime.threads) * kTileQueries) * partial_size_);
}

void PagedAttention::add_items(int first_tile, int last_tile) {
  const int group = shape_.heads / shape_.key_heads;
  const Tile &first = tiles_[first_tile], &last = tiles_[last_tile];
  const auto begin = batch_.positions.begin() + first.first_row + first.first_query / group;
  const auto end = batch_.positions.begin() + last.first_row + (last.first_query + last.count - 1) / group + 1;
  const int first_page = first_seen(*std::min_element(begin, end)) / kPageTokens;
  const int last_page = *std::max_element(begin, end) / kPageTokens;
  for (int head = 0; head < shape_.key_heads; head++) {
    if (!by_page_) items_.push_back({first_tile, last_tile, head, first_page, last_page});
    if (by_page_)
      for (int page = first_page; page <= last_page; page++)
        items_.push_back({first_tile, last_tile, head, page, page});
  }
}

PageView PagedAttention::view(int segment, int page, int head) const {
  const KeyValues& held = *states_[segment];
  PageView page_view{held.keys(page, head), held.values(page, head), nullptr, nullptr, kPageTokens};
  if (const Tree* tree = batch_.segments[segment].tree) {
    page_view.tree = tree->base() - page * kPageTokens;
    if ((page + 1) * kPageTokens < batch_.segments[segment].cache->capacity()) {
      page_view.next_keys = held.keys(page + 1, head);
      page_view.next_values = held.values(page + 1, head);
    }
  }
  return page_view;
}

float* PagedAttention::partial(int row, int head, int page) const {
  const size_t place = (size_t(row) * shape_.heads + head) * pages_ + (by_page_ ? page : 0);
  return batch_.runtime.partials.get() + place * partial_size_;
}

void PagedAttention::attend(Team& team, const uint16_t* queries, const void* after) const {
  const Kernels& kernels = batch_.runtime.kernels;
  const int group = shape_.heads / shape_.key_heads, size = shape_.head_size;
  float* own = partial(batch_.rows, 0, 0) + size_t(team.id) * kTileQueries * partial_size_;
  const auto keys = [&](const Item& item, int page) {
    return states_[tiles_[item.first_tile].segment]->keys(page, item.key_head);
  };
  team.each(int(items_.size()), [&](int index) {
    const Item& item = items_[index];
    const Item* following = index + team.count < int(items_.size()) ? &items_[index + team.count] : nullptr;
    for (int page = item.first_page; page <= item.last_page; page++) {
      const void* next = page < item.last_page ? keys(item, page + 1)
                         : following           ? keys(*following, following->first_page)
                                               : after;
      for (int t = item.first_tile; t <= item.last_tile; t++, next = keys(item, page)) {
        const Tile& tile = tiles_[t];
        Query seen[kTileQueries];
        float* totals[kTileQueries];
        for (int i = 0; i < tile.count; i++) {
          const int query = tile.first_query + i, row = tile.first_row + query / group;
          const int head = item.key_head * group + query % group;
          const int position = batch_.positions[row], before = page * kPageTokens;
          totals[i] = partial(row, head, page);
          seen[i] = {
              queries + (size_t(row) * shape_.heads + head) * size,
              std::clamp(first_seen(position) - before, 0, kPageTokens),
              std::clamp(position + 1 - before, 0, kPageTokens),
              // The first page's result is the total so far; later ones are merged into it.
              by_page_ || page == item.first_page ? totals[i] : own + size_t(i) * partial_size_,
              batch_.paths[row],
          };
        }
        kernels.attend(seen, tile.count, view(tile.segment, page, item.key_head), size, next);
        for (int i = 0; i < tile.count; i++)
          if (seen[i].partial != totals[i]) kernels.merge(totals[i], seen[i].partial, size);
      }
    }
  });
}

void PagedAttention::gather(int row, float* out) const {
  const int size = shape_.head_size, position = batch_.positions[row];
  const int first = by_page_ ? first_seen(position) / kPageTokens : 0;
  const int last = by_page_ ? position / kPageTokens : 0;
  for (int head = 0; head < shape_.heads; head++) {
    float* total = partial(row, head, first);
    for (int page = first + 1; page <= last; page++)
      batch_.runtime.kernels.merge(total, partial(row, head, page), size);
    for (int d = 0; d < size; d++) out[head * size + d] = total[kPartialHeader + d] / total[1];
  }
}

}  // namespace fastmtp
