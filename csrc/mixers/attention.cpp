#include "mixers/attention.hpp"

#include <algorithm>
#include <numeric>

namespace fastmtp {
namespace {

// Up to this many rows, each page of a segment is an item of work, so that there are items for all threads. With more
// rows there are enough items without that, and the partial results of every page would take too much memory.
constexpr int kRowsByPage = 16;

// What a page costs in tokens, before the first one.
constexpr int kPageCost = 32;

// Pages start at fixed positions, each gives a partial result, and a query's partial results are merged in the order
// of pages. So a query's result does not depend on the tokens beside it, nor on which thread computes which page.
class AttentionPass : public Mixer::Pass {
 public:
  AttentionPass(const Attention& attention, const Batch& batch, int layer)
      : attention_(attention), shape_(attention.shape), batch_(batch), runtime_(batch.runtime),
        wide_stride_(stride_of(attention.query_key_value)),
        partial_size_(kPartialHeader + round_up(shape_.head_size, kLanes)), by_page_(batch.rows <= kRowsByPage) {
    for (const Segment& segment : batch.segments)
      states_.push_back(static_cast<const KeyValues*>(segment.cache->layers()[layer].get()));
    if (by_page_) pages_ = *std::max_element(batch.positions.begin(), batch.positions.end()) / kPageTokens + 1;
    add_items();

    runtime_.reserve(runtime_.stream, batch.rows, attention.query_key_value.inputs());
    runtime_.reserve(runtime_.inner, batch.rows, attention.out.inputs());
    runtime_.reserve_groups(all_heads());
    runtime_.wide.reserve(size_t(batch.rows) * wide_stride_);
    runtime_.queries.reserve(size_t(batch.rows) * attention.out.inputs() + kLanes);
    const size_t results = size_t(batch.rows) * shape_.heads * pages_;
    runtime_.partials.reserve((results + size_t(runtime_.threads) * kTileQueries) * partial_size_);
  }

  void run(Team& team, Norm norm, float* out, int stride, const Then* then) const override {
    const auto turn = [&](const Team& own, int m, int head) {
      const float* numbers = wide(m) + head * shape_.head_size;
      head < shape_.heads ? rotate(own, numbers, attention_.query_norm, m, shape_.scale, query(m, head))
                          : store(own, numbers, m, head - shape_.heads);
    };
    const Then turned(Part::rope, shape_.head_size, turn);
    fetch_first(team);
    runtime_.matmul(team, Part::query_key_value, runtime_.stream, attention_.query_key_value, batch_.rows, wide(0),
                    wide_stride_, norm, &turned);
    attend(team);
    // The fewest heads that fill whole groups of the operand.
    const int together = kGroup / std::gcd(kGroup, shape_.head_size);
    team.each_group(Part::attention, batch_.rows, (shape_.heads - 1) / together + 1, [&](int m, int index) {
      const int first = index * together, last = std::min(shape_.heads, first + together);
      float* merged = runtime_.own_row(team);
      for (int head = first; head < last; head++)
        merge_pages(m, head, merged + (head - first) * shape_.head_size);
      const int group = first * shape_.head_size / kGroup, end = ((last * shape_.head_size) - 1) / kGroup + 1;
      for (int g = group; g < end; g++) runtime_.convert(runtime_.inner, attention_.out, merged + (g - group) * kGroup, m, g);
    });
    runtime_.matmul(team, Part::out, runtime_.inner, attention_.out, batch_.rows, out, stride, {}, then);
  }

 private:
  // Queries that share keys: some tokens of a segment times the query heads of one key head. Query i is of token
  // i / group and of head i % group.
  struct Tile {
    int segment, first_row, first_query, count;
  };
  // Work for one thread: some tiles of one segment, one key head, some pages. `middle` is the cost of all items before
  // and of half of this one.
  struct Item {
    int first_tile, last_tile, key_head, first_page, last_page;
    double middle;
  };

  void add_items() {
    int row = 0;
    for (size_t s = 0; s < batch_.segments.size(); s++) {
      const int first_tile = int(tiles_.size()), queries = batch_.segments[s].count * shape_.group();
      for (int first = 0; first < queries; first += kTileQueries)
        tiles_.push_back({int(s), row, first, std::min(kTileQueries, queries - first)});
      row += batch_.segments[s].count;
      // If a segment has few tiles they go over a page one after another, while it is in the cache of one core.
      if (by_page_) add_items(first_tile, int(tiles_.size()) - 1);
      for (int tile = first_tile; !by_page_ && tile < int(tiles_.size()); tile++) add_items(tile, tile);
    }
  }

