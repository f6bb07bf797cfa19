#include "head.hpp"

#include <stdexcept>

namespace fastmtp {

Head::Head(const Model& model, const Stack& stack, const Projection& projection)
    : model(model), stack(stack), projection(projection) {
  if (stack.layers.empty()) throw std::invalid_argument("the head's stack has no layers");
  if (stack.hidden != model.stack.hidden || projection.matrix.outputs() != model.stack.hidden)
    throw std::invalid_argument("the head's stack and projection must have the model's hidden size");
}

void Head::forward(const std::vector<Segment>& segments, const std::vector<int32_t>& tokens,
                   const std::vector<const float*>& before, float* after) const {
  Runtime& runtime = model.runtime;
  const Call call(runtime, Owner::head);
  const int hidden = stack.hidden;
  const Pass pass(runtime, stack, segments);
  runtime.reserve(runtime.stream, pass.rows(), 2 * hidden);
  runtime.run([&](Team& team) {
    team.each(Part::convert, pass.rows(), [&](int m) {
      float* joined = runtime.own_row(team);
      model.embed(tokens[m], joined);
      team.lap(Part::embed);
      runtime.norm(joined, projection.token_norm, stack.epsilon, joined + hidden);
      runtime.norm(before[m], projection.hidden_norm, stack.epsilon, joined);
      team.lap(Part::norm);
      runtime.convert(projection.matrix, joined, m);
    });
    runtime.matmul(team, Part::project, runtime.stream, projection.matrix, pass.rows(), pass.branch(0), pass.stride(),
                   {}, nullptr);
    pass.run(team, after);
  });
}

}  // namespace fastmtp
