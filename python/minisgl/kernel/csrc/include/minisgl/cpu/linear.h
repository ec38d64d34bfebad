// Products with weights that lie in panels: `kPanel` output features side by side, and of each of them 32 bits: one float,
// two numbers of 16 bits or four int8, which belong to input features that follow one another. Such a unit of a panel is two
// vectors, whatever the type is; 16 and 8 bits are widened in registers.
//
// One layout serves one row (a stream through memory), a few rows, and a prefill: `multiply` keeps a block of rows by
// one panel in registers (K. Goto and R. van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
// For int8 weights the rows are 16-bit integers with a scale each, and sums are 32-bit integers.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "api.h"
#include "simd.h"

namespace minisgl::cpu {

constexpr int kPanel = 2 * kLanes;
constexpr int kUnitBytes = kPanel * 4;
constexpr int kBlockRows = kLanes == 8 ? 6 : 12;  // so that the sums fit the registers
constexpr int kAhead = 8 * kUnitBytes;            // how far ahead of a stream to prefetch
// Units that several blocks of rows find in the first-level cache, the second where there are many. 512 products of 16 by 8
// bits fit 32.
constexpr int kChunkUnits = 128;
constexpr int kLongChunkUnits = 256;

inline int64_t depth_of(Type type) { return type == Type::kInt8 ? 4 : type == Type::kFloat32 ? 1 : 2; }
inline int64_t num_units(const Linear& w) { return (w.in + depth_of(w.type) - 1) / depth_of(w.type); }
inline int64_t panels_of(int64_t out) { return (out + kPanel - 1) / kPanel; }
inline int64_t num_panels(const Linear& w) {
  if (w.is_pair || w.parts.empty()) return panels_of(w.part()) * (w.is_pair ? 2 : 1);
  int64_t count = 0;
  for (const Part& part : w.parts) count += panels_of(part.out);
  return count;
}
inline int64_t panel_bytes(const Linear& w) { return num_units(w) * kUnitBytes; }

// Panels that are read side by side by two rows, which leave the registers for that; more keep a core busy. A single row
// waits for memory alone. Processors with AMX get more from it by several streams than by one; others most by one, and read
// ahead by themselves.
#if defined(__AMX_INT8__)
constexpr int kStreams = 4;
#else
constexpr int kStreams = 1;
#endif
constexpr int streams_of(int64_t rows) { return rows == 1 ? kStreams : rows == 2 ? 2 : 1; }

// Rows of 8-bit integers for packed weights, in groups of 32 with a scale each.
struct ByteRows {
  const int8_t* bytes;          // [count, stride * 32]
  const float* scales;          // [count, stride]
  const float* totals;          // [count, stride, 2], of 16 integers, scaled
  const float* pair_totals;     // [count, stride], of 32
  int64_t groups, stride;       // stride: is odd, so that rows keep out of each other's way in the caches

