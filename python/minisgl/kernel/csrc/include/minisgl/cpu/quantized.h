// Products with weights of few bits (packed.h). The rows are 8-bit integers, with a scale for 32 inputs; sums of 16 or 32
// products are 32-bit integers, and exact.
//
// A panel's codes are unpacked to registers as they come from memory, a strip of a group at a time, and multiplied with all
// rows of a block, whose sums stay in the first-level cache.
#pragma once

#include "packed.h"

namespace minisgl::cpu {

constexpr int64_t kRowsOfCodes = 64;  // that stay in the cache
constexpr int kUnits = 8;             // of a group
constexpr int64_t kCodesAhead = 4096;  // bytes, which come from memory while many rows are multiplied

// One row's 8-bit integers, to groups of 32 of which the last is filled up with zeros. totals: of 16 integers, scaled;
// pair_totals: of 32. columns: which inputs they are, or null. A group with a NaN has a scale that is one.
struct ByteRow {
  int8_t* bytes;
  float *scales, *totals, *pair_totals;

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
    for (int s = 0; s < 2; ++s) totals[2 * g + s] = float(sum(totals_of[s])) * scale;
    scales[g] = scale;
    pair_totals[g] = float(sum(totals_of[0] + totals_of[1])) * scale;
  }
};

// What a kernel is compiled for.
template <int bits, bool has_table, int subs, bool has_least>
struct Shape {
  static constexpr int kBits = bits, kSubs = subs;
  static constexpr bool kHasTable = has_table, kHasLeast = has_least;
  static constexpr int kValueBits = has_table ? 8 : bits;
};

// f(Shape) for the one that a format has.
template <class F>
inline void with_shape(const Format& f, F&& call) {
  switch (f.bits) {
    case 2: return call(Shape<2, false, 2, true>{});
    case 3: return call(Shape<3, false, 2, true>{});
    case 4:
      if (f.values == nullptr) return call(Shape<4, false, 1, true>{});
      return f.subs == 1 ? call(Shape<4, true, 1, (kWideBias > 0)>{}) : call(Shape<4, true, 2, (kWideBias > 0)>{});
    case 5: return call(Shape<5, false, 1, true>{});
    case 6: return call(Shape<6, false, 2, true>{});
    default: return f.least == Least::kNone && f.offset == 0 ? call(Shape<8, false, 1, false>{}) : call(Shape<8, false, 1, true>{});
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
  for (int i = 0; i < 16; ++i) table[i] = f.values == nullptr ? uint8_t(i) : uint8_t(f.values[i] + f.offset);
}

// The numbers of a strip for one span.
struct Head {
  Floats scale, least{};

  Head(const Format& f, const char* span, int strip) {
    auto numbers = reinterpret_cast<const uint16_t*>(span) + strip * kLanes;
    auto number = [&](const uint16_t* p) { return f.is_bfloat16 ? load(reinterpret_cast<const BFloat16*>(p)) : load_halves(p); };
    scale = number(numbers);
    if (f.has_steps) scale *= f.factor;
    if (f.least == Least::kZero)
      least = __builtin_convertvector(load_as<HalfInts>(numbers + kPanel), Floats) * scale;
    else if (f.least != Least::kNone)
      least = number(numbers + kPanel);
  }

  // Of a group's sub-group s. steps: of the group and strip.
  Floats scale_of(const Format& f, const int8_t* steps, int s) const { return f.has_steps ? scale * load_small(steps + s * kPanel) : scale; }
  // What the sum of inputs is multiplied with, and then subtracted.
  Floats least_of(const Format& f, const int8_t* steps, int s) const {
    if (f.least == Least::kNone) return scale_of(f, steps, s) * float(f.offset);
    return f.least == Least::kSteps ? least * load_small(steps + (f.subs + s) * kPanel) : least;
  }
};

// One row's part of the sum over a group of a strip. scales, least: of its sub-groups; at: the row's group.
template <class S>
inline Floats add_group(Floats acc, const Bytes* codes, const Floats* scales, const Floats* least, const ByteRows& x, int64_t at) {
  constexpr int kPart = kUnits / S::kSubs;
  const int8_t* bytes = x.bytes + at * kGroup;
  Floats total{};
#pragma GCC unroll 2
  for (int s = 0; s < S::kSubs; ++s) {
    total += __builtin_convertvector(dot_codes<S::kValueBits, kPart>(codes + s * kPart, bytes + 4 * s * kPart), Floats) * scales[s];
    if constexpr (S::kHasLeast) acc -= least[s] * (S::kSubs == 2 ? x.totals[2 * at + s] : x.pair_totals[at]);
  }
  return acc + total * x.scales[at];
}

// So many rows keep a core so busy that the processor no longer reads far enough ahead by itself. With fewer, its own way is
// faster.
template <class S>
constexpr int64_t kBusyRows = S::kBits == 8 ? 24 : 4;

// Whether the registers hold both strips of a group, which then share what is read of a row.
template <class S>
constexpr bool kHasBothStrips = kHasByteDots && kLanes == 16 && S::kSubs == 1;

// The same for both strips of a group, added to `to`: [rows, kPanel].
template <class S>
inline void add_rows(float* to, const Bytes (*codes)[kUnits], const Floats* scales, const Floats* least, const ByteRows& x, int64_t at,
                     int64_t rows) {
  for (int64_t m = 0; m < rows; ++m, at += x.stride, to += kPanel) {
    Ints dots[2] = {};
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      Bytes unit = broadcast_unit(x.bytes + at * kGroup + 4 * u);
      keep(unit);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) dots[h] = dot_bytes<S::kValueBits == 8>(dots[h], codes[h][u], unit);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Floats acc = load(to + h * kLanes);
      if constexpr (S::kHasLeast) acc -= least[h] * x.pair_totals[at];
      store(to + h * kLanes, acc + __builtin_convertvector(dots[h], Floats) * scales[h] * x.scales[at]);
    }
  }
}

