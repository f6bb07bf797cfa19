#include "draft.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastmtp {
namespace {

constexpr float kStruckOut = -std::numeric_limits<float>::infinity();

// Logits of a draft vocabulary lie part by part, each with its stride.
int stride_of(const std::vector<DraftRows>& rows) {
  int stride = 0;
  for (const DraftRows& part : rows) stride += stride_of(*part.matrix);
  return stride;
}

// Calls work(row, its logits) for each of `count` states.
template <class Work>
void with_logits(Runtime& runtime, const std::vector<DraftRows>& rows, const float* states, int count, Work work) {
  const int stride = stride_of(rows), hidden = rows[0].matrix->inputs();
  float* logits = runtime.logits.reserve(size_t(count) * stride);
  runtime.reserve_operand(count, hidden);
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    // All parts are of one type and width, so that a state is converted for all of them at once.
    team.each(count, [&](int m) { runtime.convert(*rows[0].matrix, states + size_t(m) * hidden, m); });
    float* out = logits;
    for (const DraftRows& part : rows) {
      runtime.matmul(team, *part.matrix, count, out, stride);
      out += stride_of(*part.matrix);
    }
    team.each(count, [&](int m) { work(m, logits + size_t(m) * stride); });
  });
}

// Where the largest logit is; of equal ones the first.
struct Best {
  float* logit;
  int32_t token;
};

Best best_of(const Kernels& kernels, const std::vector<DraftRows>& rows, float* logits) {
  Best best{nullptr, 0};
  for (const DraftRows& part : rows) {
    const int place = kernels.argmax(logits, part.count);
    if (!best.logit || logits[place] > *best.logit) best = {logits + place, part.ids[place]};
    logits += stride_of(*part.matrix);
  }
  return best;
}

void find_candidates(const Kernels& kernels, const std::vector<DraftRows>& rows, float* logits, int width,
                     Candidates& found) {
  float top = 0, total = 0;
  while (int(found.tokens.size()) < width) {
    const Best best = best_of(kernels, rows, logits);
    if (*best.logit == kStruckOut) break;
    if (found.tokens.empty()) {
      top = *best.logit;
      float* part_logits = logits;
      for (const DraftRows& part : rows) {
        total += kernels.sum_exponentials(part_logits, part.count, top);
        part_logits += stride_of(*part.matrix);
      }
    }
    if (std::find(found.tokens.begin(), found.tokens.end(), best.token) == found.tokens.end()) {
      found.tokens.push_back(best.token);
      found.confidences.push_back(std::exp(*best.logit - top) / total);
    }
    *best.logit = kStruckOut;
  }
}

}  // namespace

std::vector<int32_t> Drafter::chain(int start, int count, const int32_t* tokens, const float* before,
                                    const std::vector<DraftRows>& rows, int steps) {
  const size_t hidden = head_.stack.hidden;
  std::lock_guard<std::recursive_mutex> lock(head_.model.runtime.busy);
  std::vector<float> states(count * hidden), last(hidden);
  std::vector<int32_t> drafted(steps);
  Segment segment{&cache_, start, count};
  head_.forward(segment, tokens, before, states.data());
  for (int step = 0; true; step++) {
    std::copy(states.end() - hidden, states.end(), last.begin());
    with_logits(head_.model.runtime, rows, last.data(), 1, [&](int, float* logits) {
      drafted[step] = best_of(head_.model.runtime.kernels, rows, logits).token;
    });
    if (step + 1 == steps) return drafted;
    segment = {&cache_, segment.start + segment.count, 1};
    states.resize(hidden);
    head_.forward(segment, &drafted[step], last.data(), states.data());
  }
}

std::vector<Candidates> Drafter::start(int start, int count, const int32_t* tokens, const float* before,
                                       const std::vector<DraftRows>& rows, int width) {
  const size_t hidden = head_.stack.hidden;
  std::lock_guard<std::recursive_mutex> lock(head_.model.runtime.busy);
  std::vector<float> states(count * hidden);
  head_.forward({&cache_, start, count}, tokens, before, states.data());
  base_ = start + count - 1;
  parents_.clear();
  states_.clear();
  return add_nodes({-1}, states.data() + (count - 1) * hidden, rows, width);
}

std::vector<Candidates> Drafter::extend(const std::vector<int32_t>& parents, const int32_t* tokens,
                                        const std::vector<DraftRows>& rows, int width) {
  const size_t hidden = head_.stack.hidden, count = parents.size();
  std::lock_guard<std::recursive_mutex> lock(head_.model.runtime.busy);
  std::vector<float> before(count * hidden), states(count * hidden);
  for (size_t m = 0; m < count; m++)
    std::copy_n(states_.begin() + parents[m] * hidden, hidden, before.begin() + m * hidden);
  std::vector<int32_t> all = parents_;
  all.insert(all.end(), parents.begin(), parents.end());
  const Tree tree(base_, all);
  const Segment segment{&cache_, base_ + nodes(), int(count), tree.is_chain() ? nullptr : &tree};
  head_.forward(segment, tokens, before.data(), states.data());
  return add_nodes(parents, states.data(), rows, width);
}

std::vector<Candidates> Drafter::add_nodes(const std::vector<int32_t>& parents, const float* states,
                                           const std::vector<DraftRows>& rows, int width) {
  const int count = int(parents.size());
  parents_.insert(parents_.end(), parents.begin(), parents.end());
  states_.insert(states_.end(), states, states + count * size_t(head_.stack.hidden));
  int size = 0;
  for (const DraftRows& part : rows) size += part.count;
  // Room for all of them now: a thread of a team cannot throw.
  std::vector<Candidates> candidates(count);
  for (Candidates& one : candidates) {
    one.tokens.reserve(std::min(width, size));
    one.confidences.reserve(std::min(width, size));
  }
  with_logits(head_.model.runtime, rows, states, count, [&](int m, float* logits) {
    find_candidates(head_.model.runtime.kernels, rows, logits, width, candidates[m]);
  });
  return candidates;
}

}  // namespace fastmtp
