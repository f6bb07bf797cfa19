// A tree of tokens that follows a sequence of `base` tokens in a cache.
//
// Node n is kept in slot base + n, wherever in the tree it is; it sees the sequence and its path, and its position is
// that of a token which follows them. A chain is a tree in which slots and positions are the same.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmtp {

class Tree {
 public:
  // parents[n] < n is the node before node n; -1 is the sequence.
  Tree(int base, const std::vector<int32_t>& parents) : base_(base), starts_{0} {
    for (size_t n = 0; n < parents.size(); n++) {
      if (parents[n] >= 0)
        for (int i = starts_[parents[n]]; i < starts_[parents[n] + 1]; i++) paths_.push_back(paths_[i]);
      paths_.push_back(int32_t(n));
      starts_.push_back(int(paths_.size()));
      chain_ = chain_ && parents[n] == int32_t(n) - 1;
    }
  }

  int base() const { return base_; }
  bool is_chain() const { return chain_; }
  int position(int node) const { return base_ + starts_[node + 1] - starts_[node] - 1; }
  // Nodes from the sequence on, this one last; path(node)[i] is at position base + i.
  const int32_t* path(int node) const { return paths_.data() + starts_[node]; }

 private:
  int base_;
  bool chain_ = true;
  std::vector<int> starts_;  // of each node's path in `paths_`, and where the last one ends
  std::vector<int32_t> paths_;
};

}  // namespace fastmtp
