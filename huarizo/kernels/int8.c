/* The products of a frozen int8 linear layer and the operations around them.
 *
 *     quantise  q = round(z / s) with z = rotate(x * factor) and s = max|z| / 127 of a row
 *     forward   y = rotate((q W') * s * scale) + x_F F' + h B' + bias
 *     backward  g_x = rotate((q W) * s) * factor, with q and s of z = rotate(g) * scale, rounded stochastically
 *
 * W is int8 [N, K], one copy for both directions; F, the float weight, is [N, k]; h [T, r] and B [N, r] are those of a
 * LoRA; rotate multiplies each block of COLUMNS neighbours in a row by the Hadamard matrix, computed as sums and
 * differences of pairs. The reference in plain torch is huarizo/model/frozen/int8.py.
 *
 * The weight is stored in panels of COLUMNS outputs, [panel][word][COLUMNS], as unsigned bytes with 128 added. A word is
 * four neighbours along the depth in int8, two in bf16 and one in fp32. What multiplies it depends on the instruction
 * set (vectors.h):
 *
 *     OFFSET    words of the left operand, signed, are multiplied by the unsigned words of the panel as it is stored;
 *               every sum starts from -128 times the sum of the quantised row (vpdpbusd)
 *     PAIRS     both operands are widened to int16, in words of two (vpmaddwd)
 *     MATRICES  the panel is made signed; two rows and two columns, eight numbers deep, are multiplied as matrices (smmla)
 *     else      the panel is made signed (sdot)
 *
 * A tile is TILE_ROWS rows times TILE_VECTORS vectors of columns, with the sums in registers. Up to DEPTH_BLOCK words of
 * its columns stay in the closest cache for a block of rows. Panels that must be changed first, as all of the backward
 * product must, are brought in by groups that fit a core's own cache. Complete sums are converted to fp32, scaled and rotated; the
 * float channels, the LoRA's term and the bias are added; and the result is rounded once, when it is stored.
 *
 * The tiles of a call are numbered panel by panel, and every thread takes an equal share of consecutive ones. Integer
 * sums are exact, and every number of the result is computed in the same order on any thread, so results are
 * bit-identical for any number of threads; in fp32 also for any instruction set, given the same
 * h. A row with a NaN or an infinity gets
 * the scale NaN and a result of NaNs.
 */

#include "threads.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    COLUMNS = 32,               /* of a panel, and channels that are rotated together */
    VECTORS = COLUMNS / LANES,
    FOUR = 4 * LANES,           /* numbers that become one vector of bytes */
    PASS = TILE_VECTORS * LANES, /* columns whose sums are in registers */
    PASSES = COLUMNS / PASS,
    ROW_BLOCK = TILE_ROWS * TILES_TOGETHER,
    WIDE = PAIRS ? 2 : 1,       /* bytes of a number in an operand */
    UNROLL = 4,                 /* in words; every depth is a multiple of it */
    BLOCK_BYTES = COLUMNS * COLUMNS,
    GROUP_BYTES = 256 << 10,    /* of a group of panels, which all rows are multiplied by before the next group */
    GROUP_PANELS = 8,
};
_Static_assert(TILE_ROWS % TILE_UNIT == 0, "tiles are whole units");
_Static_assert(COLUMNS % PASS == 0 && DEPTH_BLOCK % UNROLL == 0, "parts are whole");

enum { ONE = 0x3F800000 }; /* the bits of 1 */

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
    const char *h;   /* [T, r] */
    const float *up; /* [N, r] */
    char *out;
    int64_t rank; /* r */
    int32_t bf16, threads;
} Call;

int64_t huarizo_call_size(void) { return sizeof(Call); }

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
#ifdef MADV_HUGEPAGE
            madvise(kept.data, kept.size, MADV_HUGEPAGE);
#else
            (void)0;
#endif
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

/* Fractions in [0, 1) of start + place / golden ratio, in units of 2^-32, for places from `at` on. */
INLINE vec noise(int64_t at, uint32_t start)
{
    const uint32_t golden = 0x9E3779B9u;
    bits x = (bits)lane_numbers() * golden + (start + (uint32_t)at * golden);
    return (vec)(x >> 9 | ONE) - set(1);
}

