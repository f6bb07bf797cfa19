#include "matrix.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fastmtp {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint16_t nearest_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A group of inputs below this counts as zeros: the inverse of its scale would overflow.
constexpr float kSmallest = 1e-30f;

// For a positive number: never below it, so that no weight exceeds 127 steps.
uint16_t bf16_above(float x) { return uint16_t((bits_of(x) + 0xffff) >> 16); }

constexpr size_t kHalfBytes = kHalf / 2 * kLanes + 2 * kLanes * sizeof(uint16_t);

size_t bytes_of_block(Type type, int groups) {
  const size_t weights = size_t(groups) * kGroup * kLanes;
  if (type == Type::int4) return 2 * groups * kHalfBytes;
  const size_t bytes = type == Type::int8 ? weights + size_t(groups) * kLanes * 2 : weights * 2;
  return (bytes + 63) / 64 * 64;
}

// The orthonormal Walsh-Hadamard transform of a group; its own inverse.
void spread(float* x) {
  for (int distance = 1; distance < kGroup; distance *= 2)
    for (int start = 0; start < kGroup; start += 2 * distance)
      for (int i = start; i < start + distance; i++) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
  for (int i = 0; i < kGroup; i++) x[i] *= 0.125f;
}

}  // namespace

Matrix::Matrix(Type type, int outputs, int inputs, bool with_bias)
    : type_(type),
      outputs_(outputs),
      inputs_(inputs),
      groups_(round_up(inputs, kGroup) / kGroup),
      block_bytes_(bytes_of_block(type, groups_)) {
  if (outputs < 1 || inputs < 1) throw std::invalid_argument("a matrix needs outputs and inputs");
  data_ = allocate<uint8_t>(bytes());
  if (with_bias) bias_ = allocate<float>(size_t(blocks()) * kLanes);
}

void Matrix::check_places(const int32_t* places, int count) const {
  for (int i = 0; i < count; i++)
    if (places[i] < 0 || places[i] >= blocks() * kLanes)
      throw std::invalid_argument("output " + std::to_string(places[i]) + " of a matrix of " +
                                  std::to_string(outputs_));
}

void Matrix::pack(const int32_t* places, const float* rows, int count) {
  check_places(places, count);
#pragma omp parallel for schedule(static)
  for (int i = 0; i < count; i++) pack_row(places[i], rows + size_t(i) * inputs_);
}

void Matrix::set_bias(const int32_t* places, const float* values, int count) {
  check_places(places, count);
  if (!bias_) throw std::invalid_argument("this matrix was made without a bias");
  for (int i = 0; i < count; i++) bias_[places[i]] = values[i];
}

uint8_t* Matrix::half_group(int output, int group) const {
  return data_.get() + (output / kLanes) * block_bytes_ + group * kHalfBytes;
}

void Matrix::pack_row(int output, const float* row) {
  const int lane = output % kLanes;
  uint8_t* block = data_.get() + (output / kLanes) * block_bytes_;
  if (type_ == Type::bf16) {
    auto* weights = reinterpret_cast<uint16_t*>(block);
    for (int k = 0; k < inputs_; k++) weights[(k / 2 * kLanes + lane) * 2 + k % 2] = nearest_bf16(row[k]);
    return;
  }
  if (type_ == Type::int4) {
    for (int g = 0; g * kHalf < inputs_; g++) {
      const float* first = row + g * kHalf;
      const int count = std::min(kHalf, inputs_ - g * kHalf);
      const auto [low, high] = std::minmax_element(first, first + count);
      uint8_t* numbers = half_group(output, g);
      auto* scales = reinterpret_cast<uint16_t*>(numbers + kHalf / 2 * kLanes) + lane;
      scales[0] = nearest_bf16((*high - *low) / 15.0f);
      scales[kLanes] = nearest_bf16(*low);
      const float step = float_of(scales[0]), least = float_of(scales[kLanes]);
      const float inverse = step > kSmallest ? 1.0f / step : 0.0f;
      for (int k = 0; k < count; k++) {
        const int number = std::clamp(int(std::lrint((first[k] - least) * inverse)), 0, 15), shift = k / 4 % 2 * 4;
        uint8_t& pair = numbers[(k / 8 * kLanes + lane) * 4 + k % 4];
        pair = uint8_t((pair & ~(15 << shift)) | number << shift);
      }
    }
    return;
  }
  auto* scales = reinterpret_cast<uint16_t*>(block + size_t(groups_) * kGroup * kLanes);
  for (int g = 0; g < groups_; g++) {
    float group[kGroup] = {};
    std::copy(row + g * kGroup, row + std::min(inputs_, (g + 1) * kGroup), group);
    spread(group);
    float most = 0;
    for (float weight : group) most = std::max(most, std::fabs(weight));
    const uint16_t scale = most > kSmallest ? bf16_above(most / 127.0f) : 0;
    const float inverse = scale ? 1.0f / float_of(scale) : 0.0f;
    uint8_t* lanes = block + size_t(g) * kGroup * kLanes;
    for (int k = 0; k < kGroup; k++)
      lanes[(k / 4 * kLanes + lane) * 4 + k % 4] = uint8_t(128 + std::lrint(group[k] * inverse));
    scales[g * kLanes + lane] = scale;
  }
}

