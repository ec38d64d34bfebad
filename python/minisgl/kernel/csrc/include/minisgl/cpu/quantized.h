// Products with weights of few bits (packed.h). The rows are 8-bit integers, with a scale for 32 inputs; sums of 16 or 32
// products are 32-bit integers, and exact.
//
// A single row is multiplied with codes as they come from memory. For several, some groups of a panel are unpacked to bytes
// that stay in the first-level cache, and multiplied with blocks of rows.
#pragma once

#include "packed.h"

namespace minisgl::cpu {

constexpr int64_t kChunkGroups = 8;  // that are unpacked at a time
constexpr int kUnits = 8;            // of a group

// One row's 8-bit integers, to groups of 32 of which the last is filled up with zeros. sums: of 16 integers; totals: these
// scaled; pair_totals: of 32. columns: which inputs they are, or null. A group with a NaN has a scale that is one.
struct ByteRow {
  int8_t* bytes;
  float* scales;
  int32_t* sums;
  float *totals, *pair_totals;

  void fill(const float* x, int64_t width, const int64_t* columns) {
    alignas(64) float copy[kGroup];
    for (int64_t g = 0; g < num_groups(width); ++g) {
      int64_t first = g * kGroup, count = std::min(kGroup, width - first);
      const float* from = x + first;
      if (columns != nullptr || count < kGroup) {
        for (int64_t i = 0; i < kGroup; ++i) copy[i] = i >= count ? 0.0f : columns == nullptr ? from[i] : x[columns[first + i]];
        from = copy;
      }
      fill_group(from, g);
    }
  }

 private:
  void fill_group(const float* x, int64_t g) {
    Ints high{};  // bits without the sign are in the order of the numbers, infinity and NaN above all others
    for (int64_t i = 0; i < kGroup; i += kLanes) high = maximum((Ints)load(x + i) & 0x7fffffff, high);
    int32_t bits = largest(high);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    float inverse = most > 1e-35f ? 127.0f / most : 0.0f, scale = most / 127.0f + most * 0.0f;
    using Small = int8_t __attribute__((vector_size(kLanes)));
    Ints totals_of[2] = {};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      Ints nearest = (Ints)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
      totals_of[i / 16] += nearest;
      auto narrow = __builtin_convertvector(nearest, Small);
      std::memcpy(bytes + g * kGroup + i, &narrow, sizeof narrow);
    }
    for (int s = 0; s < 2; ++s) {
      sums[2 * g + s] = sum(totals_of[s]);
      totals[2 * g + s] = float(sums[2 * g + s]) * scale;
    }
    scales[g] = scale;
    pair_totals[g] = float(sums[2 * g] + sums[2 * g + 1]) * scale;
  }
};

// What a kernel is compiled for.
template <int bits, bool has_table, int subs, bool has_least>
struct Shape {
  static constexpr int kBits = bits, kSubs = subs;
  static constexpr bool kHasTable = has_table, kHasLeast = has_least;
  static constexpr bool kIsWide = has_table || bits == 8;
};

// f(Shape) for the one that a format has.
template <class F>
inline void with_shape(const Format& f, F&& call) {
  bool has_least = f.least != Least::kNone;
  switch (f.bits) {
    case 2: return call(Shape<2, false, 2, true>{});
    case 3: return call(Shape<3, false, 2, false>{});
    case 4:
      if (f.values != nullptr) return call(Shape<4, true, 1, false>{});
      return has_least ? call(Shape<4, false, 1, true>{}) : call(Shape<4, false, 1, false>{});
    case 5: return has_least ? call(Shape<5, false, 1, true>{}) : call(Shape<5, false, 1, false>{});
    case 6: return call(Shape<6, false, 2, false>{});
    default: return has_least ? call(Shape<8, false, 1, true>{}) : call(Shape<8, false, 1, false>{});
  }
}

inline Words shifted(Words v, int left) { return left >= 0 ? v << left : v >> -left; }

