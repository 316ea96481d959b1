/* The x86 intrinsics that isa/avx512.h and isa/avx2.h use, in plain C, lane by lane, as Intel's manual defines them.
 *
 * So a tier that the CPU lacks is compiled and run on any CPU, also under sanitizers, which see every byte that a masked
 * load or store touches. SIMDe is not used: its 512-bit types are unions, which can't be cast to the vectors of
 * vectors.h, and it lacks several of these functions. Slow, and for tests alone. An intrinsic that is missing here is an
 * error of the compiler.
 */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EMULATION static __attribute__((noinline)) /* inlined, a kernel would take minutes to compile */
#define PART static inline
#define EACH(count) for (int i = 0; i < (count); i++)

typedef float __m256 __attribute__((vector_size(32)));
typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint8_t __mmask8;
typedef uint16_t __mmask16;

/* A register seen as numbers of some type. */
typedef union {
    __m512i all;
    __m512 floats;
    __m512bh halves_of_floats;
    __m256i lower_256;
    __m256 lower_floats;
    __m256bh lower_halves_of_floats;
    __m128i lower_128;
    __m128i parts[4];
    float f[16];
    int64_t q[8];
    int32_t d[16];
    uint32_t u[16];
    int16_t w[32];
    uint16_t h[32];
    int8_t b[64];
    uint8_t ub[64];
} Register;

PART Register of_512(__m512i x) { return (Register){.all = x}; }
PART Register of_floats(__m512 x) { return (Register){.floats = x}; }
PART Register of_256(__m256i x) { return (Register){.lower_256 = x}; }
PART Register of_256_floats(__m256 x) { return (Register){.lower_floats = x}; }
PART Register of_128(__m128i x) { return (Register){.lower_128 = x}; }

/* ------------------------------------------------------------------------------------------------------- one number */

#define _MM_FROUND_TO_NEG_INF 1
#define _MM_FROUND_NO_EXC 8
#define _CMP_GT_OQ 30

PART int32_t whole_of(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN; }
PART int32_t saturated(int32_t x, int32_t most) { return x > most ? most : x < -most - 1 ? -most - 1 : x; }
PART float maximum(float a, float b) { return a > b ? a : b; }

PART float from_half(uint16_t half)
{
    uint32_t number = (uint32_t)half << 16;
    float x;
    memcpy(&x, &number, sizeof x);
    return x;
}

PART float flushed(float x) { return x > -0x1p-126f && x < 0x1p-126f ? copysignf(0, x) : x; }

/* bf16, rounded to nearest, ties to even; denormal numbers become zero. */
PART uint16_t to_half(float x)
{
    uint32_t number;
    x = flushed(x);
    memcpy(&number, &x, sizeof number);
    return (uint16_t)(isnan(x) ? number >> 16 | 0x40 : (number + 0x7FFF + (number >> 16 & 1)) >> 16);
}

PART float scaled(float x, float power)
{
    if (isnan(x) || isnan(power))
        return x + power;
    return ldexpf(x, (int)floorf(power < -1000 ? -1000 : power > 1000 ? 1000 : power));
}

/* --------------------------------------------------------------------------------------- both widths, as functions of
 * registers; `count` is the number of results */

PART Register fused_lanes(Register a, Register b, Register c, int count)
{
    EACH(count) a.f[i] = fmaf(a.f[i], b.f[i], c.f[i]);
    return a;
}

PART Register larger_lanes(Register a, Register b, int count)
{
    EACH(count) a.f[i] = maximum(a.f[i], b.f[i]);
    return a;
}

PART Register larger_unsigned(Register a, Register b, int count)
{
    EACH(count) a.u[i] = a.u[i] > b.u[i] ? a.u[i] : b.u[i];
    return a;
}

PART Register rounded(Register a, int count)
{
    EACH(count) a.d[i] = whole_of(rintf(a.f[i]));
    return a;
}

PART Register as_floats(Register a, int count)
{
    EACH(count) a.f[i] = (float)a.d[i];
    return a;
}