  ByteRows from(int64_t row) const {
    int64_t at = row * stride;
    return {bytes + at * 32, scales + at, totals + 2 * at, pair_totals + at, groups, stride};
  }
};

// The rows to multiply with, as far as the weights' last units reach. For int8 weights: `shorts`, which hold value / scale, for
// packed ones `bytes`. Many rows may be `tiles` instead (amx.h).
struct Rows {
  int64_t count;
  const float* values;  // [count, stride]
  int64_t stride;
  const int16_t* shorts;  // [count, short_stride]
  int64_t short_stride;
  const float* scales;  // [count]
  const char* tiles;    // or null
  ByteRows bytes = {};
};

// The input features of a unit's four bytes: shifts make pairs of 16 bits out of the even bytes, and of the odd.
constexpr int kQuad[4] = {0, 2, 1, 3};

// Input feature d of the unit's 32 bits.
inline Floats part_of(const float*, Words v, int) { return (Floats)v; }
inline Floats part_of(const BFloat16*, Words v, int d) { return (Floats)(d == 0 ? v << 16 : v & 0xffff0000u); }
inline Floats part_of(const Float16*, Words v, int d) {
  Halves halves = __builtin_convertvector((d == 0 ? v : v >> 16) & 0xffff, Halves);
  return load_halves(reinterpret_cast<const uint16_t*>(&halves));
}

// Where a product goes: panel p's sums are [M, stride] from sums + p * next on.
struct Sums {
  float* sums;
  int64_t stride, next;
};

// to (+)= x: [M, ldx] * w: P panels of [units, kPanel] of T, `panel` bytes apart. ahead: what is prefetched beside w.
template <class T, int M, int P>
[[gnu::noinline]] void multiply(const T* w, int64_t panel, const float* x, int64_t ldx, int64_t units, Sums to, bool add,
                                int64_t ahead) {
  constexpr int kDepth = 4 / sizeof(T);
  constexpr int kUnroll = std::max(1, (M * P <= 6 ? 8 : 2) / kDepth);
  const char* from = reinterpret_cast<const char*>(w);
  Floats acc[P][M][2];
  for (int p = 0; p < P; ++p)
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) acc[p][m][h] = add ? load(to.sums + p * to.next + m * to.stride + h * kLanes) : Floats{};
  auto unit = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int d = 0; d < kDepth; ++d) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const char* place = from + p * panel + i * kUnitBytes;
        if (d == 0 && M * P > 1)
          for (int b = 0; b < kUnitBytes; b += 64) __builtin_prefetch(place + ahead + b);
        Floats low = part_of(w, load_as<Words>(place), d), high = part_of(w, load_as<Words>(place + kUnitBytes / 2), d);
        if constexpr (M > 1) keep(low), keep(high);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          Floats value = broadcast(x[m * ldx + i * kDepth + d]);
          acc[p][m][0] += value * low;
          acc[p][m][1] += value * high;
        }
      }
    }
  };
  int64_t i = 0;
  for (; i + kUnroll <= units; i += kUnroll) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) unit(i + u);
  }
  for (; i < units; ++i) unit(i);
  for (int p = 0; p < P; ++p)
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) store(to.sums + p * to.next + m * to.stride + h * kLanes, acc[p][m][h]);
}

// The same for int8 weights and 16-bit rows; units: no more than `kChunkUnits`.
template <class T, int M, int P>
[[gnu::noinline]] void multiply(const int8_t* w, int64_t panel, const int16_t* x, int64_t ldx, int64_t units, Sums to, bool add,
                                int64_t ahead) {
  Ints acc[P][M][2] = {};
  for (int64_t i = 0; i < units; ++i) {
#pragma GCC unroll 2
    for (int d = 0; d < 2; ++d) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const int8_t* place = w + p * panel + i * kUnitBytes;
        if (d == 0 && M * P > 1)
          for (int b = 0; b < kUnitBytes; b += 64) __builtin_prefetch(place + ahead + b);
        Shorts low = load_as<Shorts>(place), high = load_as<Shorts>(place + kUnitBytes / 2);
        low = d == 0 ? (low << 8) >> 8 : low >> 8, high = d == 0 ? (high << 8) >> 8 : high >> 8;
        if constexpr (M > 1) keep(low), keep(high);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          Shorts value = (Shorts)(Ints{} + load_as<int32_t>(x + m * ldx + 4 * i + 2 * d));
          acc[p][m][0] = dot_pairs(acc[p][m][0], low, value);
          acc[p][m][1] = dot_pairs(acc[p][m][1], high, value);
        }
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int m = 0; m < M; ++m)
      for (int h = 0; h < 2; ++h) {
        float* place = to.sums + p * to.next + m * to.stride + h * kLanes;
        Floats total = __builtin_convertvector(acc[p][m][h], Floats);
        store(place, add ? load(place) + total : total);
      }
}

template <class T, class X, int M = kBlockRows>
inline void multiply_block(int m, const T* w, const X* x, int64_t ldx, int64_t units, Sums to, bool add, int64_t ahead) {
  if constexpr (M > 1) {
    if (m < M) return multiply_block<T, X, M - 1>(m, w, x, ldx, units, to, add, ahead);
  }
  multiply<T, M, 1>(w, 0, x, ldx, units, to, add, ahead);
}

