/* AVX512 with BW, DQ and VL; VNNI and BF16 where the tier has them. See vectors.h. */

#include <immintrin.h>

typedef __mmask16 mask;

enum { REGISTERS = 32, LEAST_POWER = -200 };

INLINE vec set(float x) { return (vec)_mm512_set1_ps(x); }
INLINE ints set_int(int32_t x) { return (ints)_mm512_set1_epi32(x); }
INLINE vec fused(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE ints larger_bits(ints a, ints b) { return (ints)_mm512_max_epu32((__m512i)a, (__m512i)b); }
INLINE ints nearest(vec x) { return (ints)_mm512_cvtps_epi32((__m512)x); }
INLINE vec float_of(ints x) { return (vec)_mm512_cvtepi32_ps((__m512i)x); }
INLINE vec times_power(vec y, vec whole) { return (vec)_mm512_scalef_ps((__m512)y, (__m512)whole); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE int32_t sum_of_ints(ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE float largest_of(vec x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE uint32_t largest_bits_of(ints x) { return _mm512_reduce_max_epu32((__m512i)x); }

INLINE ints floor_of(vec x)
{
    return (ints)_mm512_cvt_roundps_epi32((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

INLINE vec swap(vec x, const int apart)
{
    switch (apart) {
    case 1: return (vec)_mm512_permute_ps((__m512)x, 0xB1);
    case 2: return (vec)_mm512_permute_ps((__m512)x, 0x4E);
    case 4: return (vec)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xB1);
    default: return (vec)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4E);
    }
}

INLINE mask first(int64_t count) { return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (mask)((1u << count) - 1); }
INLINE mask both(mask a, mask b) { return a & b; }
INLINE mask above(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE mask at_least(ints a, ints b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
INLINE ints keep(mask m, ints x) { return (ints)_mm512_maskz_mov_epi32(m, (__m512i)x); }
INLINE vec choose(mask m, vec a, vec b) { return (vec)_mm512_mask_mov_ps((__m512)b, m, (__m512)a); }

INLINE ints load_first(const void *from, int64_t count) { return (ints)_mm512_maskz_loadu_epi32(first(count), from); }
INLINE void store_first(void *to, ints x, int64_t count) { _mm512_mask_storeu_epi32(to, first(count), (__m512i)x); }

INLINE ints load_halves(const void *from)
{
    return (ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

INLINE ints load_first_halves(const void *from, int64_t count)
{
    return (ints)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
}

INLINE void store_halves(void *to, ints x) { _mm256_storeu_si256(to, _mm512_cvtepi32_epi16((__m512i)x)); }

INLINE void store_first_halves(void *to, ints x, int64_t count)
{
    _mm256_mask_storeu_epi16(to, first(count), _mm512_cvtepi32_epi16((__m512i)x));
}

#ifdef __AVX512BF16__
enum { HALVES = 1 };

INLINE vec multiply_halves(vec sum, ints left, ints right)
{
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}

INLINE ints round_halves(vec x) { return (ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

INLINE void store_pairs(char *pairs, char *a_to, char *b_to, vec a, vec b)
{
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, both));
    if (a_to) {
        _mm256_storeu_si256((__m256i *)a_to, _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i *)b_to, _mm512_extracti64x4_epi64(both, 1));
    }
}
#else
enum { HALVES = 0 };

INLINE vec multiply_halves(vec sum, ints left, ints right) { return MULTIPLY_HALVES_IN_SOFTWARE(sum, left, right); }
INLINE ints round_halves(vec x) { return rounded_in_software(x); }
#define STORE_PAIRS_IN_SOFTWARE
#endif

/* int8: see int8.c. Inline assembly, because with the intrinsic gcc 12 moves and spills the sums of a tile. */
enum { TILE_ROWS = 12, TILE_VECTORS = 2, TILE_UNIT = 4, FINISHED_ROWS = 6 };

#ifdef __AVX512VNNI__
enum { MATRICES = 0, PAIRS = 0, OFFSET = 128, DEPTH_BLOCK = 1 << 30, TILES_TOGETHER = 1 };

INLINE void dot(ints *sum, ints left, ints right)
{
#ifdef EMULATED
    *sum = (ints)_mm512_dpbusd_epi32((__m512i)*sum, (__m512i)right, (__m512i)left);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(right), "v"(left));
#endif
}

INLINE ints add_bytes(ints sum, const int8_t *from)
{
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi8(1), _mm512_loadu_si512(from));
}
#else
enum { MATRICES = 0, PAIRS = 1, OFFSET = 0, DEPTH_BLOCK = 128, TILES_TOGETHER = 8 };

INLINE void dot(ints *sum, ints left, ints right)
{
#ifdef EMULATED
    *sum = *sum + (ints)_mm512_madd_epi16((__m512i)left, (__m512i)right);
#else
    ints product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(*sum), "=&v"(product) : "v"(left), "v"(right));
#endif
}

INLINE ints add_bytes(ints sum, const int8_t *from)
{
    __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), _mm512_loadu_si512(from));
    return sum + (ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#endif

INLINE void store_bytes(int8_t *to, const ints y[4])
{
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i low = _mm512_packs_epi32((__m512i)y[0], (__m512i)y[1]);
    __m512i high = _mm512_packs_epi32((__m512i)y[2], (__m512i)y[3]);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}

/* Blocks of 4 by 4 bytes are transposed within their 128 bits, then moved to their words. */
INLINE void turn_block(char *to, const char *from)
{
    const __m512i turn = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) { /* 16 outputs, 16 inputs */
        int inputs = part % 2, outputs = part / 2;
        __m512i a[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            a[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + (inputs * 4 + i) * 2 * LINE + outputs * LINE), turn);
        __m512i low = _mm512_shuffle_i32x4(a[0], a[1], 0x44), high = _mm512_shuffle_i32x4(a[0], a[1], 0xEE);
        __m512i low_2 = _mm512_shuffle_i32x4(a[2], a[3], 0x44), high_2 = _mm512_shuffle_i32x4(a[2], a[3], 0xEE);
        char *at = to + outputs * 4 * 2 * LINE + inputs * LINE;
        _mm512_storeu_si512(at, _mm512_shuffle_i32x4(low, low_2, 0x88));
        _mm512_storeu_si512(at + 2 * LINE, _mm512_shuffle_i32x4(low, low_2, 0xDD));
        _mm512_storeu_si512(at + 4 * LINE, _mm512_shuffle_i32x4(high, high_2, 0x88));
        _mm512_storeu_si512(at + 6 * LINE, _mm512_shuffle_i32x4(high, high_2, 0xDD));
    }
}
