// Vectors of the widest registers that the compiler may use (-march=native), in the compilers' own vector types, so
// that one source serves AVX2, AVX-512 and NEON. Few instructions are called by name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

#include "api.h"

namespace minisgl::cpu {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Shorts = int16_t __attribute__((vector_size(kLanes * 4)));       // pairs of 16-bit numbers, one pair a lane
using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
using HalfInts = int16_t __attribute__((vector_size(kLanes * 2)));
using Bytes = uint8_t __attribute__((vector_size(kLanes * 4)));        // four numbers of 8 bits a lane

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const float* p) { return load_as<Floats>(p); }
inline Floats load(const BFloat16* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  Words wide = (Words)_mm512_cvtepu16_epi32(load_as<__m256i>(p));
#elif defined(__AVX2__)
  Words wide = (Words)_mm256_cvtepu16_epi32(load_as<__m128i>(p));  // GCC 12 makes five instructions of the other
#else
  Words wide = __builtin_convertvector(load_as<Halves>(p), Words);
#endif
  return (Floats)(wide << 16);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Keeps a vector in a register: a compiler would rather load it again for each use.
template <class V>
inline void keep(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; a NaN stays one.
inline void store(BFloat16* p, Floats v) {
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words quiet = (bits >> 16) | 0x40;
  Ints is_nan = v != v;
  rounded = (quiet & (Words)is_nan) | (rounded & ~(Words)is_nan);
  Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

inline void narrow(float* p, float x) { *p = x; }
inline void narrow(BFloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats broadcast(float x) {
  Ints bits;
  std::memcpy(&bits, &x, sizeof x);
  int32_t first = bits[0];
  return (Floats)(Ints{} + first);
}

// Folds a vector: its halves, their halves, and so on.
template <int N, class V, class F>
inline V fold(V v, F f) {
  if constexpr (N == 1) {
    return v;
  } else {
    Ints lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i ^ (N / 2);
#if defined(__clang__)
    V swapped;
    for (int i = 0; i < kLanes; ++i) swapped[i] = v[lane[i]];
#else
    V swapped = __builtin_shuffle(v, lane);
#endif
    return fold<N / 2>(f(v, swapped), f);
  }
}

template <class V>
inline auto sum(V v) {
  return fold<kLanes>(v, [](V a, V b) { return a + b; })[0];
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline auto largest(V v) {
  return fold<kLanes>(v, maximum<V>)[0];
}

// Bit i: whether the number in lane i is negative, as that of a comparison is that holds.
inline uint32_t sign_bits(Ints v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_cmplt_epi32_mask((__m512i)v, _mm512_setzero_si512());
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)v));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(v[i] < 0) << i;
  return bits;
#endif
}

// acc + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in each lane i.
inline Ints dot_pairs(Ints acc, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && defined(__AVX2__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return acc + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  Ints low_a = ((Ints)a << 16) >> 16, low_b = ((Ints)b << 16) >> 16;
  return acc + low_a * low_b + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// Whether unsigned bytes of any size can be multiplied with signed ones at once. Elsewhere those above 127 would overflow:
// there, weights that need all 8 bits are signed.
#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || (defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512BW__))
constexpr bool kHasByteDots = true;
#else
constexpr bool kHasByteDots = false;
#endif
constexpr int kWideBias = kHasByteDots ? 128 : 0;  // what is added to such a weight

// Four numbers of x in each lane. x: -127 … 127.
inline Bytes broadcast_unit(const int8_t* x) { return (Bytes)(Ints{} + load_as<int32_t>(x)); }

#if defined(__AVX2__)
// Sums of two products w * x, with signs for x only, in each 16 bits.
inline Shorts dot_byte_pairs(Bytes w, Bytes x) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
#endif
}
#endif

// The sum in each lane of acc and of four products w * x. kIsWide: w is a weight of 8 bits, with `kWideBias`; else it is
// 0 … 127.
template <bool kIsWide>
inline Ints dot_bytes(Ints acc, Bytes w, Bytes x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  if constexpr (kIsWide) {
    x = (Bytes)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), (__m512i)x);
    w = (Bytes)_mm512_abs_epi8((__m512i)w);
  }
  return dot_pairs(acc, dot_byte_pairs(w, x), Shorts{} + 1);
#elif defined(__AVXVNNI__) && defined(__AVX2__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
  if constexpr (kIsWide) {
    x = (Bytes)_mm256_sign_epi8((__m256i)x, (__m256i)w);
    w = (Bytes)_mm256_abs_epi8((__m256i)w);
  }
  return dot_pairs(acc, dot_byte_pairs(w, x), Shorts{} + 1);
#else
  Ints a = (Ints)w, b = (Ints)x;  // as signed bytes: a weight that is not wide has no sign
  for (int shift = 0; shift < 32; shift += 8) acc += ((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24);
  return acc;
#endif
}

// The sum in each lane of N vectors of codes, 0 … 2^bits - 1, times N units of x. Where a product of bytes makes pairs of 16
// bits, as many of these are added as cannot overflow.
template <int bits, int N>
inline Ints dot_codes(const Bytes* codes, const int8_t* x) {
  Ints acc{};
#if defined(__AVX2__)
  if constexpr (!kHasByteDots && bits < 7) {
    constexpr int kTogether = std::min(N, 32767 / (2 * 127 * ((1 << bits) - 1)));
#pragma GCC unroll 8
    for (int u = 0; u < N; u += kTogether) {
      Shorts pairs{};
#pragma GCC unroll 8
      for (int i = u; i < u + kTogether; ++i) pairs += dot_byte_pairs(codes[i], broadcast_unit(x + 4 * i));
      acc = dot_pairs(acc, pairs, Shorts{} + 1);
    }
    return acc;
  }
#endif
#pragma GCC unroll 8
  for (int u = 0; u < N; ++u) acc = dot_bytes<bits == 8>(acc, codes[u], broadcast_unit(x + 4 * u));
  return acc;
}

// table[i] of each byte i < 16.
inline Bytes look_up(const uint8_t* table, Bytes i) {
#if defined(__AVX512BW__)
  return (Bytes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_as<__m128i>(table)), (__m512i)i);
#elif defined(__AVX2__)
  return (Bytes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(table)), (__m256i)i);
#elif defined(__SSSE3__)
  return (Bytes)_mm_shuffle_epi8(load_as<__m128i>(table), (__m128i)i);
#else
  for (size_t j = 0; j < sizeof i; ++j) i[j] = table[i[j]];
  return i;
#endif
}

