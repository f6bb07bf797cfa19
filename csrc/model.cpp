#include "model.hpp"

#include <algorithm>
#include <stdexcept>

namespace fastmtp {

Cache Stack::new_cache() const {
  std::vector<std::unique_ptr<State>> states;
  size_t numbers = 0;
  for (const Layer& layer : layers) {
    states.push_back(layer.mixer->new_state());
    numbers += states.back()->page_numbers();
  }
  if (!pages_ || pages_->numbers != numbers) pages_ = std::make_shared<Pages>(numbers);
  return Cache(std::move(states), pages_);
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
  const int hidden = stack_.hidden;
  batch_.set_angles(team);
  const Gains none, *out_norm = &none;
  auto mixer = mixers_.begin();
  for (const Layer& layer : stack_.layers) {
    const bool first = mixer == mixers_.begin(), last = &layer == &stack_.layers.back();
    norm_branch(team, *out_norm);
    const Norm mixed = add_branch(team, layer.mixer_norm, layer.mixer->input(), first);
    if (last_inputs && last)
      team.each(Part::norm, rows(), [&](int m) { std::copy_n(x(m), hidden, last_inputs + size_t(m) * hidden); });
    (*mixer++)->run(team, mixed, branch(0), stride());
    norm_branch(team, layer.mixer_out_norm);
    const Norm processed = add_branch(team, layer.network_norm, layer.network->input(), false);
    layer.network->run(runtime_, team, processed, rows(), branch(0), stride());
    out_norm = &layer.network_out_norm;
  }
  norm_branch(team, *out_norm);
  team.each(Part::norm, rows(), [&](int m) {
    runtime_.kernels.add(x(m), branch(m), hidden);
    runtime_.norm(x(m), stack_.final_norm, stack_.epsilon, states + size_t(m) * hidden);
  });
}

void Pass::norm_branch(const Team& team, const Gains& gains) const {
  if (gains.empty()) return;
  team.each(Part::norm, rows(), [&](int m) { runtime_.norm(branch(m), gains, stack_.epsilon, branch(m)); });
}

Norm Pass::add_branch(const Team& team, const Gains& gains, const Matrix& matrix, bool first) const {
  team.each_group(Part::norm, rows(), matrix.groups(), [&](int m, int group) {
    const int start = group * kGroup, size = std::min(kGroup, stack_.hidden - start);
    float* numbers = x(m) + start;
    if (first) std::fill_n(numbers, size, 0.0f);
    runtime_.squares(m, group) = runtime_.kernels.add(numbers, branch(m) + start, size);
    runtime_.convert(matrix, numbers, m, group, gains.empty() ? nullptr : gains.data() + start);
  });
  return gains.empty() ? Norm{} : Norm{stack_.hidden, stack_.epsilon};
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
