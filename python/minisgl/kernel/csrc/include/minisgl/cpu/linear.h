// Products with weights that lie in panels: `kPanel` output features side by side, one input feature after the other.
//
// One layout serves one row (a stream through memory), a few rows, and a prefill: `multiply` keeps a block of rows by
// one panel in registers (K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
// Weights of 16 and 8 bits are widened in registers, or, for more rows than one block, once into a chunk that stays in
// the first-level cache. For int8 weights the rows are 16-bit integers with a scale each, and sums are 32-bit integers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "api.h"
#include "simd.h"

namespace minisgl::cpu {

constexpr int kPanel = 2 * kLanes;
constexpr int kBlockRows = kLanes == 8 ? 6 : 12;  // so that the sums fit the registers
// Input features at a time: a widened chunk of a panel is 16 KiB with 8 lanes. 512 products of 16 by 8 bits fit 32.
constexpr int kChunk = 256;
constexpr int kPairs = 256;
constexpr int kDirectRows = 2 * kBlockRows;  // from here on, widening a chunk once is cheaper than widening it for each block

inline int64_t num_panels(const Linear& w) { return (w.part() + kPanel - 1) / kPanel * (w.is_pair ? 2 : 1); }

// The rows to multiply with. For int8 weights: `pairs`, which hold value * scale.
struct Rows {
  int64_t count;
  const float* values;  // [count, stride]
  int64_t stride;
  const int16_t* pairs;  // [count, pair_stride]
  int64_t pair_stride;   // of 16-bit numbers
  const float* scales;   // [count]
};

// sums: [M, ldt] (+)= x: [M, ldx] * w: [k, kPanel].
template <class T, int M>
[[gnu::noinline]] void multiply(const T* w, const float* x, int64_t ldx, int64_t k, float* sums, int64_t ldt, bool add,
                     const char* next, int64_t next_step) {
  constexpr int kSets = M == 1 ? 4 : M == 2 ? 2 : 1;  // against the latency of an addition
  Floats acc[kSets][M][2];
  for (int s = 0; s < kSets; ++s)
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h)
        acc[s][m][h] = add && s == 0 ? load(sums + m * ldt + h * kLanes) : Floats{};
  int64_t i = 0;
  for (; i + kSets <= k; i += kSets) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      __builtin_prefetch(next + (i + s) * next_step);
      Floats low = load(w + (i + s) * kPanel), high = load(w + (i + s) * kPanel + kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        Floats value = broadcast(x[m * ldx + i + s]);
        acc[s][m][0] += value * low;
        acc[s][m][1] += value * high;
      }
    }
  }
  for (; i < k; ++i)
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) acc[0][m][h] += broadcast(x[m * ldx + i]) * load(w + i * kPanel + h * kLanes);
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) {
      Floats total = acc[0][m][h];
      for (int s = 1; s < kSets; ++s) total += acc[s][m][h];
      store(sums + m * ldt + h * kLanes, total);
    }
}

inline Shorts load_pairs(const int16_t* p) { return load_as<Shorts>(p); }
inline Shorts load_pairs(const int8_t* p) { return __builtin_convertvector(load_as<Bytes>(p), Shorts); }

// The same for integers: w: [pairs, kPanel, 2], x: [M, ldx] 16-bit.
template <class T, int M>
[[gnu::noinline]] void multiply(const T* w, const int16_t* x, int64_t ldx, int64_t pairs, float* sums, int64_t ldt, bool add,
                     const char* next, int64_t next_step) {
  Ints acc[M][2] = {};
  for (int64_t i = 0; i < pairs; ++i) {
    __builtin_prefetch(next + i * next_step);
    Shorts low = load_pairs(w + i * 2 * kPanel), high = load_pairs(w + i * 2 * kPanel + kPanel);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * ldx + 2 * i, 4);
      Shorts value = (Shorts)(Ints{} + pair);
      acc[m][0] = dot_pairs(acc[m][0], low, value);
      acc[m][1] = dot_pairs(acc[m][1], high, value);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) {
      float* place = sums + m * ldt + h * kLanes;
      Floats total = __builtin_convertvector(acc[m][h], Floats);
      store(place, add ? load(place) + total : total);
    }
}

// Any number of rows, in blocks of nearly equal size.
template <class T, class X, int M = kBlockRows>
inline void multiply_block(int m, const T* w, const X* x, int64_t ldx, int64_t k, float* sums, int64_t ldt, bool add,
                           const char* next, int64_t next_step) {
  if constexpr (M > 1) {
    if (m < M) return multiply_block<T, X, M - 1>(m, w, x, ldx, k, sums, ldt, add, next, next_step);
  }
  multiply<T, M>(w, x, ldx, k, sums, ldt, add, next, next_step);
}

