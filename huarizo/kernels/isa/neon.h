/* Arm's Advanced SIMD (NEON), with DotProd, I8MM and BF16 where the tier has them. See vectors.h. */

#include <arm_neon.h>

typedef ints mask; /* all bits of a lane, or none */

enum { REGISTERS = 32, LEAST_POWER = -127, HALVES = 0 };

INLINE vec set(float x) { return (vec)vdupq_n_f32(x); }
INLINE ints set_int(int32_t x) { return (ints)vdupq_n_s32(x); }
INLINE vec fused(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE ints larger_bits(ints a, ints b) { return (ints)vmaxq_u32((uint32x4_t)a, (uint32x4_t)b); }
INLINE ints nearest(vec x) { return (ints)vcvtnq_s32_f32((float32x4_t)x); }
INLINE ints floor_of(vec x) { return (ints)vcvtmq_s32_f32((float32x4_t)x); }
INLINE vec float_of(ints x) { return (vec)vcvtq_f32_s32((int32x4_t)x); }
INLINE vec times_power(vec y, vec whole) { return y * (vec)((nearest(whole) + 127) << 23); }
INLINE vec choose(mask m, vec a, vec b) { return (vec)((m & (ints)a) | (~m & (ints)b)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE float sum_of(vec x) { return vaddvq_f32((float32x4_t)x); }
INLINE int32_t sum_of_ints(ints x) { return vaddvq_s32((int32x4_t)x); }
INLINE float largest_of(vec x) { return vmaxvq_f32((float32x4_t)x); }
INLINE uint32_t largest_bits_of(ints x) { return vmaxvq_u32((uint32x4_t)x); }

INLINE vec swap(vec x, const int apart)
{
    return apart == 1 ? (vec)vrev64q_f32((float32x4_t)x) : (vec)vextq_f32((float32x4_t)x, (float32x4_t)x, 2);
}

INLINE mask first(int64_t count) { return set_int((int32_t)(count < LANES ? count : LANES)) > lane_numbers(); }
INLINE mask both(mask a, mask b) { return a & b; }
INLINE mask above(vec a, vec b) { return a > b; }
INLINE mask at_least(ints a, ints b) { return (mask)((bits)a >= (bits)b); }
INLINE ints keep(mask m, ints x) { return m & x; }

INLINE ints load_first(const void *from, int64_t count)
{
    int32_t numbers[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        memcpy(numbers + i, (const char *)from + 4 * i, 4);
    return load_ints(numbers);
}

INLINE void store_first(void *to, ints x, int64_t count)
{
    for (int64_t i = 0; i < count && i < LANES; i++) {
        int32_t number = x[i];
        memcpy((char *)to + 4 * i, &number, 4);
    }
}

INLINE ints load_halves(const void *from) { return (ints)vmovl_u16(vld1_u16(from)); }
INLINE void store_halves(void *to, ints x) { vst1_u16(to, vmovn_u32((uint32x4_t)x)); }

#define PARTS_OF_HALVES_IN_SOFTWARE

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
INLINE ints round_halves(vec x) { return (ints)vmovl_u16(vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x))); }
#else
INLINE ints round_halves(vec x) { return rounded_in_software(x); }
#endif
/* bfdot is not used: it rounds to odd and flushes denormals, unlike two fused multiply-adds. */
INLINE vec multiply_halves(vec sum, ints left, ints right) { return MULTIPLY_HALVES_IN_SOFTWARE(sum, left, right); }
#define STORE_PAIRS_IN_SOFTWARE

/* int8: see int8.c. */
enum { PAIRS = 0, OFFSET = 0, TILE_UNIT = 2, FINISHED_ROWS = 1, DEPTH_BLOCK = 384, TILES_TOGETHER = 16 };

#if defined(__ARM_FEATURE_MATMUL_INT8)
enum { MATRICES = 1, TILE_ROWS = 8, TILE_VECTORS = 2 };
#define DOT_OF_MATRICES

INLINE void dot_matrices(ints *sum, ints left, ints right)
{
    *sum = (ints)vmmlaq_s32((int32x4_t)*sum, (int8x16_t)left, (int8x16_t)right);
}

/* The lower and the upper halves of two vectors. */
INLINE ints lower_halves(ints a, ints b) { return (ints)vzip1q_s64((int64x2_t)a, (int64x2_t)b); }
INLINE ints upper_halves(ints a, ints b) { return (ints)vzip2q_s64((int64x2_t)a, (int64x2_t)b); }

/* Stores a0 b0 a1 b1 a2 b2 a3 b3. */
INLINE void store_interleaved(char *to, ints a, ints b)
{
    store_ints(to, (ints)vzip1q_s32((int32x4_t)a, (int32x4_t)b));
    store_ints(to + sizeof a, (ints)vzip2q_s32((int32x4_t)a, (int32x4_t)b));
}
#elif defined(__ARM_FEATURE_DOTPROD)
enum { MATRICES = 0, TILE_ROWS = 6, TILE_VECTORS = 4 };

INLINE void dot(ints *sum, ints left, ints right)
{
    *sum = (ints)vdotq_s32((int32x4_t)*sum, (int8x16_t)left, (int8x16_t)right);
}
#endif

INLINE ints add_bytes(ints sum, const int8_t *from)
{
    for (int i = 0; i < 4; i++)
        sum = (ints)vpadalq_s16((int32x4_t)sum, vpaddlq_s8(vld1q_s8(from + 16 * i)));
    return sum;
}

INLINE void store_bytes(int8_t *to, const ints y[4])
{
    int16x8_t low = vcombine_s16(vqmovn_s32((int32x4_t)y[0]), vqmovn_s32((int32x4_t)y[1]));
    int16x8_t high = vcombine_s16(vqmovn_s32((int32x4_t)y[2]), vqmovn_s32((int32x4_t)y[3]));
    vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

INLINE void turn_block(char *to, const char *from)
{
    static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint8x16_t turn = vld1q_u8(order);
    for (int outputs = 0; outputs < 8; outputs++)
#pragma GCC unroll 8
        for (int inputs = 0; inputs < 8; inputs++) {
            uint8x16_t bytes = vld1q_u8((const uint8_t *)from + inputs * 128 + outputs * 16);
            vst1q_u8((uint8_t *)to + outputs * 128 + inputs * 16, vqtbl1q_u8(bytes, turn));
        }
}