/* sum + place^4 in the lanes where y is above zero; the lanes are places from `at` on. */
INLINE bits add_above_zero(bits sum, vec y, int64_t at)
{
    bits place = (bits)lane_numbers() + (uint32_t)at;
    place = place * place;
    return sum + (bits)keep(above(y, set(0)), (ints)(place * place));
}

/* Rotates a block: sums and differences of channels 1, 2, 4, 8 and 16 apart. */
INLINE void rotate(vec block[VECTORS])
{
    UNROLLED for (int j = 0; j < VECTORS; j++)
        UNROLLED for (int apart = 1; apart < LANES; apart *= 2) {
            vec sign = (vec)((lane_numbers() & apart) != 0);
            block[j] = fused(block[j], (vec)(((ints)sign & (int32_t)0x80000000u) | ONE), swap(block[j], apart));
        }
    UNROLLED for (int apart = 1; apart < VECTORS; apart *= 2)
        UNROLLED for (int j = 0; j < VECTORS; j++)
            if (!(j & apart)) {
                vec low = block[j], high = block[j + apart];
                block[j] = low + high;
                block[j + apart] = low - high;
            }
}

/* The part of a row that starts at `from`, of `count` elements, times `factor` if that isn't NULL. */
INLINE vec load_scaled(const int bf16, const char *from, const float *factor, int64_t count)
{
    vec x = load_part(bf16, from, count);
    return factor ? x * load_part(0, (const char *)factor, count) : x;
}

/* Quantises one row of `count` elements, padded with zeros to `stride` bytes, a multiple of 64, and writes its scale
 * and the initial value of its sums. An input is multiplied by `factor` [count], rotated, and rounded to nearest, ties
 * to even. A gradient is rotated, multiplied by `factor` [count padded], and rounded stochastically, with noise that
 * starts from a hash of the scale and the signs. scratch: [stride]. */
INLINE void quantise_row(const int bf16, const int gradient, const char *x, const float *factor,
                         int64_t count, float *scratch, int8_t *to, int64_t stride, float *scale_to, int32_t *start_to)
{
    /* Magnitudes compare as their bits do as integers, and a NaN is the largest. */
    ints top = set_int(0);
    bits signs = (bits)top;
    for (int64_t i = 0; i < padded(count, LINE); i += COLUMNS) {
        vec y[VECTORS];
        UNROLLED for (int j = 0; j < VECTORS; j++) {
            int64_t at = i + j * LANES;
            y[j] = at < count ? load_scaled(bf16, x + at * size_of(bf16), gradient ? NULL : factor + at, count - at)
                              : set(0);
        }
        rotate(y);
        UNROLLED for (int j = 0; j < VECTORS; j++) {
            if (gradient && i < count)
                y[j] = y[j] * load_vec(factor + i + j * LANES);
            top = larger_bits(top, magnitude(y[j]));
            if (gradient)
                signs = add_above_zero(signs, y[j], i + j * LANES);
            store_vec(scratch + i + j * LANES, y[j]);
        }
    }
    uint32_t number = largest_bits_of(top);
    float most, scale;
    memcpy(&most, &number, sizeof most);
    scale = number >= 0x7F800000u ? NAN : (most < 1e-12f ? 1e-12f : most) * (float)(1.0 / 127);
    memcpy(&number, &scale, sizeof number);
    vec inverse = set(1.0f / scale);
    ints sum = set_int(0);
    uint32_t start = (number >> 8) * 0x85EBCA6Bu + (uint32_t)sum_of_ints((ints)signs) * 0x27D4EB2Fu;
    int64_t end = padded(count, LINE);
    for (int64_t i = 0; i < end; i += FOUR) {
        ints y[4];
        UNROLLED for (int j = 0; j < 4; j++) {
            vec step = load_vec(scratch + i + j * LANES) * inverse;
            y[j] = gradient ? floor_of(step + noise(i + j * LANES, start)) : nearest(step);
        }
        store_bytes(to + i, y);
    }
    memset(to + end, 0, stride - end);
    for (int64_t i = 0; i < end; i += LINE)
        sum = add_bytes(sum, to + i);
    *scale_to = scale;
    *start_to = -128 * sum_of_ints(sum);
}

