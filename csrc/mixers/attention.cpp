#include "mixers/attention.hpp"

#include <algorithm>
#include <numeric>

#include "mixers/attention_work.hpp"

namespace fastmtp {
namespace {

constexpr float kLog2E = 1.44269504f;  // the kernels' softmax is of powers of two

// Pages start at fixed positions, each gives a partial result, and a query's partial results are merged in the order
// of pages. So a query's result does not depend on the tokens beside it, nor on which thread computes which page.
class AttentionPass : public Mixer::Pass {
 public:
  AttentionPass(const Attention& attention, const Batch& batch, int layer, const AttentionPass* before)
      : attention_(attention), shape_(attention.shape), batch_(batch), runtime_(batch.runtime), layer_(layer),
        wide_stride_(stride_of(attention.query_key_value)),
        partial_size_(kPartialHeader + round_up(shape_.head_size, kLanes)),
        work_(before && before->work_->fits(shape_, attention.window)
                  ? before->work_
                  : std::make_shared<const AttentionWork>(batch, shape_, attention.window)) {
    runtime_.reserve(runtime_.stream, batch.rows, attention.query_key_value.inputs());
    runtime_.reserve(runtime_.inner, batch.rows, attention.out.inputs());
    runtime_.reserve_groups(all_heads());
    runtime_.wide.reserve(size_t(batch.rows) * wide_stride_);
    runtime_.queries.reserve(size_t(batch.rows) * attention.out.inputs() + kLanes);
    const size_t results = size_t(batch.rows) * shape_.heads * work_->pages;
    runtime_.partials.reserve((results + size_t(runtime_.threads) * kTileQueries) * partial_size_);
  }

