// Weights of few bits: how they lie in panels, and how they get there.
//
// A panel has kPanel output features, in two strips of a vector's lanes. Along its inputs stand spans: of each feature a
// 16-bit scale, perhaps a second number (`Least`), and then `span` groups of 32 inputs: small integers that refine both for
// 16 or 32 inputs, and codes, strip by strip. A product reads all this in the order in which it lies. Of each feature a vector of codes has 32 bits, which belong to four inputs that
// follow one another: a unit. A group's 8 units are 8 vectors of bytes; or 4 of half bytes, the odd units' in the upper
// halves. Bits above those, or instead of them, come first: pairs, as bits 2u, 2u + 1 of vector u / 4, and single ones, as
// bit u of a vector.
#pragma once

#include <algorithm>
#include <string>

#include "linear.h"

namespace minisgl::cpu {

constexpr int64_t kGroup = 32;  // inputs
constexpr int64_t kSpanOfBlocks = 8;
constexpr int64_t kVector = kLanes * 4;  // bytes

constexpr bool has_halves(int bits) { return bits >= 4 && bits < 8; }
constexpr bool has_pairs(int bits) { return bits == 2 || bits == 3 || bits == 6; }
constexpr bool has_singles(int bits) { return bits == 3 || bits == 5; }
constexpr int64_t code_bytes(int bits) { return kGroup * kPanel * bits / 8; }  // of a group

inline int64_t num_groups(int64_t in) { return (in + kGroup - 1) / kGroup; }
inline int64_t num_spans(const Format& f, int64_t in) { return (num_groups(in) + f.span - 1) / f.span; }
inline int64_t head_bytes(const Format& f) { return kPanel * 2 * (f.least == Least::kNone ? 1 : 2); }
inline int64_t step_bytes(const Format& f) { return f.has_steps ? f.subs * kPanel * (f.least == Least::kSteps ? 2 : 1) : 0; }
inline int64_t group_bytes(const Format& f) { return step_bytes(f) + code_bytes(f.bits); }
inline int64_t span_bytes(const Format& f) { return head_bytes(f) + f.span * group_bytes(f); }
inline int64_t panel_bytes(const Format& f, int64_t in) { return num_spans(f, in) * span_bytes(f); }

// Values of 4-bit codes that are not evenly spaced: those of ggml's IQ4 types, and the floats of 4 bits (OCP Microscaling
// Formats, E2M1), doubled.
constexpr int8_t kUneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFloat4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// Magnitudes of ggml's IQ2, IQ3_XXS and IQ3_S types, and from the ninth on the same below zero; and for IQ1 -1, 0 and 1 in
// eighths, an eighth more and an eighth less.
constexpr int8_t kOfTwoBits[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43};
constexpr int8_t kOfThreeBits[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
constexpr int8_t kOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};
constexpr int8_t kEighths[16] = {-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7};

// One block of a row, or 32 inputs of other formats.
struct Block {
  const uint8_t* grid;  // of the type; or null
  uint8_t codes[256];
  uint16_t scale, least;
  int8_t steps[16], least_steps[16];
};

inline uint16_t word_at(const uint8_t* p) { return load_as<uint16_t>(p); }

// 32 codes of 4 bits: of 16 bytes the lower halves, then the upper ones.
inline void split_halves(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) codes[i] = from[i] & 15, codes[i + 16] = from[i] >> 4;
}

// Bit i of a word to bit 4 of code i.
inline void add_fifth_bits(uint32_t bits, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (bits >> i & 1) << 4;
}

inline uint16_t negative(uint16_t half) { return half ^ 0x8000; }

// 8 scales and 8 minima of 6 bits in 12 bytes: the lower four of both, whose upper bits are the others' two upper ones.
inline void read_sixes(const uint8_t* from, Block& b) {
  for (int i = 0; i < 4; ++i) {
    b.steps[i] = from[i] & 63, b.least_steps[i] = from[i + 4] & 63;
    b.steps[i + 4] = int8_t((from[i + 8] & 15) | (from[i] >> 6 << 4));
    b.least_steps[i + 4] = int8_t((from[i + 8] >> 4) | (from[i + 4] >> 6 << 4));
  }
}