PART Register permuted_within_four(Register a, int order, int count)
{
    Register y = a;
    EACH(count) y.u[i] = a.u[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    return y;
}

PART Register spread(int32_t x)
{
    Register y;
    EACH(16) y.d[i] = x;
    return y;
}

PART Register extended(Register a, int count)
{
    Register y = a;
    EACH(count) y.u[i] = a.h[i];
    return y;
}

/* Sums of four products of unsigned and signed bytes. */
PART Register four_products(Register sum, Register a, Register b, int count)
{
    EACH(count)
        for (int j = 0; j < 4; j++)
            sum.u[i] += (uint32_t)(a.ub[4 * i + j] * b.b[4 * i + j]);
    return sum;
}

PART Register pairs_of_words(Register a, Register b, int count)
{
    Register y = a;
    EACH(count) y.u[i] = (uint32_t)(a.w[2 * i] * b.w[2 * i]) + (uint32_t)(a.w[2 * i + 1] * b.w[2 * i + 1]);
    return y;
}

PART Register pairs_of_bytes(Register a, Register b, int count)
{
    Register y = a;
    EACH(count) y.w[i] = saturated(a.ub[2 * i] * b.b[2 * i] + a.ub[2 * i + 1] * b.b[2 * i + 1], INT16_MAX);
    return y;
}

/* Within each 128 bits: those of a, then those of b. */
PART Register packed_to_words(Register a, Register b, int count)
{
    Register y = a;
    EACH(count) y.w[i] = saturated((i % 8 < 4 ? a : b).d[i / 8 * 4 + i % 4], INT16_MAX);
    return y;
}

PART Register packed_to_bytes(Register a, Register b, int count)
{
    Register y = a;
    EACH(count) y.b[i] = saturated((i % 16 < 8 ? a : b).w[i / 16 * 8 + i % 8], INT8_MAX);
    return y;
}

PART Register shuffled_bytes(Register a, Register order, int count)
{
    Register y = a;
    EACH(count) y.b[i] = order.b[i] < 0 ? 0 : a.b[i / 16 * 16 + (order.b[i] & 15)];
    return y;
}

PART Register permuted(Register order, Register a, int count)
{
    Register y = a;
    EACH(count) y.u[i] = a.u[order.u[i] % count];
    return y;
}

/* -------------------------------------------------------------------------------------------------------- 128 bits */

EMULATION __m128i _mm_loadu_si128(const void *from)
{
    __m128i x;
    memcpy(&x, from, sizeof x);
    return x;
}

EMULATION void _mm_storeu_si128(void *to, __m128i x) { memcpy(to, &x, sizeof x); }

EMULATION __m128i _mm_set_epi8(char p, char o, char n, char m, char l, char k, char j, char i, char h, char g, char f,
                               char e, char d, char c, char b, char a)
{
    return (__m128i)(int8_t __attribute__((vector_size(16)))){a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}

EMULATION __m128i _mm_shuffle_epi8(__m128i a, __m128i order)
{
    return shuffled_bytes(of_128(a), of_128(order), 16).lower_128;
}

/* -------------------------------------------------------------------------------------------------------- 256 bits */

EMULATION __m256i _mm256_loadu_si256(const void *from)
{
    __m256i x;
    memcpy(&x, from, sizeof x);
    return x;
}

EMULATION void _mm256_storeu_si256(void *to, __m256i x) { memcpy(to, &x, sizeof x); }
EMULATION __m256i _mm256_setzero_si256(void) { return (__m256i){0}; }
EMULATION __m256i _mm256_and_si256(__m256i a, __m256i b) { return a & b; }
EMULATION __m128i _mm256_castsi256_si128(__m256i x) { return of_256(x).lower_128; }
EMULATION __m256 _mm256_set1_ps(float x) { return (__m256){x, x, x, x, x, x, x, x}; }
EMULATION __m256i _mm256_set1_epi32(int32_t x) { return spread(x).lower_256; }
EMULATION __m256i _mm256_set1_epi16(int16_t x) { return spread((uint16_t)x * 0x10001u).lower_256; }
EMULATION __m256i _mm256_set1_epi8(int8_t x) { return spread((uint8_t)x * 0x1010101u).lower_256; }
EMULATION __m256i _mm256_cvtepu16_epi32(__m128i a) { return extended(of_128(a), 8).lower_256; }
EMULATION __m256i _mm256_cvtps_epi32(__m256 a) { return rounded(of_256_floats(a), 8).lower_256; }
EMULATION __m256 _mm256_cvtepi32_ps(__m256i a) { return as_floats(of_256(a), 8).lower_floats; }

EMULATION __m256i _mm256_set_epi32(int h, int g, int f, int e, int d, int c, int b, int a)
{
    return (__m256i)(int32_t __attribute__((vector_size(32)))){a, b, c, d, e, f, g, h};
}

EMULATION __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c)
{
    return fused_lanes(of_256_floats(a), of_256_floats(b), of_256_floats(c), 8).lower_floats;
}

EMULATION __m256 _mm256_max_ps(__m256 a, __m256 b)
{
    return larger_lanes(of_256_floats(a), of_256_floats(b), 8).lower_floats;
}

EMULATION __m256i _mm256_max_epu32(__m256i a, __m256i b) { return larger_unsigned(of_256(a), of_256(b), 8).lower_256; }

EMULATION __m256 _mm256_floor_ps(__m256 a)
{
    EACH(8) a[i] = floorf(a[i]);
    return a;
}

EMULATION __m256 _mm256_permute_ps(__m256 a, int order)
{
    return permuted_within_four(of_256_floats(a), order, 8).lower_floats;
}

EMULATION __m256 _mm256_permute2f128_ps(__m256 a, __m256 b, int order)
{
    Register from[2] = {of_256_floats(a), of_256_floats(b)}, y = from[0];
    EACH(2) y.parts[i] = from[order >> 4 * i >> 1 & 1].parts[order >> 4 * i & 1];
    return y.lower_floats;
}

EMULATION __m256i _mm256_permute4x64_epi64(__m256i a, int order)
{
    Register x = of_256(a), y = x;
    EACH(4) y.q[i] = x.q[order >> 2 * i & 3];
    return y.lower_256;
}

EMULATION __m256i _mm256_permutevar8x32_epi32(__m256i a, __m256i order)
{
    return permuted(of_256(order), of_256(a), 8).lower_256;
}

EMULATION __m256 _mm256_blendv_ps(__m256 a, __m256 b, __m256 choice)
{
    Register sign = of_256_floats(choice);
    EACH(8) a[i] = sign.d[i] < 0 ? b[i] : a[i];
    return a;
}

EMULATION __m256i _mm256_maskload_epi32(const void *from, __m256i mask)
{
    Register y = spread(0), wanted = of_256(mask);
    EACH(8) if (wanted.d[i] < 0) memcpy(y.d + i, (const char *)from + 4 * i, 4);
    return y.lower_256;
}

EMULATION void _mm256_maskstore_epi32(void *to, __m256i mask, __m256i a)
{
    Register x = of_256(a), wanted = of_256(mask);
    EACH(8) if (wanted.d[i] < 0) memcpy((char *)to + 4 * i, x.d + i, 4);
}

EMULATION __m256i _mm256_packus_epi32(__m256i a, __m256i b)
{
    Register from[2] = {of_256(a), of_256(b)}, y = from[0];
    EACH(16) {
        int32_t x = from[i % 8 / 4].d[i / 8 * 4 + i % 4];
        y.h[i] = x < 0 ? 0 : x > UINT16_MAX ? UINT16_MAX : x;
    }
    return y.lower_256;
}

EMULATION __m256i _mm256_packs_epi32(__m256i a, __m256i b) { return packed_to_words(of_256(a), of_256(b), 16).lower_256; }
EMULATION __m256i _mm256_packs_epi16(__m256i a, __m256i b) { return packed_to_bytes(of_256(a), of_256(b), 32).lower_256; }
EMULATION __m256i _mm256_madd_epi16(__m256i a, __m256i b) { return pairs_of_words(of_256(a), of_256(b), 8).lower_256; }

EMULATION __m256i _mm256_maddubs_epi16(__m256i a, __m256i b)
{
    return pairs_of_bytes(of_256(a), of_256(b), 16).lower_256;
}

EMULATION __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b)
{
    return four_products(of_256(sum), of_256(a), of_256(b), 8).lower_256;
}

