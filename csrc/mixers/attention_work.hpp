// How the work of attention is shared out among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "mixers/attention.hpp"

namespace fastmtp {

// Up to this many rows, each page of a segment is an item of work, so that there are items for all threads. With more
// rows there are enough items without that, and the partial results of every page would take too much memory.
constexpr int kRowsByPage = 16;

// What a page costs in tokens, before the first one.
constexpr int kPageCost = 32;

// Queries that share keys: some tokens of a segment times the query heads of one key head. Query i is of token
// i / group and of head i % group.
struct QueryTile {
  int segment, first_row, first_query, count;
};

// Work for one thread: some tiles of one segment, one key head, some pages. `middle` is the cost of all items before
// and of half of this one.
struct AttentionItem {
  int first_tile, last_tile, key_head, first_page, last_page;
  double middle;
};

// What there is to do in a layer: the same in all layers of one shape and window.
class AttentionWork {
 public:
  AttentionWork(const Batch& batch, const AttentionShape& shape, int window)
      : by_page(batch.rows <= kRowsByPage), batch_(batch), shape_(shape), window_(window) {
    if (by_page) pages = *std::max_element(batch.positions.begin(), batch.positions.end()) / kPageTokens + 1;
    int row = 0;
    for (size_t s = 0; s < batch.segments.size(); s++) {
      const int first_tile = int(tiles.size()), queries = batch.segments[s].count * shape.group();
      for (int first = 0; first < queries; first += kTileQueries)
        tiles.push_back({int(s), row, first, std::min(kTileQueries, queries - first)});
      row += batch.segments[s].count;
      // If a segment has few tiles they go over a page one after another, while it is in the cache of one core.
      if (by_page) add_items(first_tile, int(tiles.size()) - 1);
      for (int tile = first_tile; !by_page && tile < int(tiles.size()); tile++) add_items(tile, tile);
    }
  }

  // Whether the work of another layer of the same batch is the same.
  bool fits(const AttentionShape& shape, int window) const {
    return window == window_ && shape.heads == shape_.heads && shape.key_heads == shape_.key_heads;
  }

  int first_seen(int position) const { return window_ > 0 ? std::max(0, position - window_ + 1) : 0; }

  // The items of a thread: neighbouring ones, so that few results change cores.
  Items share(int thread, int threads) const { return {first_item(thread, threads), first_item(thread + 1, threads)}; }

  const bool by_page;  // an item for each page of a segment, otherwise one for each tile
  int pages = 1;       // with a partial result of their own
  std::vector<QueryTile> tiles;
  std::vector<AttentionItem> items;

 private:
  void add_items(int first_tile, int last_tile) {
    const QueryTile &first = tiles[first_tile], &last = tiles[last_tile];
    const auto begin = batch_.positions.begin() + first.first_row + first.first_query / shape_.group();
    const auto end = batch_.positions.begin() + last.first_row + (last.first_query + last.count - 1) / shape_.group();
    const int first_page = first_seen(*std::min_element(begin, end + 1)) / kPageTokens;
    const int last_page = *std::max_element(begin, end + 1) / kPageTokens;
    const int step = by_page ? 1 : last_page - first_page + 1;
    const int end_token = *std::max_element(begin, end + 1) + 1;
    for (int head = 0; head < shape_.key_heads; head++)
      for (int page = first_page; page <= last_page; page += step) {
        const int tokens = std::min(end_token, (page + step) * kPageTokens) - page * kPageTokens;
        const double cost = double(kPageCost + tokens) * (last_tile - first_tile + 1);
        items.push_back({first_tile, last_tile, head, page, page + step - 1, cost_ + cost / 2});
        cost_ += cost;
      }
  }
  int first_item(int thread, int threads) const {
    const auto before = [](const AttentionItem& item, double cost) { return item.middle < cost; };
    return int(std::lower_bound(items.begin(), items.end(), cost_ * thread / threads, before) - items.begin());
  }

  const Batch& batch_;
  const AttentionShape& shape_;
  const int window_;
  double cost_ = 0;  // of all items
};

}  // namespace fastmtp
