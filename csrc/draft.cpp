#include "draft.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastmtp {
namespace {

constexpr float kUsed = -std::numeric_limits<float>::infinity();

// Calls work(row, its logits) for each of `count` states. Logits lie part by part, each with its stride.
template <class Work>
void with_logits(Runtime& runtime, const DraftRows& rows, const float* states, int count, Work work) {
  int stride = 0;
  for (const DraftPart& part : rows) stride += stride_of(*part.matrix);
  const int hidden = rows[0].matrix->inputs();
  float* logits = runtime.logits.reserve(size_t(count) * stride);
  runtime.reserve_operand(count, hidden);
  runtime.run([&](Team team) {
    // All parts are of one type and width, so a state is converted once.
    team.each(count, [&](int m) { runtime.convert(*rows[0].matrix, states + size_t(m) * hidden, m); });
    float* out = logits;
    for (const DraftPart& part : rows) {
      runtime.matmul(team, *part.matrix, count, out, stride);
      out += stride_of(*part.matrix);
    }
    team.each(count, [&](int m) { work(m, logits + size_t(m) * stride); });
  });
}

// The largest logit; of equal ones the first.
struct Best {
  float* logit = nullptr;
  int32_t token = 0;
};

Best best_of(const Kernels& kernels, const DraftRows& rows, float* logits) {
  Best best;
  for (const DraftPart& part : rows) {
    const int index = kernels.argmax(logits, part.count);
    if (!best.logit || logits[index] > *best.logit) best = {logits + index, part.ids[index]};
    logits += stride_of(*part.matrix);
  }
  return best;
}

void find_candidates(const Kernels& kernels, const DraftRows& rows, float* logits, int width, Candidates& found) {
  Best best = best_of(kernels, rows, logits);
  const float top = *best.logit;
  float total = 0, *part_logits = logits;
  for (const DraftPart& part : rows) {
    total += kernels.sum_exponentials(part_logits, part.count, top);
    part_logits += stride_of(*part.matrix);
  }
  while (*best.logit != kUsed) {
    if (std::find(found.tokens.begin(), found.tokens.end(), best.token) == found.tokens.end()) {
      found.tokens.push_back(best.token);
      found.confidences.push_back(std::exp(*best.logit - top) / total);
      if (int(found.tokens.size()) == width) break;
    }
    *best.logit = kUsed;
    best = best_of(kernels, rows, logits);
  }
}

}  // namespace

std::vector<int32_t> Drafter::chain(int start, const std::vector<int32_t>& tokens, const float* before,
                                    const DraftRows& rows, int steps) {
  const size_t hidden = head.stack.hidden;
  const std::lock_guard lock(head.model.runtime.busy);
  std::vector<float> states(tokens.size() * hidden), last(hidden);
  std::vector<int32_t> drafted(steps);
  Segment segment{&cache, start, int(tokens.size())};
  head.forward(segment, tokens.data(), before, states.data());
  for (int step = 0; true; step++) {
    std::copy(states.end() - hidden, states.end(), last.begin());
    with_logits(head.model.runtime, rows, last.data(), 1, [&](int, float* logits) {
      drafted[step] = best_of(head.model.runtime.kernels, rows, logits).token;
    });
    if (step + 1 == steps) return drafted;
    segment = {&cache, segment.start + segment.count, 1};
    states.resize(hidden);
    head.forward(segment, &drafted[step], last.data(), states.data());
  }
}

std::vector<Candidates> Drafter::start(int start, const std::vector<int32_t>& tokens, const float* before,
                                       const DraftRows& rows, int width) {
  const size_t hidden = head.stack.hidden, count = tokens.size();
  const std::lock_guard lock(head.model.runtime.busy);
  std::vector<float> states(count * hidden);
  head.forward({&cache, start, int(count)}, tokens.data(), before, states.data());
  base_ = start + int(count) - 1;
  parents_.clear();
  states_.clear();
  return add_nodes({-1}, states.data() + (count - 1) * hidden, rows, width);
}

std::vector<Candidates> Drafter::extend(const std::vector<int32_t>& parents, const std::vector<int32_t>& tokens,
                                        const DraftRows& rows, int width) {
  const size_t hidden = head.stack.hidden, count = parents.size();
  const std::lock_guard lock(head.model.runtime.busy);
  std::vector<float> before(count * hidden), states(count * hidden);
  for (size_t m = 0; m < count; m++)
    std::copy_n(states_.begin() + parents[m] * hidden, hidden, before.begin() + m * hidden);
  std::vector<int32_t> all = parents_;
  all.insert(all.end(), parents.begin(), parents.end());
  const Tree tree(base_, all);
  const Segment segment{&cache, base_ + nodes(), int(count), tree.is_chain() ? nullptr : &tree};
  head.forward(segment, tokens.data(), before.data(), states.data());
  return add_nodes(parents, states.data(), rows, width);
}

std::vector<Candidates> Drafter::add_nodes(const std::vector<int32_t>& parents, const float* states,
                                           const DraftRows& rows, int width) {
  const int count = int(parents.size());
  parents_.insert(parents_.end(), parents.begin(), parents.end());
  states_.insert(states_.end(), states, states + count * size_t(head.stack.hidden));
  int size = 0;
  for (const DraftPart& part : rows) size += part.count;
  // Room for all of them now: a thread of a team cannot throw.
  std::vector<Candidates> candidates(count);
  for (Candidates& one : candidates) {
    one.tokens.reserve(std::min(width, size));
    one.confidences.reserve(std::min(width, size));
  }
  with_logits(head.model.runtime, rows, states, count, [&](int m, float* logits) {
    find_candidates(head.model.runtime.kernels, rows, logits, width, candidates[m]);
  });
  return candidates;
}

}  // namespace fastmtp
