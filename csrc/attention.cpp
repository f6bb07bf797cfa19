#include "attention.hpp"

#include <algorithm>

namespace fastmtp {
namespace {

PageView view(const Segment& segment, int page, int layer, int head) {
  const Cache& cache = *segment.cache;
  PageView page_view{cache.keys(page, layer, head), cache.values(page, layer, head), nullptr, nullptr, kPageTokens};
  if (segment.tree) {
    page_view.tree = segment.tree->base() - page * kPageTokens;
    if ((page + 1) * kPageTokens < cache.capacity()) {
      page_view.next_keys = cache.keys(page + 1, layer, head);
      page_view.next_values = cache.values(page + 1, layer, head);
    }
  }
  return page_view;
}

// With few rows the pages are shared out among the threads; with many there is work for all without that, and the
// partial results of every page would take too much memory.
constexpr int kRowsByPage = 16;

}  // namespace

Attention::Attention(const Shape& shape, const std::vector<Segment>& segments, const std::vector<int>& windows)
    : shape_(shape), segments_(segments), partial_size_(kPartialHeader + round_up(shape.head_size, kLanes)) {
  const int group = shape.heads / shape.key_heads;
  for (size_t s = 0; s < segments.size(); s++) {
    const Segment& segment = segments[s];
    const int queries = segment.count * group;
    for (int first = 0; first < queries; first += kTileQueries)
      tiles_.push_back({int(s), rows_, first, std::min(kTileQueries, queries - first)});
    for (int i = 0; i < segment.count; i++) {
      positions_.push_back(segment.position(i));
      paths_.push_back(segment.path(i));
    }
    rows_ += segment.count;
  }
  by_page_ = rows_ <= kRowsByPage;
  if (by_page_)
    for (int position : positions_) pages_ = std::max(pages_, position / kPageTokens + 1);

  for (int window : windows) {
    if (std::any_of(plans_.begin(), plans_.end(), [&](const Plan& made) { return made.window == window; })) continue;
    Plan made{window, {}};
    int first = 0;
    for (int tile = 1; tile <= int(tiles_.size()); tile++) {
      // Tiles of a segment that are not too many share a page while it is in the cache of one core.
      if (by_page_ && tile < int(tiles_.size()) && tiles_[tile].segment == tiles_[first].segment) continue;
      add_items(made, first, tile - 1);
      first = tile;
    }
    plans_.push_back(std::move(made));
  }
}

void Attention::add_items(Plan& made, int first_tile, int last_tile) const {
  const int group = shape_.heads / shape_.key_heads;
  const Tile &first = tiles_[first_tile], &last = tiles_[last_tile];
  const auto begin = positions_.begin() + first.first_row + first.first_query / group;
  const auto end = positions_.begin() + last.first_row + (last.first_query + last.count - 1) / group + 1;
  const int first_page = first_seen(*std::min_element(begin, end), made.window) / kPageTokens;
  const int last_page = *std::max_element(begin, end) / kPageTokens;
  for (int head = 0; head < shape_.key_heads; head++) {
    if (!by_page_) made.items.push_back({first_tile, last_tile, head, first_page, last_page});
    if (by_page_)
      for (int page = first_page; page <= last_page; page++)
        made.items.push_back({first_tile, last_tile, head, page, page});
  }
}

const Attention::Plan& Attention::plan(int window) const {
  return *std::find_if(plans_.begin(), plans_.end(), [&](const Plan& made) { return made.window == window; });
}

size_t Attention::scratch(int threads) const {
  const size_t results = size_t(rows_) * shape_.heads * pages_;
  return (results + size_t(threads) * kTileQueries) * partial_size_;
}

float* Attention::partial(Runtime& runtime, int row, int head, int page) const {
  const size_t place = (size_t(row) * shape_.heads + head) * pages_ + (by_page_ ? page : 0);
  return runtime.partials.get() + place * partial_size_;
}

void Attention::attend(Runtime& runtime, Team& team, int layer, int window, const uint16_t* queries,
                       const void* after) const {
  const std::vector<Item>& items = plan(window).items;
  const int group = shape_.heads / shape_.key_heads, size = shape_.head_size;
  float* own = runtime.partials.get() + (size_t(rows_) * shape_.heads * pages_ + size_t(team.id) * kTileQueries) * partial_size_;
  const auto keys = [&](const Item& item, int page) {
    return segments_[tiles_[item.first_tile].segment].cache->keys(page, layer, item.key_head);
  };
  team.each(int(items.size()), [&](int index) {
    const Item& item = items[index];
    const Item* following = index + team.count < int(items.size()) ? &items[index + team.count] : nullptr;
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
          const int position = positions_[row], before = page * kPageTokens;
          totals[i] = partial(runtime, row, head, page);
          seen[i] = {
              queries + (size_t(row) * shape_.heads + head) * size,
              std::clamp(first_seen(position, window) - before, 0, kPageTokens),
              std::clamp(position + 1 - before, 0, kPageTokens),
              // The first page's result is the total so far; later ones are merged into it.
              by_page_ || page == item.first_page ? totals[i] : own + size_t(i) * partial_size_,
              paths_[row],
          };
        }
        runtime.kernels.attend(seen, tile.count, view(segments_[tile.segment], page, layer, item.key_head), size, next);
        for (int i = 0; i < tile.count; i++)
          if (seen[i].partial != totals[i]) runtime.kernels.merge(totals[i], seen[i].partial, size);
      }
    }
  });
}

void Attention::gather(Runtime& runtime, int row, int window, float* out) const {
  const int size = shape_.head_size, position = positions_[row];
  const int first = by_page_ ? first_seen(position, window) / kPageTokens : 0;
  const int last = by_page_ ? position / kPageTokens : 0;
  for (int head = 0; head < shape_.heads; head++) {
    float* total = partial(runtime, row, head, first);
    for (int page = first + 1; page <= last; page++)
      runtime.kernels.merge(total, partial(runtime, row, head, page), size);
    for (int d = 0; d < size; d++) out[head * size + d] = total[kPartialHeader + d] / total[1];
  }
}

}  // namespace fastmtp
