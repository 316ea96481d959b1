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
 * x is [T, K], A [r, K]. The products never store the whole mask or dropout(x). They sum over `words`: two neighbours
 * along the sum in bf16 (vdpbf16ps), one number in fp32 (fma). Threads share the rows in the forward pass and the
 * columns in the backward pass, and every number is computed in a fixed order, so results are bit-identical for any
 * number of threads.
 */
#include "vectors.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROWS = 4,    /* of x that are read together in the forward pass */
    TALL = 8,    /* and in the backward pass */
    RANKS = 4,   /* rows of A that are read together in the forward pass; A is padded to a multiple */
    SUMS = 8192, /* numbers of g_A that stay in a core's closest cache */
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

/* The mask of 16 elements of a row from column `column` on: the kept ones. */
INLINE __mmask16 kept(const Call *call, int64_t row, int64_t column)
{
    int64_t at = call->places[row] * call->inputs + column;
    const __m512i multipliers[3] = {_mm512_set1_epi32(0x21F0AAAD), _mm512_set1_epi32(0x735A2D97),
                                    _mm512_set1_epi32(0x21F0AAAD)};
    __m512i seed = _mm512_set1_epi32((int)call->seed);
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32((int)at),
                                 _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
#pragma GCC unroll 3
    for (int round = 0; round < 3; round++) {
        x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), multipliers[round]);
        x = _mm512_add_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), seed);
    }
    return _mm512_cmpge_epu32_mask(x, _mm512_set1_epi32((int)call->threshold));
}

/* Loads the kept ones of 16 elements of a row from column `column` on, as fp32, or as bf16 in the lower half of each
 * lane; the others are zero. */
INLINE __m512i load_kept(const Call *call, const int bf16, int64_t row, int64_t column, __mmask16 *mask)
{
    const char *from = call->x + row * call->x_stride + column * size_of(bf16);
    *mask = kept(call, row, column) & first(call->inputs - column);
    return bf16 ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(*mask, from)) : _mm512_maskz_loadu_epi32(*mask, from);
}

/* Stores the first `count` of 16 numbers as elements. */
INLINE void store_first(const Call *call, int64_t count, char *to, int64_t at, __m512 x)
{
    store(call->bf16, first(count), to + at * size_of(call->bf16), x);
}

INLINE void store_one(const Call *call, char *to, int64_t at, float x)
{
    store_first(call, 1, to, at, _mm512_set1_ps(x));
}

/* The bits of element i of an array. */
INLINE uint32_t element_at(const Call *call, const char *from, int64_t i)
{
    return call->bf16 ? ((const uint16_t *)from)[i] : ((const uint32_t *)from)[i];
}

/* --------------------------------------------------------------------------------------------------------- dropout */

/* Writes out [T, K] from x. */
int huarizo_dropout(const Call *call)
{
    __m512 scale = _mm512_set1_ps(call->scale);
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            __mmask16 mask = kept(call, row, k) & first(call->inputs - k);
            const char *from = call->x + row * call->x_stride + k * size_of(call->bf16);
            store_first(call, call->inputs - k, call->out, row * call->inputs + k,
                        _mm512_mul_ps(load(call->bf16, mask, from), scale));
        }
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------ down */

/* A as words along K: [r padded to RANKS][words]. */
static void pack_along_inputs(const Call *call, uint32_t *to, int64_t words)
{
    for (int64_t rank = 0; rank < call->rank; rank++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            __m512 weight = _mm512_maskz_loadu_ps(first(call->inputs - k), call->weight + rank * call->inputs + k);
            store_first(call, call->inputs - k, (char *)(to + rank * words), k, weight);
        }
}

