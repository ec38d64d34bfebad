// Keys and values as caches hold them. One token's key or value of a head is a row: numbers of 32 or 16 bits, or integers of 8
// bits and behind these the scale that they share, a float.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace minisgl::cpu {

inline Floats load(const int8_t* p) { return load_small(p); }
inline float widen(int8_t x) { return x; }
inline void store(Float16* p, Floats v) { store_halves(&p->bits, v); }
inline void narrow(Float16* p, float x) { p->bits = half_bits(x); }

// Number d of the 32 bits that each lane holds, as in linear.h.
inline Floats part_of(const int8_t*, Words v, int d) {
  return __builtin_convertvector((Ints)(v << (24 - 8 * d)) >> 24, Floats);
}

template <class T>
constexpr bool kHasScales = std::is_same_v<T, int8_t>;

// How many T there are in a row.
template <class T>
constexpr int64_t row_size(int64_t dim) {
  return kHasScales<T> ? dim + int64_t(sizeof(float)) : dim;
}

template <class T>
inline float scale_of(const T* row, int64_t dim) {
  if constexpr (kHasScales<T>) return load_as<float>(row + dim);
  return 1.0f;
}

// f(Cache<T>) for the type that a cache has.
template <class F>
inline void with_type(const AnyCache& cache, F&& f) {
  auto typed = [&]<class T>(T*) { f(Cache<T>{static_cast<T*>(cache.k), static_cast<T*>(cache.v)}); };
  switch (cache.type) {
    case CacheType::kFloat32: return typed(static_cast<float*>(nullptr));
    case CacheType::kBFloat16: return typed(static_cast<BFloat16*>(nullptr));
    case CacheType::kFloat16: return typed(static_cast<Float16*>(nullptr));
    case CacheType::kInt8: return typed(static_cast<int8_t*>(nullptr));
  }
}

template <class T>
inline void store_row(T* row, const float* x, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(row + i, load(x + i));
  for (; i < dim; ++i) narrow(row + i, x[i]);
}

// Where a number is not finite, the scale is NaN.
inline void store_row(int8_t* row, const float* x, int64_t dim) {
  float most = 0, nothing = 0;
  for (int64_t i = 0; i < dim; ++i) most = std::max(most, std::fabs(x[i])), nothing += x[i] * 0.0f;
  float scale = most / 127.0f + nothing, inverse = most > 1e-35f ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < dim; ++i) {
    float nearest = x[i] * inverse + 12582912.0f;  // what is added leaves no room for fractions
    row[i] = int8_t(load_as<int32_t>(&nearest));
  }
  std::memcpy(row + dim, &scale, sizeof scale);
}

}  // namespace minisgl::cpu
