/* Shared by the kernels: vectors of 16 fp32 lanes, and elements that are bf16 or fp32.
 *
 * A `word` is 32 bits along a summed dimension: two neighbours in bf16, one number in fp32. So one code serves both.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, LINE = 64 /* bytes of a cache line */, WORD = 4, ALL = 0xFFFF /* lanes, as a mask */ };
enum { OK = 0, BAD_BOUNDARIES = 1, NO_MEMORY = 2 }; /* return values of a kernel */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
INLINE int64_t pair_of(int bf16) { return bf16 ? 2 : 1; } /* elements in a word */
INLINE int64_t size_of(int bf16) { return bf16 ? 2 : 4; }

/* The first `count` lanes; none for a negative count. */
INLINE __mmask16 first(int64_t count)
{
    return count >= LANES ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* sum += left * right, word by word. */
INLINE __m512 multiply_add(const int bf16, __m512 sum, __m512i left, __m512i right)
{
    if (!bf16)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
#else
    __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                           _mm512_castsi512_ps(_mm512_and_si512(right, upper)), sum);
#endif
}

/* Loads 16 elements as fp32; masked-out ones are zero and not read. */
INLINE __m512 load(const int bf16, __mmask16 mask, const char *from)
{
    int all = __builtin_constant_p(mask) && mask == ALL;
    if (!bf16)
        return all ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
    __m256i elements = all ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(mask, from);
    __m512i halves = _mm512_cvtepu16_epi32(elements);
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

/* 16 numbers as bf16 in the lower halves of the lanes, rounded to nearest, ties to even. */
INLINE __m512i halves_of(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}

/* Stores 16 numbers as elements, those in the mask. */
INLINE void store(const int bf16, __mmask16 mask, char *to, __m512 x)
{
    int all = __builtin_constant_p(mask) && mask == ALL;
    if (!bf16) {
        if (all)
            _mm512_storeu_ps(to, x);
        else
            _mm512_mask_storeu_ps(to, mask, x);
        return;
    }
#ifdef __AVX512BF16__
    __m256i elements = (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m256i elements = _mm512_cvtepi32_epi16(halves_of(x));
#endif
    if (all)
        _mm256_storeu_si256((__m256i *)to, elements);
    else
        _mm256_mask_storeu_epi16(to, mask, elements);
}

#endif