  void add_items(int first_tile, int last_tile) {
    const Tile &first = tiles_[first_tile], &last = tiles_[last_tile];
    const auto begin = batch_.positions.begin() + first.first_row + first.first_query / shape_.group();
    const auto end = batch_.positions.begin() + last.first_row + (last.first_query + last.count - 1) / shape_.group();
    const int first_page = first_seen(*std::min_element(begin, end + 1)) / kPageTokens;
    const int last_page = *std::max_element(begin, end + 1) / kPageTokens;
    const int step = by_page_ ? 1 : last_page - first_page + 1;
    const int end_token = *std::max_element(begin, end + 1) + 1;
    for (int head = 0; head < shape_.key_heads; head++)
      for (int page = first_page; page <= last_page; page += step) {
        const int tokens = std::min(end_token, (page + step) * kPageTokens) - page * kPageTokens;
        const double cost = double(kPageCost + tokens) * (last_tile - first_tile + 1);
        items_.push_back({first_tile, last_tile, head, page, page + step - 1, cost_ + cost / 2});
        cost_ += cost;
      }
  }
  // The first item of a thread: neighbouring items are one thread's, so that few results change cores.
  int first_item(int thread, int threads) const {
    const auto before = [](const Item& item, double cost) { return item.middle < cost; };
    return int(std::lower_bound(items_.begin(), items_.end(), cost_ * thread / threads, before) - items_.begin());
  }

  int all_heads() const { return shape_.heads + 2 * shape_.key_heads; }
  float* wide(int m) const { return runtime_.wide.get() + size_t(m) * wide_stride_; }
  uint16_t* query(int m, int head) const {
    return runtime_.queries.get() + (size_t(m) * shape_.heads + head) * shape_.head_size;
  }
  float* partial(int row, int head, int page) const {
    const size_t index = (size_t(row) * shape_.heads + head) * pages_ + (by_page_ ? page : 0);
    return runtime_.partials.get() + index * partial_size_;
  }
  int first_seen(int position) const {
    return attention_.window > 0 ? std::max(0, position - attention_.window + 1) : 0;
  }

  void rotate(const Team& team, const float* head, const Gains& gains, int m, float scale, uint16_t* out) const {
    if (!gains.empty()) {
      runtime_.norm(head, gains, shape_.epsilon, runtime_.own_row(team));
      head = runtime_.own_row(team);
    }
    const float* angle = batch_.angles(attention_.rope, m);
    runtime_.kernels.rotate(head, angle, angle + shape_.head_size / 2, shape_.head_size, scale, out);
  }

  // One row's key or value into its cache: first the heads' keys, then their values.
  void store(const Team& team, const float* numbers, int m, int index) const {
    const KeyValues& state = *states_[batch_.places[m].segment];
    const int slot = batch_.places[m].slot, size = shape_.head_size;
    const int page = slot / kPageTokens, in_page = slot % kPageTokens;
    if (index >= shape_.key_heads)
      return runtime_.kernels.store_value(numbers, size, in_page, state.values(page, index - shape_.key_heads));
    uint16_t rotated[kLargestHead];
    rotate(team, numbers, attention_.key_norm, m, 1.0f, rotated);
    runtime_.kernels.store_key(rotated, size, in_page, state.keys(page, index));
  }

  PageView page_view(int segment, int page, int head) const {
    const KeyValues& state = *states_[segment];
    PageView view{state.keys(page, head), state.values(page, head), nullptr, nullptr, kPageTokens};
    if (const Tree* tree = batch_.segments[segment].tree) {
      view.tree = tree->base - page * kPageTokens;
      if ((page + 1) * kPageTokens < batch_.segments[segment].cache->capacity()) {
        view.next_keys = state.keys(page + 1, head);
        view.next_values = state.values(page + 1, head);
      }
    }
    return view;
  }