/* ROWS rows of h from row `row` on. kept_rows: [ROWS, words]. */
INLINE void down_rows(const Call *call, const int bf16, const uint32_t *weight, uint32_t *kept_rows, int64_t words,
                      int64_t row)
{
    int64_t count = least(ROWS, call->rows - row);
    __mmask16 mask;
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            __m512i x = load_kept(call, bf16, row + i, k, &mask);
            char *to = (char *)(kept_rows + i * words) + k * size_of(bf16);
            if (bf16)
                _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x));
            else
                _mm512_storeu_si512(to, x);
        }
    for (int64_t rank = 0; rank < call->rank; rank += RANKS) {
        __m512 sum[ROWS][RANKS];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < RANKS; j++)
                sum[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < words; k += LANES) {
            __m512i right[RANKS];
#pragma GCC unroll 4
            for (int j = 0; j < RANKS; j++)
                right[j] = _mm512_loadu_si512(weight + (rank + j) * words + k);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) {
                __m512i left = _mm512_loadu_si512(kept_rows + i * words + k);
#pragma GCC unroll 4
                for (int j = 0; j < RANKS; j++)
                    sum[i][j] = multiply_add(bf16, sum[i][j], left, right[j]);
            }
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < least(RANKS, call->rank - rank); j++)
                store_one(call, call->h, (row + i) * call->rank + rank + j,
                          _mm512_reduce_add_ps(sum[i][j]) * call->scale);
    }
}

/* Writes h [T, r] from x and weight. */
int huarizo_dropout_down(const Call *call)
{
    int64_t words = padded(call->inputs, LANES * 2) / pair_of(call->bf16), blocks = padded(call->rows, ROWS) / ROWS;
    int64_t ranks = padded(call->rank, RANKS);
    uint32_t *space = calloc((ranks + ROWS * call->threads) * words, sizeof *space);
    if (!space)
        return NO_MEMORY;
    pack_along_inputs(call, space, words);
#pragma omp parallel num_threads(call->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        uint32_t *kept_rows = space + (ranks + ROWS * thread) * words;
        for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++)
            if (call->bf16)
                down_rows(call, 1, space, kept_rows, words, block * ROWS);
            else
                down_rows(call, 0, space, kept_rows, words, block * ROWS);
    }
    free(space);
    return OK;
}

/* -------------------------------------------------------------------------------------------------------- gradient */

/* A [words of ranks][K padded] and g_h [T][words of ranks] as words along the ranks; g_h as words along the rows,
 * [words of rows][r]. */
typedef struct { uint32_t *weight, *grads, *row_words; int64_t rank_words, columns; } Packed;

static void pack_gradient(const Call *call, const Packed *p, int64_t thread, int64_t threads)
{
    int64_t pair = pair_of(call->bf16), row_words = (call->rows + pair - 1) / pair;
    for (int64_t i = p->rank_words * thread / threads; i < p->rank_words * (thread + 1) / threads; i++)
        for (int64_t k = 0; k < call->inputs; k += LANES) {
            __m512i word = _mm512_setzero_si512();
            for (int64_t j = 0; j < least(pair, call->rank - i * pair); j++) {
                const float *from = call->weight + (i * pair + j) * call->inputs + k;
                __m512 weight = _mm512_maskz_loadu_ps(first(call->inputs - k), from);
                __m512i element = call->bf16 ? halves_of(weight) : _mm512_castps_si512(weight);
                word = _mm512_or_si512(word, j ? _mm512_slli_epi32(element, 16) : element);
            }
            _mm512_storeu_si512(p->weight + i * p->columns + k, word);
        }
    for (int64_t row = call->rows * thread / threads; row < call->rows * (thread + 1) / threads; row++)
        for (int64_t i = 0; i < p->rank_words; i++) {
            uint32_t word = 0;
            for (int64_t j = 0; j < least(pair, call->rank - i * pair); j++)
                word |= element_at(call, call->h, row * call->rank + i * pair + j) << 16 * j;
            p->grads[row * p->rank_words + i] = word;
        }
    for (int64_t at = row_words * thread / threads; at < row_words * (thread + 1) / threads; at++)
        for (int64_t rank = 0; rank < call->rank; rank++) {
            uint32_t word = 0;
            for (int64_t j = 0; j < least(pair, call->rows - at * pair); j++)
                word |= element_at(call, call->h, (at * pair + j) * call->rank + rank) << 16 * j;
            p->row_words[at * call->rank + rank] = word;
        }
}

/* Computes g_x of up to TALL rows, `count`, and adds their part of g_A, in the 16 columns from `column` on. sums: the
 * sums of g_A in these columns, [r, stride]. */
INLINE void gradient_tile(const Call *call, const int bf16, const Packed *p, float *sums, int64_t stride, int64_t row,
                          int64_t count, int64_t column)
{
    const int pair = bf16 ? 2 : 1;
    __m512i x[TALL];
    __m512 grad[TALL];
    __mmask16 mask[TALL];
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++) {
        grad[i] = _mm512_setzero_ps();
        x[i] = _mm512_setzero_si512();
        if (i < count)
            x[i] = load_kept(call, bf16, row + i, column, &mask[i]);
    }
    if (bf16)
