// Linear layers of one token with weights of few bits, bound by the reading of these, with the neighbours of the layer
// fused: RMS norm before it, SwiGLU or the residual's sum after it.
//
// 8 rows of W are an octet. A block has a contiguous range of octets (gated: of pairs of a gate and an up octet), all k of
// them, and takes up to kOctets at a time; its warps take turns at steps of k, each with a ring of its own, which needs no
// barrier and runs on into the next group of octets. W does not depend on earlier kernels: the ring is filled with it
// before `pdl_wait`. Then each warp makes of its own part of x what the tensor cores multiply, once for all octets, so
// that little is left to do for each of them:
//  - 4 bits (minisgl/packed_weight.cuh): x becomes integers of 16 bits, over a scale of each step, whose upper and lower
//    bytes are two columns of a product of integers; a mask takes four codes at a time out of a word. A group's sum is
//    scaled in fp32, and what the zero and the offset make of the sum of x, from a product with ones, is added.
//  - MINISGL_FP8, e4m3 with a scale of each row, or of each octet and 128 k: an instruction makes fp16 of two (sm_89), and
//    x becomes fp16 too, times a power of two for each warp, so that none of it is out of range.
// Both are finer than bf16. A norm of x is applied to the sum: y = rstd * (x∘g) W^T. Sums are added in a fixed order.
#pragma once

#include "minisgl/float8.cuh"
#include "minisgl/packed_weight.cuh"

namespace minisgl {
namespace {

#ifndef MINISGL_SHARED
#define MINISGL_SHARED 113  // KiB of a block: half of an SM's, less what the system takes
#endif
#if MINISGL_FP8
constexpr bool kFloat8 = true;
#else
constexpr bool kFloat8 = false;
#endif

constexpr int kSharedBytes = MINISGL_SHARED * 1024;
constexpr int kScaleBlock = 128;                    // k that share a scale, where octets of e4m3 have them
constexpr int kStepK = kFloat8 ? 64 : kUnitK;       // 512 bytes of an octet
constexpr int kStepBytes = kFloat8 ? 64 : kUnitBytes;  // to the next one, in memory
constexpr int kXBytes = kStepK * 2;                 // of a step of x, in shared memory
constexpr int kVectors = kXBytes / 16;              // of 8 k
constexpr int kPieces = kParamBytes / 16;           // of 16 bytes, of what an octet of a unit has beside codes
constexpr int kStageOctet = kOctetBytes + (kFloat8 ? 0 : kParamBytes);
constexpr int kGroupWords = kGroup / 32;
constexpr float kMost = 32600.f;   // of x as integers: the upper byte of one more than 32,639 were no int8
constexpr float kLeast = 1e-30f;   // the largest of a step of zeros
constexpr unsigned kBeyond = 0x7e800000u;  // bits of 2^126

struct Args {
  const char* weight;
  const float* row_scales;    // of e4m3: null, or [rows of W]
  const float* block_scales;  // null, or [octets of W, k / 128]
  const T* x;
  const T* norm;      // gains, or null: no norm
  const T* bias;      // null: none
  const T* residual;  // null, or equal to out
  T* out;             // [outputs]
  float unit;         // factor of all scales
  float eps;
  int outputs, k;
  int steps;          // of k
};

// most_steps: of k, for which there is room.
template <bool gated, int warps, int octets, int most_steps>
struct Config {
  static constexpr bool kGated = gated;
  static constexpr int kWarps = warps;
  static constexpr int kThreads = warps * 32;
  static constexpr int kOctets = octets;
  static constexpr int kTiles = (octets + 1) / 2;
  static constexpr int kSteps = most_steps;
  static constexpr int kLaneVectors = ((kSteps + warps - 1) / warps * kVectors + 31) / 32;  // of x, at most
  static constexpr int kStage = octets * kStageOctet;  // bytes of a warp
  static constexpr int kRows = octets * 8;
  static constexpr int kRestBytes = kSteps * (kXBytes + 4) + warps * (kRows + 1) * 4;
  static constexpr int kFit = (kSharedBytes - kRestBytes) / (warps * kStage);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kRing = warps * kStages * kStage;
  static constexpr int kBytes = kRing + kRestBytes;
  static constexpr bool kExists = kStages >= 2 && (!gated || octets % 2 == 0);
};

struct Group {
  int first;   // octet; gated: twice the pair
  int octets;  // in this group
};

// What a thread adds to the sum of its output, read early so that its latency is hidden.
struct Addend {
  float residual, bias[2], scale[2];
};

template <typename C>
struct Worker {
  const Args& args;
  char* smem;
  uint32_t ring;           // of this warp
  uint32_t x_at;           // what becomes of x, by steps
  float* factors;          // of steps
  float* partial;          // [warps][rows]
  float* squares_of_warps;
  int warp, lane, row, quad;
  int first_octet, octets, groups;  // of this block
  int blocks;              // steps of k, of this warp
  int total;               // blocks * groups
  int load_index, load_block, loaded, load_octets;  // where loads stand
  int64_t pitch;           // bytes, of two octets
  const char* load_codes[2];  // of this lane: the group's first octet and the next, in the next step
  const char* load_params;    // its piece of the scales