EMULATION __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *from)
{
    Register y = spread(0);
    EACH(16) if (mask >> i & 1) memcpy(y.h + i, (const char *)from + 2 * i, 2);
    return y.lower_256;
}

EMULATION void _mm256_mask_storeu_epi16(void *to, __mmask16 mask, __m256i a)
{
    Register x = of_256(a);
    EACH(16) if (mask >> i & 1) memcpy((char *)to + 2 * i, x.h + i, 2);
}

/* -------------------------------------------------------------------------------------------------------- 512 bits */

EMULATION __m512i _mm512_loadu_si512(const void *from)
{
    __m512i x;
    memcpy(&x, from, sizeof x);
    return x;
}

EMULATION void _mm512_storeu_si512(void *to, __m512i x) { memcpy(to, &x, sizeof x); }
EMULATION __m256i _mm512_castsi512_si256(__m512i x) { return of_512(x).lower_256; }
EMULATION __m512i _mm512_set1_epi32(int32_t x) { return spread(x).all; }
EMULATION __m512i _mm512_set1_epi16(int16_t x) { return spread((uint16_t)x * 0x10001u).all; }
EMULATION __m512i _mm512_set1_epi8(int8_t x) { return spread((uint8_t)x * 0x1010101u).all; }
EMULATION __m512i _mm512_cvtepu16_epi32(__m256i a) { return extended(of_256(a), 16).all; }
EMULATION __m512i _mm512_cvtps_epi32(__m512 a) { return rounded(of_floats(a), 16).all; }
EMULATION __m512 _mm512_cvtepi32_ps(__m512i a) { return as_floats(of_512(a), 16).floats; }
EMULATION __m512i _mm512_max_epu32(__m512i a, __m512i b) { return larger_unsigned(of_512(a), of_512(b), 16).all; }
EMULATION __m512i _mm512_packs_epi32(__m512i a, __m512i b) { return packed_to_words(of_512(a), of_512(b), 32).all; }
EMULATION __m512i _mm512_packs_epi16(__m512i a, __m512i b) { return packed_to_bytes(of_512(a), of_512(b), 64).all; }
EMULATION __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return pairs_of_words(of_512(a), of_512(b), 16).all; }
EMULATION __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) { return pairs_of_bytes(of_512(a), of_512(b), 32).all; }
EMULATION __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) { return shuffled_bytes(of_512(a), of_512(b), 64).all; }
EMULATION __m512i _mm512_permutexvar_epi32(__m512i order, __m512i a) { return permuted(of_512(order), of_512(a), 16).all; }

