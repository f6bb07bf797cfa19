// Functions of one row, or of a range of memory. Part of kernels.cpp, which states the rules for all of it.
#pragma once

namespace {

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// Calls work(Constant<count>), for counts from 1 to Most.
template <int Most, class Work>
inline void with_constant(int count, Work work) {
  if (count == Most)
    work(Constant<Most>{});
  else if constexpr (Most > 1)
    with_constant<Most - 1>(count, work);
}

// exp(x) for x <= 88; 0 below -87. Degree 6 after Cody and Waite's reduction; exact at 0; error below 2 ulp.
inline Floats exponential(Floats x) {
  const Floats clamped = max(x, splat(-87.0f));
  const Floats n = nearest(mul(clamped, splat(1.44269504f)));
  Floats r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), splat(1.0f));
  return scale_by_power(y, n);
}

void norm(const float* x, const float* gain, int size, float epsilon, float* out) {
  Floats squares = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; i++) out[i] = x[i] * scale * gain[i];
}

float add_rows(float* x, const float* y, int size) {
  Floats squares = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats both = add(load(x + i), load(y + i));
    store(x + i, both);
    squares = fma(both, both, squares);
  }
  float total = sum(squares);
  for (; i < size; i++) {
    x[i] += y[i];
    total += x[i] * x[i];
  }
  return total;
}

void activate(const float* gate_up, int size, bool gelu, float* out) {
  for (int i = 0; i < size; i += kLanes) {
    const Floats gate = load(gate_up + 2 * i), up = load(gate_up + 2 * i + kLanes);
    Floats inner = gate;
    if (gelu) {
      // gelu(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the tanh form
      const Floats cubic = fma(mul(gate, gate), splat(0.044715f), splat(1.0f));
      inner = mul(mul(gate, cubic), splat(1.5957691216f));
    }
    // exp(-x) would overflow below -88, where the result is 0 anyway
    const Floats minus = min(sub(splat(0.0f), inner), splat(87.0f));
    store(out + i, mul(div(gate, add(splat(1.0f), exponential(minus))), up));
  }
}

// The first of sixteen numbers, and zeros.
inline Floats load_some(const float* p, int count) {
  if (count >= kLanes) return load(p);
  float padded[kLanes] = {};
  for (int i = 0; i < count; i++) padded[i] = p[i];
  return load(padded);
}

// Rounds `size` numbers to bf16; out has room for whole lanes.
inline void round_row(const float* x, int size, uint16_t* out) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_bf16(out + i, load(x + i));
  if (i == size) return;
  uint16_t rounded[kLanes];
  store_bf16(rounded, load_some(x + i, size - i));
  for (int j = i; j < size; j++) out[j] = rounded[j - i];
}

void rotate(const float* x, const float* cosine, const float* sine, int size, float scale, uint16_t* out) {
  const int half = size / 2;
  float turned[kLargestHead];
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    turned[i] = (a * cosine[i] - b * sine[i]) * scale;
    turned[i + half] = (b * cosine[i] + a * sine[i]) * scale;
  }
  round_row(turned, size, out);
}

int argmax(const float* x, int size) {
  // First the largest number of each strip, then its index within the first strip that has it.
  constexpr int kStrip = 64 * kLanes;
  float most = -INFINITY;
  int strip = 0;
  for (int start = 0; start < size; start += kStrip) {
    const int end = size - start < kStrip ? size : start + kStrip;
    Floats lanes = splat(-INFINITY);
    int i = start;
    for (; i + kLanes <= end; i += kLanes) lanes = max(lanes, load(x + i));
    float top = largest(lanes);
    for (; i < end; i++) top = x[i] > top ? x[i] : top;
    if (top > most) {
      most = top;
      strip = start;
    }
  }
  while (strip + 1 < size && x[strip] != most) strip++;
  return strip;
}

float sum_exponentials(const float* x, int size, float top) {
  Floats total = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) total = add(total, exponential(sub(load(x + i), splat(top))));
  if (i < size) {
    const Floats rest = load_some(x + i, size - i);
    total = add(total, keep(exponential(sub(rest, splat(top))), 0, size - i, 0.0f));
  }
  return sum(total);
}

// SplitMix64 (decode/random_numbers.py) but for its last step, which leaves the high 31 bits alone.
int small_numbers(uint64_t key, int size, uint64_t limit, int32_t* found) {
  constexpr int kStrip = 256;
  const uint64_t most = limit | 0x1ffffffffull;
  uint8_t is_small[kStrip];
  int count = 0;
  for (int start = 0; start < size; start += kStrip) {
    const int strip = size - start < kStrip ? size - start : kStrip;
    const uint64_t first = key + uint64_t(start) * 0x9E3779B97F4A7C15ull;
    uint8_t any = 0;
    for (int i = 0; i < strip; i++) {
      uint64_t bits = first + uint64_t(i) * 0x9E3779B97F4A7C15ull;
      bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9ull;
      bits = (bits ^ bits >> 27) * 0x94D049BB133111EBull;
      is_small[i] = bits <= most;
      any |= is_small[i];
    }
    if (!any) continue;
    for (int i = 0; i < strip; i++)
      if (is_small[i]) found[count++] = start + i;
  }
  return count;
}

// Four streams at once, as in the matrix products with few rows.
float read(const float* memory, size_t count) {
  constexpr int kStreams = 4;
  const size_t part = count / kStreams / (4 * kLanes) * (4 * kLanes);
  Floats total[kStreams];
  for (Floats& one : total) one = splat(0.0f);
  for (size_t i = 0; i < part; i += kLanes)
    for (int s = 0; s < kStreams; s++) {
      const float* numbers = memory + s * part + i;
      prefetch(reinterpret_cast<const uint8_t*>(numbers) + 1024);
      total[s] = add(total[s], load(numbers));
    }
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

}  // namespace