  __device__ __forceinline__ Worker(const Args& arguments, char* shared) : args(arguments), smem(shared) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    ring = base + warp * C::kStages * C::kStage;
    x_at = base + C::kRing;
    factors = reinterpret_cast<float*>(smem + C::kRing + C::kSteps * kXBytes);
    partial = factors + C::kSteps;
    squares_of_warps = partial + C::kWarps * C::kRows;
    constexpr int kUnit = C::kGated ? 2 : 1;
    int all = args.outputs / 8;
    int first = static_cast<int>(static_cast<int64_t>(all) * blockIdx.x / gridDim.x);
    int end = static_cast<int>(static_cast<int64_t>(all) * (blockIdx.x + 1) / gridDim.x);
    first_octet = first * kUnit, octets = (end - first) * kUnit;
    groups = (octets + C::kOctets - 1) / C::kOctets;
    blocks = (args.steps - warp + C::kWarps - 1) / C::kWarps;
    total = blocks * groups;
    pitch = kFloat8 ? static_cast<int64_t>(C::kGated ? 8 : 16) * args.k : static_cast<int64_t>(args.steps) * kUnitBytes;
    load_index = load_block = loaded = 0;
    enter_group();
  }

  __device__ __forceinline__ Group group_at(int index) const {
    constexpr int kUnit = C::kGated ? 2 : 1;
    int all = octets / kUnit, begin = all * index / groups * kUnit, end = all * (index + 1) / groups * kUnit;
    return {first_octet + begin, end - begin};
  }

  // The octet's first row of W, of e4m3.
  __device__ __forceinline__ int64_t row_of(int octet) const {
    return C::kGated ? octet % 2 * args.outputs + octet / 2 * 8 : octet * 8;
  }

  __device__ __forceinline__ void enter_group() {
    Group group = group_at(load_index);
    load_octets = group.octets;
    const char* weight = args.weight + warp * kStepBytes;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      int octet = group.first + o;
      if constexpr (kFloat8) {
        load_codes[o] = weight + (row_of(octet) + row) * args.k + quad * 16;
      } else {
        load_codes[o] = weight + octet / 2 * pitch + octet % 2 * kOctetBytes + lane * 16;
      }
    }
    if constexpr (!kFloat8) {
      int octet = group.first + lane / kPieces;
      load_params = weight + octet / 2 * pitch + kCodeBytes + octet % 2 * kParamBytes + lane % kPieces * 16;
    }
  }

