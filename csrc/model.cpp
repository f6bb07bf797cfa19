#include "model.hpp"

#include <algorithm>
#include <stdexcept>

namespace fastmtp {

Cache Stack::new_cache() const {
  std::vector<std::unique_ptr<State>> states;
  for (const Layer& layer : layers) states.push_back(layer.mixer->new_state());
  return Cache(std::move(states));
}

bool Stack::fits(const Cache& cache) const {
  return std::equal(layers.begin(), layers.end(), cache.layers().begin(), cache.layers().end(),
                    [](const Layer& layer, const auto& state) { return layer.mixer->fits(*state); });
}

Pass::Pass(Runtime& runtime, const Stack& stack, const std::vector<Segment>& segments)
    : runtime_(runtime), stack_(stack), batch_(runtime, segments, stack.ropes) {
  runtime.x.reserve(size_t(rows()) * stack.hidden);
  runtime.branch.reserve(size_t(rows()) * stride());
  for (const Layer& layer : stack.layers) {
    mixers_.push_back(layer.mixer->plan(batch_, int(mixers_.size())));
    layer.network->reserve(runtime, rows());
  }
}

void Pass::run(Team& team, float* states, float* last_inputs) const {
  batch_.set_angles(team);
  const Gains none, *out_norm = &none;
  auto mixer = mixers_.begin();
  for (const Layer& layer : stack_.layers) {
    team.each(Part::convert, rows(), [&](int m) {
      if (mixer == mixers_.begin()) std::fill_n(x(m), stack_.hidden, 0.0f);
      add_branch(team, m, *out_norm);
      if (last_inputs && &layer == &stack_.layers.back())
        std::copy_n(x(m), stack_.hidden, last_inputs + size_t(m) * stack_.hidden);
      convert_norm(team, m, layer.mixer_norm, layer.mixer->input());
    });
    (*mixer++)->run(team, branch(0), stride());
    team.each(Part::convert, rows(), [&](int m) {
      add_branch(team, m, layer.mixer_out_norm);
      convert_norm(team, m, layer.network_norm, layer.network->input());
    });
    layer.network->run(runtime_, team, rows(), branch(0), stride());
    out_norm = &layer.network_out_norm;
  }
  team.each(Part::norm, rows(), [&](int m) {
    add_branch(team, m, *out_norm);
    runtime_.norm(x(m), stack_.final_norm, stack_.epsilon, states + size_t(m) * stack_.hidden);
  });
}

void Pass::add_branch(const Team& team, int m, const Gains& out_norm) const {
  float* added = branch(m);
  if (!out_norm.empty()) runtime_.norm(branch(m), out_norm, stack_.epsilon, added = runtime_.own_row(team));
  runtime_.kernels.add(x(m), added, stack_.hidden);
}

void Pass::convert_norm(const Team& team, int m, const Gains& gains, const Matrix& matrix) const {
  runtime_.norm(x(m), gains, stack_.epsilon, runtime_.own_row(team));
  team.lap(Part::norm);
  runtime_.convert(matrix, runtime_.own_row(team), m);
}

Model::Model(Runtime& runtime, const Stack& stack, const Matrix& embedding, const Matrix& lm_head,
             float embedding_scale)
    : runtime(runtime), stack(stack), embedding(embedding), lm_head(lm_head), embedding_scale(embedding_scale) {
  if (stack.layers.empty()) throw std::invalid_argument("the stack has no layers");
  if (embedding.inputs() != stack.hidden || lm_head.inputs() != stack.hidden)
    throw std::invalid_argument("embedding and LM head must be [vocabulary, hidden]");
}

void Model::forward(const std::vector<Segment>& segments, const int32_t* tokens, float* states,
                    float* last_inputs) const {
  const Call call(runtime);
  const Pass pass(runtime, stack, segments);
  runtime.run([&](Team team) {
    team.each(Part::embed, pass.rows(), [&](int m) { embed(tokens[m], pass.branch(m)); });
    pass.run(team, states, last_inputs);
  });
}

void Model::embed(int token, float* out) const {
  embedding.unpack(token, out);
  for (int h = 0; h < stack.hidden; h++) out[h] *= embedding_scale;
}

}  // namespace fastmtp
