/* Dropout with a hashed mask, alone and fused with a low-rank product.
 *
 *     dropout   y_tk = keep(t, k) ? x_tk * scale : 0, where keep is hash(place_t K + k, seed) >= threshold
 *     down      h = dropout(x) A'
 *     gradient  g_A = g_h' dropout(x)    g_x = dropout(g_h A), with the same mask
 *
 * The hash is stateless integer arithmetic, so the loop vectorises, and the backward pass recomputes the mask from the
 * seed. It is rounds of xor-shift and multiply modulo 2^32; the constants are from C. Wellons' hash prospector. The
 * reference in plain torch is huarizo/model/dropout.py.
 *
 * x is [T, K], A [r, K]. The products never store the whole mask or dropout(x). They sum over `words`: one number in fp32,
 * or two neighbours along the sum in bf16 where the instruction set multiplies such pairs (vdpbf16ps); elsewhere bf16
 * becomes fp32 first. Threads share the rows in the forward pass and the
 * columns in the backward pass, and every number is computed in a fixed order, so results are bit-identical for any
 * number of threads.
 */
#include "threads.h"
#include "vectors.h"

#include <stdlib.h>

enum {
    ROWS = 4,                             /* of x that are read together in the forward pass */
    RANKS = REGISTERS == 32 ? 4 : 2,      /* and rows of A with them; A is padded to a multiple */
    TALL = REGISTERS == 32 ? 8 : 4,       /* rows and vectors of x that are read together in the backward pass */
    WIDE = REGISTERS == 32 ? 1 : 2,
    SUMS = REGISTERS == 32 ? 8192 : 4096, /* numbers of g_A that stay in a core's closest cache */
};

/* The arguments of a call. x is [T, K], its stride in bytes; places are those of its rows in the step. `h` is h or g_h,
 * `out` y or g_x, `grad` g_A, all contiguous. */
typedef struct {
    int64_t rows, inputs, rank, x_stride;
    const char *x;
    const int32_t *places;
    const float *weight;
    char *h, *out;
    float *grad;
    uint32_t seed, threshold;
    float scale;
    int32_t bf16, threads;
} Call;

int64_t huarizo_call_size(void) { return sizeof(Call); }

/* Whether products are of pairs of bf16. */
INLINE int paired(const Call *call) { return HALVES && call->bf16; }

/* The indices that are hashed for LANES elements of a row from column `column` on. */
INLINE bits indices(const Call *call, int64_t row, int64_t column)
{
    return (bits)set_int((int32_t)(call->places[row] * call->inputs + column)) + (bits)lane_numbers();
}

/* The mask of the elements with these indices: the kept ones. */
INLINE mask kept(const Call *call, bits x)
{
    const uint32_t multipliers[3] = {0x21F0AAAD, 0x735A2D97, 0x21F0AAAD};
    UNROLLED for (int round = 0; round < 3; round++) {
        x = (x ^ x >> 16) * multipliers[round];
        x = (x ^ x >> 15) + call->seed;
    }
    return at_least((ints)x, set_int((int32_t)call->threshold));
}

/* The first `count` of LANES elements as fp32, or in `pairs` as bf16 in the lower half of each lane; those that aren't in
 * the mask are zero. */
INLINE ints load_kept(const int bf16, const int pairs, mask kept_ones, const char *from, int64_t count)
{
    if (!pairs)
        return keep(kept_ones, (ints)load_part(bf16, from, count));
    return keep(kept_ones, count >= LANES ? load_halves(from) : load_first_halves(from, count));
}

/* An element of an array, in the lower half in `pairs`, else as fp32. */
INLINE uint32_t element_at(const Call *call, const char *from, int64_t i)
{
    if (!call->bf16)
        return ((const uint32_t *)from)[i];
    return (uint32_t)((const uint16_t *)from)[i] << (HALVES ? 0 : 16);
}

/* The first `count` of LANES weights, rounded as x is, in the lower halves in `pairs`, else as fp32. */
INLINE ints load_weights(const Call *call, const float *from, int64_t count)
{
    vec x = load_part(0, (const char *)from, count);
    return !call->bf16 ? (ints)x : round_halves(x) << (HALVES ? 0 : 16);
}

/* --------------------------------------------------------------------------------------------------------- dropout */