inline void read_q4_0(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  split_halves(p + 2, b.codes);
}
inline void read_q4_1(const uint8_t* p, Block& b) {
  b.scale = word_at(p), b.least = negative(word_at(p + 2));
  split_halves(p + 4, b.codes);
}
inline void read_q5_0(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  split_halves(p + 6, b.codes);
  add_fifth_bits(load_as<uint32_t>(p + 2), b.codes);
}
inline void read_q5_1(const uint8_t* p, Block& b) {
  b.scale = word_at(p), b.least = negative(word_at(p + 2));
  split_halves(p + 8, b.codes);
  add_fifth_bits(load_as<uint32_t>(p + 4), b.codes);
}
inline void read_q8_0(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  for (int i = 0; i < 32; ++i) b.codes[i] = uint8_t(p[2 + i] + kWideBias);
}
inline void read_mxfp4(const uint8_t* p, Block& b) {
  b.scale = uint16_t(p[0] < 2 ? 0x20 << p[0] : (p[0] - 1) << 7);  // half of 2^(p[0] - 127), for values that are doubled
  split_halves(p + 1, b.codes);
}

// Group n's pairs of bits: of 32 bytes for four groups each.
inline void read_pairs(const uint8_t* from, int n, int to, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (from[n / 4 * 32 + i] >> n % 4 * 2 & 3) << to;
}

// The lower halves of 32 bytes, or the upper ones.
inline void read_half(const uint8_t* from, int upper, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] = from[i] >> 4 * upper & 15;
}

