// Every table of kernels that a processor can run, against the portable one, on shapes drawn at random: a program of its
// own, so that it can be compiled for another processor and run in an emulator (`make check-arm`), or with sanitizers.
// Its arguments are the number of rounds and the seed of the shapes.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "matrix.hpp"

using namespace fastmtp;

namespace {

std::mt19937 dice;
int cases = 0;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(dice); }

std::vector<float> normal(size_t count, float size = 1) {
  std::normal_distribution<float> distribution(0, size);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = distribution(dice);
  return numbers;
}

float of_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

std::vector<uint16_t> normal_bf16(size_t count) {
  std::vector<uint16_t> numbers;
  for (float number : normal(count)) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    numbers.push_back(uint16_t(bits >> 16));
  }
  return numbers;
}

[[noreturn]] void fail(const Kernels& kernels, const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", kernels.name, what.c_str());
  std::exit(1);
}

void expect(const Kernels& kernels, const char* what, const float* found, const float* wanted, size_t count, float error) {
  cases++;
  for (size_t i = 0; i < count; i++)
    if (!(std::fabs(found[i] - wanted[i]) <= error * std::max(1.0f, std::fabs(wanted[i]))))
      fail(kernels, std::string(what) + ": number " + std::to_string(i) + " of " + std::to_string(count) + " is " +
                        std::to_string(found[i]) + ", not " + std::to_string(wanted[i]));
}

void expect_same(const Kernels& kernels, const char* what, const void* found, const void* wanted, size_t bytes) {
  cases++;
  if (std::memcmp(found, wanted, bytes)) fail(kernels, std::string(what) + ": not the same bits");
}

// Rows of an operand, converted by one table.
struct Rows {
  Rows(const Kernels& kernels, Type type, const std::vector<float>& numbers, const std::vector<float>* gains, int rows,
       int inputs, const std::vector<float>& factors)
      : groups(round_up(inputs, kGroup) / kGroup), values(allocate<uint8_t>(size_t(rows) * groups * kGroup * 2)),
        scales(2 * groups * rows), sums(2 * groups * rows),
        operand{values.get(), scales.data(), sums.data(), factors.data(), groups, rows} {
    for (int m = 0; m < rows; m++)
      for (int g = 0; g < groups; g++)
        kernels.convert(type, numbers.data() + size_t(m) * inputs + g * kGroup, gains ? gains->data() + g * kGroup : nullptr,
                        std::min(kGroup, inputs - g * kGroup), operand, m, g);
  }

  int groups;
  Buffer<uint8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  Operand operand;
};

void check_products(const Kernels& kernels, const Kernels& portable, Type type) {
  const int outputs = draw(1, 90), inputs = draw(1, 300), rows = draw(1, 37), blocks = round_up(outputs, kLanes) / kLanes;
  Matrix matrix(type, outputs, inputs, draw(0, 1));
  const std::vector<float> weights = normal(size_t(outputs) * inputs), biases = normal(outputs);
  std::vector<int32_t> places(outputs);
  for (int n = 0; n < outputs; n++) places[n] = n;
  matrix.pack(places.data(), weights.data(), outputs);
  if (matrix.view().bias) matrix.set_bias(places.data(), biases.data(), outputs);

  const std::vector<float> numbers = normal(size_t(rows) * inputs), gains = normal(inputs), factors = normal(rows);
  const std::vector<float>* some_gains = draw(0, 1) ? &gains : nullptr;
  const Rows ours(kernels, type, numbers, some_gains, rows, inputs, factors);
  const Rows theirs(portable, type, numbers, some_gains, rows, inputs, factors);
  const int stride = blocks * kLanes + draw(0, 3) * kLanes, first = draw(0, blocks - 1);
  std::vector<float> found(size_t(rows) * stride, -1), wanted = found;
  kernels.matmul(matrix.view(), ours.operand, rows, first, blocks, found.data(), stride);
  portable.matmul(matrix.view(), theirs.operand, rows, first, blocks, wanted.data(), stride);
  // Inputs that lie between two steps may be rounded to different ones, and AVX2's steps are up to twice as wide. Weights
  // and factors are about 1, so an error of several deviations of the sum is left.
  const float step = std::max(*std::max_element(ours.scales.begin(), ours.scales.end()),
                              *std::max_element(theirs.scales.begin(), theirs.scales.end()));
  const float error = type == Type::bf16 ? 2e-4f : 5 * step * std::sqrt(float(ours.groups * kGroup));
  for (int m = 0; m < rows; m++)
    expect(kernels, "a product", found.data() + size_t(m) * stride, wanted.data() + size_t(m) * stride, outputs, error);

  std::vector<float> alone(stride);
  for (int m = 0; m < rows; m++) {
    kernels.matmul(matrix.view(), ours.operand.from(type, m), 1, first, blocks, alone.data(), stride);
    expect_same(kernels, "a row of a product alone", alone.data() + first * kLanes,
                found.data() + size_t(m) * stride + first * kLanes, (blocks - first) * kLanes * sizeof(float));
  }
}

