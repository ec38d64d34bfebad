// Weights that are stored in full, made 4 or 8 bits wide: groups of kGroup inputs with a scale and a zero.
#pragma once

#include <atomic>

#include "packed.h"

namespace minisgl::cpu {

// Steps into which a group's range is divided: with more than 15 its ends are cut.
constexpr float kSpans[] = {13.0f, 14.2f, 15.4f, 16.6f};

// To the nearest whole number, an even one between two. |x| < 2^22.
inline Floats nearest(Floats x) { return (x + 12582912.0f) - 12582912.0f; }
inline Floats clamped(Floats x, float most) {
  x = x < 0.0f ? Floats{} : x;
  return x > most ? broadcast(most) : x;
}

// As many groups as a vector has lanes. importance: of errors in each input.
struct Groups {
  Floats x[kGroup], importance[kGroup];
  Floats scale, zero;
};

// For given codes q - z, the scale with the least squared error is <x, q - z> / <q - z, q - z>, and what it takes away from
// <x, x> is <x, q - z>² / <q - z, q - z>: so candidates are compared without computing what they stand for.
inline void search(Groups& g) {
  Floats low{}, high{}, best{};
  for (Floats x : g.x) low = x < low ? x : low, high = maximum(x, high);
  Floats range = maximum(high - low, broadcast(1e-30f));
  g.scale = g.zero = Floats{};
  for (float span : kSpans) {
    Floats inverse = span / range, middle = 7.5f - (low + high) * 0.5f * inverse, below = nearest(middle);
    below = below > middle ? below - 1.0f : below;
    for (float shift : {0.0f, 1.0f}) {
      Floats zero = clamped(below + shift, 15.0f), product{}, square{};
      for (int i = 0; i < kGroup; ++i) {
        Floats code = clamped(nearest(g.x[i] * inverse + zero), 15.0f) - zero, weighted = code * g.importance[i];
        product += weighted * g.x[i];
        square += weighted * code;
      }
      square = maximum(square, broadcast(1e-30f));
      Floats gain = product * product / square;
      Ints is_better = gain > best;
      best = is_better ? gain : best, g.zero = is_better ? zero : g.zero, g.scale = is_better ? product / square : g.scale;
    }
  }
}

inline void symmetric(Groups& g) {
  Floats most{};
  for (Floats x : g.x) most = maximum(most, maximum(x, -x));
  g.scale = most / 127.0f, g.zero = broadcast(128.0f);
}

// Where the results of all groups go; zeros: none are wanted where there are 8 bits.
struct Narrow {
  int bits;
  uint8_t* codes;
  uint16_t* scales;
  uint8_t* zeros;
};

// Groups `first` and following, of which the last `kLanes - count` are no more. Whether all are finite.
template <class T>
bool narrow_groups(const T* weight, const float* importance, int64_t in, int64_t first, int64_t count, const Narrow& to) {
  Groups g{};
  Floats zeros{};
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t i = 0; i < kGroup; ++i) {
      int64_t at = (first + lane) * kGroup + i;
      g.x[i][lane] = widen(weight[at]);
      g.importance[i][lane] = importance == nullptr ? 1.0f : importance[at % in];
    }
  for (Floats x : g.x) zeros += x * 0.0f;
  if (sum(zeros) != 0.0f) return false;  // NaN is none either
  to.bits == 8 ? symmetric(g) : search(g);
  Floats scale;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint16_t half = half_bits(g.scale[lane]);
    scale[lane] = half == 0 ? 1.0f : half_value(half);
    if (lane < count) to.scales[first + lane] = half;
    if (lane < count && to.zeros != nullptr) to.zeros[first + lane] = uint8_t(g.zero[lane]);
  }
  Ints codes[kGroup];
  for (int i = 0; i < kGroup; ++i)
    codes[i] = __builtin_convertvector(clamped(nearest(g.x[i] / scale + g.zero), to.bits == 8 ? 255.0f : 15.0f), Ints);
  for (int64_t lane = 0; lane < count; ++lane) {
    uint8_t* bytes = to.codes + (first + lane) * kGroup * to.bits / 8;
    for (int i = 0; i < kGroup && to.bits == 8; ++i) bytes[i] = uint8_t(codes[i][lane]);
    for (int i = 0; i < kGroup / 2 && to.bits == 4; ++i) bytes[i] = uint8_t(codes[2 * i][lane] | codes[2 * i + 1][lane] << 4);
  }
  return true;
}

template <class T>
bool narrow_weight(Workers& workers, const T* weight, const float* importance, int64_t out, int64_t in, const Narrow& to) {
  std::atomic<bool> is_finite{true};
  int64_t groups = out * in / kGroup;
  workers.pool.run([&](int) {
    workers.pool.share((groups + kLanes - 1) / kLanes, 64, [&](int64_t i) {
      if (!narrow_groups(weight, importance, in, i * kLanes, std::min<int64_t>(kLanes, groups - i * kLanes), to)) is_finite = false;
    });
  });
  return is_finite;
}

}  // namespace minisgl::cpu