// Numbers of 16 bits with 5 bits of exponent (IEEE 754 binary16).
inline float half_value(uint16_t bits) {
  uint32_t word = uint32_t(bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &word, 4);
  value = (bits & 0x7c00) == 0x7c00 ? (bits & 0x3ff ? NAN : INFINITY) : value * 0x1p112f;
  return bits & 0x8000 ? -value : value;
}
inline Floats load_halves(const uint16_t* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = half_value(p[i]);
  return result;
#endif
}

inline Floats load(const Float16* p) { return load_halves(&p->bits); }
inline float widen(Float16 x) { return half_value(x.bits); }

// To nearest even. What is larger than the format's largest number becomes that one, and what is not finite NaN.
inline uint16_t half_bits(float x) {
  float most = std::fmin(std::fabs(x), 65504.0f), shifted = most < 0x1p-14f ? most + 0.5f : most;
  uint32_t bits, sign;
  std::memcpy(&bits, &shifted, 4);
  std::memcpy(&sign, &x, 4);
  bits = most < 0x1p-14f ? bits - 0x3f000000 : ((bits + 0xfff + ((bits >> 13) & 1)) >> 13) - (112 << 10);
  return uint16_t((x * 0.0f == 0.0f ? bits : 0x7e00) | (sign >> 16 & 0x8000));
}
inline void store_halves(uint16_t* p, Floats v) {
#if (defined(__AVX512F__) && defined(__AVX512BW__)) || (defined(__AVX2__) && defined(__F16C__))
  Floats limited = v > 65504.0f ? broadcast(65504.0f) : v < -65504.0f ? broadcast(-65504.0f) : v;
  limited += v * 0.0f;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m256i halves = _mm512_cvtps_ph((__m512)limited, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  __m128i halves = _mm256_cvtps_ph((__m256)limited, _MM_FROUND_TO_NEAREST_INT);
#endif
  std::memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = half_bits(v[i]);
#endif
}

// Signed bytes as floats.
inline Floats load_small(const int8_t* p) {
  using Small = int8_t __attribute__((vector_size(kLanes)));
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_as<Small>(p), Floats);
#endif
}

// e^x to within 2 units in the last place; 0 below -87.3, and what is above 88 counts as 88. The polynomial is Cephes'
// expf (S. L. Moshier).
inline Floats exponential(Floats x) {
  Ints tiny = x < -87.3f;
  x = x > 88.0f ? broadcast(88.0f) : x;
  x = tiny ? broadcast(-87.3f) : x;
  Floats scaled = x * 1.44269504088896341f;
  Floats n = (scaled + 12582912.0f) - 12582912.0f;  // the nearest integer
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints exponent = __builtin_convertvector(n, Ints) + 127;
  Floats result = p * (Floats)(exponent << 23);
  return tiny ? Floats{} : result;
}

// cap * tanh(x / cap), by e^(2x / cap).
inline Floats soft_capped(Floats x, float cap) { return cap - 2.0f * cap / (exponential(x * (2.0f / cap)) + 1.0f); }

// silu(gate) * up.
inline Floats gated(Floats gate, Floats up) { return gate / (1.0f + exponential(-gate)) * up; }

// gelu(gate) * up, by the tangent: gate * sigmoid(2 sqrt(2 / pi) * (gate + 0.044715 gate³)) (arXiv 1606.08415).
inline Floats gelu_gated(Floats gate, Floats up) {
  Floats inner = gate * 1.59576912160573f * (1.0f + 0.044715f * gate * gate);
  return gate / (1.0f + exponential(-inner)) * up;
}

}  // namespace minisgl::cpu