void check_rows(const Kernels& kernels, const Kernels& portable) {
  const int size = draw(1, 300);
  const std::vector<float> y = normal(size), gains = normal(size);
  std::vector<float> x = normal(size), found(size), wanted(size), same = x;
  kernels.norm(x.data(), gains.data(), size, 1e-5f, found.data());
  portable.norm(x.data(), gains.data(), size, 1e-5f, wanted.data());
  expect(kernels, "a norm", found.data(), wanted.data(), size, 1e-5f);
  const float squares = kernels.add(x.data(), y.data(), size), others = portable.add(same.data(), y.data(), size);
  expect_same(kernels, "a sum", x.data(), same.data(), size * sizeof(float));
  expect(kernels, "a sum of squares", &squares, &others, 1, 1e-5f);

  const int lanes = draw(1, 9) * kLanes;
  const std::vector<float> gate_up = normal(2 * lanes, 4);
  std::vector<float> active(lanes), activated(lanes);
  for (bool gelu : {false, true}) {
    kernels.activate(gate_up.data(), lanes, gelu, active.data());
    portable.activate(gate_up.data(), lanes, gelu, activated.data());
    expect(kernels, "an activation", active.data(), activated.data(), lanes, 1e-5f);
  }

  std::vector<float> scores = normal(draw(1, 3000), 20);
  scores[draw(0, int(scores.size()) - 1)] = *std::max_element(scores.begin(), scores.end());
  const int best = kernels.argmax(scores.data(), int(scores.size()));
  cases++;
  if (best != std::max_element(scores.begin(), scores.end()) - scores.begin()) fail(kernels, "not the first of the largest");
  const float total = kernels.sum_exponentials(scores.data(), int(scores.size()), scores[best]);
  const float sum = portable.sum_exponentials(scores.data(), int(scores.size()), scores[best]);
  expect(kernels, "a sum of exponentials", &total, &sum, 1, 1e-5f);

  const uint64_t key = uint64_t(draw(0, 1 << 30)) << 34 | draw(0, 1 << 30);
  const uint64_t limit = uint64_t(draw(0, 1 << 30)) << draw(20, 33);
  std::vector<int32_t> small(scores.size()), same_small(scores.size());
  small.resize(kernels.small_numbers(key, int(small.size()), limit, small.data()));
  same_small.resize(portable.small_numbers(key, int(same_small.size()), limit, same_small.data()));
  cases++;
  if (small != same_small) fail(kernels, "not the small numbers");
}

// A page and the one after it, filled by `store_key` and `store_value` of tokens in the order of slots.
struct Pages {
  Pages(const Kernels& kernels, int size, const std::vector<uint16_t>& keys, const std::vector<float>& values)
      : numbers(allocate<uint16_t>(4 * head_numbers(size))) {
    for (int slot = 0; slot < 2 * kPageTokens; slot++) {
      uint16_t* page = numbers.get() + slot / kPageTokens * 2 * head_numbers(size);
      kernels.store_key(keys.data() + size_t(slot) * size, size, slot % kPageTokens, page);
      kernels.store_value(values.data() + size_t(slot) * size, size, slot % kPageTokens, page + head_numbers(size));
    }
  }
  PageView view(int size, int tree) const {
    const size_t count = head_numbers(size);
    return {numbers.get(), numbers.get() + count, numbers.get() + 2 * count, numbers.get() + 3 * count, tree};
  }

  Buffer<uint16_t> numbers;
};