EMULATION __m512 _mm512_set1_ps(float x)
{
    __m512 y;
    EACH(16) y[i] = x;
    return y;
}

EMULATION __m512i _mm512_set_epi32(int p, int o, int n, int m, int l, int k, int j, int i, int h, int g, int f, int e,
                                   int d, int c, int b, int a)
{
    return (__m512i)(int32_t __attribute__((vector_size(64)))){a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
}

/* As an array, the last number first. */
#define _mm512_set_epi16(...) set_from_last((const int16_t[32]){__VA_ARGS__})

PART __m512i set_from_last(const int16_t numbers[32])
{
    Register y;
    EACH(32) y.w[i] = numbers[31 - i];
    return y.all;
}

EMULATION __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c)
{
    return fused_lanes(of_floats(a), of_floats(b), of_floats(c), 16).floats;
}

EMULATION __m512 _mm512_max_ps(__m512 a, __m512 b) { return larger_lanes(of_floats(a), of_floats(b), 16).floats; }

/* The only rounding that the kernels ask for is downwards. */
EMULATION __m512i _mm512_cvt_roundps_epi32(__m512 a, int rounding)
{
    Register x = of_floats(a);
    EACH(16) x.d[i] = rounding == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC) ? whole_of(floorf(x.f[i])) : INT32_MIN;
    return x.all;
}

EMULATION __m512 _mm512_scalef_ps(__m512 a, __m512 power)
{
    EACH(16) a[i] = scaled(a[i], power[i]);
    return a;
}

/* The upper half is added to the lower one until one number is left, as gcc does. */
EMULATION float _mm512_reduce_add_ps(__m512 a)
{
    for (int half = 8; half; half /= 2)
        EACH(half) a[i] += a[i + half];
    return a[0];
}