void Matrix::unpack(int output, float* row) const {
  const int lane = output % kLanes;
  const uint8_t* block = data_.get() + (output / kLanes) * block_bytes_;
  if (type_ == Type::bf16) {
    const auto* weights = reinterpret_cast<const uint16_t*>(block);
    for (int k = 0; k < inputs_; k++) row[k] = float_of(weights[(k / 2 * kLanes + lane) * 2 + k % 2]);
    return;
  }
  if (type_ == Type::int4) {
    for (int k = 0; k < inputs_; k++) {
      const uint8_t* numbers = half_group(output, k / kHalf);
      const auto* scales = reinterpret_cast<const uint16_t*>(numbers + kHalf / 2 * kLanes) + lane;
      const int pair = numbers[(k % kHalf / 8 * kLanes + lane) * 4 + k % 4], number = pair >> k / 4 % 2 * 4 & 15;
      row[k] = float_of(scales[kLanes]) + float_of(scales[0]) * float(number);
    }
    return;
  }
  const auto* scales = reinterpret_cast<const uint16_t*>(block + size_t(groups_) * kGroup * kLanes);
  for (int g = 0; g < groups_; g++) {
    float group[kGroup];
    const uint8_t* lanes = block + size_t(g) * kGroup * kLanes;
    const float scale = float_of(scales[g * kLanes + lane]);
    for (int k = 0; k < kGroup; k++)
      group[k] = float(int(lanes[(k / 4 * kLanes + lane) * 4 + k % 4]) - 128) * scale;
    spread(group);
    std::copy(group, group + std::min(kGroup, inputs_ - g * kGroup), row + g * kGroup);
  }
}

void Matrix::copy(const int32_t* places, const Matrix& source, const int32_t* outputs, int count) {
  if (source.type_ != type_ || source.inputs_ != inputs_)
    throw std::invalid_argument("rows are copied between matrices of one type and width only");
  check_places(places, count);
  source.check_places(outputs, count);
  // Of every line of sixteen words one lane, and of every line of sixteen scales.
  const auto copy_lane = [](uint8_t* to, int to_lane, const uint8_t* from, int from_lane, size_t lines, size_t size) {
    for (size_t line = 0; line < lines; line++)
      std::memcpy(to + (line * kLanes + to_lane) * size, from + (line * kLanes + from_lane) * size, size);
  };
  for (int i = 0; i < count; i++) {
    uint8_t* to = data_.get() + (places[i] / kLanes) * block_bytes_;
    const uint8_t* from = source.data_.get() + (outputs[i] / kLanes) * block_bytes_;
    const int to_lane = places[i] % kLanes, from_lane = outputs[i] % kLanes;
    // Words and scales take turns in int4; elsewhere they are one part.
    const size_t parts = type_ == Type::int4 ? 2 * groups_ : 1, inputs = size_t(groups_) * kGroup / parts;
    const size_t words = type_ == Type::int4 ? inputs / 8 : type_ == Type::int8 ? inputs / 4 : inputs / 2;
    const size_t scales = type_ == Type::int4 ? 2 : type_ == Type::int8 ? groups_ : 0;
    for (size_t part = 0; part < parts; part++) {
      copy_lane(to, to_lane, from, from_lane, words, 4);
      to += words * kLanes * 4;
      from += words * kLanes * 4;
      copy_lane(to, to_lane, from, from_lane, scales, 2);
      to += scales * kLanes * 2;
      from += scales * kLanes * 2;
    }
    if (bias_) bias_[places[i]] = source.bias_ ? source.bias_[outputs[i]] : 0.0f;
  }
}

}  // namespace fastmtp