inline void read_q2_k(const uint8_t* p, Block& b) {
  b.scale = word_at(p + 80), b.least = word_at(p + 82);
  for (int i = 0; i < 16; ++i) b.steps[i] = p[i] & 15, b.least_steps[i] = p[i] >> 4;
  std::memset(b.codes, 0, 256);
  for (int n = 0; n < 8; ++n) read_pairs(p + 16, n, 0, b.codes + 32 * n);
}
inline void read_q3_k(const uint8_t* p, Block& b) {
  const uint8_t* scales = p + 96;
  b.scale = word_at(p + 108);
  for (int i = 0; i < 16; ++i)
    b.steps[i] = int8_t(((scales[i % 8] >> i / 8 * 4 & 15) | (scales[8 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
  std::memset(b.codes, 0, 256);
  for (int n = 0; n < 8; ++n) {
    read_pairs(p + 32, n, 0, b.codes + 32 * n);
    for (int i = 0; i < 32; ++i) b.codes[32 * n + i] |= (p[i] >> n & 1) << 2;
  }
}
inline void read_q4_k(const uint8_t* p, Block& b) {
  b.scale = word_at(p), b.least = word_at(p + 2);
  read_sixes(p + 4, b);
  for (int n = 0; n < 8; ++n) read_half(p + 16 + n / 2 * 32, n % 2, b.codes + 32 * n);
}
inline void read_q5_k(const uint8_t* p, Block& b) {
  b.scale = word_at(p), b.least = word_at(p + 2);
  read_sixes(p + 4, b);
  for (int n = 0; n < 8; ++n) {
    read_half(p + 48 + n / 2 * 32, n % 2, b.codes + 32 * n);
    for (int i = 0; i < 32; ++i) b.codes[32 * n + i] |= (p[16 + i] >> n & 1) << 4;
  }
}
inline void read_q6_k(const uint8_t* p, Block& b) {
  b.scale = word_at(p + 208);
  std::memcpy(b.steps, p + 192, 16);
  for (int n = 0; n < 8; ++n) {
    read_half(p + n / 4 * 64 + n % 2 * 32, n / 2 % 2, b.codes + 32 * n);
    read_pairs(p + 128, n, 4, b.codes + 32 * n);
  }
}
inline void read_iq4_xs(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  for (int n = 0; n < 8; ++n) {
    b.steps[n] = int8_t(((p[4 + n / 2] >> n % 2 * 4 & 15) | (word_at(p + 2) >> 2 * n & 3) << 4) - 32);
    split_halves(p + 8 + 16 * n, b.codes + 32 * n);
  }
}

// `count` codes: a row of the grid, in the table's second half where bits are set.
inline void read_grid(const Block& b, int64_t row, int count, uint32_t bits, uint8_t* codes) {
  for (int i = 0; i < count; ++i) codes[i] = uint8_t(b.grid[row * count + i] | (bits >> i & 1) << 3);
}

// Of 8 signs the eighth is not stored: an even number of them are set.
inline uint32_t even_signs(uint32_t bits) { return (bits & 127) | uint32_t(__builtin_parity(bits & 127)) << 7; }

inline int8_t odd(uint32_t number) { return int8_t(2 * number + 1); }

// A step of 4 bits for every 16 or 32 inputs.
inline void read_fours(const uint8_t* from, int count, Block& b) {
  for (int i = 0; i < count; ++i) b.steps[i] = odd(from[i / 2] >> i % 2 * 4 & 15);
}

inline void read_iq2_xxs(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* rows = p + 2 + 8 * g;
    uint32_t signs = load_as<uint32_t>(rows + 4);
    b.steps[g] = odd(signs >> 28);
    for (int i = 0; i < 4; ++i) read_grid(b, rows[i], 8, even_signs(signs >> 7 * i), b.codes + 32 * g + 8 * i);
  }
}
inline void read_iq2_xs(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  read_fours(p + 66, 16, b);
  for (int i = 0; i < 32; ++i) {
    uint32_t word = word_at(p + 2 + 2 * i);
    read_grid(b, word & 511, 8, even_signs(word >> 9), b.codes + 8 * i);
  }
}
inline void read_iq2_s(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  read_fours(p + 74, 16, b);
  for (int i = 0; i < 32; ++i) read_grid(b, p[2 + i] | (p[66 + i / 4] >> i % 4 * 2 & 3) << 8, 8, p[34 + i], b.codes + 8 * i);
}
inline void read_iq3_xxs(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  for (int i = 0; i < 64; ++i) {
    uint32_t word = load_as<uint32_t>(p + 66 + i / 8 * 4);
    b.steps[i / 8] = odd(word >> 28);
    read_grid(b, p[2 + i], 4, even_signs(word >> i / 2 % 4 * 7) >> i % 2 * 4, b.codes + 4 * i);
  }
}
inline void read_iq3_s(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  read_fours(p + 106, 8, b);
  for (int i = 0; i < 64; ++i) read_grid(b, p[2 + i] | (p[66 + i / 8] >> i % 8 & 1) << 8, 4, p[74 + i / 2] >> i % 2 * 4, b.codes + 4 * i);
}
inline void read_iq1_s(const uint8_t* p, Block& b) {
  b.scale = word_at(p);
  for (int i = 0; i < 32; ++i) {
    uint32_t word = word_at(p + 34 + i / 4 * 2);
    b.steps[i / 4] = odd(word >> 12 & 7);
    read_grid(b, p[2 + i] | (word >> i % 4 * 3 & 7) << 8, 8, word & 0x8000 ? 255 : 0, b.codes + 8 * i);
  }
}
inline void read_iq1_m(const uint8_t* p, Block& b) {
  b.scale = 0;
  for (int i = 0; i < 16; ++i) {
    uint32_t word = word_at(p + 48 + i / 4 * 2);
    b.steps[i] = odd(word >> i % 4 * 3 & 7);
    if (i % 4 == 0) b.scale |= uint16_t(word >> 12 << i);  // four bits of it in each
  }
  for (int i = 0; i < 32; ++i) {
    uint32_t more = p[32 + i / 2] >> i % 2 * 4;
    read_grid(b, p[i] | (more & 7) << 8, 8, more & 8 ? 255 : 0, b.codes + 8 * i);
  }
}

// ggml's types of blocks.
struct BlockType {
  const char* name;
  int64_t bytes;
  void (*read)(const uint8_t*, Block&);
  Format format;
};

// What is added to values of up to `most`, where bytes have no sign: no more, for it is subtracted again from the sums.
constexpr int above(int most) { return kWideBias > 0 ? most : 0; }

constexpr BlockType kBlockTypes[] = {
    {"Q4_0", 18, read_q4_0, {4, 1, Least::kNone, false, 8, 1, false, nullptr}},
    {"Q4_1", 20, read_q4_1, {4, 1, Least::kValue, false, 0, 1, false, nullptr}},
    {"Q5_0", 22, read_q5_0, {5, 1, Least::kNone, false, 16, 1, false, nullptr}},
    {"Q5_1", 24, read_q5_1, {5, 1, Least::kValue, false, 0, 1, false, nullptr}},
    {"Q8_0", 34, read_q8_0, {8, 1, Least::kNone, false, kWideBias, 1, false, nullptr}},
    {"Q2_K", 84, read_q2_k, {2, 2, Least::kSteps, true, 0, kSpanOfBlocks, false, nullptr}},
    {"Q3_K", 110, read_q3_k, {3, 2, Least::kNone, true, 4, kSpanOfBlocks, false, nullptr}},
    {"Q4_K", 144, read_q4_k, {4, 1, Least::kSteps, true, 0, kSpanOfBlocks, false, nullptr}},
    {"Q5_K", 176, read_q5_k, {5, 1, Least::kSteps, true, 0, kSpanOfBlocks, false, nullptr}},
    {"Q6_K", 210, read_q6_k, {6, 2, Least::kNone, true, 32, kSpanOfBlocks, false, nullptr}},
    {"IQ4_NL", 18, read_q4_0, {4, 1, Least::kNone, false, kWideBias, 1, false, kUneven}},
    {"IQ4_XS", 136, read_iq4_xs, {4, 1, Least::kNone, true, kWideBias, kSpanOfBlocks, false, kUneven}},
    {"MXFP4", 17, read_mxfp4, {4, 1, Least::kNone, false, kWideBias, 1, true, kFloat4}},
    {"IQ2_XXS", 66, read_iq2_xxs, {4, 1, Least::kNone, true, above(43), kSpanOfBlocks, false, kOfTwoBits, 0.125f}},
    {"IQ2_XS", 74, read_iq2_xs, {4, 2, Least::kNone, true, above(43), kSpanOfBlocks, false, kOfTwoBits, 0.125f}},
    {"IQ2_S", 82, read_iq2_s, {4, 2, Least::kNone, true, above(43), kSpanOfBlocks, false, kOfTwoBits, 0.125f}},
    {"IQ3_XXS", 98, read_iq3_xxs, {4, 1, Least::kNone, true, above(62), kSpanOfBlocks, false, kOfThreeBits, 0.25f}},
    {"IQ3_S", 110, read_iq3_s, {4, 1, Least::kNone, true, above(15), kSpanOfBlocks, false, kOdd}},
    {"IQ1_S", 50, read_iq1_s, {4, 1, Least::kNone, true, above(9), kSpanOfBlocks, false, kEighths, 0.125f}},
    {"IQ1_M", 56, read_iq1_m, {4, 2, Least::kNone, true, above(9), kSpanOfBlocks, false, kEighths, 0.125f}},
};

inline const BlockType* block_type(const std::string& name) {
  for (const BlockType& type : kBlockTypes)
    if (name == type.name) return &type;
  return nullptr;
}

// A format of no bits where there is none.
inline Format find_format(const std::string& name, int64_t in, int64_t group, bool has_zeros, bool is_bfloat16) {
  Least least = has_zeros ? Least::kZero : Least::kNone;
  int64_t span = group == in ? num_groups(in) : group / kGroup;
  bool fits = group == in || (group % kGroup == 0 && group > 0 && in % group == 0);
  if (name == "grouped4" && fits) return {4, 1, least, false, has_zeros ? 0 : 8, span, is_bfloat16, nullptr};
  if (name == "grouped8" && fits) return {8, 1, least, false, has_zeros ? 0 : kWideBias, span, is_bfloat16, nullptr};
  const BlockType* type = block_type(name);
  return type != nullptr && in % (type->format.span * kGroup) == 0 ? type->format : Format{};
}

// Codes of 32 inputs of feature j of a panel, the span's group g. The four codes of a unit are moved together.
inline void put_codes(const uint8_t* codes, const Format& f, int j, int64_t g, char* span) {
  constexpr uint32_t kOnes = 0x01010101;
  char* to = span + head_bytes(f) + g * group_bytes(f) + step_bytes(f) + j / kLanes * code_bytes(f.bits) / 2 + j % kLanes * 4;
  auto unit = [&](int u) { return load_as<uint32_t>(codes + 4 * u); };
  auto put = [&](uint32_t word) { std::memcpy(to, &word, 4), to += kVector; };
  if (f.bits == 8)
    for (int u = 0; u < 8; ++u) put(unit(u));
  int upper = has_halves(f.bits) ? 4 : 0;
  for (int v = 0; has_pairs(f.bits) && v < 2; ++v) {
    uint32_t word = 0;
    for (int u = 0; u < 4; ++u) word |= (unit(4 * v + u) >> upper & 3 * kOnes) << 2 * u;
    put(word);
  }
  if (has_pairs(f.bits)) upper += 2;
  if (has_singles(f.bits)) {
    uint32_t word = 0;
    for (int u = 0; u < 8; ++u) word |= (unit(u) >> upper & kOnes) << u;
    put(word);
  }
  for (int v = 0; has_halves(f.bits) && v < 4; ++v) put((unit(2 * v) & 15 * kOnes) | (unit(2 * v + 1) & 15 * kOnes) << 4);
}

// A block, as feature j of one span.
inline void put_block(const Block& block, const Format& f, int j, char* span) {
  auto numbers = reinterpret_cast<uint16_t*>(span);
  numbers[j] = block.scale;
  if (f.least != Least::kNone) numbers[kPanel + j] = block.least;
  for (int64_t g = 0; g < f.span; ++g) {
    char* steps = span + head_bytes(f) + g * group_bytes(f);
    for (int64_t i = 0; f.has_steps && i < f.subs; ++i) {
      steps[i * kPanel + j] = block.steps[g * f.subs + i];
      if (f.least == Least::kSteps) steps[(f.subs + i) * kPanel + j] = block.least_steps[g * f.subs + i];
    }
    put_codes(block.codes + g * kGroup, f, j, g, span);
  }
}

inline void pack_block_rows(const BlockType& type, const uint8_t* rows, int64_t stride, int64_t count, int64_t in,
                            const uint8_t* grid, char* panel) {
  int64_t blocks = in / (type.format.span * kGroup);
  Block block{grid};
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t j = 0; j < count; ++j) {
      type.read(rows + j * stride + i * type.bytes, block);
      put_block(block, type.format, int(j), panel + i * span_bytes(type.format));
    }
}

// codes, scales, zeros: of the panel's first row.
inline void pack_grouped_rows(const Format& f, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, int64_t count,
                              int64_t in, char* panel) {
  int64_t spans = num_spans(f, in);
  uint8_t shift = f.bits == 8 ? uint8_t(128 + kWideBias) : 0;  // codes of 8 bits become what `dot_bytes` wants
  for (int64_t j = 0; j < count; ++j)
    for (int64_t g = 0; g < num_groups(in); ++g) {
      uint8_t group[kGroup] = {};
      for (int64_t i = g * kGroup; i < std::min(in, (g + 1) * kGroup); ++i)
        group[i % kGroup] = f.bits == 8 ? uint8_t(codes[j * in + i] + shift) : codes[(j * in + i) / 2] >> i % 2 * 4 & 15;
      char* span = panel + g / f.span * span_bytes(f);
      put_codes(group, f, int(j), g % f.span, span);
      auto numbers = reinterpret_cast<uint16_t*>(span);
      numbers[j] = scales[j * spans + g / f.span];
      if (f.least == Least::kZero)
        numbers[kPanel + j] = uint16_t(zeros[j * spans + g / f.span] - (f.bits == 8 ? 128 - kWideBias : 0));
    }
}

}  // namespace minisgl::cpu