EMULATION int32_t _mm512_reduce_add_epi32(__m512i a)
{
    Register x = of_512(a);
    for (int half = 8; half; half /= 2)
        EACH(half) x.u[i] += x.u[i + half];
    return x.d[0];
}

EMULATION float _mm512_reduce_max_ps(__m512 a)
{
    for (int half = 8; half; half /= 2)
        EACH(half) a[i] = maximum(a[i], a[i + half]);
    return a[0];
}

EMULATION uint32_t _mm512_reduce_max_epu32(__m512i a)
{
    Register x = of_512(a);
    EACH(16) x.u[0] = x.u[i] > x.u[0] ? x.u[i] : x.u[0];
    return x.u[0];
}

EMULATION __m512 _mm512_permute_ps(__m512 a, int order) { return permuted_within_four(of_floats(a), order, 16).floats; }

EMULATION __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order)
{
    Register from[2] = {of_512(a), of_512(b)}, y;
    EACH(4) y.parts[i] = from[i / 2].parts[order >> 2 * i & 3];
    return y.all;
}

EMULATION __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order)
{
    return (__m512)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, order);
}

EMULATION __m512i _mm512_broadcast_i32x4(__m128i a)
{
    Register y;
    EACH(4) y.parts[i] = a;
    return y.all;
}

EMULATION __m256i _mm512_extracti64x4_epi64(__m512i a, int upper)
{
    Register x = of_512(a), y = x;
    EACH(4) y.q[i] = x.q[4 * upper + i];
    return y.lower_256;
}

EMULATION __m256i _mm512_cvtepi32_epi16(__m512i a)
{
    Register x = of_512(a), y = x;
    EACH(16) y.h[i] = (uint16_t)x.u[i];
    return y.lower_256;
}

EMULATION __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a)
{
    Register at = of_512(order), x = of_512(a), y;
    EACH(32) y.h[i] = x.h[at.h[i] % 32];
    return y.all;
}

EMULATION __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int comparison)
{
    __mmask16 mask = 0;
    EACH(16) mask |= (__mmask16)((comparison == _CMP_GT_OQ && a[i] > b[i]) << i);
    return mask;
}

EMULATION __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b)
{
    Register x = of_512(a), y = of_512(b);
    __mmask16 mask = 0;
    EACH(16) mask |= (__mmask16)((x.u[i] >= y.u[i]) << i);
    return mask;
}

EMULATION __m512i _mm512_maskz_mov_epi32(__mmask16 mask, __m512i a)
{
    Register x = of_512(a);
    EACH(16) x.d[i] = mask >> i & 1 ? x.d[i] : 0;
    return x.all;
}

EMULATION __m512 _mm512_mask_mov_ps(__m512 other, __mmask16 mask, __m512 a)
{
    EACH(16) a[i] = mask >> i & 1 ? a[i] : other[i];
    return a;
}

EMULATION __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *from)
{
    Register y = spread(0);
    EACH(16) if (mask >> i & 1) memcpy(y.d + i, (const char *)from + 4 * i, 4);
    return y.all;
}

EMULATION void _mm512_mask_storeu_epi32(void *to, __mmask16 mask, __m512i a)
{
    Register x = of_512(a);
    EACH(16) if (mask >> i & 1) memcpy((char *)to + 4 * i, x.d + i, 4);
}

EMULATION __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b)
{
    return four_products(of_512(sum), of_512(a), of_512(b), 16).all;
}

/* ------------------------------------------------------------------------------------------------------------- bf16 */

EMULATION __m256bh _mm512_cvtneps_pbh(__m512 a)
{
    Register y;
    EACH(16) y.h[i] = to_half(a[i]);
    return y.lower_halves_of_floats;
}

/* Those of b come first. */
EMULATION __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b)
{
    Register y;
    EACH(16) {
        y.h[i] = to_half(b[i]);
        y.h[16 + i] = to_half(a[i]);
    }
    return y.halves_of_floats;
}

/* The upper numbers first; denormal numbers are zero. */
EMULATION __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b)
{
    EACH(16)
        for (int j = 1; j >= 0; j--) {
            float left = flushed(from_half(a[2 * i + j])), right = flushed(from_half(b[2 * i + j]));
            sum[i] = flushed(fmaf(left, right, flushed(sum[i])));
        }
    return sum;
}

#endif