// A strip's codes of one group, unit by unit, as bytes. table: [16], of formats that have values.
template <class S>
inline void read_codes(const char* from, const uint8_t* table, Bytes* units) {
  constexpr uint32_t kOnes = 0x01010101;
  constexpr int kUpper = has_halves(S::kBits) ? 4 : 0, kSingle = kUpper + (has_pairs(S::kBits) ? 2 : 0);
  const char* singles = from + (has_pairs(S::kBits) ? 2 * kVector : 0);
  const char* halves = singles + (has_singles(S::kBits) ? kVector : 0);
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    if constexpr (S::kBits == 8) {
      units[u] = load_as<Bytes>(from + u * kVector);
      continue;
    }
    Words code{};
    if constexpr (has_halves(S::kBits)) code = (load_as<Words>(halves + u / 2 * kVector) >> (u % 2 * 4)) & (15 * kOnes);
    if constexpr (has_pairs(S::kBits))
      code |= shifted(load_as<Words>(from + u / 4 * kVector), kUpper - u % 4 * 2) & ((3 * kOnes) << kUpper);
    if constexpr (has_singles(S::kBits)) code |= shifted(load_as<Words>(singles), kSingle - u) & (kOnes << kSingle);
    units[u] = S::kHasTable ? look_up(table, (Bytes)code) : (Bytes)code;
  }
}

inline void fill_table(const Format& f, uint8_t* table) {
  for (int i = 0; i < 16; ++i) table[i] = f.values == nullptr ? uint8_t(i) : uint8_t(f.values[i] + kWideBias);
}

// The numbers of a strip for one span.
struct Head {
  Floats scale, least{};

  Head(const Format& f, const char* span, int strip) {
    auto numbers = reinterpret_cast<const uint16_t*>(span) + strip * kLanes;
    auto number = [&](const uint16_t* p) { return f.is_bfloat16 ? load(reinterpret_cast<const BFloat16*>(p)) : load_halves(p); };
    scale = number(numbers);
    if (f.least == Least::kZero)
      least = __builtin_convertvector(load_as<HalfInts>(numbers + kPanel), Floats) * scale;
    else if (f.least != Least::kNone)
      least = number(numbers + kPanel);
  }

  // Of a group's sub-group s. steps: of the group and strip.
  Floats scale_of(const Format& f, const int8_t* steps, int s) const { return f.has_steps ? scale * load_small(steps + s * kPanel) : scale; }
  Floats least_of(const Format& f, const int8_t* steps, int s) const {
    return f.least == Least::kSteps ? least * load_small(steps + (f.subs + s) * kPanel) : least;
  }
};

inline Bytes broadcast_unit(const int8_t* x) { return (Bytes)(Ints{} + load_as<int32_t>(x)); }

// Sums of products of a group's units, of which sub-group s is the s-th part, begin with what is left of code - offset.
template <int subs>
inline Ints first_sum(const int32_t* sums, int s, int offset) {
  return Ints{} - offset * (subs == 2 ? sums[s] : sums[0] + sums[1]);
}

// One row by a panel → sums: [kPanel]. It reads a stream through memory, and leaves it to the processor to read ahead.
template <class S>
[[gnu::noinline]] void multiply_one(const Format& f, const char* panel, const ByteRows& x, float* sums) {
  alignas(16) uint8_t table[16];
  fill_table(f, table);
  Floats acc[2] = {};
  int64_t steps_size = step_bytes(f);
  for (int64_t g = 0; g < x.groups;) {
    Head heads[2] = {{f, panel, 0}, {f, panel, 1}};
    panel += head_bytes(f);
    for (int64_t end = g + f.span; g < end; ++g) {
      auto steps = reinterpret_cast<const int8_t*>(panel);
      panel += steps_size;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h, steps += kLanes, panel += code_bytes(S::kBits) / 2) {
        Bytes units[kUnits];
        read_codes<S>(panel, table, units);
        Floats total{};
#pragma GCC unroll 2
        for (int s = 0; s < S::kSubs; ++s) {
          Ints dot = first_sum<S::kSubs>(x.sums + 2 * g, s, f.offset);
#pragma GCC unroll 8
          for (int u = 0; u < kUnits / S::kSubs; ++u) {
            int unit = s * (kUnits / S::kSubs) + u;
            dot = dot_bytes<S::kIsWide>(dot, units[unit], broadcast_unit(x.bytes + g * kGroup + 4 * unit));
          }
          total += __builtin_convertvector(dot, Floats) * heads[h].scale_of(f, steps, s);
          if constexpr (S::kHasLeast)
            acc[h] -= heads[h].least_of(f, steps, s) * (S::kSubs == 2 ? x.totals[2 * g + s] : x.pair_totals[g]);
        }
        acc[h] += total * x.scales[g];
        if constexpr (S::kBits == 8) asm volatile("" : : : "memory");  // else the compiler mixes the loads of both strips
      }
    }
  }
  for (int h = 0; h < 2; ++h) store(sums + h * kLanes, acc[h]);
}

