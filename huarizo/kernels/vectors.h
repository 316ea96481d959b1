/* Vectors of 32-bit numbers, alike on every instruction set, and elements that are bf16 or fp32.
 *
 * A `vec` has LANES fp32 numbers, an `ints` as many int32. C's operators work on both, lane by lane, and the header of
 * the instruction set (isa/) adds what they can't express:
 *
 *     set, set_int                 one number in all lanes
 *     fused                        a * b + c, rounded once
 *     larger, larger_bits          of two fp32 numbers, the second if either is a NaN; of two unsigned integers
 *     nearest, floor_of, float_of  fp32 to int32, to nearest with ties to even or downwards, and back
 *     times_power                  y * 2^whole, for a whole number of at least LEAST_POWER, which gives 0
 *     swap                         exchanges neighbours that are 1, 2, 4 or 8 lanes apart
 *     sum_of, sum_of_ints, largest_of, largest_bits_of    over the lanes
 *     mask, first, both, keep      some lanes; the first `count`; those in two masks; zeros in the other lanes
 *     above, at_least              compares fp32 numbers, and unsigned integers
 *     choose                       a in a mask's lanes, b in the others
 *     load_first, store_first      the first `count` 32-bit numbers; others are zero, and neither read nor written
 *     load_halves, store_halves    16-bit numbers, zero-extended to ints, and the lower halves of ints
 *     load_first_halves, store_first_halves               the first `count` of those
 *     store_pairs                  two vectors as bf16, interleaved (a0 b0 a1 b1 ...) and one after the other
 *     multiply_halves              sum + the dot product of two bf16 numbers in each lane; HALVES says whether that is
 *                                  one instruction
 *     round_halves                 fp32 as bf16 in the lower halves, rounded to nearest, ties to even
 *
 *     REGISTERS                    vectors that the CPU has room for
 *
 * and for int8 products (int8.c):
 *
 *     PAIRS, OFFSET                whether `dot` multiplies pairs of int16, and what is added to a byte of the right operand
 *     MATRICES                     whether it multiplies 2 by 8 and 8 by 2 bytes instead (DOT_OF_MATRICES as a macro):
 *                                  dot_matrices, lower_halves, upper_halves, store_interleaved
 *     dot                          sum += in each lane, four products of bytes (the right ones unsigned with an OFFSET),
 *                                  or two of int16
 *     dot_row                      `dot` with the columns of a tile, where it needs its own order (DOT_ROW as a macro)
 *     add_bytes                    adds 64 bytes to the lanes of a sum, in any order
 *     store_bytes                  4 * LANES int32 as bytes, saturated
 *     turn_block                   32 by 32 bytes from [8][32][4] to [8][32][4], the other dimension in words
 *     TILE_ROWS, TILE_VECTORS      a tile whose sums fit the registers
 *     TILE_UNIT, FINISHED_ROWS     rows of a tile at the end; rows whose sums are converted together
 *     DEPTH_BLOCK, TILES_TOGETHER  words of a tile's columns that stay in the closest cache, for this many tiles
 *
 * Sums over lanes are in an order of the instruction set's own. All else is exact or rounded once, so it is the same
 * everywhere, but for results of times_power below 2^-126. A `word` is 32 bits along a summed dimension: two neighbours in bf16, one number in fp32. So one code
 * serves both.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define UNROLLED _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#elif defined(__ARM_NEON)
#define LANES 4
#else
#error "no instruction set that the kernels know"
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

enum { LINE = 64 /* bytes of a cache line */, WORD = 4 };
enum { OK = 0, BAD_BOUNDARIES = 1, NO_MEMORY = 2 }; /* return values of a kernel */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
INLINE int64_t pair_of(int bf16) { return bf16 ? 2 : 1; } /* elements in a word */
INLINE int64_t size_of(int bf16) { return bf16 ? 2 : 4; }

INLINE ints shifted_right(ints x, const int by) { return (ints)((bits)x >> by); } /* zeros come in */
INLINE ints magnitude(vec x) { return (ints)x & 0x7FFFFFFF; }                     /* |x|, as bits */

