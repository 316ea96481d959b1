/* The products of a frozen int8 linear layer and the operations around them, for CPUs with AVX512-VNNI.
 *
 *     quantise  q = round(z / s) with z = rotate(x * factor) and s = max|z| / 127 of a row
 *     forward   y = rotate((q W') * s * scale) + x_F F' + bias
 *     backward  g_x = rotate((q W) * s) * factor, with q and s of z = rotate(g) * scale, rounded stochastically
 *
 * W is int8 [N, K], one copy for both directions; F, the float weight, is [N, k]; rotate multiplies each block of
 * BLOCK neighbours in a row by the Hadamard matrix, computed as sums and differences of pairs. The reference in plain
 * torch is huarizo/model/frozen/int8.py.
 *
 * vpdpbusd adds to each of 16 int32 the dot product of four unsigned and four signed bytes. The weight is therefore
 * stored as unsigned bytes, with 128 added, and every sum starts from -128 times the sum of the quantised row.
 *
 * A tile is ROWS rows times COLUMNS columns over the whole depth, with the sums in registers. 32 bits of the left
 * operand, a `word`, are broadcast to a vector; the right operand is a panel [depth in words][COLUMNS]. A word is four
 * neighbours along the depth in int8, two in bf16 (vdpbf16ps) and one in fp32 (fma). The weight is stored as the panels
 * of the forward product, [panel][word][COLUMNS]. The panels of the backward product are made from it, in groups that
 * fit a core's own cache. Complete int8 sums are converted to fp32, scaled and rotated; the float channels and the bias
 * are added; and the result is rounded once, when it is stored.
 *
 * The tiles of a call are numbered panel by panel, and every thread takes an equal share of consecutive ones. Integer
 * sums are exact, and every number of the result is computed in the same order on any thread, so results are
 * bit-identical for any number of threads. A row with a NaN or an infinity gets the scale NaN and a result of NaNs.
 */

#include "vectors.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    ROWS = 12,                  /* 12 x 2 vectors of sums, 2 of the right operand and 1 of the left */
    VECTORS = 2,
    COLUMNS = VECTORS * LANES,
    BLOCK = COLUMNS,            /* channels that are rotated together */
    UNIT = 4,                   /* threads share rows in units; rows that don't fill ROWS are tiles of one unit */
    UNROLL = 4,                 /* in words; every depth is a multiple of it */
    GROUP_BYTES = 256 << 10,    /* of a group of panels, which all rows are multiplied by before the next group */
    GROUP_PANELS = 8,
};
_Static_assert(ROWS % UNIT == 0, "tiles are whole units");

enum { ONE = 0x3F800000, MINUS = (int)0xBF800000u }; /* the bits of 1 and of -1 */

/* The arguments of a call. `x` is [T, K] in forward and quantise, and the gradient [T, N] in backward; `out` is the
 * result of forward or backward, contiguous. Strides are in bytes. N and K of the weight are padded to multiples of
 * COLUMNS. */
typedef struct {
    int64_t rows, inputs, outputs, floats; /* T, K, N, k */
    int64_t x_stride, quantised_stride;
    const char *x;
    int8_t *quantised; /* [T, quantised_stride] */
    float *row_scale;
    int32_t *row_start;
    const char *weight; /* [N / COLUMNS][K / WORD][COLUMNS][WORD] */
    const float *scale, *factor; /* [N padded]; [K], of quantise or backward */
    const int64_t *float_channels;
    const char *float_weight, *bias; /* [N / COLUMNS][k in words][COLUMNS][WORD]; [N] */
    char *out;
    int32_t bf16, threads;
} Call;

int64_t huarizo_call_size(void) { return sizeof(Call); }