INLINE void drop_rows(const Call *call, const int bf16, int64_t from, int64_t to)
{
    for (int64_t row = from; row < to; row++) {
        const char *x = call->x + row * call->x_stride;
        char *out = call->out + row * call->inputs * size_of(bf16);
        bits index = indices(call, row, 0);
        for (int64_t k = 0; k < call->inputs; k += LANES, index += LANES) {
            int64_t count = call->inputs - k;
            vec y = (vec)load_kept(bf16, 0, kept(call, index), x + k * size_of(bf16), count);
            store_part(bf16, out + k * size_of(bf16), y * call->scale, count);
        }
    }
}

static void drop_share(void *shared, int64_t thread, int64_t threads)
{
    const Call call = *(const Call *)shared; /* a copy, which no store can change */
    int64_t from = call.rows * thread / threads, to = call.rows * (thread + 1) / threads;
    if (call.bf16)
        drop_rows(&call, 1, from, to);
    else
        drop_rows(&call, 0, from, to);
}

/* Writes out [T, K] from x. */
int huarizo_dropout(const Call *call)
{
    parallel(call->threads, drop_share, (void *)call);
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------ down */

/* Of one call: A as words along K, [r padded to RANKS][words], and ROWS rows of dropout(x) for each thread. */
typedef struct { const Call *call; uint32_t *weight, *kept_rows; int64_t words; } Down;

static void pack_along_inputs(const Down *d)
{
    const Call *call = d->call;
    for (int64_t rank = 0; rank < call->rank; rank++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            ints weights = load_weights(call, call->weight + rank * call->inputs + k, call->inputs - k);
            uint32_t *to = d->weight + rank * d->words;
            if (paired(call))
                store_halves((uint16_t *)to + k, weights);
            else
                store_ints(to + k, weights);
        }
}

/* ROWS rows of h from row `row` on. kept_rows: [ROWS, words]. */
INLINE void down_rows(const Call *call, const Down *d, const int bf16, uint32_t *kept_rows, int64_t row)
{
    const int pairs = bf16 && HALVES;
    int64_t count = least(ROWS, call->rows - row), words = d->words;
    for (int64_t i = 0; i < count; i++) {
        const char *from = call->x + (row + i) * call->x_stride;
        char *to = (char *)(kept_rows + i * words);
        bits index = indices(call, row + i, 0);
        for (int64_t k = 0; k < call->inputs; k += LANES, index += LANES) {
            ints x = load_kept(bf16, pairs, kept(call, index), from + k * size_of(bf16), call->inputs - k);
            if (pairs)
                store_halves(to + k * size_of(1), x);
            else
                store_ints(to + k * WORD, x);
        }
    }
    for (int64_t rank = 0; rank < call->rank; rank += RANKS) {
        vec sum[ROWS][RANKS];
        UNROLLED for (int i = 0; i < ROWS; i++)
            UNROLLED for (int j = 0; j < RANKS; j++)
                sum[i][j] = set(0);
        for (int64_t k = 0; k < words; k += LANES) {
            ints right[RANKS];
            UNROLLED for (int j = 0; j < RANKS; j++)
                right[j] = load_ints(d->weight + (rank + j) * words + k);
            UNROLLED for (int i = 0; i < ROWS; i++) {
                ints left = load_ints(kept_rows + i * words + k);
                UNROLLED for (int j = 0; j < RANKS; j++)
                    sum[i][j] = multiply_add(pairs, sum[i][j], left, right[j]);
            }
        }
        UNROLLED for (int i = 0; i < ROWS; i++)
            UNROLLED for (int j = 0; j < RANKS; j++)
                if (i < count && rank + j < call->rank)
                    store_part(bf16, call->h + ((row + i) * call->rank + rank + j) * size_of(bf16),
                               set(sum_of(sum[i][j]) * call->scale), 1);
    }
}

static void down_share(void *shared, int64_t thread, int64_t threads)
{
    const Down *d = shared;
    const Call call = *d->call; /* a copy, which no store can change */
    int64_t blocks = padded(call.rows, ROWS) / ROWS;
    uint32_t *kept_rows = d->kept_rows + ROWS * thread * d->words;
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++)
        if (call.bf16)
            down_rows(&call, d, 1, kept_rows, block * ROWS);
        else
            down_rows(&call, d, 0, kept_rows, block * ROWS);
}

/* Writes h [T, r] from x and weight. */
int huarizo_dropout_down(const Call *call)
{
    int64_t words = padded(call->inputs, LANES * 2) / pair_of(paired(call)), ranks = padded(call->rank, RANKS);
    uint32_t *space = calloc((ranks + ROWS * call->threads) * words, sizeof *space);
    if (!space)
        return NO_MEMORY;
    Down d = {call, space, space + ranks * words, words};
    pack_along_inputs(&d);
    parallel(call->threads, down_share, &d);
    free(space);
    return OK;
}

