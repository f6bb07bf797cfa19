#include "batch.hpp"

#include <cmath>

namespace fastmtp {

Batch::Batch(Runtime& runtime, const std::vector<Segment>& segments, const std::vector<Rope>& ropes)
    : runtime(runtime), segments(segments), ropes_(ropes),
      angle_size_(ropes.empty() ? 0 : 2 * int(ropes.front().inverse_frequencies.size())) {
  for (size_t segment = 0; segment < segments.size(); segment++) {
    const auto& [cache, start, count, tree] = segments[segment];
    cache->prepare(start, count, start);
    rows += count;
    for (int slot = start; slot < start + count; slot++) {
      places.push_back({int(segment), slot});
      positions.push_back(tree ? tree->position(slot - tree->base) : slot);
      paths.push_back(tree ? tree->path(slot - tree->base) : nullptr);
    }
  }
  runtime.angles.reserve(size_t(rows) * ropes.size() * angle_size_);
}

void Batch::set_angles(Team& team) const {
  const int half = angle_size_ / 2;
  team.each(Part::rope, int(ropes_.size()), [&](int r) {
    const Rope& rope = ropes_[r];
    for (int m = 0; m < rows; m++)
      for (int d = 0; d < half; d++) {
        // In single precision, as the reference implementations compute it.
        const float angle = float(positions[m]) * rope.inverse_frequencies[d];
        angles(r, m)[d] = float(std::cos(double(angle))) * rope.scale;
        angles(r, m)[half + d] = float(std::sin(double(angle))) * rope.scale;
      }
  });
}

}  // namespace fastmtp