// Some groups of a panel, unpacked.
struct alignas(64) Unpacked {
  Bytes codes[2][kChunkGroups][kUnits];
  Floats scales[2][kChunkGroups * 2];
  Floats least[kChunkGroups * 2][2];  // negative
};

// `count` groups from `first` on.
template <class S>
[[gnu::noinline]] void unpack(const Format& f, const char* panel, int64_t first, int64_t count, Unpacked& to) {
  alignas(16) uint8_t table[16];
  fill_table(f, table);
  for (int64_t i = 0; i < count;) {
    int64_t begin = (first + i) % f.span, end = std::min(f.span, begin + count - i);
    const char* span = panel + (first + i) / f.span * span_bytes(f);
    Head heads[2] = {{f, span, 0}, {f, span, 1}};
    for (int64_t g = begin; g < end; ++g, ++i) {
      const char* group = span + head_bytes(f) + g * group_bytes(f);
      for (int h = 0; h < 2; ++h) {
        auto steps = reinterpret_cast<const int8_t*>(group) + h * kLanes;
        read_codes<S>(group + step_bytes(f) + h * code_bytes(S::kBits) / 2, table, to.codes[h][i]);
        for (int s = 0; s < S::kSubs; ++s) {
          to.scales[h][i * S::kSubs + s] = heads[h].scale_of(f, steps, s);
          if constexpr (S::kHasLeast) to.least[i * S::kSubs + s][h] = -heads[h].least_of(f, steps, s);
        }
      }
    }
  }
}

// M rows by a strip of unpacked groups; sums: [M, kPanel].
template <bool kIsWide, int subs, int M>
[[gnu::noinline]] void multiply_codes(const Bytes (*codes)[kUnits], const Floats* scales, int64_t groups, int offset, const ByteRows& x,
                                      float* sums, bool add) {
  Floats acc[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) acc[m] = add ? load(sums + m * kPanel) : Floats{};
  for (int64_t g = 0; g < groups; ++g) {
    Bytes units[kUnits];
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) units[u] = codes[g][u];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      int64_t at = m * x.groups + g;
      Floats total{};
#pragma GCC unroll 2
      for (int s = 0; s < subs; ++s) {
        Ints dot = first_sum<subs>(x.sums + 2 * at, s, offset);
#pragma GCC unroll 8
        for (int u = 0; u < kUnits / subs; ++u) {
          int unit = s * (kUnits / subs) + u;
          dot = dot_bytes<kIsWide>(dot, units[unit], broadcast_unit(x.bytes + at * kGroup + 4 * unit));
        }
        total += __builtin_convertvector(dot, Floats) * scales[g * subs + s];
      }
      acc[m] += total * x.scales[at];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) store(sums + m * kPanel, acc[m]);
}

template <bool kIsWide, int subs, int M = kBlockRows>
inline void multiply_codes_of(int m, const Bytes (*codes)[kUnits], const Floats* scales, int64_t groups, int offset, const ByteRows& x,
                              float* sums, bool add) {
  if constexpr (M > 1) {
    if (m < M) return multiply_codes_of<kIsWide, subs, M - 1>(m, codes, scales, groups, offset, x, sums, add);
  }
  multiply_codes<kIsWide, subs, M>(codes, scales, groups, offset, x, sums, add);
}