/* The first `count` of 32 elements; none for a negative count. */
INLINE __mmask32 first32(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

/* ------------------------------------------------------------------------------------------------------- workspace */

typedef struct { char *data; int64_t size; } Space;

/* Kept between calls by the calling thread: page faults on new memory cost more than writing to it. */
static _Thread_local Space kept;

static char *workspace(int64_t size)
{
    if (kept.size < size) {
        free(kept.data);
        kept.size = padded(size, 2 << 20);
        kept.data = aligned_alloc(2 << 20, kept.size);
        if (kept.data)
            madvise(kept.data, kept.size, MADV_HUGEPAGE);
        else
            kept.size = 0;
    }
    return kept.data;
}

/* Takes `size` bytes from the front of the rest of a workspace. */
INLINE void *take(char **space, int64_t size)
{
    char *taken = *space;
    *space += padded(size, LINE);
    return taken;
}

/* ---------------------------------------------------------------------------------------------------- quantisation */

/* 64 int32 as bytes, in order, saturated. */
INLINE __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i low = _mm512_packs_epi32(a, b), high = _mm512_packs_epi32(c, d);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

/* Fractions in [0, 1) of start + place / golden ratio, in units of 2^-32, for places `at` to `at` + 15. */
INLINE __m512 noise(int64_t at, uint32_t start)
{
    const uint32_t golden = 0x9E3779B9u;
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32((int)golden),
                                             _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __m512i x = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(start + (uint32_t)at * golden)));
    x = _mm512_or_si512(_mm512_srli_epi32(x, 9), _mm512_set1_epi32(ONE));
    return _mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(1));
}

/* sum + place^4 in the lanes where y is above zero; the lanes are places `at` to `at` + 15. */
INLINE __m512i add_above_zero(__m512i sum, __m512 y, int64_t at)
{
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32((int)at),
                                     _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __mmask16 above = _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GT_OQ);
    place = _mm512_mullo_epi32(place, place);
    return _mm512_mask_add_epi32(sum, above, sum, _mm512_mullo_epi32(place, place));
}

/* x times the Hadamard matrix of order 16, as sums and differences of lanes 1, 2, 4 and 8 apart. */
INLINE __m512 rotate_lanes(__m512 x)
{
    x = _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_set4_epi32(MINUS, ONE, MINUS, ONE)), _mm512_permute_ps(x, 0xB1));
    x = _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_set4_epi32(MINUS, MINUS, ONE, ONE)), _mm512_permute_ps(x, 0x4E));
    x = _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_set_epi32(MINUS, MINUS, MINUS, MINUS, ONE, ONE, ONE, ONE,
                                                                MINUS, MINUS, MINUS, MINUS, ONE, ONE, ONE, ONE)),
                        _mm512_shuffle_f32x4(x, x, 0xB1));
    return _mm512_fmadd_ps(x, _mm512_castsi512_ps(_mm512_set_epi32(MINUS, MINUS, MINUS, MINUS, MINUS, MINUS, MINUS, MINUS,
                                                                   ONE, ONE, ONE, ONE, ONE, ONE, ONE, ONE)),
                           _mm512_shuffle_f32x4(x, x, 0x4E));
}

/* Rotates one block. */
INLINE void rotate(__m512 *a, __m512 *b)
{
    __m512 low = rotate_lanes(*a), high = rotate_lanes(*b);
    *a = _mm512_add_ps(low, high);
    *b = _mm512_sub_ps(low, high);
}

/* Quantises one row of `count` elements, padded with zeros to `stride` bytes, a multiple of 64, and writes its scale
 * and the initial value of its sums. An input is multiplied by `factor` [count], rotated, and rounded to nearest, ties
 * to even. A gradient is rotated, multiplied by `factor` [count padded], and rounded stochastically, with noise that
 * starts from a hash of the scale and the signs. scratch: [stride]. */