template <class T, class X>
inline void multiply_rows(int64_t rows, const T* w, const X* x, int64_t ldx, int64_t k, float* sums, int64_t ldt, bool add,
                          const void* next = nullptr, int64_t next_step = 0) {
  int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
    bool last = b + 1 == blocks && next != nullptr;
    multiply_block(int(end - begin), w, x + begin * ldx, ldx, k, sums + begin * ldt, ldt, add,
                   static_cast<const char*>(last ? next : w), last ? next_step : 0);
  }
}

// One panel by all rows, chunk by chunk → sums: [rows, kPanel], not scaled. `chunk` has room for a widened one.
template <class T, class Wide, class X>
inline void multiply_panel(int64_t rows, const T* w, int64_t row_len, const X* x, int64_t ldx, int64_t k, int64_t step,
                           int64_t x_step, Wide* chunk, float* sums) {
  for (int64_t first = 0; first < k; first += step) {
    int64_t count = std::min(step, k - first);
    const T* part = w + first * row_len;
    const X* values = x + first * x_step;
    const T* next = part + step * row_len;
    if (std::is_same_v<T, Wide> || rows <= kDirectRows) {
      multiply_rows(rows, part, values, ldx, count, sums, kPanel, first > 0, next, row_len * int64_t(sizeof(T)));
      continue;
    }
    for (int64_t i = 0; i < count * row_len; i += sizeof(Floats) / sizeof(Wide)) {
      if constexpr (std::is_same_v<Wide, int16_t>) {
        Shorts wide = load_pairs(part + i);
        std::memcpy(chunk + i, &wide, sizeof wide);
      } else {
        store(chunk + i, load(part + i));
      }
    }
    multiply_rows(rows, chunk, values, ldx, count, sums, kPanel, first > 0, next, row_len * int64_t(sizeof(T)));
  }
}

constexpr int64_t kChunkBytes = std::max(kChunk * kPanel * 4, kPairs * kPanel * 4);

// sums: [rows, kPanel] = rows * panel, scaled, with the bias.
inline void panel_product(const Linear& w, int64_t panel, const Rows& x, void* chunk, float* sums) {
  int64_t size = w.in * kPanel;
  if (w.type == Type::kFloat32) {
    multiply_panel(x.count, static_cast<const float*>(w.data) + panel * size, kPanel, x.values, x.stride, w.in, kChunk, 1,
                   static_cast<float*>(chunk), sums);
  } else if (w.type == Type::kBFloat16) {
    multiply_panel(x.count, static_cast<const BFloat16*>(w.data) + panel * size, kPanel, x.values, x.stride, w.in, kChunk, 1,
                   static_cast<float*>(chunk), sums);
  } else {
    size = w.num_pairs() * 2 * kPanel;
    multiply_panel(x.count, static_cast<const int8_t*>(w.data) + panel * size, 2 * kPanel, x.pairs, x.pair_stride,
                   w.num_pairs(), kPairs, 2, static_cast<int16_t*>(chunk), sums);
    for (int64_t m = 0; m < x.count; ++m)
      for (int h = 0; h < 2; ++h) {
        float* place = sums + m * kPanel + h * kLanes;
        store(place, load(place) * (load(w.scale + panel * kPanel + h * kLanes) * x.scales[m]));
      }
  }
}

// 16-bit integers with one scale, which is returned; NaN where a value is not finite. An odd count is padded with a zero.
inline float to_pairs(const float* x, int64_t count, int16_t* pairs) {
  Floats high{}, nothing{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Floats v = load(x + i);
    high = maximum(v, maximum(-v, high));
    nothing += v * 0.0f;
  }
  float most = largest(high), poison = sum(nothing);
  for (; i < count; ++i) most = std::max(most, std::fabs(x[i])), poison += x[i] * 0.0f;
  float inverse = most > 0 ? 32767.0f / most : 0.0f;
  for (i = 0; i + kLanes <= count; i += kLanes) {
    Ints nearest = (Ints)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;  // what is added leaves no room for fractions
    auto narrow = __builtin_convertvector(nearest, HalfInts);
    std::memcpy(pairs + i, &narrow, sizeof narrow);
  }
  for (; i < count; ++i) pairs[i] = int16_t(std::lrintf(x[i] * inverse));
  if (count % 2) pairs[count] = 0;
  return most / 32767.0f + poison;
}

}  // namespace minisgl::cpu
