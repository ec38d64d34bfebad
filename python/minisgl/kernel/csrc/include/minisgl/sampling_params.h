// What a row's token is sampled with, beside its logits: a record of `COLUMNS` in kernel/sampling.py, for CPUs and GPUs.
#pragma once

#include <cstdint>

namespace minisgl {

struct SamplingParams {
  uint64_t seed;
  int64_t position;   // of the token to be sampled
  float temperature;  // 0: greedy
  float top_p;        // 1: off
  float min_p;        // 0: off
  int32_t top_k;      // 0: off
  float repetition_penalty;                     // 1: off
  float presence_penalty, frequency_penalty;    // 0: off
  int32_t prompt_len;  // tokens of its history that are no output
  int32_t min_len;     // tokens before which those that end the output are forbidden
  int32_t mask;        // of a step on a GPU; negative: none
};

}  // namespace minisgl