INLINE void quantise_row(const int bf16, const int gradient, const char *x, const float *factor,
                         int64_t count, float *scratch, int8_t *to, int64_t stride, float *scale_to, int32_t *start_to)
{
    /* Magnitudes compare as their bits do as integers, and a NaN is the largest. */
    __m512i top[VECTORS] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512i signs = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded(count, LINE); i += BLOCK) {
        __m512 y[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) {
            int64_t at = i + j * LANES;
            __mmask16 mask = first(count - at);
            y[j] = load(bf16, mask, x + at * size_of(bf16));
            if (!gradient)
                y[j] = _mm512_mul_ps(y[j], _mm512_maskz_loadu_ps(mask, factor + at));
        }
        rotate(&y[0], &y[1]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) {
            if (gradient && i < count)
                y[j] = _mm512_mul_ps(y[j], _mm512_loadu_ps(factor + i + j * LANES));
            top[j] = _mm512_max_epu32(top[j], _mm512_castps_si512(_mm512_abs_ps(y[j])));
            if (gradient)
                signs = add_above_zero(signs, y[j], i + j * LANES);
            _mm512_storeu_ps(scratch + i + j * LANES, y[j]);
        }
    }
    uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(top[0], top[1]));
    float most, scale;
    memcpy(&most, &bits, sizeof most);
    scale = bits >= 0x7F800000u ? NAN : (most < 1e-12f ? 1e-12f : most) * (float)(1.0 / 127);
    memcpy(&bits, &scale, sizeof bits);
    __m512 inverse = _mm512_set1_ps(1.0f / scale);
    __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    uint32_t start = (bits >> 8) * 0x85EBCA6Bu + (uint32_t)_mm512_reduce_add_epi32(signs) * 0x27D4EB2Fu;
    for (int64_t i = 0; i < stride; i += LINE) {
        __m512i bytes = _mm512_setzero_si512();
        if (i < count) {
            __m512i y[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512 step = _mm512_mul_ps(_mm512_loadu_ps(scratch + i + j * LANES), inverse);
                if (gradient)
                    y[j] = _mm512_cvt_roundps_epi32(_mm512_add_ps(step, noise(i + j * LANES, start)),
                                                    _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
                else
                    y[j] = _mm512_cvtps_epi32(step);
            }
            bytes = bytes_of(y[0], y[1], y[2], y[3]);
        }
        sum = _mm512_dpbusd_epi32(sum, ones, bytes);
        _mm512_storeu_si512(to + i, bytes);
    }
    *scale_to = scale;
    *start_to = -128 * _mm512_reduce_add_epi32(sum);
}

/* The arguments of quantising the rows of a call's x. */
typedef struct {
    int gradient;
    const float *factor;
    int64_t count, stride;
    int8_t *to;
    float *scale, *scratch; /* [stride] for each thread */
    int32_t *start;
} Quantisation;

/* Quantises the share of `thread`. */
static void quantise_rows(const Call *call, const Quantisation *q, int64_t thread, int64_t threads)
{
    float *scratch = q->scratch + thread * q->stride;
    for (int64_t row = call->rows * thread / threads; row < call->rows * (thread + 1) / threads; row++) {
        const char *x = call->x + row * call->x_stride;
        int8_t *to = q->to + row * q->stride;
        if (q->gradient && call->bf16)
            quantise_row(1, 1, x, q->factor, q->count, scratch, to, q->stride, q->scale + row, q->start + row);
        else if (q->gradient)
            quantise_row(0, 1, x, q->factor, q->count, scratch, to, q->stride, q->scale + row, q->start + row);
        else if (call->bf16)
            quantise_row(1, 0, x, q->factor, q->count, scratch, to, q->stride, q->scale + row, q->start + row);
        else
            quantise_row(0, 0, x, q->factor, q->count, scratch, to, q->stride, q->scale + row, q->start + row);
    }
}

/* ---------------------------------------------------------------------------------------------------------- panels */

INLINE int64_t panel_bytes(int64_t words) { return words * COLUMNS * WORD; }

/* Result i has the i-th 128 bits of each of a, b, c, d. */
INLINE void transpose_lanes(__m512i *a, __m512i *b, __m512i *c, __m512i *d)
{
    __m512i low = _mm512_shuffle_i32x4(*a, *b, 0x44), high = _mm512_shuffle_i32x4(*a, *b, 0xEE);
    __m512i low_2 = _mm512_shuffle_i32x4(*c, *d, 0x44), high_2 = _mm512_shuffle_i32x4(*c, *d, 0xEE);
    *a = _mm512_shuffle_i32x4(low, low_2, 0x88);
    *b = _mm512_shuffle_i32x4(low, low_2, 0xDD);
    *c = _mm512_shuffle_i32x4(high, high_2, 0x88);
    *d = _mm512_shuffle_i32x4(high, high_2, 0xDD);
}

/* The backward product's panel that starts at column `at`. Its depth is `panels` forward panels of `words` words each.
 *
 * Blocks of 4 by 4 bytes, outputs by inputs, are transposed within their 128 bits, then moved to their words. */