// Rows by a panel → sums: [rows, kPanel]. It reads a stream through memory, and leaves it to the processor to read ahead but
// where several rows keep it busy.
template <class S, bool is_one>
[[gnu::noinline]] void multiply_packed(const Format& f, const char* panel, ByteRows x, int64_t rows, float* sums) {
  constexpr bool kAreTogether = kHasBothStrips<S> && !is_one;
  alignas(16) uint8_t table[16];
  fill_table(f, table);
  std::fill(sums, sums + rows * kPanel, 0.0f);
  Floats acc[2] = {};  // of one row
  int64_t steps_size = step_bytes(f);
  for (int64_t g = 0; g < x.groups;) {
    Head heads[2] = {{f, panel, 0}, {f, panel, 1}};
    panel += head_bytes(f);
    for (int64_t end = g + f.span; g < end; ++g) {
      auto steps = reinterpret_cast<const int8_t*>(panel);
      panel += steps_size;
      Bytes codes[kAreTogether ? 2 : 1][kUnits];
      Floats scales[2][S::kSubs], least[2][S::kSubs];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h, steps += kLanes, panel += code_bytes(S::kBits) / 2) {
        auto& mine = codes[kAreTogether ? h : 0];
        read_codes<S>(panel, table, mine);
        for (int s = 0; s < S::kSubs; ++s) scales[h][s] = heads[h].scale_of(f, steps, s), least[h][s] = heads[h].least_of(f, steps, s);
        if constexpr (is_one) {
          acc[h] = add_group<S>(acc[h], mine, scales[h], least[h], x, g);
          if constexpr (S::kBits == 8) asm volatile("" : : : "memory");  // else the compiler mixes the loads of both strips
          continue;
        }
        for (int64_t b = 0; rows >= kBusyRows<S> && b < code_bytes(S::kBits) / 2; b += 64) __builtin_prefetch(panel + kCodesAhead + b);
        float* to = sums + h * kLanes;
        for (int64_t m = 0, at = g; !kAreTogether && m < rows; ++m, at += x.stride, to += kPanel)
          store(to, add_group<S>(load(to), mine, scales[h], least[h], x, at));
      }
      if constexpr (kAreTogether) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
          for (int u = 0; u < kUnits; ++u) keep(codes[h][u]);
        add_rows<S>(sums, codes, scales[0], least[0], x, g, rows);
      }
    }
  }
  for (int h = 0; is_one && h < 2; ++h) store(sums + h * kLanes, acc[h]);
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
      if (rows == 1) return multiply_packed<S, true>(f, here.data(w.in), x, 1, sums + p * kPanel);
      for (int64_t m = 0; m < rows; m += kRowsOfCodes)
        multiply_packed<S, false>(f, here.data(w.in), x.from(m), std::min(kRowsOfCodes, rows - m), sums + (p * rows + m) * kPanel);
    });
  }
}

// Row `index` of a part → out: [in].
inline void unpack_row(const Part& part, int64_t index, int64_t in, const int64_t* columns, float* out) {
  alignas(16) uint8_t table[16];
  const Format& f = part.format;
  const char* panel = part.data + index / kPanel * panel_bytes(f, in);
  int64_t strip = index % kPanel / kLanes, lane = index % kLanes;
  fill_table(f, table);
  with_shape(f, [&]<class S>(S) {
    for (int64_t g = 0; g < num_groups(in); ++g) {
      const char* span = panel + g / f.span * span_bytes(f);
      const char* group = span + head_bytes(f) + g % f.span * group_bytes(f);
      auto steps = reinterpret_cast<const int8_t*>(group) + strip * kLanes;
      Head head(f, span, int(strip));
      Bytes codes[kUnits];
      read_codes<S>(group + step_bytes(f) + strip * code_bytes(S::kBits) / 2, table, codes);
      for (int64_t i = 0; i < std::min(kGroup, in - g * kGroup); ++i) {
        int s = int(i * S::kSubs / kGroup);
        int64_t column = g * kGroup + i;
        uint8_t byte = codes[i / 4][lane * 4 + i % 4];
        int code = S::kValueBits == 8 && !kHasByteDots ? int8_t(byte) : byte;
        float least = f.least == Least::kNone ? 0.0f : head.least_of(f, steps, s)[lane];
        out[columns == nullptr ? column : columns[column]] = head.scale_of(f, steps, s)[lane] * float(code - f.offset) - least;
      }
    }
  });
}

}  // namespace minisgl::cpu
