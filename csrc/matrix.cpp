#include "matrix.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
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

// A group with all weights below this is stored as zeros: the inverse of its scale would overflow.
constexpr float kSmallest = 1e-30f;

// Rounds a positive number up, so that no weight exceeds 127 steps.
uint16_t bf16_above(float x) { return uint16_t((bits_of(x) + 0xffff) >> 16); }

size_t bytes_of_block(Type type, int groups) {
  const size_t weights = size_t(groups) * kGroup * kLanes;
  if (type == Type::int4) return 2 * groups * kHalfBytes;
  const size_t bytes = type == Type::int8 ? weights + size_t(groups) * kLanes * 2 : weights * 2;
  return (bytes + 63) / 64 * 64;
}

// Where a block stores input k of the output in a lane, and its scales.
uint16_t& bf16_weight(uint8_t* block, int lane, int k) {
  return reinterpret_cast<uint16_t*>(block)[(k / 2 * kLanes + lane) * 2 + k % 2];
}
uint8_t& int8_weight(uint8_t* block, int lane, int k) { return block[(k / 4 * kLanes + lane) * 4 + k % 4]; }
uint16_t& int8_scale(uint8_t* block, int lane, int group, int groups) {
  return reinterpret_cast<uint16_t*>(block + size_t(groups) * kGroup * kLanes)[group * kLanes + lane];
}
uint8_t& int4_pair(uint8_t* block, int lane, int k) {
  return block[k / kHalf * kHalfBytes + (k % kHalf / 8 * kLanes + lane) * 4 + k % 4];
}
uint16_t* int4_scales(uint8_t* block, int lane, int k) {
  return reinterpret_cast<uint16_t*>(block + k / kHalf * kHalfBytes + kHalfWords) + lane;
}

// Copies one lane of some lines of sixteen, and moves both pointers past them.
template <class Number>
void copy_lane(uint8_t*& to, int to_lane, const uint8_t*& from, int from_lane, size_t lines) {
  for (; lines > 0; lines--, to += kLanes * sizeof(Number), from += kLanes * sizeof(Number))
    std::memcpy(to + to_lane * sizeof(Number), from + from_lane * sizeof(Number), sizeof(Number));
}

// Rounds half to even, as std::lrint does, in a form that compilers turn into vectors; |x| is below 2^22.
int nearest(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return int(bits_of(x + kShift)) - int(bits_of(kShift));
}

// The least and the largest of some numbers, of which eight are compared at a time.
std::pair<float, float> bounds(const float* x, int count) {
  float low[8], high[8];
  for (int i = 0; i < 8; i++) low[i] = high[i] = x[0];
  int k = 0;
  for (; k + 8 <= count; k += 8)
    for (int i = 0; i < 8; i++) low[i] = std::min(low[i], x[k + i]), high[i] = std::max(high[i], x[k + i]);
  for (; k < count; k++) low[0] = std::min(low[0], x[k]), high[0] = std::max(high[0], x[k]);
  return {*std::min_element(low, low + 8), *std::max_element(high, high + 8)};
}

float clamped(float x, float most) { return std::min(std::max(x, 0.0f), most); }

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
    : type_(type), outputs_(outputs), inputs_(inputs), groups_(round_up(inputs, kGroup) / kGroup),
      block_bytes_(bytes_of_block(type, groups_)) {
  if (outputs < 1 || inputs < 1) throw std::invalid_argument("a matrix needs outputs and inputs");
  own_ = allocate<uint8_t>(bytes() + (with_bias ? blocks() * kLanes * sizeof(float) : 0));
  data_ = own_.get();
  bias_ = with_bias ? reinterpret_cast<float*>(data_ + bytes()) : nullptr;
}

void Matrix::use(uint8_t* memory, std::shared_ptr<void> owner) {
  data_ = memory;
  if (bias_) bias_ = reinterpret_cast<float*>(data_ + bytes());
  owner_ = std::move(owner);
  own_ = nullptr;
}

void Matrix::check_outputs(const int32_t* outputs, int count) const {
  for (int i = 0; i < count; i++)
    if (outputs[i] < 0 || outputs[i] >= blocks() * kLanes)
      throw std::invalid_argument("output " + std::to_string(outputs[i]) + " of a matrix of " +
                                  std::to_string(outputs_));
}

void Matrix::pack(const int32_t* outputs, const float* rows, int count) {
  check_outputs(outputs, count);
  for (int i = 0; i < count; i++) pack_row(outputs[i], rows + size_t(i) * inputs_);
}

void Matrix::set_bias(const int32_t* outputs, const float* values, int count) {
  check_outputs(outputs, count);
  if (!bias_) throw std::invalid_argument("this matrix was made without a bias");
  for (int i = 0; i < count; i++) bias_[outputs[i]] = values[i];
}

uint8_t* Matrix::block(int output) const { return data_ + (output / kLanes) * block_bytes_; }