static void pack_columns(char *to, const char *weight, int64_t at, int64_t panels, int64_t words)
{
    const __m512i turn = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    for (int64_t panel = 0; panel < panels; panel++, to += panel_bytes(COLUMNS / WORD)) {
        const char *from = weight + panel * panel_bytes(words) + at / WORD * COLUMNS * WORD;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            _mm_prefetch(from + 2 * panel_bytes(words) + i * LINE, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) { /* 16 outputs, 16 inputs */
            int inputs = part % 2, outputs = part / 2;
            __m512i lines[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                lines[i] = _mm512_shuffle_epi8(
                    _mm512_loadu_si512(from + (inputs * 4 + i) * COLUMNS * WORD + outputs * LINE), turn);
            transpose_lanes(&lines[0], &lines[1], &lines[2], &lines[3]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                _mm512_store_si512(to + (outputs * 4 + i) * COLUMNS * WORD + inputs * LINE, lines[i]);
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------- tiles */

INLINE int word_at(const char *from)
{
    int word;
    memcpy(&word, from, sizeof word);
    return word;
}

INLINE void multiply_floats(const int bf16, const int rows, int64_t words, const char *left, int64_t stride,
                            const char *right, __m512 sum[ROWS][VECTORS])
{
    for (int64_t k = 0; k < words; k++, right += COLUMNS * WORD) {
        __m512i a = _mm512_loadu_si512(right), b = _mm512_loadu_si512(right + LINE);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            __m512i spread = _mm512_set1_epi32(word_at(left + i * stride + k * WORD));
            sum[i][0] = multiply_add(bf16, sum[i][0], spread, a);
            sum[i][1] = multiply_add(bf16, sum[i][1], spread, b);
        }
    }
}

/* sum += left * right. Inline assembly, because with the intrinsic gcc 12 moves and spills the sums of a tile. */
INLINE void add_products(__m512i *sum, __m512i left, __m512i right)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(right), "v"(left));
}

INLINE void multiply_bytes(const int rows, int64_t words, const char *left, int64_t stride, const char *right,
                           __m512i sum[ROWS][VECTORS])
{
    const char *at[ROWS / 3];
#pragma GCC unroll 4
    for (int i = 0; i < (rows + 2) / 3; i++)
        at[i] = left + 3 * i * stride;
    for (int64_t k = 0; k < words; k += UNROLL) {
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; u++) {
            __m512i a = _mm512_loadu_si512(right), b = _mm512_loadu_si512(right + LINE);
            right += COLUMNS * WORD;
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++) {
                __m512i spread = _mm512_set1_epi32(word_at(at[i / 3] + i % 3 * stride + u * WORD));
                add_products(&sum[i][0], spread, a);
                add_products(&sum[i][1], spread, b);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++)
            at[i] += UNROLL * WORD;
    }
}

/* Stores the first `count` of 32 numbers as elements. */
INLINE void store_columns(const int bf16, char *to, int64_t count, __m512 a, __m512 b)
{
#ifdef __AVX512BF16__
    if (bf16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
        if (count >= COLUMNS)
            _mm512_storeu_si512(to, both);
        else
            _mm512_mask_storeu_epi16(to, first32(count), both);
        return;
    }
#endif
    if (count >= COLUMNS) {
        store(bf16, ALL, to, a);
        store(bf16, ALL, to + LANES * size_of(bf16), b);
    } else {
        store(bf16, first(count), to, a);
        store(bf16, first(count - LANES), to + LANES * size_of(bf16), b);
    }
}

/* A product, left [T, words] times panels, and the operations on its result. */
typedef struct {
    const Call *call;
    int64_t rows, columns, words, float_words; /* of the result; of the two depths; float_words is 0 in backward */
    const char *left, *left_end;               /* quantised rows; their last unit, padded */
    int64_t left_stride;
    const float *row_scale;
    const float *before, *after; /* factors per column: before the rotation in forward, after it in backward; else NULL */
    const int32_t *row_start;
    const char *floats; /* the float channels, [T in units, float_words] */
    const char *bias;   /* NULL in backward and without a bias */
    char *packed;       /* in backward: space for a group of panels per thread */
} Product;

/* The tile that starts at row `row` and column `at`. */
INLINE void tile(const int bf16, const int rows, const Product *p, const char *panel, int64_t row, int64_t at)
{
    __m512i sum[ROWS][VECTORS];
    __m512 y[ROWS][VECTORS];
    int64_t count = rows == UNIT ? least(UNIT, p->rows - row) : rows;
    const char *left = count < rows ? p->left_end : p->left + row * p->left_stride;
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        sum[i][0] = sum[i][1] = _mm512_set1_epi32(p->row_start[row + (i < count ? i : 0)]);
    multiply_bytes(rows, p->words, left, p->left_stride, panel, sum);
    __m512 before[VECTORS], after[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) {
        int64_t column = at + j * LANES;
        before[j] = p->before ? _mm512_loadu_ps(p->before + column) : _mm512_set1_ps(1);
        after[j] = p->after ? _mm512_maskz_loadu_ps(first(p->columns - column), p->after + column) : _mm512_set1_ps(1);
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        __m512 row_scale = _mm512_set1_ps(p->row_scale[row + (i < count ? i : 0)]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++)
            y[i][j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), row_scale), before[j]);
        rotate(&y[i][0], &y[i][1]);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++)
            y[i][j] = _mm512_mul_ps(y[i][j], after[j]);
    }
    if (p->float_words) {
        int64_t stride = p->float_words * WORD;
        multiply_floats(bf16, rows, p->float_words, p->floats + row * stride, stride,
                        p->call->float_weight + at / COLUMNS * panel_bytes(p->float_words), y);
    }
    if (p->bias)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) {
            int64_t column = at + j * LANES;
            __m512 bias = load(bf16, first(p->columns - column), p->bias + column * size_of(bf16));
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++)
                y[i][j] = _mm512_add_ps(y[i][j], bias);
        }
    char *to = p->call->out + (row * p->columns + at) * size_of(bf16);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        if (i < count)
            store_columns(bf16, to + i * p->columns * size_of(bf16), p->columns - at, y[i][0], y[i][1]);
}