  // Begins to fetch the keys and values that this thread reads first.
  void fetch_first(const Team& team) const {
    const int index = first_item(team.id, team.count);
    if (index == first_item(team.id + 1, team.count)) return;
    const Item& item = items_[index];
    const uint16_t* keys = states_[tiles_[item.first_tile].segment]->keys(item.first_page, item.key_head);
    for (size_t number = 0; number < 2 * head_numbers(shape_.head_size); number += 32)
      __builtin_prefetch(keys + number, 0, 2);
  }

  // Partial results of all queries.
  void attend(Team& team) const {
    // The next product's weights are fetched during a thread's last page: where its share begins (see Team::split).
    const PackedView after = attention_.out.view();
    const void* weights = after.data + after.block_bytes * (size_t(attention_.out.blocks()) * team.id / team.count);
    const auto keys = [&](const Item& item, int page) {
      return states_[tiles_[item.first_tile].segment]->keys(page, item.key_head);
    };
    const auto share = [&](int thread) {
      return Items{first_item(thread, team.count), first_item(thread + 1, team.count)};
    };
    team.phase(Part::attention, int(items_.size()), 0, share, [&](int begin, int end) {
      for (int index = begin; index < end; index++) {
        const Item& item = items_[index];
        const Item* following = index + 1 < end ? &items_[index + 1] : nullptr;
        for (int page = item.first_page; page <= item.last_page; page++) {
          const void* next = page < item.last_page ? keys(item, page + 1)
                             : following           ? keys(*following, following->first_page)
                                                   : weights;
          for (int t = item.first_tile; t <= item.last_tile; t++, next = keys(item, page))
            attend_tile(team, tiles_[t], item, page, next);
        }
      }
    });
  }

  void attend_tile(const Team& team, const Tile& tile, const Item& item, int page, const void* next) const {
    const int group = shape_.group(), before = page * kPageTokens;
    float* own = partial(batch_.rows, 0, 0) + size_t(team.id) * kTileQueries * partial_size_;
    Query queries[kTileQueries];
    float* totals[kTileQueries];
    for (int i = 0; i < tile.count; i++) {
      const int row = tile.first_row + (tile.first_query + i) / group;
      const int head = item.key_head * group + (tile.first_query + i) % group;
      const int position = batch_.positions[row];
      totals[i] = partial(row, head, page);
      queries[i] = {
          query(row, head),
          std::clamp(first_seen(position) - before, 0, kPageTokens),
          std::clamp(position + 1 - before, 0, kPageTokens),
          // The first page's result is the total so far; later ones are merged into it.
          by_page_ || page == item.first_page ? totals[i] : own + size_t(i) * partial_size_,
          batch_.paths[row],
      };
    }
    runtime_.kernels.attend(queries, tile.count, page_view(tile.segment, page, item.key_head), shape_.head_size, next);
    for (int i = 0; i < tile.count; i++)
      if (queries[i].partial != totals[i])
        runtime_.kernels.merge(totals[i], queries[i].partial, shape_.head_size);
  }

  // One head's outputs of one row, [D].
  void merge_pages(int row, int head, float* out) const {
    const int size = shape_.head_size, position = batch_.positions[row];
    const int first = by_page_ ? first_seen(position) / kPageTokens : 0;
    const int last = by_page_ ? position / kPageTokens : 0;
    float* total = partial(row, head, first);
    for (int page = first + 1; page <= last; page++) runtime_.kernels.merge(total, partial(row, head, page), size);
    runtime_.kernels.divide(total, size, out);
  }

  const Attention& attention_;
  const AttentionShape& shape_;
  const Batch& batch_;
  Runtime& runtime_;
  const int wide_stride_, partial_size_;
  const bool by_page_;  // an item for each page of a segment, otherwise one for each tile
  int pages_ = 1;       // with a partial result of their own
  std::vector<const KeyValues*> states_;  // by segment
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  double cost_ = 0;  // of all items
};

}  // namespace

std::unique_ptr<State> Attention::new_state() const {
  return std::make_unique<KeyValues>(shape.key_heads, shape.head_size);
}

bool Attention::fits(const State& state) const {
  const auto* known = dynamic_cast<const KeyValues*>(&state);
  return known && known->heads == shape.key_heads && known->head_size == shape.head_size;
}

std::unique_ptr<Mixer::Pass> Attention::plan(const Batch& batch, int layer) const {
  return std::make_unique<AttentionPass>(*this, batch, layer);
}

}  // namespace fastmtp
