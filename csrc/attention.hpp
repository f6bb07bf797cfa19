// Attention of all rows of a forward pass over the pages of their caches.
//
// Pages lie at fixed positions, each gives a partial result, and a query's partial results are merged from the first
// page on. So a query's result does not depend on the tokens beside it, nor on which thread did which page.
#pragma once

#include <vector>

#include "cache.hpp"
#include "model.hpp"
#include "runtime.hpp"
#include "tree.hpp"

namespace fastmtp {

// Some tokens of one sequence; their keys and values are written to the cache from `start` on. They are consecutive,
// or the last nodes of a tree.
struct Segment {
  Cache* cache;
  int start, count;
  const Tree* tree = nullptr;

  int node(int i) const { return start - tree->base() + i; }
  int position(int i) const { return tree ? tree->position(node(i)) : start + i; }
  const int32_t* path(int i) const { return tree ? tree->path(node(i)) : nullptr; }
};

class Attention {
 public:
  // Plans the work for segments whose caches have the room. `windows` are those of the layers.
  Attention(const Shape& shape, const std::vector<Segment>& segments, const std::vector<int>& windows);

  // Floats of working memory for `threads` threads.
  size_t scratch(int threads) const;

  // Partial results of all queries of a layer, by the whole team. `queries` is [M, heads * D] in bf16, rotated and
  // scaled; `after` is what this thread reads next, and is fetched meanwhile.
  void attend(Runtime& runtime, Team& team, int layer, int window, const uint16_t* queries,
              const void* after) const;

  // The heads' outputs of one row, [heads * D].
  void gather(Runtime& runtime, int row, int window, float* out) const;

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
  struct Plan {
    int window;
    std::vector<Item> items;
  };

  const Plan& plan(int window) const;
  void add_items(Plan& plan, int first_tile, int last_tile) const;
  int first_seen(int position, int window) const { return window > 0 && position >= window ? position - window + 1 : 0; }
  float* partial(Runtime& runtime, int row, int head, int page) const;

  Shape shape_;
  std::vector<Segment> segments_;
  std::vector<int> positions_;          // by row
  std::vector<const int32_t*> paths_;  // by row; see Query
  std::vector<Tile> tiles_;
  std::vector<Plan> plans_;
  bool by_page_;  // one item for each page of a segment, else one for each tile
  int pages_ = 1, partial_size_, rows_ = 0;
};

}  // namespace fastmtp