void Matrix::pack_row(int output, const float* row) {
  const int lane = output % kLanes;
  uint8_t* to = block(output);
  if (type_ == Type::bf16)
    for (int k = 0; k < inputs_; k++) bf16_weight(to, lane, k) = nearest_bf16(row[k]);
  for (int start = 0; type_ == Type::int4 && start < inputs_; start += kHalf) {
    const int count = std::min(kHalf, inputs_ - start);
    const auto [low, high] = bounds(row + start, count);
    const uint16_t steps = nearest_bf16((high - low) / 15.0f), lows = nearest_bf16(low);
    const float step = float_of(steps), least = float_of(lows);
    const float inverse = step > kSmallest ? 1.0f / step : 0.0f;
    uint8_t numbers[kHalf] = {};
    for (int k = 0; k < count; k++) numbers[k] = uint8_t(nearest(clamped((row[start + k] - least) * inverse, 15.0f)));
    pack_int4(output, start, numbers, steps, lows);
  }
  for (int g = 0; type_ == Type::int8 && g < groups_; g++) {
    float group[kGroup] = {};
    std::copy(row + g * kGroup, row + std::min(inputs_, (g + 1) * kGroup), group);
    spread(group);
    float most = 0;
    for (float weight : group) most = std::max(most, std::fabs(weight));
    uint8_t numbers[kGroup];
    const uint16_t scale = most > kSmallest ? bf16_above(most / 127.0f) : 0;
    const float inverse = scale ? 1.0f / float_of(scale) : 0.0f;
    for (int k = 0; k < kGroup; k++)
      numbers[k] = uint8_t(128 + nearest(group[k] * inverse));
    for (int k = 0; k < kGroup; k += 4) std::memcpy(&int8_weight(to, lane, g * kGroup + k), numbers + k, 4);
    int8_scale(to, lane, g, groups_) = scale;
  }
}

void Matrix::pack_int4(int output, int start, const uint8_t* numbers, uint16_t step, uint16_t least) {
  const int lane = output % kLanes;
  uint8_t* to = block(output);
  for (int k = 0; k < kHalf; k += 8)
    for (int i = 0; i < 4; i++) (&int4_pair(to, lane, start + k))[i] = uint8_t(numbers[k + i] | numbers[k + 4 + i] << 4);
  uint16_t* scales = int4_scales(to, lane, start);
  scales[0] = step;
  scales[kLanes] = least;
}

void Matrix::pack_grid(const int32_t* outputs, const uint8_t* numbers, const float* steps, const float* least,
                       int count) {
  check_outputs(outputs, count);
  if (type_ != Type::int4 || inputs_ % kHalf)
    throw std::invalid_argument("a grid fits only an int4 matrix whose width is a multiple of 32");
  const int groups = inputs_ / kHalf;
  for (int i = 0; i < count; i++)
    for (int g = 0; g < groups; g++)
      pack_int4(outputs[i], g * kHalf, numbers + size_t(i) * inputs_ + g * kHalf,
                nearest_bf16(steps[size_t(i) * groups + g]), nearest_bf16(least[size_t(i) * groups + g]));
}

void Matrix::unpack(int output, float* row) const {
  const int lane = output % kLanes;
  uint8_t* from = block(output);
  if (type_ == Type::bf16)
    for (int k = 0; k < inputs_; k++) row[k] = float_of(bf16_weight(from, lane, k));
  for (int k = 0; type_ == Type::int4 && k < inputs_; k++) {
    const uint16_t* scales = int4_scales(from, lane, k);
    const int number = int4_pair(from, lane, k) >> k / 4 % 2 * 4 & 15;
    row[k] = float_of(scales[kLanes]) + float_of(scales[0]) * float(number);
  }
  for (int g = 0; type_ == Type::int8 && g < groups_; g++) {
    float group[kGroup];
    const float scale = float_of(int8_scale(from, lane, g, groups_));
    for (int k = 0; k < kGroup; k++) group[k] = float(int(int8_weight(from, lane, g * kGroup + k)) - 128) * scale;
    spread(group);
    std::copy(group, group + std::min(kGroup, inputs_ - g * kGroup), row + g * kGroup);
  }
}

void Matrix::copy(const int32_t* outputs, const Matrix& source, const int32_t* source_outputs, int count) {
  if (source.type_ != type_ || source.inputs_ != inputs_)
    throw std::invalid_argument("rows are copied between matrices of one type and width only");
  check_outputs(outputs, count);
  source.check_outputs(source_outputs, count);
  // A part of a block is lines of sixteen words of 4 bytes, then lines of sixteen scales of 2 bytes. int4 has a part
  // for each group.
  const size_t parts = type_ == Type::int4 ? 2 * groups_ : 1, inputs = size_t(groups_) * kGroup / parts;
  const size_t words = inputs / (type_ == Type::int4 ? 8 : type_ == Type::int8 ? 4 : 2);
  const size_t scales = type_ == Type::int4 ? 2 : type_ == Type::int8 ? groups_ : 0;
  for (int i = 0; i < count; i++) {
    uint8_t* to = block(outputs[i]);
    const uint8_t* from = source.block(source_outputs[i]);
    for (size_t part = 0; part < parts; part++) {
      copy_lane<uint32_t>(to, outputs[i] % kLanes, from, source_outputs[i] % kLanes, words);
      copy_lane<uint16_t>(to, outputs[i] % kLanes, from, source_outputs[i] % kLanes, scales);
    }
    if (bias_) bias_[outputs[i]] = source.bias_ ? source.bias_[source_outputs[i]] : 0.0f;
  }
}

}  // namespace fastmtp