/* -------------------------------------------------------------------------------------------------------- gradient */

/* Of one call: A [words of ranks][K padded] and g_h [T][words of ranks] as words along the ranks; g_h as words along the
 * rows, [words of rows][r]; and the sums of g_A, `each` for each thread. */
typedef struct {
    const Call *call;
    uint32_t *weight, *grads, *row_words;
    float *sums;
    int64_t rank_words, columns, each, most; /* most: vectors of columns that are summed together */
} Gradient;

static void pack_share(void *shared, int64_t thread, int64_t threads)
{
    const Gradient *g = shared;
    const Call *call = g->call;
    int64_t pair = pair_of(paired(call)), row_words = (call->rows + pair - 1) / pair;
    for (int64_t i = g->rank_words * thread / threads; i < g->rank_words * (thread + 1) / threads; i++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            ints word = set_int(0);
            for (int64_t j = 0; j < least(pair, call->rank - i * pair); j++) {
                const float *from = call->weight + (i * pair + j) * call->inputs + k;
                word = word | load_weights(call, from, call->inputs - k) << 16 * (int)j;
            }
            store_ints(g->weight + i * g->columns + k, word);
        }
    for (int64_t row = call->rows * thread / threads; row < call->rows * (thread + 1) / threads; row++)
        for (int64_t i = 0; i < g->rank_words; i++) {
            uint32_t word = 0;
            for (int64_t j = 0; j < least(pair, call->rank - i * pair); j++)
                word |= element_at(call, call->h, row * call->rank + i * pair + j) << 16 * j;
            g->grads[row * g->rank_words + i] = word;
        }
    for (int64_t at = row_words * thread / threads; at < row_words * (thread + 1) / threads; at++)
        for (int64_t rank = 0; rank < call->rank; rank++) {
            uint32_t word = 0;
            for (int64_t j = 0; j < least(pair, call->rows - at * pair); j++)
                word |= element_at(call, call->h, (at * pair + j) * call->rank + rank) << 16 * j;
            g->row_words[at * call->rank + rank] = word;
        }
}

/* Computes g_x of up to TALL rows, `count`, and adds their part of g_A, in `vectors` vectors of columns from `column` on.
 * sums: the sums of g_A in these columns, [r, stride]. */
INLINE void gradient_tile(const Call *call, const Gradient *g, const int bf16, const int vectors, float *sums, int64_t stride,
                          int64_t row, int64_t count, int64_t column)
{
    const int pairs = bf16 && HALVES, pair = pairs ? 2 : 1;
    ints x[TALL][WIDE];
    mask kept_ones[TALL][WIDE];
    UNROLLED for (int i = 0; i < TALL; i++) {
        const char *from = call->x + (row + i) * call->x_stride + column * size_of(bf16);
        bits index = i < count ? indices(call, row + i, column) : (bits)set_int(0);
        UNROLLED for (int j = 0; j < vectors; j++) {
            x[i][j] = set_int(0);
            kept_ones[i][j] = kept(call, index + (uint32_t)(j * LANES));
            if (i < count)
                x[i][j] = load_kept(bf16, pairs, kept_ones[i][j], from + j * LANES * size_of(bf16),
                                    call->inputs - column - j * LANES);
        }
    }
    if (pairs)
        UNROLLED for (int i = 0; i < TALL / 2; i++)
            UNROLLED for (int j = 0; j < vectors; j++)
                x[i][j] = x[2 * i][j] | x[2 * i + 1][j] << 16;
    int64_t words = (count + pair - 1) / pair;
    for (int64_t rank = 0; rank < call->rank; rank++) {
        vec sum[WIDE];
        UNROLLED for (int j = 0; j < vectors; j++)
            sum[j] = load_vec(sums + rank * stride + j * LANES);
        UNROLLED for (int i = 0; i < TALL / pair; i++)
            if (i < words) {
                ints spread = set_int((int32_t)g->row_words[(row / pair + i) * call->rank + rank]);
                UNROLLED for (int j = 0; j < vectors; j++)
                    sum[j] = multiply_add(pairs, sum[j], x[i][j], spread);
            }
        UNROLLED for (int j = 0; j < vectors; j++)
            store_vec(sums + rank * stride + j * LANES, sum[j]);
    }
    vec grad[TALL][WIDE];
    UNROLLED for (int i = 0; i < TALL; i++)
        UNROLLED for (int j = 0; j < vectors; j++)
            grad[i][j] = set(0);
    for (int64_t word = 0; word < g->rank_words; word++) {
        ints weight[WIDE];
        UNROLLED for (int j = 0; j < vectors; j++)
            weight[j] = load_ints(g->weight + word * g->columns + column + j * LANES);
        UNROLLED for (int i = 0; i < TALL; i++)
            if (i < count) {
                ints spread = set_int((int32_t)g->grads[(row + i) * g->rank_words + word]);
                UNROLLED for (int j = 0; j < vectors; j++)
                    grad[i][j] = multiply_add(pairs, grad[i][j], weight[j], spread);
            }
    }
    UNROLLED for (int i = 0; i < TALL; i++)
        UNROLLED for (int j = 0; j < vectors; j++)
            if (i < count) {
                int64_t at = column + j * LANES;
                store_part(bf16, call->out + ((row + i) * call->inputs + at) * size_of(bf16),
                           (vec)keep(kept_ones[i][j], (ints)(grad[i][j] * call->scale)), call->inputs - at);
            }
}

