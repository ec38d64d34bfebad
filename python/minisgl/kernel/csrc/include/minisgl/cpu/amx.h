// Products of many rows with AMX, where the processor has it: registers that are tiles of 16 rows of 64 bytes, and one
// instruction that multiplies two of them. The rest of the code works without this file.
//
// A panel is already what a tile of weights has to be: 16 units of it are two tiles, side by side. The rows are made of parts
// that tiles can hold: of a float three bfloat16 with 8 bits of mantissa each, which are all of it; of a 16-bit integer its two
// bytes.
#pragma once

#include "linear.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <sys/syscall.h>
#include <unistd.h>
#define MINISGL_AMX 1
#endif

namespace minisgl::cpu {

constexpr int64_t kLeastRows = 8;  // of which products are faster with tiles
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepUnits = 16;
constexpr int64_t kStepBytes = kStepUnits * kUnitBytes;  // of a panel
constexpr int64_t kChunkSteps = 32;                      // whose weights stay close while a block of rows goes by
constexpr int64_t kBlockBytes = 1 << 20;                 // of rows that stay in the second-level cache while panels go by

constexpr int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

constexpr int num_parts(Type type) { return type == Type::kInt8 ? 2 : 3; }

inline int64_t num_steps(int64_t width, Type type) {
  int64_t inputs = kStepUnits * depth_of(type);
  return (width + inputs - 1) / inputs;
}

// The rows as tiles: [rows / 16, steps, parts, 16, 64 bytes].
inline int64_t tiles_size(int64_t rows, int64_t width, Type type) {
  return round_up(rows, kTileRows) / kTileRows * num_steps(width, type) * num_parts(type) * kTileBytes;
}

// How many rows a block has, between 64 and 256.
inline int64_t tile_block(const Linear& w) {
  return std::clamp<int64_t>(kBlockBytes / tiles_size(kTileRows, w.in, w.type), 4, 16) * kTileRows;
}

// The block of them from `first` on.
inline Rows tile_rows(const Linear& w, Rows x, int64_t first) {
  x.count = std::min(tile_block(w), x.count - first);
  x.tiles += tiles_size(first, w.in, w.type);
  if (w.type == Type::kInt8) x.scales += first;
  return x;
}

#if defined(MINISGL_AMX)

// Linux lets the threads of a process use tiles when it has asked once.
inline bool are_tiles_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool is_permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_permitted;
}

// Sums of int8 weights fit 32 bits: 255 * 127 * width.
inline bool uses_tiles(int64_t rows, int64_t width, Type type) {
  return rows >= kLeastRows && (type == Type::kBFloat16 || type == Type::kInt8) && width <= 65536 && are_tiles_permitted();
}

// A thread's tiles are of full size as long as one of these lives.
class TileUse {
 public:
  explicit TileUse(bool is_used) : is_used_(is_used) {
    if (!is_used) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, none[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileUse() {
    if (is_used_) _tile_release();
  }
  TileUse(const TileUse&) = delete;

 private:
  bool is_used_;
};

// Row r of the tiles; the inputs that fill the last step up are zeros.
inline void tile_row(const float* x, int64_t r, int64_t width, char* tiles) {
  char* to = tiles + tiles_size(r / kTileRows * kTileRows, width, Type::kBFloat16) + r % kTileRows * 64;
  for (int64_t i = 0; i < width; i += 32) {
    Floats rest[2];
    for (int h = 0; h < 2; ++h) {
      int64_t left = std::clamp<int64_t>(width - i - h * kLanes, 0, kLanes);
      rest[h] = (Floats)_mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), x + i + h * kLanes);
    }
    for (int p = 0; p < num_parts(Type::kBFloat16); ++p, to += kTileBytes) {
      auto rounded = _mm512_cvtne2ps_pbh((__m512)rest[1], (__m512)rest[0]);
      std::memcpy(to, &rounded, 64);
      for (int h = 0; h < 2; ++h) rest[h] -= load(reinterpret_cast<const BFloat16*>(to) + h * kLanes);
    }
  }
}

// The same of 16-bit integers: their upper bytes, signed, and their lower ones, unsigned, in the order of the weights.
inline void tile_row(const int16_t* x, int64_t r, int64_t width, char* tiles) {
  char* to = tiles + tiles_size(r / kTileRows * kTileRows, width, Type::kInt8) + r % kTileRows * 64;
  int8_t order[32];
  for (int j = 0; j < 32; ++j) order[j] = int8_t(j % 16 / 4 * 4 + kQuad[j % 4]);
  for (int64_t i = 0; i < round_up(width, 64); i += 32) {
    int64_t left = std::clamp<int64_t>(width - i, 0, 32);
    __m512i v = _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << left) - 1), x + i);
    for (int p = 0; p < 2; ++p) {
      __m256i bytes = _mm512_cvtepi16_epi8(p == 0 ? _mm512_srai_epi16(v, 8) : v);
      bytes = _mm256_shuffle_epi8(bytes, load_as<__m256i>(order));
      std::memcpy(to + (i / 64 * 2 + p) * kTileBytes + i % 64, &bytes, 32);
    }
  }
}