/* All tiles of rows `from` to `to`, in units, and `count` panels, the first of which starts at column `at`. */
static __attribute__((noinline)) void tiles(const Product *p, const char *panels, int64_t count, int64_t at,
                                            int64_t from, int64_t to)
{
    int64_t step = 0;
    for (int64_t unit = from; unit < to; unit += step) {
        step = to - unit >= ROWS / UNIT && (unit + ROWS / UNIT) * UNIT <= p->rows ? ROWS / UNIT : 1;
        for (int64_t i = 0; i < count; i++) {
            const char *panel = panels + i * panel_bytes(p->words);
            int64_t column = at + i * COLUMNS;
            if (p->call->bf16) {
                if (step > 1)
                    tile(1, ROWS, p, panel, unit * UNIT, column);
                else
                    tile(1, UNIT, p, panel, unit * UNIT, column);
            } else if (step > 1)
                tile(0, ROWS, p, panel, unit * UNIT, column);
            else
                tile(0, UNIT, p, panel, unit * UNIT, column);
        }
    }
}

/* --------------------------------------------------------------------------------------------------------- threads */

INLINE int64_t group_panels(const Product *p)
{
    int64_t fit = GROUP_BYTES / panel_bytes(p->words);
    return fit < 1 ? 1 : least(fit, GROUP_PANELS);
}

/* The share of `thread`: units `at` to `to` of all tiles, numbered panel by panel. */
static void run_thread(const Product *p, int64_t thread, int64_t threads)
{
    int64_t units = padded(p->rows, UNIT) / UNIT, all = padded(p->columns, COLUMNS) / COLUMNS * units;
    int64_t at = all * thread / threads, to = all * (thread + 1) / threads, most = group_panels(p);
    char *packed = p->packed ? p->packed + thread * most * panel_bytes(p->words) : NULL;
    while (at < to) {
        int64_t panel = at / units, row = at % units, count = 1, end = least(units, row + to - at);
        if (row == 0 && end == units)
            count = least(most, (to - at) / units);
        if (packed)
            for (int64_t i = 0; i < count; i++)
                pack_columns(packed + i * panel_bytes(p->words), p->call->weight, (panel + i) * COLUMNS,
                             p->words / (COLUMNS / WORD), padded(p->columns, COLUMNS) / WORD);
        tiles(p, packed ? packed : p->call->weight + panel * panel_bytes(p->words), count, panel * COLUMNS, row, end);
        at += (count - 1) * units + end - row;
    }
}

