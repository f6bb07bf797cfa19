#include "mixers/attention.hpp"

namespace fastmtp {
namespace {

// Where a thread's share of a matrix begins (see Team::split).
const void* share_of(const Team& team, const Matrix& matrix) {
  const PackedView view = matrix.view();
  return view.data + view.block_bytes * (size_t(matrix.blocks()) * team.id / team.count);
}

class AttentionPass : public Mixer::Pass {
 public:
  AttentionPass(const Attention& attention, const Batch& batch, std::vector<KeyValues*> states)
      : attention_(attention), shape_(attention.shape), batch_(batch), runtime_(batch.runtime),
        wide_stride_(stride_of(attention.query_key_value)),
        paged_(shape_, attention.window, batch, std::move(states)) {
    for (const Matrix* matrix : {&attention.query_key_value, &attention.out}) {
      runtime_.reserve_operand(batch.rows, matrix->inputs());
      runtime_.reserve_rows(matrix->inputs());
    }
    runtime_.wide.reserve(size_t(batch.rows) * wide_stride_);
    runtime_.queries.reserve(size_t(batch.rows) * attention.out.inputs() + kLanes);
  }

  void run(Team& team, float* out, int stride) const override {
    runtime_.matmul(team, attention_.query_key_value, batch_.rows, wide(0), wide_stride_);
    team.each(2 * shape_.key_heads, [&](int item) {
      const int head = item % shape_.key_heads;
      item < shape_.key_heads ? place_keys(team, head) : place_queries(team, head);
    });
    paged_.attend(team, runtime_.queries.get(), share_of(team, attention_.out));
    team.each(batch_.rows, [&](int m) {
      paged_.gather(m, runtime_.own_row(team));
      runtime_.convert(attention_.out, runtime_.own_row(team), m);
    });
    runtime_.matmul(team, attention_.out, batch_.rows, out, stride);
  }

 private:
  float* wide(int m) const { return runtime_.wide.get() + size_t(m) * wide_stride_; }

  void rotate(const Team& team, const float* head, const Gains& gains, int m, float scale, uint16_t* out) const {
    if (!gains.empty()) {
      runtime_.norm(head, gains, shape_.epsilon, runtime_.own_row(team));
      head = runtime_.own_row(team);
    }
    const float* angle = batch_.angles(attention_.rope, m);
    runtime_.kernels.rotate(head, angle, angle + shape_.head_size / 2, shape_.head_size, scale, out);
  }

  // The queries that share one key head.
  void place_queries(const Team& team, int key_head) const {
    const int size = shape_.head_size, group = shape_.heads / shape_.key_heads;
    for (int m = 0; m < batch_.rows; m++)
      for (int head = key_head * group; head < (key_head + 1) * group; head++)
        rotate(team, wide(m) + head * size, attention_.query_norm, m, shape_.scale,
               runtime_.queries.get() + (size_t(m) * shape_.heads + head) * size);
  }

  // The keys and values of one head, into the caches.
  void place_keys(const Team& team, int key_head) const {
    const int size = shape_.head_size;
    int m = 0;
    for (size_t s = 0; s < batch_.segments.size(); s++)
      for (int i = 0; i < batch_.segments[s].count; i++, m++) {
        const float* key = wide(m) + (shape_.heads + key_head) * size;
        const float* value = key + shape_.key_heads * size;
        uint16_t rotated[kLargestHead];
        rotate(team, key, attention_.key_norm, m, 1.0f, rotated);
        const int slot = batch_.segments[s].start + i, page = slot / kPageTokens;
        const KeyValues& held = *paged_.states()[s];
        runtime_.kernels.store_token(rotated, value, size, slot % kPageTokens, held.keys(page, key_head),
                                     held.values(page, key_head));
      }
  }

  const Attention& attention_;
  const AttentionShape& shape_;
  const Batch& batch_;
  Runtime& runtime_;
  const int wide_stride_;
  const PagedAttention paged_;
};

}  // namespace

std::unique_ptr<State> Attention::new_state() const {
  return std::make_unique<KeyValues>(shape.key_heads, shape.head_size);
}

bool Attention::fits(const State& state) const {
  const auto* held = dynamic_cast<const KeyValues*>(&state);
  return held && held->heads() == shape.key_heads && held->head_size() == shape.head_size;
}

std::unique_ptr<Mixer::Pass> Attention::plan(const Batch& batch, int layer) const {
  std::vector<KeyValues*> states;
  for (const Segment& segment : batch.segments)
    states.push_back(static_cast<KeyValues*>(segment.cache->layers()[layer].get()));
  return std::make_unique<AttentionPass>(*this, batch, std::move(states));
}

}  // namespace fastmtp