// sums (+)= rows * one panel: S times [16, kPanel]. Those of int8 weights are int32, of the upper bytes and of the lower ones;
// others are of one or two tiles of rows, `next` bytes apart. ahead: what is prefetched beside w.
template <Type type, int S>
inline void multiply_tiles(const char* w, const char* x, int64_t next, int64_t steps, float* sums, bool add, int64_t ahead) {
  constexpr int64_t kStride = kPanel * 4;
  float* more = sums + kTileRows * kPanel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kLanes, kStride);
    if constexpr (S == 2) {
      _tile_loadd(2, more, kStride);
      _tile_loadd(3, more + kLanes, kStride);
    }
  }
  for (int64_t i = 0; i < steps; ++i, w += kStepBytes, x += num_parts(type) * kTileBytes) {
    for (int64_t b = 0; ahead > 0 && b < kStepBytes; b += 64) __builtin_prefetch(w + ahead + b, 0, 2);
    _tile_loadd(6, w, kUnitBytes);
    _tile_loadd(7, w + 64, kUnitBytes);
    if constexpr (type == Type::kInt8) {
      _tile_loadd(4, x, 64);
      _tile_loadd(5, x + kTileBytes, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      for (int p = 0; p < num_parts(type); ++p) {
        _tile_loadd(4, x + p * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (S == 2) {
          _tile_loadd(5, x + next + p * kTileBytes, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kLanes, kStride);
  if constexpr (S == 2) {
    _tile_stored(2, more, kStride);
    _tile_stored(3, more + kLanes, kStride);
  }
}

// Sums of the upper bytes and of the lower ones, in turn: [rows / 16, 2, 16, kPanel] → [rows, kPanel], scaled.
inline void join_bytes(float* sums, const float* weight_scale, const Rows& x) {
  for (int64_t r = 0; r < x.count; ++r)
    for (int h = 0; h < kPanel; h += kLanes) {
      const float* from = sums + (r / kTileRows * kTileRows + r) * kPanel + h;
      auto high = __builtin_convertvector(load_as<Ints>(from), Floats);
      auto low = __builtin_convertvector(load_as<Ints>(from + kTileRows * kPanel), Floats);
      store(sums + r * kPanel + h, (high * 256.0f + low) * (load(weight_scale + h) * x.scales[r]));
    }
}

// sums: [rows, kPanel], scaled, in room for twice as many tiles. The last tile's rows beyond x.count hold anything: nobody reads
// what becomes of them.
template <Type type>
void tile_panel(const Linear& w, int64_t panel, const Rows& x, float* sums) {
  const char* data = static_cast<const char*>(w.data) + panel * panel_bytes(w);
  int64_t units = num_units(w), whole = units / kStepUnits, steps = num_steps(w.in, type);
  constexpr int64_t kRowBytes = num_parts(type) * kTileBytes;  // of a step
  alignas(64) char rest[kStepBytes] = {};  // the last units, filled up with zeros
  std::memcpy(rest, data + whole * kStepBytes, units % kStepUnits * kUnitBytes);
  asm volatile("" : : "r"(rest) : "memory");  // GCC does not know that tiles are loaded from memory
  for (int64_t first = 0, count; first < steps; first += count) {
    count = first < whole ? std::min(kChunkSteps, whole - first) : 1;
    const char* from = first < whole ? data + first * kStepBytes : rest;
    for (int64_t r = 0, rows; r < x.count; r += rows) {
      bool is_single = type == Type::kInt8 || x.count - r <= kTileRows;
      rows = is_single ? kTileRows : 2 * kTileRows;
      const char* tiles = x.tiles + (r / kTileRows * steps + first) * kRowBytes;
      int64_t ahead = r + rows < x.count ? 0 : count * kStepBytes;
      if constexpr (type == Type::kInt8)
        multiply_tiles<type, 2>(from, tiles, 0, count, sums + r * 2 * kPanel, first > 0, ahead);
      else if (is_single)
        multiply_tiles<type, 1>(from, tiles, 0, count, sums + r * kPanel, first > 0, ahead);
      else
        multiply_tiles<type, 2>(from, tiles, steps * kRowBytes, count, sums + r * kPanel, first > 0, ahead);
    }
  }
  if (type == Type::kInt8) join_bytes(sums, w.scale + panel * kPanel, x);
}

// Like `panel_products`; a panel's sums begin `size` after those of the one before.
inline void tile_products(const Linear& w, int64_t first, int64_t panels, const Rows& x, float* sums, int64_t size) {
  auto product = w.type == Type::kInt8 ? tile_panel<Type::kInt8> : tile_panel<Type::kBFloat16>;
  for (int64_t p = 0; p < panels; ++p) product(w, first + p, x, sums + p * size);
}

#else

inline bool uses_tiles(int64_t, int64_t, Type) { return false; }
struct TileUse {
  explicit TileUse(bool) {}
};
template <class X>
void tile_row(const X*, int64_t, int64_t, char*) {}
inline void tile_products(const Linear&, int64_t, int64_t, const Rows&, float*, int64_t) {}

#endif

}  // namespace minisgl::cpu