  // A step of the group's rows into a slot. whole: there are kOctets of them.
  template <bool whole>
  __device__ __forceinline__ void load_step(uint32_t slot) const {
    const char* from[2] = {load_codes[0], load_codes[1]};
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) {
      if (whole || o < load_octets) cp_async(slot + o * kOctetBytes + lane * 16, from[o % 2]);
      from[o % 2] += pitch;
    }
    if constexpr (!kFloat8) {
      const char* params = load_params;
#pragma unroll
      for (int i = 0; i < C::kOctets * kPieces; i += 32) {
        bool has = (whole || i / kPieces + lane / kPieces < load_octets) && i + lane < C::kOctets * kPieces;
        if (has) cp_async(slot + C::kOctets * kOctetBytes + (i + lane) * 16, params);
        params += 16 / kPieces * pitch;
      }
    }
  }

  // Issue the next step into a slot; nothing when all were.
  __device__ __forceinline__ void load(uint32_t slot) {
    if (loaded == total) return;
    if (load_octets == C::kOctets) load_step<true>(slot);
    else load_step<false>(slot);
    load_codes[0] += C::kWarps * kStepBytes, load_codes[1] += C::kWarps * kStepBytes;
    load_params += C::kWarps * kStepBytes;
    ++loaded;
    if (++load_block == blocks && loaded < total) {
      load_block = 0;
      ++load_index;
      enter_group();
    }
  }

  // This lane's part of x or of the gains: every 32nd of the vectors of its warp's steps.
  __device__ __forceinline__ void read(const T* from, uint32_t (&words)[C::kLaneVectors][4]) const {
#pragma unroll
    for (int i = 0; i < C::kLaneVectors; ++i) {
      int vector = lane + 32 * i, at = step_of(vector) * kStepK + vector % kVectors * 8;
      bool inside = vector < blocks * kVectors && at < args.k;
      uint4 v = inside ? *reinterpret_cast<const uint4*>(from + at) : make_uint4(0, 0, 0, 0);
      words[i][0] = v.x, words[i][1] = v.y, words[i][2] = v.z, words[i][3] = v.w;
    }
  }
  __device__ __forceinline__ int step_of(int vector) const { return warp + vector / kVectors * C::kWarps; }

  // The largest magnitude as bits of a float, where NaN is above all.
  __device__ __forceinline__ static unsigned largest_of(const uint32_t (&words)[4]) {
    T2 most = __habs2(pair(words[0]));
#pragma unroll
    for (int i = 1; i < 4; ++i) most = __hmax2_nan(most, __habs2(pair(words[i])));
    return max(__float_as_uint(to_float(most.x)), __float_as_uint(to_float(most.y)));
  }

  // A vector of x as integers, where a product's fragments have them: of a step two rows of bytes, the upper and the
  // lower, each in the order of quads, words and nibbles. 16 lanes have a step.
  __device__ __forceinline__ void store_integers(int vector, const uint32_t (&words)[4]) {
    unsigned largest = max(largest_of(words), __float_as_uint(kLeast));
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    if (largest > kBeyond) largest = 0x7fffffffu;  // NaN: there is no inverse of it
    float factor = __uint_as_float(largest), inverse = __fdividef(kMost, factor);
    // Under this, integers are the lowest bits; the upper byte is that of the nearest multiple of 256, the lower is 128
    // more than what remains.
    constexpr float kUnder = 12582912.f + 128.f;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 v = floats_of_pair(words[i]);
      pairs[i] = __byte_perm(__float_as_uint(fmaf(v.x, inverse, kUnder)), __float_as_uint(fmaf(v.y, inverse, kUnder)),
                             0x5410) ^ 0x00800080u;
    }
    // A word of codes has two times 16 k, whose bytes alternate: their lanes exchange the pairs of two quads.
    int later = lane / 2 % 2;
    uint32_t to = x_at + step_of(vector) * kXBytes + lane % 16 / 8 * 64 + lane / 4 % 2 * 8 + lane % 2 * 4 + later * 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t theirs = __shfl_xor_sync(0xffffffffu, later ? pairs[i] : pairs[2 + i], 2);
      uint32_t first = later ? theirs : pairs[i], second = later ? pairs[2 + i] : theirs;
      if (vector >= blocks * kVectors) continue;
      store_shared(to + i * 16, __byte_perm(first, second, 0x7351));
      store_shared(to + i * 16 + 128, __byte_perm(first, second, 0x6240));
    }
    if (lane % 16 == 0 && vector < blocks * kVectors) factors[step_of(vector)] = factor / kMost;
  }

  // This warp's part of x as fp16, times a power of two of which the largest becomes 2^14 to 2^15. Returns one over it.
  __device__ __forceinline__ float store_halves(const uint32_t (&words)[C::kLaneVectors][4]) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < C::kLaneVectors; ++i) largest = max(largest, largest_of(words[i]));
    unsigned exponent = max(__reduce_max_sync(0xffffffffu, largest) >> 23, 20u);  // such powers, and inverses, exist
    float power = __uint_as_float((127 + 127 + 14 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < C::kLaneVectors; ++i) {
      int vector = lane + 32 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 v = floats_of_pair(words[i][j]);
        __half2 halves = __floats2half2_rn(v.x * power, v.y * power);
        uint32_t to = x_at + step_of(vector) * kXBytes + vector % kVectors * 16 + j * 4;
        if (vector < blocks * kVectors) store_shared(to, *reinterpret_cast<uint32_t*>(&halves));
      }
    }
    return __uint_as_float((exponent - 14) << 23);
  }

  // What is multiplied, of this warp's part of x. Returns what its sums have to be multiplied with.
  __device__ __forceinline__ float prepare(const uint32_t (&gains)[C::kLaneVectors][4]) {
    uint32_t words[C::kLaneVectors][4];
    read(args.x, words);
    if (args.norm != nullptr) {
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < C::kLaneVectors * 4; ++i) {
        uint32_t& word = words[i / 4][i % 4];
        square += squares(word);
        word = minisgl::scale(word, gains[i / 4][i % 4]);
      }
      square = warp_sum(square);
      if (lane == 0) squares_of_warps[warp] = square;
    }
    float rest = 1.f;
    if constexpr (kFloat8) {
      rest = store_halves(words);
    } else {
#pragma unroll
      for (int i = 0; i < C::kLaneVectors; ++i) store_integers(lane + 32 * i, words[i]);
    }
    __syncwarp();
    return rest;
  }

  // sums += a step's; slots beyond the group's octets hold stale rows: their sums are never written. Tiles take turns, so
  // that products do not wait for one another.
  __device__ __forceinline__ void multiply_integers(uint32_t slot, int step, float (&sums)[C::kTiles][2]) const {
    uint32_t x = x_at + step * kXBytes + row % 2 * 128 + quad * 16;
    const uint4 low = load_shared(x), high = load_shared(x + 64);
    const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
    float factor = factors[step];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t codes[2 * C::kTiles][kGroupWords] = {};
      int part[C::kTiles][4] = {}, ones[4] = {};
#pragma unroll
      for (int o = 0; o < C::kOctets; ++o) {
        read_codes(slot + o * kOctetBytes + lane * 16 + g * kGroupWords * 4, codes[o]);
      }
#pragma unroll
      for (int w = 0; w < kGroupWords; ++w) {
        const uint32_t(&y)[2] = b[g * kGroupWords + w];
        mma_int8(ones, kUnits, kUnits, kUnits, kUnits, y[0], y[1]);
#pragma unroll
        for (int tile = 0; tile < C::kTiles; ++tile) {
          uint32_t a = codes[2 * tile][w], c = codes[2 * tile + 1][w];
          mma_int8(part[tile], a & kNibbles, c & kNibbles, a >> 4 & kNibbles, c >> 4 & kNibbles, y[0], y[1]);
        }
      }
      float of_x = static_cast<float>(ones[0] * 256 + ones[1]) * factor;
#pragma unroll
      for (int o = 0; o < C::kOctets; ++o) {
        Params params{load_shared_4(slot + C::kOctets * kOctetBytes + o * kParamBytes + g * 32 + row * 4)};
        const int(&c)[4] = part[o / 2];
        float sum = static_cast<float>(c[o % 2 * 2] * 256 + c[o % 2 * 2 + 1]) * factor;
        sums[o / 2][o % 2] = fmaf(params.scale(), sum, fmaf(params.plain_shift(), of_x, sums[o / 2][o % 2]));
      }
    }
  }

  __device__ __forceinline__ void multiply_halves(uint32_t slot, const Group& group, int step,
                                                  float (&sums)[C::kTiles][2]) const {
    uint32_t x = x_at + step * kXBytes + quad * 32;
    const uint4 low = load_shared(x), high = load_shared(x + 16);
    const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
    float part[C::kTiles][4] = {};
    uint4 codes[2 * C::kTiles] = {};
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) codes[o] = load_shared(slot + o * kOctetBytes + lane * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int tile = 0; tile < C::kTiles; ++tile) {
        const uint4 &first = codes[2 * tile], &second = codes[2 * tile + 1];
        uint32_t a[4];
        to_half(i == 0 ? first.x : i == 1 ? first.y : i == 2 ? first.z : first.w, a[0], a[2]);
        to_half(i == 0 ? second.x : i == 1 ? second.y : i == 2 ? second.z : second.w, a[1], a[3]);
        mma_half(part[tile], a[0], a[1], a[2], a[3], b[i][0], b[i][1]);
      }
    }
