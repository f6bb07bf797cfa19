#include "forward.hpp"

#include <algorithm>
#include <cmath>

namespace fastmtp {
namespace {

std::vector<int> windows_of(const Stack& stack) {
  std::vector<int> windows;
  for (const Layer& layer : stack.layers) windows.push_back(layer.window);
  return windows;
}

// One pass through a stack: its phases, each done by the whole team. What a phase does to a row (or a head, or a
// block of outputs) is done by one thread, so nothing depends on their number.
class Pass {
 public:
  Pass(Runtime& runtime, const Stack& stack, const std::vector<Segment>& segments, int widest_input)
      : runtime_(runtime), stack_(stack), shape_(stack.shape), segments_(segments),
        attention_(stack.shape, segments, windows_of(stack)) {
    for (const Segment& segment : segments) {
      segment.cache->reserve(segment.start + segment.count);
      rows += segment.count;
    }
    const Layer& layer = stack.layers.front();
    const size_t count = rows;
    const int heads_size = shape_.heads * shape_.head_size;
    wide_stride_ = std::max(stride_of(layer.query_key_value), stride_of(layer.gate_up));
    branch_stride = stride_of(layer.down);
    row_size_ = round_up(std::max({widest_input, heads_size, layer.down.inputs()}), kGroup) + kLanes;
    runtime.reserve_operand(rows, std::max({widest_input, shape_.hidden, heads_size, layer.down.inputs()}));
    runtime.x.reserve(count * shape_.hidden);
    runtime.branch.reserve(count * branch_stride);
    runtime.wide.reserve(count * wide_stride_);
    runtime.queries.reserve(count * heads_size + kLanes);
    runtime.rows.reserve(size_t(runtime.threads) * row_size_);
    runtime.partials.reserve(attention_.scratch(runtime.threads));
    runtime.angles.reserve(count * stack.ropes.size() * shape_.head_size);
  }

  int rows = 0, branch_stride;

  // A thread's own memory for one row.
  float* own_row(const Team& team) { return runtime_.rows.get() + size_t(team.id) * row_size_; }
  float* branch(int m) { return runtime_.branch.get() + size_t(m) * branch_stride; }

  // From `branch`, taken as the input [M, H], through all layers and the final norm.
  void run(Team& team, float* states, float* last_inputs = nullptr) {
    set_angles(team);
    const Gains none, *out_norm = &none;
    int index = 0;
    for (const Layer& layer : stack_.layers) {
      team.each(rows, [&](int m) {
        if (index == 0) std::fill_n(x(m), shape_.hidden, 0.0f);
        add_branch(team, m, *out_norm);
        if (last_inputs && &layer == &stack_.layers.back())
          std::copy_n(x(m), shape_.hidden, last_inputs + size_t(m) * shape_.hidden);
        convert_norm(team, layer.input_norm, layer.query_key_value, m);
      });
      runtime_.matmul(team, layer.query_key_value, rows, wide(0), wide_stride_);
      team.each(2 * shape_.key_heads, [&](int item) {
        const int head = item % shape_.key_heads;
        item < shape_.key_heads ? place_keys(team, layer, index, head) : place_queries(team, layer, head);
      });
      attention_.attend(runtime_, team, index, layer.window, runtime_.queries.get(),
                        share_of(team, layer.out));
      team.each(rows, [&](int m) {
        attention_.gather(runtime_, m, layer.window, own_row(team));
        runtime_.convert(layer.out, own_row(team), m);
      });
      runtime_.matmul(team, layer.out, rows, branch(0), branch_stride);
      team.each(rows, [&](int m) {
        add_branch(team, m, layer.attention_out_norm);
        convert_norm(team, layer.feed_forward_norm, layer.gate_up, m);
      });
      runtime_.matmul(team, layer.gate_up, rows, wide(0), wide_stride_);
      team.each(rows, [&](int m) {
        runtime_.kernels.activate(wide(m), layer.down.inputs(), shape_.gelu, own_row(team));
        runtime_.convert(layer.down, own_row(team), m);
      });
      runtime_.matmul(team, layer.down, rows, branch(0), branch_stride);
      out_norm = &layer.feed_forward_out_norm;
      index++;
    }
    team.each(rows, [&](int m) {
      add_branch(team, m, *out_norm);
      norm(x(m), stack_.final_norm, states + size_t(m) * shape_.hidden);
    });
  }

  void norm(const float* row, const Gains& gains, float* out) {
    runtime_.kernels.norm(row, gains.data(), int(gains.size()), shape_.epsilon, out);
  }

 private:
  // Where a thread's share of a matrix begins (see Team::split).
  static const void* share_of(const Team& team, const Matrix& matrix) {
    const PackedView view = matrix.view();
    return view.data + view.block_bytes * (size_t(matrix.blocks()) * team.id / team.count);
  }

  float* x(int m) { return runtime_.x.get() + size_t(m) * shape_.hidden; }
  float* wide(int m) { return runtime_.wide.get() + size_t(m) * wide_stride_; }
  // Cosines, then sines, of one row for one rope.
  float* angles(int rope, int m) { return runtime_.angles.get() + (size_t(rope) * rows + m) * shape_.head_size; }

  void add_branch(Team& team, int m, const Gains& out_norm) {
    float* added = branch(m);
    if (!out_norm.empty()) norm(branch(m), out_norm, added = own_row(team));
    runtime_.kernels.add(x(m), added, shape_.hidden);
  }