INLINE vec load_vec(const void *from)
{
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE ints load_ints(const void *from)
{
    ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_vec(void *to, vec x) { memcpy(to, &x, sizeof x); }
INLINE void store_ints(void *to, ints x) { memcpy(to, &x, sizeof x); }

/* 0, 1, 2, ... */
INLINE ints lane_numbers(void)
{
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_ints(numbers);
}

/* fp32 as bf16 in the lower halves of the lanes, rounded to nearest, ties to even; a NaN stays one. */
INLINE ints rounded_in_software(vec x)
{
    bits number = (bits)x, odd = number >> 16 & 1;
    bits nan = (bits)(x != x) & 0x7FC00000; /* without it the sum could carry over the largest exponent */
    return (ints)(((number + odd + 0x7FFF) | nan) >> 16);
}

/* sum + the dot product of two bf16 numbers in each lane, as two fused multiply-adds. */
#define MULTIPLY_HALVES_IN_SOFTWARE(sum, left, right)                                                  \
    fused((vec)((left) & (int32_t)0xFFFF0000u), (vec)((right) & (int32_t)0xFFFF0000u),                   \
        fused((vec)((left) << 16), (vec)((right) << 16), sum))

#if LANES == 16
#include "isa/avx512.h"
#elif LANES == 8
#include "isa/avx2.h"
#else
#include "isa/neon.h"
#endif

#ifdef PARTS_OF_HALVES_IN_SOFTWARE
INLINE ints load_first_halves(const void *from, int64_t count)
{
    uint16_t halves[LANES] = {0};
    for (int64_t i = 0; i < count && i < LANES; i++)
        memcpy(halves + i, (const char *)from + 2 * i, 2);
    return load_halves(halves);
}

INLINE void store_first_halves(void *to, ints x, int64_t count)
{
    uint16_t halves[LANES];
    store_halves(halves, x);
    for (int64_t i = 0; i < count && i < LANES; i++)
        memcpy((char *)to + 2 * i, halves + i, 2);
}
#endif

#ifdef STORE_PAIRS_IN_SOFTWARE
INLINE void store_pairs(char *pairs, char *a_to, char *b_to, vec a, vec b)
{
    ints low = round_halves(a), high = round_halves(b);
    store_ints(pairs, low | high << 16);
    if (a_to) {
        store_halves(a_to, low);
        store_halves(b_to, high);
    }
}
#endif

/* Exchanges rows and columns of LANES by LANES words. */
INLINE void transpose(ints rows[LANES])
{
    UNROLLED for (int apart = 1; apart < LANES; apart *= 2) {
        mask upper = at_least(lane_numbers() & apart, set_int(1));
        UNROLLED for (int i = 0; i < LANES; i++)
            if (!(i & apart)) {
                vec low = (vec)rows[i], high = (vec)rows[i + apart];
                rows[i] = (ints)choose(upper, swap(high, apart), low);
                rows[i + apart] = (ints)choose(upper, high, swap(low, apart));
            }
    }
}

/* sum += left * right, word by word. */
INLINE vec multiply_add(const int bf16, vec sum, ints left, ints right)
{
    return bf16 ? multiply_halves(sum, left, right) : fused((vec)left, (vec)right, sum);
}

/* LANES elements as fp32. */
INLINE vec load(const int bf16, const char *from)
{
    return bf16 ? (vec)(load_halves(from) << 16) : load_vec(from);
}

/* The first `count` elements as fp32; the others are zero, and are not read. */
INLINE vec load_part(const int bf16, const char *from, int64_t count)
{
    if (count >= LANES)
        return load(bf16, from);
    return bf16 ? (vec)(load_first_halves(from, count) << 16) : (vec)load_first(from, count);
}

/* LANES numbers as elements. */
INLINE void store(const int bf16, char *to, vec x)
{
    if (bf16)
        store_halves(to, round_halves(x));
    else
        store_vec(to, x);
}

/* The first `count` numbers as elements. */
INLINE void store_part(const int bf16, char *to, vec x, int64_t count)
{
    if (count >= LANES)
        store(bf16, to, x);
    else if (bf16)
        store_first_halves(to, round_halves(x), count);
    else
        store_first(to, (ints)x, count);
}

#endif
