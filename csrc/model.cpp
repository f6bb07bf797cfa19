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
    mixers_.push_back(layer.mixer->plan(batch_, int(mixers_.size()), mixers_.empty() ? nullptr : mixers_.back().get()));
    layer.network->reserve(runtime, rows());
  }
}

void Pass::run(Team& team, float* states, float* last_inputs) const {
  const int hidden = stack_.hidden;
  const Gains none;
  batch_.set_angles(team);
  const Layer& first = stack_.layers.front();
  add_branch(
      team,
      [&](const Then* then) {
        team.each_group(then->part, rows(), first.mixer->input().groups(), [&](int m, int group) {
          std::fill_n(x(m) + group * kGroup, std::min(kGroup, hidden - group * kGroup), 0.0f);
          (*then)(team, m, group);
        });
      },
      none, first.mixer_norm, first.mixer->input());
  auto mixer = mixers_.begin();
  for (auto layer = stack_.layers.begin(); layer != stack_.layers.end(); mixer++) {
    const Layer &own = *layer++, *next = layer == stack_.layers.end() ? nullptr : &*layer;
    if (last_inputs && !next)
      team.each(Part::norm, rows(), [&](int m) { std::copy_n(x(m), hidden, last_inputs + size_t(m) * hidden); });
    const auto mix = [&](const Then* then) {
      (*mixer)->run(team, left_of(own.mixer_norm), branch(0), stride(), then);
    };
    const auto process = [&](const Then* then) {
      own.network->run(runtime_, team, left_of(own.network_norm), rows(), branch(0), stride(), then);
    };
    add_branch(team, mix, own.mixer_out_norm, own.network_norm, own.network->input());
    if (next) {
      add_branch(team, process, own.network_out_norm, next->mixer_norm, next->mixer->input());
    } else {
      process(nullptr);
      norm_branch(team, own.network_out_norm);
    }
  }
  team.each(Part::norm, rows(), [&](int m) {
    runtime_.kernels.add(x(m), branch(m), hidden);
    runtime_.norm(x(m), stack_.final_norm, stack_.epsilon, states + size_t(m) * hidden);
  });
}

template <class Run>
void Pass::add_branch(Team& team, Run run, const Gains& out_norm, const Gains& gains, const Matrix& matrix) const {
  const auto add = [&](const Team&, int m, int group) {
    const int start = group * kGroup, size = std::min(kGroup, stack_.hidden - start);
    float* numbers = x(m) + start;
    runtime_.squares(m, group) = runtime_.kernels.add(numbers, branch(m) + start, size);
    runtime_.convert(runtime_.stream, matrix, numbers, m, group, gains.empty() ? nullptr : gains.data() + start);
  };
  const Then added(Part::norm, kGroup, add);
  if (out_norm.empty()) return run(&added);
  run(nullptr);
  norm_branch(team, out_norm);
  team.each_group(Part::norm, rows(), matrix.groups(), [&](int m, int group) { add(team, m, group); });
}

void Pass::norm_branch(Team& team, const Gains& gains) const {
  if (gains.empty()) return;
  team.each(Part::norm, rows(), [&](int m) { runtime_.norm(branch(m), gains, stack_.epsilon, branch(m)); });
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
  runtime.run([&](Team& team) {
    team.each(Part::embed, pass.rows(), [&](int m) { embed(tokens[m], pass.branch(m)); });
    pass.run(team, states, last_inputs);
  });
}

void Model::embed(int token, float* out) const {
  embedding.unpack(token, out);
  for (int h = 0; h < stack.hidden; h++) out[h] *= embedding_scale;
}

}  // namespace fastmtp
