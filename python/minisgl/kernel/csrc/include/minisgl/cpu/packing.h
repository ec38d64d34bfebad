// How weights get into panels: by all threads, a panel at a time.
#pragma once

#include "ops.h"

namespace minisgl::cpu {

// Features of one panel, of which there may be fewer than it holds. scale: [kPanel].
template <class T>
void pack_int8(const T* rows, int64_t count, int64_t in, int8_t* panel, float* scale) {
  std::memset(panel, 0, (in + 3) / 4 * kUnitBytes);
  std::fill(scale, scale + kPanel, 0.0f);
  for (int64_t j = 0; j < count; ++j) {
    float most = 0;
    for (int64_t i = 0; i < in; ++i) most = std::max(most, std::fabs(widen(rows[j * in + i])));
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    scale[j] = most / 127.0f;
    for (int64_t i = 0; i < in; ++i)
      panel[i / 4 * kUnitBytes + j * 4 + kQuad[i % 4]] = int8_t(std::lrintf(widen(rows[j * in + i]) * inverse));
  }
}

// Plain weights of type T to panels of the same type, or of int8 with a scale for each feature, as w has.
template <class T>
void pack(Workers& workers, const T* weight, const Linear& w, void* data, float* scale) {
  int64_t in = w.in;
  workers.pool.run([&](int) {
    workers.pool.share(num_panels(w), 1, [&](int64_t p) {
      int64_t part = w.is_pair ? p % 2 : 0, first = (w.is_pair ? p / 2 : p) * kPanel;
      int64_t count = std::min<int64_t>(kPanel, w.part() - first);
      const T* rows = weight + (part * w.part() + first) * in;
      char* panel = static_cast<char*>(data) + p * panel_bytes(w);
      if (scale != nullptr) return pack_int8(rows, count, in, reinterpret_cast<int8_t*>(panel), scale + p * kPanel);
      T* to = reinterpret_cast<T*>(panel);
      constexpr int64_t kDepth = 4 / sizeof(T);
      std::memset(panel, 0, panel_bytes(w));
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < in; ++i) to[(i / kDepth * kPanel + j) * kDepth + i % kDepth] = rows[j * in + i];
    });
  });
}

// Rows of blocks, `stride` bytes apart.
inline void pack_part(Workers& workers, const BlockType& type, const uint8_t* rows, int64_t stride, int64_t out, int64_t in,
                      const uint8_t* grid, char* data) {
  workers.pool.run([&](int) {
    workers.pool.share(panels_of(out), 1, [&](int64_t p) {
      int64_t first = p * kPanel, bytes = panel_bytes(type.format, in);
      std::memset(data + p * bytes, 0, bytes);
      pack_block_rows(type, rows + first * stride, stride, std::min<int64_t>(kPanel, out - first), in, grid, data + p * bytes);
    });
  });
}

// Integers with scales, as `pack_grouped` gets them.
inline void pack_part(Workers& workers, const Format& f, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, int64_t out,
                      int64_t in, char* data) {
  int64_t spans = num_spans(f, in);
  workers.pool.run([&](int) {
    workers.pool.share(panels_of(out), 1, [&](int64_t p) {
      int64_t first = p * kPanel, bytes = panel_bytes(f, in);
      std::memset(data + p * bytes, 0, bytes);
      pack_grouped_rows(f, codes + first * in * f.bits / 8, scales + first * spans, zeros == nullptr ? nullptr : zeros + first * spans,
                        std::min<int64_t>(kPanel, out - first), in, data + p * bytes);
    });
  });
}

}  // namespace minisgl::cpu