// Some rows by one panel → sums: [rows, kPanel].
template <class S>
void multiply_packed(const Format& f, const char* panel, const ByteRows& x, int64_t rows, float* sums) {
  Unpacked chunk;
  int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t first = 0; first < x.groups; first += kChunkGroups) {
    int64_t count = std::min(kChunkGroups, x.groups - first);
    unpack<S>(f, panel, first, count, chunk);
    int64_t bytes = kChunkGroups * span_bytes(f) / f.span;  // the next chunk's, to the second-level cache meanwhile
    const char* next = panel + first / kChunkGroups * bytes + bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
      for (int h = 0; h < 2; ++h)
        multiply_codes_of<S::kIsWide && !kHasByteDots, S::kSubs>(int(end - begin), chunk.codes[h], chunk.scales[h], count, f.offset,
                                                                 x.from(begin, first), sums + begin * kPanel + h * kLanes, first > 0);
    }
    if constexpr (S::kHasLeast) {
      ByteRows here = x.from(0, first);
      auto least = reinterpret_cast<const float*>(chunk.least);
      const float* totals = S::kSubs == 2 ? here.totals : here.pair_totals;
      multiply_rows<float>(rows, least, totals, x.groups * S::kSubs, count * S::kSubs, sums, kPanel, true);
    }
  }
}

// Where panel p of a packed weight lies.
struct PartPanel {
  const Part* part;
  int64_t index;

  PartPanel(const Linear& w, int64_t p) : part(w.parts.data()), index(p) {
    if (w.is_pair) part += p % 2, index = p / 2;
    for (; !w.is_pair && index >= panels_of(part->out); ++part) index -= panels_of(part->out);
  }

  const char* data(int64_t in) const { return part->data + index * panel_bytes(part->format, in); }
};

// The output features of a panel; of a pair, counted in its matrix.
struct PanelRange {
  int64_t first, width;

  PanelRange(const Linear& w, int64_t p) : first((w.is_pair ? p / 2 : p) * kPanel), width(w.part() - first) {
    if (!w.is_pair && !w.parts.empty()) {
      PartPanel here(w, p);
      first = here.part->first + here.index * kPanel, width = here.part->out - here.index * kPanel;
    }
    width = std::min<int64_t>(kPanel, width);
  }
};

// Like `panel_products`.
inline void packed_products(const Linear& w, int64_t first, int64_t panels, const ByteRows& x, int64_t rows, float* sums) {
  for (int64_t p = 0; p < panels; ++p) {
    PartPanel here(w, first + p);
    const Format& f = here.part->format;
    with_shape(f, [&]<class S>(S) {
      if (rows == 1)
        multiply_one<S>(f, here.data(w.in), x, sums + p * kPanel);
      else
        multiply_packed<S>(f, here.data(w.in), x, rows, sums + p * rows * kPanel);
    });
  }
}

// Row `index` of a part → out: [in].
inline void unpack_row(const Part& part, int64_t index, int64_t in, const int64_t* columns, float* out) {
  Unpacked chunk;
  const char* panel = part.data + index / kPanel * panel_bytes(part.format, in);
  int64_t strip = index % kPanel / kLanes, lane = index % kLanes;
  with_shape(part.format, [&]<class S>(S) {
    for (int64_t first = 0; first < num_groups(in); first += kChunkGroups) {
      int64_t count = std::min(kChunkGroups, num_groups(in) - first);
      unpack<S>(part.format, panel, first, count, chunk);
      for (int64_t i = 0; i < std::min(count * kGroup, in - first * kGroup); ++i) {
        int64_t sub = i * S::kSubs / kGroup, column = first * kGroup + i;
        uint8_t byte = chunk.codes[strip][i / kGroup][i % kGroup / 4][lane * 4 + i % 4];
        int code = S::kIsWide && !kHasByteDots ? int8_t(byte) : byte;
        float least = S::kHasLeast ? chunk.least[sub][strip][lane] : 0.0f;
        out[columns == nullptr ? column : columns[column]] = chunk.scales[strip][sub][lane] * float(code - part.format.offset) + least;
      }
    }
  });
}

}  // namespace minisgl::cpu