void check_attention(const Kernels& kernels, const Kernels& portable) {
  const int size = 2 * draw(4, 48), count = draw(1, kTileQueries), width = kPartialHeader + round_up(size, kLanes);
  const std::vector<uint16_t> keys = normal_bf16(size_t(2) * kPageTokens * size), queries = normal_bf16(size_t(count) * size);
  const std::vector<float> values = normal(size_t(2) * kPageTokens * size);
  const Pages ours(kernels, size, keys, values), theirs(portable, size, keys, values);
  expect_same(kernels, "a page", ours.numbers.get(), theirs.numbers.get(), 4 * head_numbers(size) * sizeof(uint16_t));

  // Half of the pages have a tree: from slot `tree` on each query sees a path of its own.
  const int tree = draw(0, 1) ? draw(0, kPageTokens - 1) : kPageTokens;
  std::vector<std::vector<int32_t>> paths(count);
  std::vector<Query> asked(count);
  std::vector<float> found(size_t(count) * width), wanted = found, alone(width);
  for (int i = 0; i < count; i++) {
    for (int node = draw(0, 3); node < 40; node += draw(1, 4)) paths[i].push_back(node);
    const int last = tree < kPageTokens ? std::min(kPageTokens, tree + int(paths[i].size())) : kPageTokens;
    const int end = tree < kPageTokens ? draw(tree, last) : draw(0, last);
    // A query that sees nothing of a page sees it from its first position on.
    const int begin = end ? draw(0, end - 1) : 0;
    asked[i] = {queries.data() + size_t(i) * size, begin, end, nullptr, paths[i].data()};
  }
  const auto attend = [&](const Kernels& table, const Pages& pages, const Query* some, int first, int number, float* out) {
    std::vector<Query> told(some + first, some + first + number);
    for (int i = 0; i < number; i++) told[i].partial = out + size_t(i) * width;
    table.attend(told.data(), number, pages.view(size, tree), size, pages.numbers.get());
  };
  attend(kernels, ours, asked.data(), 0, count, found.data());
  attend(portable, theirs, asked.data(), 0, count, wanted.data());
  for (int i = 0; i < count; i++) {
    const float *one = found.data() + size_t(i) * width, *other = wanted.data() + size_t(i) * width;
    if (asked[i].begin < asked[i].end) {
      std::vector<float> mean(size), expected(size);
      kernels.divide(one, size, mean.data());
      portable.divide(other, size, expected.data());
      expect(kernels, "attention", mean.data(), expected.data(), size, 0.01f);
    }
    attend(kernels, ours, asked.data(), i, 1, alone.data());
    expect_same(kernels, "a query alone", alone.data(), one, (kPartialHeader + size) * sizeof(float));
  }
  std::vector<float> merged = wanted;
  kernels.merge(found.data(), found.data() + (count - 1) * width, size);
  portable.merge(merged.data(), merged.data() + (count - 1) * width, size);
  if (found[1] > 0) expect(kernels, "a merged result", found.data() + 1, merged.data() + 1, 1, 0.01f);

  const std::vector<float> head = normal(size), angles = normal(size);
  std::vector<uint16_t> turned(size), same(size);
  kernels.rotate(head.data(), angles.data(), angles.data() + size / 2, size, 0.5f, turned.data());
  portable.rotate(head.data(), angles.data(), angles.data() + size / 2, size, 0.5f, same.data());
  for (int d = 0; d < size; d++) {
    const float left = of_bf16(turned[d]), right = of_bf16(same[d]);
    expect(kernels, "a rotated head", &left, &right, 1, 0.01f);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
  const unsigned seed = count > 2 ? unsigned(std::strtoul(arguments[2], nullptr, 10)) : 1;
  std::printf("%d rounds, seed %u\n", rounds, seed);
  dice.seed(seed);
  const Kernels& portable = *available_kernels().back();
  for (const Kernels* kernels : available_kernels()) {
    cases = 0;
    for (int round = 0; round < rounds; round++) {
      for (Type type : {Type::bf16, Type::int8, Type::int4}) check_products(*kernels, portable, type);
      check_rows(*kernels, portable);
      check_attention(*kernels, portable);
    }
    std::printf("%s: %d comparisons\n", kernels->name, cases);
  }
}
