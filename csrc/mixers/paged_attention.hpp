// Softmax attention of all rows of a forward pass over the pages of one layer's keys and values.
//
// Pages lie at fixed positions, each gives a partial result, and a query's partial results are merged from the first
// page on. So a query's result does not depend on the tokens beside it, nor on which thread did which page.
#pragma once

#include <vector>

#include "batch.hpp"
#include "mixers/key_values.hpp"

namespace fastmtp {

struct AttentionShape {
  int heads, key_heads, head_size;
  float epsilon;  // of the norms of queries and keys
  float scale;    // of the scores
};

class PagedAttention {
 public:
  // Plans the work for the segments' states of a layer, and reserves working memory for it. A token sees the last
  // `window` tokens, or all of them if that is 0.
  PagedAttention(const AttentionShape& shape, int window, const Batch& batch, std::vector<KeyValues*> states);

  // Partial results of all queries, by the whole team. `queries` is [M, heads * D] in bf16, rotated and scaled;
  // `after` is what this thread reads next, and is fetched meanwhile.
  void attend(Team& team, const uint16_t* queries, const void* after) const;

  // The heads' outputs of one row, [heads * D].
  void gather(int row, float* out) const;

  const std::vector<KeyValues*>& states() const { return states_; }

 private:
  // Queries that share keys: some tokens of a segment times the heads of one key head. Query i of it belongs to
  // token i / group and head i % group.
  struct Tile {
    int segment, first_row, first_query, count;
  };
  // Some tiles of one segment, one key head, some pages.
  struct Item {
    int first_tile, last_tile, key_head, first_page, last_page;
  };

  void add_items(int first_tile, int last_tile);
  PageView view(int segment, int page, int head) const;
  int first_seen(int position) const { return window_ > 0 && position >= window_ ? position - window_ + 1 : 0; }
  float* partial(int row, int head, int page) const;

  const AttentionShape& shape_;
  const int window_;
  const Batch& batch_;
  const std::vector<KeyValues*> states_;  // by segment
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  const int partial_size_;
  const bool by_page_;  // one item for each page of a segment, else one for each tile
  int pages_ = 1;
};

}  // namespace fastmtp