/* Up to TALL rows, `count`, in columns `from` to `to`. */
INLINE void gradient_rows(const Call *call, const Gradient *g, const int bf16, float *sums, int64_t stride, int64_t row, int64_t count,
                          int64_t from, int64_t to)
{
    int64_t column = from;
    for (; column + (WIDE - 1) * LANES < to; column += WIDE * LANES)
        gradient_tile(call, g, bf16, WIDE, sums + column - from, stride, row, count, column);
    for (; column < to; column += LANES)
        gradient_tile(call, g, bf16, 1, sums + column - from, stride, row, count, column);
}

/* Computes g_x and g_A in columns `from` to `to`. sums: [r, stride]. */
INLINE void gradient_columns(const Call *call, const Gradient *g, const int bf16, float *sums, int64_t from, int64_t to)
{
    int64_t stride = padded(to - from, 2 * LANES) + LANES, row; /* odd, so that ranks spread over the cache */
    memset(sums, 0, call->rank * stride * sizeof *sums);
    for (row = 0; row + TALL <= call->rows; row += TALL)
        gradient_rows(call, g, bf16, sums, stride, row, TALL, from, to);
    if (row < call->rows)
        gradient_rows(call, g, bf16, sums, stride, row, call->rows - row, from, to);
    for (int64_t rank = 0; rank < call->rank; rank++)
        for (int64_t column = from; column < to; column += LANES)
            store_part(0, (char *)(call->grad + rank * call->inputs + column),
                       load_vec(sums + rank * stride + column - from) * call->scale, to - column);
}

static void gradient_share(void *shared, int64_t thread, int64_t threads)
{
    const Gradient *g = shared;
    const Call call = *g->call; /* a copy, which no store can change */
    int64_t vectors = padded(call.inputs, LANES) / LANES, end = vectors * (thread + 1) / threads;
    float *sums = g->sums + thread * g->each;
    for (int64_t at = vectors * thread / threads, step; at < end; at += step) {
        step = least(g->most, end - at);
        int64_t to = least((at + step) * LANES, call.inputs);
        if (call.bf16)
            gradient_columns(&call, g, 1, sums, at * LANES, to);
        else
            gradient_columns(&call, g, 0, sums, at * LANES, to);
    }
}

/* Writes out [T, K] and grad [r, K] from x, weight and h, the gradient of h. */
int huarizo_dropout_down_backward(const Call *call)
{
    int64_t pair = pair_of(paired(call)), row_words = (call->rows + pair - 1) / pair;
    int64_t vectors = padded(call->inputs, LANES) / LANES, most = SUMS / LANES / (call->rank ? call->rank : 1);
    Gradient g = {.call = call, .rank_words = (call->rank + pair - 1) / pair, .columns = (vectors | 1) * LANES};
    g.most = most < WIDE ? WIDE : most / WIDE * WIDE;
    g.each = call->rank * (g.most + 2) * LANES;
    uint32_t *space = malloc((g.rank_words * (g.columns + call->rows) + row_words * call->rank + g.each * call->threads)
                             * sizeof *space);
    if (!space)
        return NO_MEMORY;
    g.weight = space;
    g.grads = g.weight + g.rank_words * g.columns;
    g.row_words = g.grads + g.rank_words * call->rows;
    g.sums = (float *)(g.row_words + row_words * call->rank);
    parallel(call->threads, pack_share, &g);
    parallel(call->threads, gradient_share, &g);
    free(space);
    return OK;
}