#pragma unroll
    for (int o = 0; o < C::kOctets; ++o) {
      float scale = 1.f;
      if (args.block_scales != nullptr && o < group.octets) {
        int64_t octet = row_of(group.first + o) / 8;
        scale = __ldg(args.block_scales + octet * (args.k / kScaleBlock) + step * kStepK / kScaleBlock);
      }
      sums[o / 2][o % 2] = fmaf(part[o / 2][o % 2 * 2], scale, sums[o / 2][o % 2]);
    }
  }

  // Of a group's output: the group's index of it is the thread's.
  __device__ __forceinline__ int output_of(const Group& group) const {
    return (C::kGated ? group.first / 2 : group.first) * 8 + threadIdx.x;
  }
  __device__ __forceinline__ bool has_output(const Group& group) const {
    return threadIdx.x < (C::kGated ? group.octets / 2 : group.octets) * 8;
  }

  __device__ __forceinline__ Addend read_addend(const Group& group) const {
    Addend addend = {0.f, {0.f, 0.f}, {args.unit, args.unit}};
    if (!has_output(group)) return addend;
    int output = output_of(group);
    if (args.residual != nullptr) addend.residual = to_float(args.residual[output]);
#pragma unroll
    for (int i = 0; i < (C::kGated ? 2 : 1); ++i) {
      if (args.bias != nullptr) addend.bias[i] = to_float(args.bias[output + i * args.outputs]);
      if (args.row_scales != nullptr) addend.scale[i] = args.row_scales[output + i * args.outputs];
    }
    return addend;
  }

  // Merge the warps' sums and write the outputs of `group`.
  __device__ __forceinline__ void finish(const Group& group, const float (&sums)[C::kTiles][2], float rest,
                                         const Addend& addend) {
    __syncthreads();  // the sums of the group before are read
    if (quad == 0) {  // all quads have the same
#pragma unroll
      for (int o = 0; o < C::kOctets; ++o) partial[warp * C::kRows + o * 8 + row] = sums[o / 2][o % 2] * rest;
    }
    __syncthreads();
    if (!has_output(group)) return;
    float y[2] = {}, square = 0.f;
    int at = C::kGated ? threadIdx.x / 8 * 16 + threadIdx.x % 8 : threadIdx.x;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      y[0] += partial[w * C::kRows + at];
      if constexpr (C::kGated) y[1] += partial[w * C::kRows + at + 8];
      if (args.norm != nullptr) square += squares_of_warps[w];
    }
    float factor = args.norm != nullptr ? inverse_root(square, args.k, args.eps) : 1.f;
    y[0] = y[0] * (addend.scale[0] * factor) + addend.bias[0] + addend.residual;
    if constexpr (C::kGated) y[0] = silu(y[0]) * (y[1] * (addend.scale[1] * factor) + addend.bias[1]);
    args.out[output_of(group)] = from_float<T>(y[0]);
  }

  // Before `pdl_wait`: weights only.
  __device__ __forceinline__ void prefetch() {
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) {
      load(ring + s * C::kStage);
      cp_async_commit();
    }
  }

  __device__ __forceinline__ void run(const uint32_t (&gains)[C::kLaneVectors][4]) {
    float rest = prepare(gains);
    int stage = 0;
    for (int index = 0; index < groups; ++index) {
      Group group = group_at(index);
      Addend addend = read_addend(group);
      float sums[C::kTiles][2] = {};
      for (int block = 0; block < blocks; ++block) {
        cp_async_wait<C::kStages - 1>();
        __syncwarp();  // what other lanes fetched
        uint32_t slot = ring + stage * C::kStage;
        int step = warp + block * C::kWarps;
        if constexpr (kFloat8) multiply_halves(slot, group, step, sums);
        else multiply_integers(slot, step, sums);
        __syncwarp();  // all have read the slot
        load(slot);
        cp_async_commit();
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
      }
      finish(group, sums, rest, addend);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2) one_token(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char smem[];
  pdl_trigger();
  Worker<C> worker(args, smem);
  worker.prefetch();
  uint32_t gains[C::kLaneVectors][4];
  if (args.norm != nullptr) worker.read(args.norm, gains);
  pdl_wait();
  worker.run(gains);
}

}  // namespace
}  // namespace minisgl