// One panel by any number of rows, in blocks of nearly equal size; units: no more than stay in the cache. What follows w in
// memory is prefetched.
template <class T, class X>
inline void multiply_rows(int64_t rows, const T* w, const X* x, int64_t ldx, int64_t units, float* sums, int64_t stride, bool add) {
  int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
    int64_t ahead = blocks == 1 ? kAhead : b + 1 == blocks ? units * kUnitBytes : 0;
    multiply_block(int(end - begin), w, x + begin * ldx, ldx, units, {sums + begin * stride, stride, 0}, add, ahead);
  }
}

// `panels` of them, not scaled.
template <class T, class X>
inline void multiply_panels(int64_t panels, int64_t panel, int64_t rows, const char* data, const X* x, int64_t ldx, int64_t units,
                            float* sums) {
  constexpr int kDepth = 4 / sizeof(T);
  if (rows <= kBlockRows && panels > 1 && panels != streams_of(rows)) {  // one after the other, from its first unit to its last
    for (int64_t p = 0; p < panels; ++p) multiply_panels<T>(1, panel, rows, data + p * panel, x, ldx, units, sums + p * rows * kPanel);
    return;
  }
  int64_t step = sizeof(T) == 1 || rows <= 2 * kBlockRows ? kChunkUnits : kLongChunkUnits;
  if (sizeof(T) > 1 && rows <= kBlockRows) step = units;
  for (int64_t first = 0; first < units; first += step) {
    int64_t count = std::min(step, units - first);
    const X* values = x + first * kDepth;
    auto w = reinterpret_cast<const T*>(data + first * kUnitBytes);
    Sums to{sums, kPanel, rows * kPanel};
    if (rows == 1 && panels == streams_of(1))
      multiply<T, 1, streams_of(1)>(w, panel, values, ldx, count, to, first > 0, kAhead);
    else if (rows == 2 && panels == streams_of(2))
      multiply<T, 2, streams_of(2)>(w, panel, values, ldx, count, to, first > 0, kAhead);
    else
      for (int64_t p = 0; p < panels; ++p)
        multiply_rows(rows, w + p * panel / int64_t(sizeof(T)), values, ldx, count, sums + p * to.next, kPanel, first > 0);
  }
}

// sums: [panels, rows, kPanel] = rows * panels from `first` on, scaled.
inline void panel_products(const Linear& w, int64_t first, int64_t panels, const Rows& x, float* sums) {
  const char* data = static_cast<const char*>(w.data) + first * panel_bytes(w);
  int64_t units = num_units(w), size = panel_bytes(w);
  if (w.type == Type::kFloat32) return multiply_panels<float>(panels, size, x.count, data, x.values, x.stride, units, sums);
  if (w.type == Type::kBFloat16) return multiply_panels<BFloat16>(panels, size, x.count, data, x.values, x.stride, units, sums);
  if (w.type == Type::kFloat16) return multiply_panels<Float16>(panels, size, x.count, data, x.values, x.stride, units, sums);
  multiply_panels<int8_t>(panels, size, x.count, data, x.shorts, x.short_stride, units, sums);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t m = 0; m < x.count; ++m)
      for (int h = 0; h < kPanel; h += kLanes) {
        float* place = sums + (p * x.count + m) * kPanel + h;
        store(place, load(place) * (load(w.scale + (first + p) * kPanel + h) * x.scales[m]));
      }
}

// 16-bit integers with one scale, which is returned; NaN where a value is not finite. The last four are filled with zeros.
inline float to_shorts(const float* x, int64_t count, int16_t* shorts) {
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
    std::memcpy(shorts + i, &narrow, sizeof narrow);
  }
  for (; i < (count + 3) / 4 * 4; ++i) shorts[i] = i < count ? int16_t(std::lrintf(x[i] * inverse)) : 0;
  return most / 32767.0f + poison;
}

}  // namespace minisgl::cpu
