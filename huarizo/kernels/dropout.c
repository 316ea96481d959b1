/* Dropout with a hashed mask: y_i = keep(i, seed) ? x_i * scale : 0, where keep is hash(i, seed) >= threshold.
 *
 * The hash is integer arithmetic without a state, so the loop becomes whole vectors and the backward pass makes the
 * same mask again from the seed. Rounds of xor-shift and multiply modulo 2^32; constants from C. Wellons' hash
 * prospector. huarizo/model/dropout.py has the same in plain torch, which defines what is correct.
 */
#include <stdint.h>
#include <string.h>

static inline uint32_t hashed(uint32_t x, uint32_t seed) {
    static const uint32_t multipliers[3] = {0x21F0AAADu, 0x735A2D97u, 0x21F0AAADu};
    for (int round = 0; round < 3; round++) {
        x = (x ^ (x >> 16)) * multipliers[round];
        x = (x ^ (x >> 15)) + seed;
    }
    return x;
}

/* bf16 is the upper half of a float; rounded to nearest, ties to even. */
static inline float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

void huarizo_dropout_bf16(const uint16_t *x, uint16_t *y, int64_t count, uint32_t seed, uint32_t threshold, float scale,
                          int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        y[i] = hashed((uint32_t)i, seed) >= threshold ? rounded(widened(x[i]) * scale) : 0;
}

void huarizo_dropout_fp32(const float *x, float *y, int64_t count, uint32_t seed, uint32_t threshold, float scale,
                          int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        y[i] = hashed((uint32_t)i, seed) >= threshold ? x[i] * scale : 0.0f;
}