/* ------------------------------------------------------------------------------------------------------- the calls */

/* Writes quantised, row_scale and row_start from x and factor. quantised_stride: a multiple of 64. */
int huarizo_int8_quantise(const Call *call)
{
    Quantisation q = {
        .factor = call->factor, .count = call->inputs, .to = call->quantised, .stride = call->quantised_stride,
        .scale = call->row_scale, .start = call->row_start,
    };
    q.scratch = (float *)workspace(q.stride * call->threads * (int64_t)sizeof(float));
    if (!q.scratch)
        return NO_MEMORY;
#pragma omp parallel num_threads(call->threads)
    quantise_rows(call, &q, omp_get_thread_num(), omp_get_num_threads());
    return OK;
}

/* Gathers the float channels of rows `from` to `to`, padded with zeros to `bytes` per row. */
static void gather(const Call *call, char *into, int64_t bytes, int64_t from, int64_t to)
{
    for (int64_t row = from; row < to; row++) {
        const char *x = call->x + row * call->x_stride;
        char *at = into + row * bytes;
        memset(at + call->floats * size_of(call->bf16), 0, bytes - call->floats * size_of(call->bf16));
        for (int64_t f = 0; f < call->floats; f++)
            if (call->bf16)
                memcpy(at + f * 2, x + call->float_channels[f] * 2, 2);
            else
                memcpy(at + f * 4, x + call->float_channels[f] * 4, 4);
    }
}

/* Writes out [T, N] from x, quantised, row_scale and row_start. */
int huarizo_int8_forward(const Call *call)
{
    Product p = {
        .call = call, .rows = call->rows, .columns = call->outputs, .words = padded(call->inputs, COLUMNS) / WORD,
        .float_words = padded(call->floats * size_of(call->bf16), WORD) / WORD,
        .left = (const char *)call->quantised, .left_stride = call->quantised_stride,
        .row_scale = call->row_scale, .row_start = call->row_start, .before = call->scale, .bias = call->bias,
    };
    int64_t rest = call->rows % UNIT, float_bytes = p.float_words * WORD;
    char *space = workspace(padded(call->rows, UNIT) * float_bytes + UNIT * p.left_stride + 2 * LINE);
    if (!space)
        return NO_MEMORY;
    char *floats = take(&space, padded(call->rows, UNIT) * float_bytes), *end = take(&space, UNIT * p.left_stride);
    memcpy(end, p.left + (call->rows - rest) * p.left_stride, rest * p.left_stride);
    p.floats = floats;
    p.left_end = end;
#pragma omp parallel num_threads(call->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        gather(call, floats, float_bytes, call->rows * thread / threads, call->rows * (thread + 1) / threads);
#pragma omp barrier
        run_thread(&p, thread, threads);
    }
    return OK;
}

/* Writes out [T, K] from x, the gradient [T, N]. */
int huarizo_int8_backward(const Call *call)
{
    int64_t rows = padded(call->rows, UNIT);
    Quantisation q = {
        .gradient = 1, .factor = call->scale, .count = call->outputs,
        .stride = padded(call->outputs, LINE) | LINE, /* an odd number of lines, so that rows spread over the cache */
    };
    Product p = {
        .call = call, .rows = call->rows, .columns = call->inputs, .words = padded(call->outputs, COLUMNS) / WORD,
        .left_stride = q.stride, .after = call->factor,
    };
    int64_t each = group_panels(&p) * panel_bytes(p.words) + q.stride * (int64_t)sizeof(float); /* per thread */
    char *space = workspace(rows * (q.stride + (int64_t)(sizeof(float) + sizeof(int32_t))) + each * call->threads
                            + 5 * LINE);
    if (!space)
        return NO_MEMORY;
    q.to = take(&space, rows * q.stride);
    p.row_scale = q.scale = take(&space, rows * sizeof(float));
    p.row_start = q.start = take(&space, rows * sizeof(int32_t));
    q.scratch = take(&space, q.stride * call->threads * sizeof(float));
    p.packed = space;
    p.left = (const char *)q.to;
    p.left_end = p.left + (rows - UNIT) * p.left_stride;
#pragma omp parallel num_threads(call->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        quantise_rows(call, &q, thread, threads);
#pragma omp barrier
        run_thread(&p, thread, threads);
    }
    return OK;
}