#pragma GCC unroll 4
        for (int i = 0; i < TALL / 2; i++)
            x[i] = _mm512_or_si512(x[2 * i], _mm512_slli_epi32(x[2 * i + 1], 16));
    int64_t words = (count + pair - 1) / pair;
    for (int64_t rank = 0; rank < call->rank; rank++) {
        __m512 sum = _mm512_loadu_ps(sums + rank * stride);
#pragma GCC unroll 8
        for (int i = 0; i < TALL / pair; i++)
            if (i < words)
                sum = multiply_add(bf16, sum, x[i],
                                   _mm512_set1_epi32((int)p->row_words[(row / pair + i) * call->rank + rank]));
        _mm512_storeu_ps(sums + rank * stride, sum);
    }
    for (int64_t word = 0; word < p->rank_words; word++) {
        __m512i weight = _mm512_loadu_si512(p->weight + word * p->columns + column);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; i++)
            if (i < count)
                grad[i] = multiply_add(bf16, grad[i], weight,
                                       _mm512_set1_epi32((int)p->grads[(row + i) * p->rank_words + word]));
    }
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
        if (i < count)
            store_first(call, call->inputs - column, call->out, (row + i) * call->inputs + column,
                        _mm512_maskz_mul_ps(mask[i], grad[i], _mm512_set1_ps(call->scale)));
}

/* Computes g_x and g_A in columns `from` to `to`. sums: [r, stride]. */
INLINE void gradient_columns(const Call *call, const int bf16, const Packed *p, float *sums, int64_t from, int64_t to)
{
    int64_t stride = padded(to - from, 2 * LANES) + LANES, row; /* odd, so that ranks spread over the cache */
    memset(sums, 0, call->rank * stride * sizeof *sums);
    for (row = 0; row + TALL <= call->rows; row += TALL)
        for (int64_t column = from; column < to; column += LANES)
            gradient_tile(call, bf16, p, sums + column - from, stride, row, TALL, column);
    if (row < call->rows)
        for (int64_t column = from; column < to; column += LANES)
            gradient_tile(call, bf16, p, sums + column - from, stride, row, call->rows - row, column);
    for (int64_t rank = 0; rank < call->rank; rank++)
        for (int64_t column = from; column < to; column += LANES)
            _mm512_mask_storeu_ps(call->grad + rank * call->inputs + column, first(to - column),
                                  _mm512_mul_ps(_mm512_loadu_ps(sums + rank * stride + column - from),
                                                _mm512_set1_ps(call->scale)));
}

/* Writes out [T, K] and grad [r, K] from x, weight and h, the gradient of h. */
int huarizo_dropout_down_backward(const Call *call)
{
    int64_t pair = pair_of(call->bf16), row_words = (call->rows + pair - 1) / pair;
    int64_t vectors = padded(call->inputs, LANES) / LANES;
    int64_t most = SUMS / LANES / call->rank < 1 ? 1 : SUMS / LANES / call->rank; /* vectors that are summed together */
    Packed p = {.rank_words = (call->rank + pair - 1) / pair, .columns = (vectors | 1) * LANES};
    int64_t each = call->rank * (most + 2) * LANES;
    uint32_t *space = malloc((p.rank_words * (p.columns + call->rows) + row_words * call->rank + each * call->threads)
                             * sizeof *space);
    if (!space)
        return NO_MEMORY;
    p.weight = space;
    p.grads = p.weight + p.rank_words * p.columns;
    p.row_words = p.grads + p.rank_words * call->rows;
    float *sums = (float *)(p.row_words + row_words * call->rank);
#pragma omp parallel num_threads(call->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        pack_gradient(call, &p, thread, threads);
#pragma omp barrier
        int64_t end = vectors * (thread + 1) / threads;
        for (int64_t at = vectors * thread / threads, step; at < end; at += step) {
            step = least(most, end - at);
            int64_t to = least((at + step) * LANES, call->inputs);
            if (call->bf16)
                gradient_columns(call, 1, &p, sums + thread * each, at * LANES, to);
            else
                gradient_columns(call, 0, &p, sums + thread * each, at * LANES, to);
        }
    }
    free(space);
    return OK;
}