/* The arguments of quantising the rows of a call's x. */
typedef struct {
    const Call *call;
    int gradient;
    const float *factor;
    int64_t count, stride;
    int8_t *to;
    float *scale, *scratch; /* [stride] for each thread */
    int32_t *start;
} Quantisation;

/* Quantises the share of `thread`. */
static void quantise_share(void *shared, int64_t thread, int64_t threads)
{
    const Quantisation *q = shared;
    const Call *call = q->call;
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

/* -------------------------------------------------------------------------------------------------------- operands */

INLINE int64_t panel_bytes(int64_t words) { return words * COLUMNS * WORD; } /* as stored */

/* The depth of an operand in words of the weight: a PAIRS operand has the lower and then the upper pairs of LANES words
 * at a time. What a panel lacks to that is not written: there the left operand is zero. */
INLINE int64_t operand_words(int64_t words) { return PAIRS ? padded(words, LANES) : words; }

INLINE int64_t operand_bytes(int64_t words) { return operand_words(words) * COLUMNS * WORD * WIDE; } /* of a panel */

typedef int16_t shorts __attribute__((vector_size(4 * LANES)));

/* Words of four bytes as pairs of int16: bytes 0 and 2, and bytes 1 and 3. */
INLINE void widen(ints words, char *lower, char *upper)
{
    store_ints(lower, (ints)((shorts)words << 8 >> 8));
    store_ints(upper, (ints)((shorts)words >> 8));
}

/* LANES words of a panel, made signed. */
INLINE ints signed_words(const char *panel, int64_t word, int j)
{
    return load_ints(panel + (word * COLUMNS + j * LANES) * WORD) ^ (int32_t)0x80808080u;
}

/* Words `from` to `to` of a panel as those of an operand. words: [to - from][COLUMNS] in the stored format.
 *
 * In an operand of PAIRS or MATRICES the columns of one pass follow each other: [pass][pair][PASS] words, and
 * [pass][depth / 8][PASS][8] bytes. */
INLINE void bring_in(char *operand, const char *words, int64_t from, int64_t to, int64_t depth)
{
    if (OFFSET) {
        memcpy(operand + from * COLUMNS * WORD, words, (to - from) * COLUMNS * WORD);
        return;
    }
    for (int64_t k = from; k < to; k++)
        UNROLLED for (int j = 0; j < VECTORS; j++) {
            char *pass = operand + j / TILE_VECTORS * operand_words(depth) * PASS * WORD * WIDE;
            ints bytes = signed_words(words, k - from, j);
            if (PAIRS) {
                char *at = pass + ((k / LANES * 2 * LANES + k % LANES) * PASS + j % TILE_VECTORS * LANES) * WORD;
                widen(bytes, at, at + LANES * PASS * WORD);
#ifdef DOT_OF_MATRICES
            } else if (k % 2 == 0) {
                store_interleaved(pass + (k * PASS + j % TILE_VECTORS * 2 * LANES) * WORD, bytes,
                                  signed_words(words, k + 1 - from, j));
#else
            } else {
                store_ints(operand + (k * COLUMNS + j * LANES) * WORD, bytes);
#endif
            }
        }
}

/* Bytes from a row of PAIRS to the next: an odd number of cache lines, so that rows spread over the cache. */
INLINE int64_t pairs_stride(int64_t words) { return padded(operand_words(words) * WORD * WIDE, LINE) | LINE; }

/* The operand of the backward product that starts at column `at`. Its depth is `panels` panels of the weight, whose
 * depth is `words`. */
static void bring_in_columns(char *operand, const char *weight, int64_t at, int64_t panels, int64_t words)
{
    const int64_t per_block = COLUMNS / WORD;
    for (int64_t panel = 0; panel < panels; panel++) {
        const char *from = weight + panel * panel_bytes(words) + at / WORD * COLUMNS * WORD;
        for (int i = 0; i < BLOCK_BYTES; i += LINE)
            __builtin_prefetch(from + 2 * panel_bytes(words) + i);
        if (OFFSET) {
            turn_block(operand + panel * BLOCK_BYTES, from);
        } else {
            char turned[BLOCK_BYTES];
            turn_block(turned, from);
            bring_in(operand, turned, panel * per_block, (panel + 1) * per_block, panels * per_block);
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

#if !defined(DOT_ROW) && !defined(DOT_OF_MATRICES)
/* The sums of one row += its word, in all lanes of `left`, times the columns. */
INLINE void dot_row(ints sum[TILE_VECTORS], ints left, const ints columns[TILE_VECTORS])
{
    UNROLLED for (int j = 0; j < TILE_VECTORS; j++)
        dot(&sum[j], left, columns[j]);
}
#endif

#ifdef DOT_OF_MATRICES
/* The sums of `rows` rows and the columns of a pass, over `depth` words of the operands. They begin with zero if `start`
 * isn't NULL, else with what is in `sums`. A product of matrices has its four sums in one vector: of rows 2 i and
 * 2 i + 1, and columns 2 j and 2 j + 1. */
INLINE void multiply(const int rows, int64_t depth, const char *left, int64_t stride, const char *right,
                     const int32_t *start, ints (*sums)[VECTORS])
{
    ints sum[TILE_ROWS / 2][2 * TILE_VECTORS];
    UNROLLED for (int i = 0; i < rows / 2; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++) {
            sum[i][2 * j] = start ? set_int(0) : lower_halves(sums[2 * i][j], sums[2 * i + 1][j]);
            sum[i][2 * j + 1] = start ? set_int(0) : upper_halves(sums[2 * i][j], sums[2 * i + 1][j]);
        }
    for (int64_t k = 0; k < depth; k += 2, right += 2 * PASS * WORD) {
        ints columns[2 * TILE_VECTORS];
        UNROLLED for (int j = 0; j < 2 * TILE_VECTORS; j++)
            columns[j] = load_ints(right + j * LANES * WORD);
        UNROLLED for (int i = 0; i < rows / 2; i++) {
            ints two_rows = load_ints(left + 2 * i * stride + 2 * k * WORD);
            UNROLLED for (int j = 0; j < 2 * TILE_VECTORS; j++)
                dot_matrices(&sum[i][j], two_rows, columns[j]);
        }
    }
    UNROLLED for (int i = 0; i < rows / 2; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++) {
            sums[2 * i][j] = lower_halves(sum[i][2 * j], sum[i][2 * j + 1]);
            sums[2 * i + 1][j] = upper_halves(sum[i][2 * j], sum[i][2 * j + 1]);
        }
}
#else
/* The sums of `rows` rows and the columns of a pass, over `depth` words of the operands. They begin with `start` for each
 * row, or, if that is NULL, with what is in `sums`. */
INLINE void multiply(const int rows, int64_t depth, const char *left, int64_t stride, const char *right,
                     const int32_t *start, ints (*sums)[VECTORS])
{
    const int64_t right_step = (PAIRS ? PASS : COLUMNS) * WORD;
    const char *at[(TILE_ROWS + 2) / 3];
    ints sum[TILE_ROWS][TILE_VECTORS];
    UNROLLED for (int i = 0; i < (rows + 2) / 3; i++)
        at[i] = left + 3 * i * stride;
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++)
            sum[i][j] = start ? set_int(OFFSET ? start[i] : 0) : sums[i][j];
    for (int64_t k = 0; k < depth; k += UNROLL) {
        UNROLLED for (int u = 0; u < UNROLL; u++) {
            ints columns[TILE_VECTORS];
            UNROLLED for (int j = 0; j < TILE_VECTORS; j++)
                columns[j] = load_ints(right + j * LANES * WORD);
            right += right_step;
            UNROLLED for (int i = 0; i < rows; i++) {
                ints spread = set_int(word_at(at[i / 3] + i % 3 * stride + u * WORD));
                dot_row(sum[i], spread, columns);
            }
        }
        UNROLLED for (int i = 0; i < (rows + 2) / 3; i++)
            at[i] += UNROLL * WORD;
    }
    UNROLLED for (int i = 0; i < rows; i++)
        UNROLLED for (int j = 0; j < TILE_VECTORS; j++)
            sums[i][j] = sum[i][j];
}
#endif

/* y += float channels of `rows` rows times those of a panel. */
INLINE void multiply_floats(const int bf16, const int rows, int64_t words, const char *left, const char *right,
                            vec y[][VECTORS])
{
    for (int64_t k = 0; k < words; k++, right += COLUMNS * WORD) {
        ints columns[VECTORS];
        UNROLLED for (int j = 0; j < VECTORS; j++)
            columns[j] = load_ints(right + j * LANES * WORD);
        UNROLLED for (int i = 0; i < rows; i++) {
            ints spread = set_int(word_at(left + (i * words + k) * WORD));
            UNROLLED for (int j = 0; j < VECTORS; j++)
                y[i][j] = multiply_add(bf16, y[i][j], spread, columns[j]);
        }
    }
}

/* A product, left [T, words] times panels, and the operations on its result. */
typedef struct {
    const Call *call;
    int backward;
    int64_t rows, columns, words; /* of the result; of the depth */
    int64_t float_words, rank_words; /* of the depths of the other two products; 0 in backward */
    const int8_t *quantised;
    int64_t quantised_stride;
    char *left, *left_end; /* the quantised rows as an operand; those of the last unit, padded */
    int64_t left_stride;
    const float *row_scale;
    const float *before, *after; /* factors per column: before the rotation in forward, after it in backward; else NULL */
    const int32_t *row_start;    /* [T in units] */
    char *floats, *h, *up; /* the float channels, [T, float_words]; h, [T, rank_words]; panels of B */
    const char *bias;   /* NULL in backward and without a bias */
    char *space;        /* of each thread: a group of panels that are brought in */
} Product;

/* From sums to elements of the result: `rows` rows from row `row`, and the columns from `at`. */
INLINE void finish(const int bf16, const int rows, const Product *p, ints (*sums)[VECTORS], int64_t row, int64_t at)
{
    vec y[FINISHED_ROWS][VECTORS];
    UNROLLED for (int i = 0; i < rows; i++) {
        vec row_scale = set(p->row_scale[row + i]);
        UNROLLED for (int j = 0; j < VECTORS; j++) {
            y[i][j] = float_of(sums[i][j]) * row_scale;
            if (p->before)
                y[i][j] = y[i][j] * load_vec(p->before + at + j * LANES);
        }
        rotate(y[i]);
    }
    if (p->float_words)
        multiply_floats(bf16, rows, p->float_words, p->floats + row * p->float_words * WORD,
                        p->call->float_weight + at / COLUMNS * panel_bytes(p->float_words), y);
    if (p->rank_words)
        multiply_floats(bf16, rows, p->rank_words, p->h + row * p->rank_words * WORD,
                        p->up + at / COLUMNS * panel_bytes(p->rank_words), y);
    UNROLLED for (int j = 0; j < VECTORS; j++) {
        int64_t column = at + j * LANES, count = p->columns - column;
        if (count <= 0)
            return;
        vec after = p->after ? load_part(0, (const char *)(p->after + column), count) : set(1);
        vec bias = p->bias ? load_part(bf16, p->bias + column * size_of(bf16), count) : set(0);
        UNROLLED for (int i = 0; i < rows; i++) {
            vec result = p->backward ? y[i][j] * after : p->bias ? y[i][j] + bias : y[i][j];
            store_part(bf16, p->call->out + ((row + i) * p->columns + column) * size_of(bf16), result, count);
        }
    }
}

INLINE void finish_rows(const int bf16, const Product *p, ints (*sums)[VECTORS], int64_t row, int64_t end, int64_t at)
{
    for (; row + FINISHED_ROWS <= end; row += FINISHED_ROWS, sums += FINISHED_ROWS)
        finish(bf16, FINISHED_ROWS, p, sums, row, at);
    for (; row < end; row++, sums++)
        finish(bf16, 1, p, sums, row, at);
}

/* The sums of rows `row` to `end`, in units, with a panel. */
INLINE void multiply_rows(const Product *p, const char *panel, int64_t row, int64_t end, ints (*sums)[VECTORS])
{
    const int64_t words = operand_words(p->words) * WIDE, blocks = (words + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
    const int64_t most = padded((words + blocks - 1) / blocks, UNROLL);
    for (int64_t k = 0, depth; k < words; k += depth) {
        depth = least(most, words - k);
        for (int pass = 0; pass < PASSES; pass++) {
            const char *right = PAIRS || MATRICES ? panel + (pass * words + k) * PASS * WORD
                                                  : panel + (k * COLUMNS + pass * PASS) * WORD;
            for (int64_t at = row, step; at < end; at += step) {
                step = at + TILE_ROWS <= end ? TILE_ROWS : TILE_UNIT;
                const char *left = (at + step > p->rows ? p->left_end : p->left + at * p->left_stride)
                                 + k * WORD * (MATRICES ? 2 : 1);
                const int32_t *start = k ? NULL : p->row_start + at;
                ints (*to)[VECTORS] = (ints (*)[VECTORS])(sums[at - row] + pass * TILE_VECTORS);
                if (step == TILE_ROWS)
                    multiply(TILE_ROWS, depth, left, p->left_stride, right, start, to);
                else
                    multiply(TILE_UNIT, depth, left, p->left_stride, right, start, to);
            }
        }
    }
}

/* All tiles of units `from` to `to` and `count` panels, the first of which starts at column `at`. */
static __attribute__((noinline)) void tiles(const Product *p, const char *panels, int64_t panel_size, int64_t count,
                                            int64_t at, int64_t from, int64_t to)
{
    ints sums[ROW_BLOCK][VECTORS];
    for (int64_t row = from * TILE_UNIT, end; row < to * TILE_UNIT; row = end) {
        end = least(row + ROW_BLOCK, to * TILE_UNIT);
        if (end > p->rows && end - row > TILE_UNIT)
            end -= TILE_UNIT; /* the last unit is elsewhere, so no tile reaches into it */
        for (int64_t i = 0; i < count; i++) {
            multiply_rows(p, panels + i * panel_size, row, end, sums);
            if (p->call->bf16)
                finish_rows(1, p, sums, row, least(end, p->rows), at + i * COLUMNS);
            else
                finish_rows(0, p, sums, row, least(end, p->rows), at + i * COLUMNS);
        }
    }
}

/* --------------------------------------------------------------------------------------------------------- threads */

INLINE int64_t group_panels(const Product *p)
{
    int64_t fit = GROUP_BYTES / operand_bytes(p->words);
    return fit < 1 ? 1 : least(fit, GROUP_PANELS);
}

INLINE int64_t space_of_thread(const Product *p) { return group_panels(p) * operand_bytes(p->words); }

/* The share of `thread`: units `at` to `to` of all tiles, numbered panel by panel. */
static void run_share(void *shared, int64_t thread, int64_t threads)
{
    const Product *p = shared;
    const int as_stored = OFFSET != 0 && !p->backward;
    int64_t units = padded(p->rows, TILE_UNIT) / TILE_UNIT, all = padded(p->columns, COLUMNS) / COLUMNS * units;
    int64_t at = all * thread / threads, to = all * (thread + 1) / threads, most = group_panels(p);
    int64_t size = as_stored ? panel_bytes(p->words) : operand_bytes(p->words);
    char *space = p->space + thread * space_of_thread(p);
    while (at < to) {
        int64_t panel = at / units, row = at % units, count = 1, end = least(units, row + to - at);
        if (row == 0 && end == units)
            count = least(most, (to - at) / units);
        const char *weight = p->call->weight;
        for (int64_t i = 0; i < count && !as_stored; i++)
            if (p->backward)
                bring_in_columns(space + i * size, weight, (panel + i) * COLUMNS, p->words / (COLUMNS / WORD),
                                 padded(p->columns, COLUMNS) / WORD);
            else
                bring_in(space + i * size, weight + (panel + i) * panel_bytes(p->words), 0, p->words, p->words);
        tiles(p, as_stored ? weight + panel * size : space, size, count, panel * COLUMNS, row, end);
        at += (count - 1) * units + end - row;
    }
}

/* ------------------------------------------------------------------------------------------------------- the calls */

/* Writes quantised, row_scale and row_start from x and factor. quantised_stride: a multiple of 64. */
int huarizo_int8_quantise(const Call *call)
{
    if (!call->rows)
        return OK; /* the pointers to rows may be NULL */
    Quantisation q = {
        .call = call, .factor = call->factor, .count = call->inputs, .to = call->quantised,
        .stride = call->quantised_stride, .scale = call->row_scale, .start = call->row_start,
    };
    q.scratch = (float *)workspace(q.stride * call->threads * (int64_t)sizeof(float));
    if (!q.scratch)
        return NO_MEMORY;
    parallel(call->threads, quantise_share, &q);
    return OK;
}

/* LANES numbers of column `rank` of B, from row `at` on: as fp32, or as bf16 in the lower halves. */
INLINE ints up_column(const Call *call, int64_t rank, int64_t at)
{
    int64_t count = rank < call->rank ? call->outputs - at : 0;
    if (count <= 0)
        return set_int(0);
    float numbers[LANES] = {0};
    for (int64_t i = 0; i < least(LANES, count); i++)
        numbers[i] = call->up[(at + i) * call->rank + rank];
    return call->bf16 ? round_halves(load_vec(numbers)) : load_ints(numbers);
}

/* Gathers the float channels and h of the share of `thread`, and packs its panels of B. */
static void gather_share(void *shared, int64_t thread, int64_t threads)
{
    const Product *p = shared;
    const Call *call = p->call;
    int64_t size = size_of(call->bf16), panels = padded(call->outputs, COLUMNS) / COLUMNS, rank = call->rank;
    for (int64_t row = call->rows * thread / threads; row < call->rows * (thread + 1) / threads; row++) {
        const char *x = call->x + row * call->x_stride;
        char *floats = p->floats + row * p->float_words * WORD, *h = p->h + row * p->rank_words * WORD;
        for (int64_t f = 0; f < call->floats; f++)
            if (call->bf16)
                memcpy(floats + f * 2, x + call->float_channels[f] * 2, 2);
            else
                memcpy(floats + f * 4, x + call->float_channels[f] * 4, 4);
        memset(floats + call->floats * size, 0, p->float_words * WORD - call->floats * size);
        if (rank) /* else there is no h */
            memcpy(h, call->h + row * rank * size, rank * size);
        memset(h + rank * size, 0, p->rank_words * WORD - rank * size);
    }
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; panel++)
        for (int64_t word = 0; word < p->rank_words; word++)
            UNROLLED for (int j = 0; j < VECTORS; j++) {
                int64_t at = panel * COLUMNS + j * LANES;
                char *to = p->up + panel * panel_bytes(p->rank_words) + (word * COLUMNS + j * LANES) * WORD;
                store_ints(to, call->bf16 ? up_column(call, 2 * word, at) | up_column(call, 2 * word + 1, at) << 16
                                          : up_column(call, word, at));
            }
}

enum { ARRANGED = PAIRS || MATRICES }; /* whether the left operand is more than the quantised rows */

/* Bytes from a row of the left operand to the next. */
static int64_t left_stride(const Product *p)
{
    return PAIRS ? pairs_stride(p->words) : MATRICES ? p->words * WORD : p->quantised_stride;
}

static int64_t left_bytes(const Product *p)
{
    return padded((ARRANGED ? p->rows : 0) * left_stride(p), LINE) + padded(TILE_UNIT * left_stride(p), LINE);
}

/* Lays out the left operand in a workspace: its last unit and, if it is ARRANGED, all of it. */
static void place_left(Product *p, char **space)
{
    int64_t rest = p->rows % TILE_UNIT;
    p->left_stride = left_stride(p);
    p->left = ARRANGED ? take(space, p->rows * p->left_stride) : (char *)p->quantised;
    p->left_end = take(space, TILE_UNIT * p->left_stride);
    if (!ARRANGED)
        memcpy(p->left_end, p->left + (p->rows - rest) * p->left_stride, rest * p->left_stride);
}

/* Arranges the rows of the share of `thread`: as PAIRS, or two rows by turns, eight numbers of each, for MATRICES. */
static void arrange_share(void *shared, int64_t thread, int64_t threads)
{
    const Product *p = shared;
    int64_t last = p->rows / TILE_UNIT * TILE_UNIT;
    for (int64_t row = p->rows * thread / threads; row < p->rows * (thread + 1) / threads; row++) {
        const char *from = (const char *)p->quantised + row * p->quantised_stride;
        char *unit = row < last ? p->left + row / TILE_UNIT * TILE_UNIT * p->left_stride : p->left_end;
        char *to = unit + row % TILE_UNIT * p->left_stride;
        if (MATRICES)
            for (int64_t k = 0; k < p->words; k += 2)
                memcpy(unit + 2 * k * WORD + row % TILE_UNIT * 2 * WORD, from + k * WORD, 2 * WORD);
        else
            for (int64_t k = 0; k < p->words; k += LANES)
                widen(load_first(from + k * WORD, p->words - k), to + 2 * k * WORD, to + (2 * k + LANES) * WORD);
    }
}

/* Brings in all that the forward product reads, but for the panels. */
static void prepare_share(void *shared, int64_t thread, int64_t threads)
{
    gather_share(shared, thread, threads);
    if (ARRANGED)
        arrange_share(shared, thread, threads);
}

/* Writes out [T, N] from x, quantised, row_scale and row_start. */
int huarizo_int8_forward(const Call *call)
{
    if (!call->rows)
        return OK; /* the pointers to rows may be NULL */
    Product p = {
        .call = call, .rows = call->rows, .columns = call->outputs, .words = padded(call->inputs, COLUMNS) / WORD,
        .float_words = padded(call->floats * size_of(call->bf16), WORD) / WORD,
        .rank_words = padded(call->rank * size_of(call->bf16), WORD) / WORD,
        .quantised = call->quantised, .quantised_stride = call->quantised_stride,
        .row_scale = call->row_scale, .before = call->scale, .bias = call->bias,
    };
    int64_t starts = padded(call->rows, TILE_UNIT) * (int64_t)sizeof(int32_t);
    int64_t up_bytes = padded(call->outputs, COLUMNS) / COLUMNS * panel_bytes(p.rank_words);
    char *space = workspace(call->rows * (p.float_words + p.rank_words) * WORD + up_bytes + starts + left_bytes(&p)
                            + space_of_thread(&p) * call->threads + 6 * LINE);
    if (!space)
        return NO_MEMORY;
    p.floats = take(&space, call->rows * p.float_words * WORD);
    p.h = take(&space, call->rows * p.rank_words * WORD);
    p.up = take(&space, up_bytes);
    int32_t *row_start = take(&space, starts);
    memset(row_start, 0, starts);
    memcpy(row_start, call->row_start, call->rows * sizeof *row_start);
    p.row_start = row_start;
    place_left(&p, &space);
    p.space = space;
    if (p.float_words || p.rank_words || ARRANGED)
        parallel(call->threads, prepare_share, &p);
    parallel(call->threads, run_share, &p);
    return OK;
}

/* Writes out [T, K] from x, the gradient [T, N]. */
int huarizo_int8_backward(const Call *call)
{
    if (!call->rows)
        return OK; /* the pointers to rows may be NULL */
    int64_t rows = padded(call->rows, TILE_UNIT);
    Quantisation q = {
        .call = call, .gradient = 1, .factor = call->scale, .count = call->outputs,
        .stride = padded(call->outputs, LINE) | LINE, /* an odd number of lines, so that rows spread over the cache */
    };
    Product p = {
        .call = call, .backward = 1, .rows = call->rows, .columns = call->inputs,
        .words = padded(call->outputs, COLUMNS) / WORD, .quantised_stride = q.stride, .after = call->factor,
    };
    char *space = workspace(rows * (q.stride + (int64_t)(sizeof(float) + sizeof(int32_t))) + left_bytes(&p) + 5 * LINE
                            + (space_of_thread(&p) + q.stride * (int64_t)sizeof(float)) * call->threads);
    if (!space)
        return NO_MEMORY;
    p.quantised = q.to = take(&space, rows * q.stride);
    p.row_scale = q.scale = take(&space, rows * sizeof(float));
    p.row_start = q.start = take(&space, rows * sizeof(int32_t));
    q.scratch = take(&space, q.stride * call->threads * sizeof(float));
    parallel(call->threads, quantise_share, &q);
    place_left(&p, &space);
    p.space = space;
    if (ARRANGED)
        parallel(call->threads, arrange_share, &p);
    parallel(call->threads, run_share, &p);
    return OK;
}
