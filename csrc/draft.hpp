// Drafting with the MTP head: greedy chains, and trees that are made level by level.
#pragma once

#include <vector>

#include "head.hpp"

namespace fastmtp {

// Rows of the LM head, one for each of the first `count` outputs, and the tokens they are of. A draft vocabulary is
// some of these, all of one type and width; a token may be in two of them.
struct DraftRows {
  const Matrix* matrix;
  const int32_t* ids;
  int count;
};

// Likeliest first, of equal ones the one that stands first in the draft vocabulary, each with its probability in it.
struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<float> confidences;
};

// Drafts into one cache, after the sequence that it holds.
class Drafter {
 public:
  // Keeps references.
  Drafter(const Head& head, Cache& cache) : head_(head), cache_(cache) {}

  const Head& head() const { return head_; }
  const Cache& cache() const { return cache_; }
  int nodes() const { return int(parents_.size()); }

  // A greedy chain: the head's forward over `count` tokens, which follow the states before them, the row that
  // scores highest (of equal ones the first), then `steps` - 1 times a forward over the token drafted last.
  std::vector<int32_t> chain(int start, int count, const int32_t* tokens, const float* before,
                             const std::vector<DraftRows>& rows, int steps);

  // A tree, level by level. Both give `width` candidates to follow each new node, or as many as there are.

  // The head's forward over `count` tokens, the last of which becomes node 0.
  std::vector<Candidates> start(int start, int count, const int32_t* tokens, const float* before,
                                const std::vector<DraftRows>& rows, int width);
  // The next nodes, each after a node of an earlier call.
  std::vector<Candidates> extend(const std::vector<int32_t>& parents, const int32_t* tokens,
                                 const std::vector<DraftRows>& rows, int width);

 private:
  std::vector<Candidates> add_nodes(const std::vector<int32_t>& parents, const float* states,
                                    const std::vector<DraftRows>& rows, int width);

  const Head& head_;
  Cache& cache_;
  // Of the tree: the slot of node 0, the parents of all nodes and their states [nodes, H].
  int base_ = 0;
  std::vector<int32_t> parents_;
  std::vector<float> states_;
};

}  // namespace fastmtp
