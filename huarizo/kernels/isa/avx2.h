/* AVX2 with FMA. See vectors.h. */

#include <immintrin.h>
#include <math.h>

typedef ints mask; /* all bits of a lane, or none */

enum { REGISTERS = 16, LEAST_POWER = -127, HALVES = 0 };

INLINE vec set(float x) { return (vec)_mm256_set1_ps(x); }
INLINE ints set_int(int32_t x) { return (ints)_mm256_set1_epi32(x); }
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE ints larger_bits(ints a, ints b) { return (ints)_mm256_max_epu32((__m256i)a, (__m256i)b); }
INLINE ints nearest(vec x) { return (ints)_mm256_cvtps_epi32((__m256)x); }
INLINE ints floor_of(vec x) { return (ints)_mm256_cvtps_epi32(_mm256_floor_ps((__m256)x)); }
INLINE vec float_of(ints x) { return (vec)_mm256_cvtepi32_ps((__m256i)x); }

INLINE vec times_power(vec y, vec whole) { return y * (vec)((nearest(whole) + 127) << 23); }

INLINE vec swap(vec x, const int apart)
{
    switch (apart) {
    case 1: return (vec)_mm256_permute_ps((__m256)x, 0xB1);
    case 2: return (vec)_mm256_permute_ps((__m256)x, 0x4E);
    default: return (vec)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
    }
}

INLINE float sum_of(vec x)
{
    x = x + swap(x, 4);
    x = x + swap(x, 2);
    return x[0] + x[1];
}

INLINE int32_t sum_of_ints(ints x)
{
    bits sum = (bits)x + (bits)swap((vec)x, 4);
    sum = sum + (bits)swap((vec)sum, 2);
    return (int32_t)(sum[0] + sum[1]);
}

INLINE float largest_of(vec x)
{
    x = larger(x, swap(x, 4));
    x = larger(x, swap(x, 2));
    return larger(x, swap(x, 1))[0];
}

INLINE uint32_t largest_bits_of(ints x)
{
    x = larger_bits(x, (ints)swap((vec)x, 4));
    x = larger_bits(x, (ints)swap((vec)x, 2));
    return (uint32_t)larger_bits(x, (ints)swap((vec)x, 1))[0];
}

INLINE mask first(int64_t count) { return set_int((int32_t)(count < LANES ? count : LANES)) > lane_numbers(); }
INLINE mask both(mask a, mask b) { return a & b; }
INLINE mask above(vec a, vec b) { return a > b; }
INLINE mask at_least(ints a, ints b) { return larger_bits(a, b) == a; }
INLINE ints keep(mask m, ints x) { return m & x; }
INLINE vec choose(mask m, vec a, vec b) { return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m); }

INLINE ints load_first(const void *from, int64_t count)
{
    return (ints)_mm256_maskload_epi32(from, (__m256i)first(count));
}

INLINE void store_first(void *to, ints x, int64_t count)
{
    _mm256_maskstore_epi32(to, (__m256i)first(count), (__m256i)x);
}

INLINE ints load_halves(const void *from) { return (ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(from)); }

INLINE void store_halves(void *to, ints x)
{
    __m256i halves = _mm256_packus_epi32(_mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256());
    _mm_storeu_si128(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xD8)));
}

#define PARTS_OF_HALVES_IN_SOFTWARE

INLINE vec multiply_halves(vec sum, ints left, ints right) { return MULTIPLY_HALVES_IN_SOFTWARE(sum, left, right); }
INLINE ints round_halves(vec x) { return rounded_in_software(x); }
#define STORE_PAIRS_IN_SOFTWARE

/* int8: see int8.c. */
enum { TILE_ROWS = 6, TILE_VECTORS = 2, TILE_UNIT = 2, FINISHED_ROWS = 3, DEPTH_BLOCK = 384, TILES_TOGETHER = 16 };

#ifdef __AVXVNNI__
enum { MATRICES = 0, PAIRS = 0, OFFSET = 128 };

INLINE void dot(ints *sum, ints left, ints right)
{
    *sum = (ints)_mm256_dpbusd_avx_epi32((__m256i)*sum, (__m256i)right, (__m256i)left);
}
#else
enum { MATRICES = 0, PAIRS = 1, OFFSET = 0 };

INLINE void dot(ints *sum, ints left, ints right)
{
    *sum = *sum + (ints)_mm256_madd_epi16((__m256i)left, (__m256i)right);
}

#ifndef EMULATED
#define DOT_ROW
/* Inline assembly, because gcc 12 reorders the sums of a tile, and spills them. In this order, and with `left` as the
 * place of the second product, a tile fits the 16 registers. */
INLINE void dot_row(ints sum[TILE_VECTORS], ints left, const ints columns[TILE_VECTORS])
{
    ints product;
    __asm__("vpmaddwd %4, %1, %0\n\tvpmaddwd %5, %1, %1\n\tvpaddd %0, %2, %2\n\tvpaddd %1, %3, %3"
            : "=&v"(product), "+v"(left), "+v"(sum[0]), "+v"(sum[1])
            : "v"(columns[0]), "v"(columns[1]));
}
#endif
#endif

INLINE ints add_bytes(ints sum, const int8_t *from)
{
    for (int i = 0; i < 2; i++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)from + i);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        sum = sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
}

INLINE void store_bytes(int8_t *to, const ints y[4])
{
    __m256i low = _mm256_packs_epi32((__m256i)y[0], (__m256i)y[1]);
    __m256i high = _mm256_packs_epi32((__m256i)y[2], (__m256i)y[3]);
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

INLINE void turn_block(char *to, const char *from)
{
    const __m128i turn = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int outputs = 0; outputs < 8; outputs++)
#pragma GCC unroll 8
        for (int inputs = 0; inputs < 8; inputs++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(from + inputs * 128 + outputs * 16));
            _mm_storeu_si128((__m128i *)(to + outputs * 128 + inputs * 16), _mm_shuffle_epi8(bytes, turn));
        }
}