  void convert_norm(Team& team, const Gains& gains, const Matrix& matrix, int m) {
    norm(x(m), gains, own_row(team));
    runtime_.convert(matrix, own_row(team), m);
  }

  void set_angles(Team& team) {
    const int half = shape_.head_size / 2;
    team.each(int(stack_.ropes.size()), [&](int r) {
      int m = 0;
      for (const Segment& segment : segments_)
        for (int i = 0; i < segment.count; i++, m++)
          for (int d = 0; d < half; d++) {
            const Rope& rope = stack_.ropes[r];
            // In single precision, as the reference implementations compute it.
            const float angle = float(segment.position(i)) * rope.inverse_frequencies[d];
            angles(r, m)[d] = float(std::cos(double(angle))) * rope.scale;
            angles(r, m)[half + d] = float(std::sin(double(angle))) * rope.scale;
          }
    });
  }

  void rotate(const Team& team, const float* head, const Gains& gains, const float* angle, float scale, uint16_t* out) {
    if (!gains.empty()) {
      norm(head, gains, own_row(team));
      head = own_row(team);
    }
    runtime_.kernels.rotate(head, angle, angle + shape_.head_size / 2, shape_.head_size, scale, out);
  }

  // The queries that share one key head.
  void place_queries(const Team& team, const Layer& layer, int key_head) {
    const int size = shape_.head_size, group = shape_.heads / shape_.key_heads;
    for (int m = 0; m < rows; m++)
      for (int head = key_head * group; head < (key_head + 1) * group; head++)
        rotate(team, wide(m) + head * size, layer.query_norm, angles(layer.rope, m), shape_.attention_scale,
               runtime_.queries.get() + (size_t(m) * shape_.heads + head) * size);
  }

  // The keys and values of one head, into the caches.
  void place_keys(const Team& team, const Layer& layer, int index, int key_head) {
    const int size = shape_.head_size;
    int m = 0;
    for (const Segment& segment : segments_)
      for (int i = 0; i < segment.count; i++, m++) {
        const float* key = wide(m) + (shape_.heads + key_head) * size;
        const float* value = key + shape_.key_heads * size;
        uint16_t rotated[kLargestHead];
        rotate(team, key, layer.key_norm, angles(layer.rope, m), 1.0f, rotated);
        const int slot = segment.start + i, page = slot / kPageTokens;
        runtime_.kernels.store_token(rotated, value, size, slot % kPageTokens,
                                     segment.cache->keys(page, index, key_head),
                                     segment.cache->values(page, index, key_head));
      }
  }

  Runtime& runtime_;
  const Stack& stack_;
  const Shape& shape_;
  const std::vector<Segment>& segments_;
  Attention attention_;
  int wide_stride_, row_size_;
};

// The scores of all rows, by the whole team.
void product(Runtime& runtime, Team& team, const Matrix& matrix, const float* states, int rows, float* out,
             int stride) {
  team.each(rows, [&](int m) { runtime.convert(matrix, states + size_t(m) * matrix.inputs(), m); });
  runtime.matmul(team, matrix, rows, out, stride);
}

void embed(const Embedding& embedding, int token, int hidden, float* out) {
  embedding.matrix.unpack(token, out);
  for (int h = 0; h < hidden; h++) out[h] *= embedding.scale;
}

}  // namespace

void target_forward(Runtime& runtime, const Stack& stack, const Embedding& embedding,
                    const std::vector<Segment>& segments, const int32_t* tokens, float* states, float* last_inputs) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  Pass pass(runtime, stack, segments, stack.shape.hidden);
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    team.each(pass.rows, [&](int m) { embed(embedding, tokens[m], stack.shape.hidden, pass.branch(m)); });
    pass.run(team, states, last_inputs);
  });
}

void head_forward(Runtime& runtime, const Stack& stack, const Projection& projection, const Embedding& embedding,
                  const std::vector<Segment>& segments, const int32_t* tokens, const float* before, float* states) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  const int hidden = stack.shape.hidden;
  Pass pass(runtime, stack, segments, 2 * hidden);
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    team.each(pass.rows, [&](int m) {
      float* joined = pass.own_row(team);
      embed(embedding, tokens[m], hidden, joined);
      pass.norm(joined, projection.token_norm, joined + hidden);
      pass.norm(before + size_t(m) * hidden, projection.hidden_norm, joined);
      runtime.convert(projection.matrix, joined, m);
    });
    runtime.matmul(team, projection.matrix, pass.rows, pass.branch(0), pass.branch_stride);
    pass.run(team, states);
  });
}

void scores(Runtime& runtime, const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  runtime.reserve_operand(rows, matrix.inputs());
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    product(runtime, team, matrix, states, rows, out, stride);
  });
}

std::vector<int32_t> choices(Runtime& runtime, const Matrix& matrix, const float* states, int rows) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  const int stride = stride_of(matrix);
  float* logits = runtime.logits.reserve(size_t(rows) * stride);
  runtime.reserve_operand(rows, matrix.inputs());
  std::vector<int32_t> chosen(rows);
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    product(runtime, team, matrix, states, rows, logits, stride);
    team.each(rows, [&](int m) { chosen[m] = runtime.kernels.argmax(logits + size_t(m) * stride, matrix.outputs()); });
  });
  return chosen;
}

}  // namespace fastmtp
