/* Arm's Advanced SIMD (NEON), with DotProd, I8MM and BF16 where the tier has them. See vectors.h and int8_products.h. */

#include <arm_neon.h>

typedef ints mask; /* all bits of a lane, or none */

INLINE vec set(float x) { return (vec)vdupq_n_f32(x); }
INLINE ints set_int(int32_t x) { return (ints)vdupq_n_s32(x); }
INLINE vec fma(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
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

INLINE ints load_first_halves(const void *from, int64_t count)
{
    uint16_t halves[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        memcpy(halves + i, (const char *)from + 2 * i, 2);
    return load_halves(halves);
}

INLINE void store_first_halves(void *to, ints x, int64_t count)
{
    for (int64_t i = 0; i < count && i < LANES; i++) {
        uint16_t half = (uint16_t)x[i];
        memcpy((char *)to + 2 * i, &half, 2);
    }
}

INLINE ints gather(const void *from, int64_t stride, int64_t count)
{
    int32_t numbers[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        memcpy(numbers + i, (const char *)from + i * stride, 4);
    return load_ints(numbers);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
INLINE ints round_halves(vec x) { return (ints)vmovl_u16(vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x))); }
#else
INLINE ints round_halves(vec x) { return rounded_in_software(x); }
#endif
/* bfdot is not used: it rounds to odd and flushes denormals, unlike two fused multiply-adds. */
INLINE vec multiply_halves(vec sum, ints left, ints right) { return MULTIPLY_HALVES_IN_SOFTWARE(sum, left, right); }
#define STORE_PAIRS_IN_SOFTWARE