  void run(Team& team, Norm norm, float* out, int stride, const Then* then) const override {
    const auto turn = [&](const Team& own, int m, int head) {
      const float* numbers = wide(m) + head * shape_.head_size;
      head < shape_.heads ? rotate(own, numbers, attention_.query_norm, m, shape_.scale * kLog2E, query(m, head))
                          : store(own, numbers, m, head - shape_.heads);
    };
    const Then turned(Part::rope, shape_.head_size, turn);
    fetch_places(team);
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
  int all_heads() const { return shape_.heads + 2 * shape_.key_heads; }
  float* wide(int m) const { return runtime_.wide.get() + size_t(m) * wide_stride_; }
  uint16_t* query(int m, int head) const {
    return runtime_.queries.get() + (size_t(m) * shape_.heads + head) * shape_.head_size;
  }
  float* partial(int row, int head, int page) const {
    const size_t index = (size_t(row) * shape_.heads + head) * work_->pages + (work_->by_page ? page : 0);
    return runtime_.partials.get() + index * partial_size_;
  }
  const KeyValues& state_of(int segment) const {
    return static_cast<const KeyValues&>(*batch_.segments[segment].cache->layers()[layer_]);
  }
  const uint16_t* keys_of(const AttentionItem& item, int page) const {
    return state_of(work_->tiles[item.first_tile].segment).keys(page, item.key_head);
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
    const KeyValues& state = state_of(batch_.places[m].segment);
    const int slot = batch_.places[m].slot, size = shape_.head_size;
    const int page = slot / kPageTokens, in_page = slot % kPageTokens;
    if (index >= shape_.key_heads)
      return runtime_.kernels.store_value(numbers, size, in_page, state.values(page, index - shape_.key_heads));
    uint16_t rotated[kLargestHead];
    rotate(team, numbers, attention_.key_norm, m, 1.0f, rotated);
    runtime_.kernels.store_key(rotated, size, in_page, state.keys(page, index));
  }

  PageView page_view(int segment, int page, int head) const {
    const KeyValues& state = state_of(segment);
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

  // Begins to fetch the memory that this thread will write keys and values to; with many rows others are in the way.
  void fetch_places(const Team& team) const {
    const int size = shape_.head_size;
    for (int index = 0; work_->by_page && index < 2 * shape_.key_heads; index++) {
      const int last_block = ((shape_.heads + index + 1) * size - 1) / kLanes;
      if (!team.has(last_block, attention_.query_key_value.blocks())) continue;
      for (int m = 0; m < batch_.rows; m++) {
        const auto [segment, slot] = batch_.places[m];
        const int page = slot / kPageTokens, in_page = slot % kPageTokens;
        const bool is_first = m == 0 || batch_.places[m - 1].segment != segment;
        if (index < shape_.key_heads && (is_first || slot % kLanes == 0)) {
          const int block = in_page / kLanes * kLanes;
          fetch(state_of(segment).keys(page, index), key_offset(block, size), key_offset(block + kLanes, size));
        } else if (index >= shape_.key_heads && (is_first || slot % 2 == 0)) {
          const int pair = in_page / 2 * 2;
          const uint16_t* values = state_of(segment).values(page, index - shape_.key_heads);
          fetch(values, value_offset(pair, size), value_offset(pair + 2, size));
        }
      }
    }
  }

  // Begins to fetch the keys and values that this thread reads first.
  void fetch_first(const Team& team) const {
    const Items share = work_->share(team.id, team.count);
    if (share.empty()) return;
    const AttentionItem& item = work_->items[share.begin];
    fetch(keys_of(item, item.first_page), 0, 2 * head_numbers(shape_.head_size));
  }

  static void fetch(const uint16_t* numbers, size_t begin, size_t end) {
    for (; begin < end; begin += 32) __builtin_prefetch(numbers + begin, 0, 2);
    asm volatile("");  // without it GCC sees no effect, and leaves out the call
  }

  // Partial results of all queries.
  void attend(Team& team) const {
    // The next product's weights are fetched during a thread's last page: where its share begins (see Team::split).
    const PackedView after = attention_.out.view();
    const void* weights = after.data + after.block_bytes * (size_t(attention_.out.blocks()) * team.id / team.count);
    const auto& items = work_->items;
    const auto share = [&](int thread) { return work_->share(thread, team.count); };
    team.phase(Part::attention, int(items.size()), 0, share, [&](int begin, int end) {
      for (int index = begin; index < end; index++) {
        const AttentionItem& item = items[index];
        const AttentionItem* following = index + 1 < end ? &items[index + 1] : nullptr;
        for (int page = item.first_page; page <= item.last_page; page++) {
          const void* next = page < item.last_page ? keys_of(item, page + 1)
                             : following           ? keys_of(*following, following->first_page)
                                                   : weights;
          for (int t = item.first_tile; t <= item.last_tile; t++, next = keys_of(item, page))
            attend_tile(team, work_->tiles[t], item, page, next);
        }
      }
    });
  }

  void attend_tile(const Team& team, const QueryTile& tile, const AttentionItem& item, int page,
                   const void* next) const {
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
          std::clamp(work_->first_seen(position) - before, 0, kPageTokens),
          std::clamp(position + 1 - before, 0, kPageTokens),
          // The first page's result is the total so far; later ones are merged into it.
          work_->by_page || page == item.first_page ? totals[i] : own + size_t(i) * partial_size_,
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
    const int first = work_->by_page ? work_->first_seen(position) / kPageTokens : 0;
    const int last = work_->by_page ? position / kPageTokens : 0;
    float* total = partial(row, head, first);
    for (int page = first + 1; page <= last; page++) runtime_.kernels.merge(total, partial(row, head, page), size);
    runtime_.kernels.divide(total, size, out);
  }

  const Attention& attention_;
  const AttentionShape& shape_;
  const Batch& batch_;
  Runtime& runtime_;
  const int layer_, wide_stride_, partial_size_;
  const std::shared_ptr<const AttentionWork> work_;
};

}  // namespace

std::unique_ptr<State> Attention::new_state() const {
  return std::make_unique<KeyValues>(shape.key_heads, shape.head_size);
}

bool Attention::fits(const State& state) const {
  const auto* known = dynamic_cast<const KeyValues*>(&state);
  return known && known->heads == shape.key_heads && known->head_size == shape.head_size;
}

std::unique_ptr<Mixer::Pass> Attention::plan(const Batch& batch, int layer, const Pass* before) const {
  return std::make_unique<AttentionPass>(*this, batch, layer, dynamic_cast<const AttentionPass*>(before));
}

}  // namespace fastmtp
