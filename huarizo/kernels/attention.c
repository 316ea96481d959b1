/* Causal attention over packed examples and its gradient, for CPUs with AVX512.
 *
 * The scores of an example are never stored as a whole. The forward pass takes ROWS queries at a time with all the keys
 * that they see and stores, beside the result, the logarithm of each softmax's sum. From that the backward pass
 * recomputes the probabilities block by block, as in FlashAttention (arXiv 2205.14135):
 *
 *     S = Q K' scale    P = exp(S - lse)    O = P V
 *     dV = P' dO        dP = dO V'          dS = P * (dP - rowsum(dO * O))        dQ = dS K scale    dK = dS' Q scale
 *
 * Every product uses the same small kernel, `product`: ROWS rows times up to COLUMNS columns, summed in registers. Its
 * left operand is read 32 bits at a time and broadcast to a vector, its right operand 16 columns at a time. These 32
 * bits, a `word`, are two neighbours along the summed dimension in bf16 (vdpbf16ps) and one number in fp32 (fma), so
 * the same code serves both; `pair` is the number of elements in a word. Sums, softmax and partial gradients are fp32.
 *
 * Right operands are packed once per example and key/value head, and serve all the query heads that share it:
 *     columns  [panel of COLUMNS tokens][D / pair][COLUMNS]  words along D, for Q K' and dO V'
 *     pairs    [tokens / pair][D]                            words along the tokens, for P V, dS K, P' dO and dS' Q
 * P' and dS' need no transposition: a left operand has one stride for its rows and one for its depth.
 *
 * Each product ends at the diagonal, rounded up to ROWS x 16 scores. One thread computes all of one example and
 * key/value head, in a fixed order, on blocks counted from the example's first token. So results are bit-identical for
 * any number of threads and don't depend on the rest of the row. Padding is zeros, never a neighbour's tokens.
 */

#include "vectors.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROWS = 6,               /* 6 x 4 vectors of sums, 4 of the right operand and 1 of the left fit the 32 registers */
    VECTORS = 4,
    COLUMNS = VECTORS * LANES,
    QUERIES = 16 * ROWS,    /* queries and keys of a block of the backward pass: its scores stay in the closest cache */
    KEYS = 2 * QUERIES,
};
_Static_assert(KEYS % COLUMNS == 0 && KEYS % ROWS == 0 && QUERIES % ROWS == 0, "blocks are made of whole tiles");

typedef uint32_t word;

/* A tensor [heads, tokens, D], D contiguous; strides in bytes. */
typedef struct { char *data; int64_t head, token; } Tensor;

/* The arguments of a call. H query heads share K key/value heads; cu_seqlens: [examples + 1]. */
typedef struct {
    const int32_t *cu_seqlens;
    int64_t examples, tokens, heads, kv_heads, size;
    float scale;
    int32_t bf16, threads;
    Tensor q, k, v, out, grad, grad_q, grad_k, grad_v;
    float *lse; /* [heads, tokens], in base 2 */
} Call;

int64_t huarizo_call_size(void) { return sizeof(Call); }

typedef struct { const word *words; int64_t row, step; } Left;   /* strides in words: of a row, along the depth */
typedef struct { const word *words; int64_t step, panel; } Right; /* strides in words: along the depth, of a panel */

/* ------------------------------------------------------------------------------------------------------- products */

/* c [ROWS, 16 * vectors] = or += left times right, over `depth` words. */
INLINE void tile(const int bf16, const int vectors, int64_t depth, Left left, const word *right, int64_t right_step,
                 float *c, int64_t c_row, int add)
{
    __m512 sum[ROWS][VECTORS];
    const word *upper = left.words, *lower = left.words + ROWS / 2 * left.row;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        __m512i columns[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            columns[j] = _mm512_loadu_si512(right + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const word *at = i < ROWS / 2 ? upper + i * left.row : lower + (i - ROWS / 2) * left.row;
            __m512i spread = _mm512_set1_epi32((int)*at);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sum[i][j] = multiply_add(bf16, sum[i][j], spread, columns[j]);
        }
        upper += left.step;
        lower += left.step;
        right += right_step;
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            _mm512_storeu_ps(c + i * c_row + j * LANES, sum[i][j]);
}

INLINE void tiles(const int bf16, int64_t columns, int64_t depth, Left left, Right right, float *c, int64_t c_row,
                  int add)
{
    for (; columns > 0; columns -= COLUMNS, right.words += right.panel, c += COLUMNS)
        switch (columns / LANES) {
        case 1: tile(bf16, 1, depth, left, right.words, right.step, c, c_row, add); break;
        case 2: tile(bf16, 2, depth, left, right.words, right.step, c, c_row, add); break;
        case 3: tile(bf16, 3, depth, left, right.words, right.step, c, c_row, add); break;
        default: tile(bf16, 4, depth, left, right.words, right.step, c, c_row, add); break;
        }
}

/* c [ROWS, columns] = or += left [ROWS, depth] times right [depth, columns].
 * columns: a multiple of 16; depth: in words. */
static __attribute__((noinline)) void product(int bf16, int64_t columns, int64_t depth, Left left, Right right,
                                              float *c, int64_t c_row, int add)
{
    if (bf16)
        tiles(1, columns, depth, left, right, c, c_row, add);
    else
        tiles(0, columns, depth, left, right, c, c_row, add);
}

/* ---------------------------------------------------------------------------------------------- vectors and packing */

/* 2^x to 3 units in the last place, for x up to about 0: 2^round(x) times a Taylor polynomial of the rest, which is in
 * [-.5, .5]. */
INLINE __m512 power_of_2(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* in this order a NaN stays a NaN */
    __m512 shift = _mm512_set1_ps(12582912.0f); /* 3 << 22: adding it rounds to an integer */
    __m512 whole = _mm512_sub_ps(_mm512_add_ps(x, shift), shift);
    __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530393e-4f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.3333558146e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6181291076e-3f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504108665e-2f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022650696e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718056e-1f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

/* Stores rows of fp32 as elements, times `factor`. from: [count, size]. */
static void store_rows(const Call *call, char *to, int64_t stride, const float *from, int64_t count, float factor)
{
    for (int64_t row = 0; row < count; row++)
        for (int64_t d = 0; d < call->size; d += LANES)
            store(call->bf16, ALL, to + row * stride + d * size_of(call->bf16),
                  _mm512_mul_ps(_mm512_loadu_ps(from + row * call->size + d), _mm512_set1_ps(factor)));
}

/* Left operand: `count` contiguous rows, padded with zeros to a multiple of ROWS. */
static void copy_rows(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    int64_t bytes = call->size * size_of(call->bf16);
    for (int64_t row = 0; row < count; row++)
        for (int64_t at = 0; at < bytes; at += 32)
            _mm256_storeu_si256((__m256i *)((char *)to + row * bytes + at),
                                _mm256_loadu_si256((const __m256i *)(from + row * stride + at)));
    memset((char *)to + count * bytes, 0, (padded(count, ROWS) - count) * bytes);
}

/* The address of a token of a head. */
INLINE char *place(Tensor tensor, int64_t head, int64_t token)
{
    return tensor.data + head * tensor.head + token * tensor.token;
}

/* Prefetches ROWS tokens. In [T, H, D] they can be a page apart, where the hardware prefetcher does not help. */
INLINE void prefetch(const Call *call, Tensor tensor, int64_t head, int64_t token)
{
    const char *from = place(tensor, head, token);
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t at = 0; at < call->size * size_of(call->bf16); at += 64)
            _mm_prefetch(from + i * tensor.token + at, _MM_HINT_T0);
}

/* Right operand `pairs` of `count` tokens, padded with zeros to a multiple of ROWS. */
static void pack_pairs(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    int64_t size = call->size, pair = pair_of(call->bf16), end = padded(count, ROWS);
    memset(to + count / pair * size, 0, (end / pair - count / pair) * size * sizeof(word));
    if (!call->bf16) {
        copy_rows(call, to, from, stride, count);
        return;
    }
    for (int64_t token = 0; token < count; token += 2)
        for (int64_t d = 0; d < size; d += LANES) {
            const char *at = from + token * stride + d * 2;
            __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
            if (token + 1 < count) {
                __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at + stride)));
                both = _mm512_or_si512(both, _mm512_slli_epi32(next, 16));
            }
            _mm512_storeu_si512(to + token / 2 * size + d, both);
        }
}

/* Right operand `columns` of `count` tokens, padded with zeros to a multiple of ROWS and then of 16. */
static void pack_columns(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    int64_t depth = call->size / pair_of(call->bf16);
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)stride));
    for (int64_t token = 0; token < padded(count, ROWS); token += LANES) {
        word *panel = to + token / COLUMNS * COLUMNS * depth + token % COLUMNS;
        for (int64_t k = 0; k < depth; k++)
            _mm512_storeu_si512(panel + k * COLUMNS,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first(count - token), offsets,
                                                            from + token * stride + k * 4, 1));
    }
}

/* -------------------------------------------------------------------------------------------------------- forward */

/* Scores j to j + 15 of row i in base 2, -inf for keys that the row does not see. */
INLINE __m512 scores_at(const float *scores, int64_t stride, int64_t i, int64_t j, int64_t seen, __m512 factor)
{
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i * stride + j), factor);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), first(seen + i - j), x);
}

/* Softmax of ROWS rows of scores, not yet divided by their sums, as elements in `p`. Row i sees its first `seen` + i
 * keys; the rest up to `keys` is zeros. `scores` and `p` are [ROWS, stride]. All rows are computed together, because a
 * single row is one chain of dependent instructions. */
INLINE void softmax_rows(const int bf16, const float *scores, char *p, int64_t stride, int64_t seen, int64_t keys,
                         float scale, float *tops, float *totals)
{
    __m512 factor = _mm512_set1_ps(scale), top[ROWS], total[ROWS];
    int64_t j, whole = seen / LANES * LANES;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        top[i] = _mm512_set1_ps(-INFINITY);
        total[i] = _mm512_setzero_ps();
    }
    for (j = 0; j < whole; j += LANES)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
            top[i] = _mm512_max_ps(top[i], _mm512_mul_ps(_mm512_loadu_ps(scores + i * stride + j), factor));
    for (; j < keys; j += LANES)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
            top[i] = _mm512_max_ps(top[i], scores_at(scores, stride, i, j, seen, factor));
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        tops[i] = _mm512_reduce_max_ps(top[i]);
        top[i] = _mm512_set1_ps(tops[i]);
    }
    for (j = 0; j < whole; j += LANES)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            __m512 x = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i * stride + j), factor, top[i]));
            total[i] = _mm512_add_ps(total[i], x);
            store(bf16, ALL, p + (i * stride + j) * size_of(bf16), x);
        }
    for (; j < keys; j += LANES)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            __m512 x = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i * stride + j), factor, top[i]));
            x = _mm512_maskz_mov_ps(first(seen + i - j), x);
            total[i] = _mm512_add_ps(total[i], x);
            store(bf16, ALL, p + (i * stride + j) * size_of(bf16), x);
        }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
        totals[i] = _mm512_reduce_add_ps(total[i]);
}

/* Words of one thread's workspace for an example of `length` tokens. */
static int64_t forward_words(const Call *call, int64_t length)
{
    int64_t keys = padded(length, COLUMNS) + COLUMNS;
    return 2 * keys * call->size + 2 * ROWS * keys + 2 * ROWS * call->size;
}

/* All query heads that share key/value head `kv` of the example at tokens begin to end. */
static void forward_item(const Call *call, word *space, int64_t begin, int64_t end, int64_t kv)
{
    int64_t length = end - begin, size = call->size, pair = pair_of(call->bf16), depth = size / pair;
    int64_t keys = padded(length, COLUMNS) + COLUMNS, groups = call->heads / call->kv_heads;
    word *k_columns = space, *v_pairs = k_columns + keys * size, *q = v_pairs + keys * size;
    word *p = q + ROWS * size;
    float *scores = (float *)(p + ROWS * keys), *sums = scores + ROWS * keys;
    float scale = call->scale * 1.4426950408889634f;
    pack_columns(call, k_columns, place(call->k, kv, begin), call->k.token, length);
    pack_pairs(call, v_pairs, place(call->v, kv, begin), call->v.token, length);
    for (int64_t row = 0; row < length; row += ROWS)
        for (int64_t head = kv * groups; head < (kv + 1) * groups; head++) {
            int64_t count = least(ROWS, length - row), token = begin + row, last = head + 1 == (kv + 1) * groups;
            copy_rows(call, q, place(call->q, head, token), call->q.token, count);
            prefetch(call, call->q, last ? kv * groups : head + 1, last ? token + ROWS : token);
            product(call->bf16, padded(row + ROWS, LANES), depth, (Left){q, depth, 1},
                    (Right){k_columns, COLUMNS, COLUMNS * depth}, scores, keys, 0);
            float top[ROWS], total[ROWS];
            if (call->bf16)
                softmax_rows(1, scores, (char *)p, keys, row + 1, padded(row + ROWS, LANES), scale, top, total);
            else
                softmax_rows(0, scores, (char *)p, keys, row + 1, padded(row + ROWS, LANES), scale, top, total);
            for (int64_t i = 0; i < count; i++)
                call->lse[head * call->tokens + token + i] = top[i] + log2f(total[i]);
            product(call->bf16, size, (row + ROWS) / pair, (Left){p, keys / pair, 1}, (Right){v_pairs, size, COLUMNS},
                    sums, size, 0);
            for (int64_t i = 0; i < count; i++)
                store_rows(call, place(call->out, head, token + i), 0, sums + i * size, 1, 1.0f / total[i]);
        }
}

/* ------------------------------------------------------------------------------------------------------- backward */

/* One thread's workspace: the example's packed keys and values, their gradients, and a block of one head's queries. */
typedef struct {
    word *k_columns, *k_pairs, *v_columns;
    float *grad_k, *grad_v;                     /* [length, D] */
    word *q, *grad, *q_pairs, *grad_pairs;      /* of QUERIES tokens */
    float *grad_q;                              /* [QUERIES, D] */
    float *scores, *grad_p;                     /* [ROWS, KEYS] */
    word *p_pairs, *grad_s_pairs, *grad_s;      /* [QUERIES / pair, KEYS] twice, and [QUERIES, KEYS / pair] */
    float lse[QUERIES], delta[QUERIES];
    int64_t next_head, next_token;              /* where the next block begins */
} Backward;

static int64_t backward_words(const Call *call, int64_t length)
{
    return 5 * padded(length, KEYS) * call->size + 5 * QUERIES * call->size + 2 * ROWS * KEYS + 3 * QUERIES * KEYS;
}

static void lay_out(const Call *call, word *space, int64_t length, Backward *b)
{
    int64_t all = padded(length, KEYS) * call->size, block = QUERIES * call->size;
    b->k_columns = space;
    b->k_pairs = space + all;
    b->v_columns = space + 2 * all;
    b->grad_k = (float *)(space + 3 * all);
    b->grad_v = (float *)(space + 4 * all);
    space += 5 * all;
    b->q = space;
    b->grad = space + block;
    b->q_pairs = space + 2 * block;
    b->grad_pairs = space + 3 * block;
    b->grad_q = (float *)(space + 4 * block);
    space += 5 * block;
    b->scores = (float *)space;
    b->grad_p = b->scores + ROWS * KEYS;
    b->p_pairs = space + 2 * ROWS * KEYS;
    b->grad_s_pairs = b->p_pairs + QUERIES * KEYS;
    b->grad_s = call->bf16 ? b->grad_s_pairs + QUERIES * KEYS : b->grad_s_pairs; /* in fp32 both layouts are the same */
}

/* Stores rows x and y as 16 words for `pairs`; in bf16 also each in its own row of a left operand. */
INLINE void store_pair(int bf16, word *pairs, __m512 x, __m512 y, word *row_x, word *row_y)
{
#ifdef __AVX512BF16__
    if (bf16) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y, x);
        __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, both));
        if (row_x) {
            _mm256_storeu_si256((__m256i *)row_x, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i *)row_y, _mm512_extracti64x4_epi64(both, 1));
        }
        return;
    }
#endif
    _mm512_storeu_ps(pairs, x);
    _mm512_storeu_ps(pairs + KEYS, y);
}

/* P and dS of 16 keys from j on and queries `row` and `row` + 1 of the block, at `i` and `i` + 1 of scores and grad_p.
 * Query `row` sees the block's first `seen` keys; above the diagonal are zeros. */
INLINE void make_pair(const int bf16, const int whole, const Backward *b, int64_t row, int64_t i, int64_t j,
                      int64_t seen, __m512 factor)
{
    __m512 p[2], grad_s[2];
#pragma GCC unroll 2
    for (int y = 0; y < 2; y++) {
        int64_t at = (i + y) * KEYS + j;
        __m512 lse = _mm512_set1_ps(b->lse[row + y]), delta = _mm512_set1_ps(b->delta[row + y]);
        p[y] = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(b->scores + at), factor, lse));
        if (!whole)
            p[y] = _mm512_maskz_mov_ps(first(seen + y - j), p[y]);
        grad_s[y] = _mm512_mul_ps(p[y], _mm512_sub_ps(_mm512_loadu_ps(b->grad_p + at), delta));
    }
    int64_t at = row / (bf16 ? 2 : 1) * KEYS + j;
    word *left = b->grad_s + row * (KEYS / 2) + j / 2;
    store_pair(bf16, b->p_pairs + at, p[0], p[1], NULL, NULL);
    store_pair(bf16, b->grad_s_pairs + at, grad_s[0], grad_s[1], left, left + KEYS / 2);
}

/* P and dS of ROWS queries, from query `row` of the block on, and the block's first `keys` keys, from scores and dP. */
INLINE void make_rows(const int bf16, const Backward *b, int64_t row, int64_t keys, int64_t seen, float scale)
{
    __m512 factor = _mm512_set1_ps(scale);
    int64_t j, whole = least(keys, seen / LANES * LANES);
    for (j = 0; j < whole; j += LANES)
#pragma GCC unroll 3
        for (int64_t i = 0; i < ROWS; i += 2)
            make_pair(bf16, 1, b, row + i, i, j, seen + i, factor);
    for (; j < keys; j += LANES)
#pragma GCC unroll 3
        for (int64_t i = 0; i < ROWS; i += 2)
            make_pair(bf16, 0, b, row + i, i, j, seen + i, factor);
}

/* Adds the contribution of `count` queries at `query` and the keys from `key` on to all three gradients. Both are
 * counted from the example's first token, and query >= key. */
static void backward_block(const Call *call, const Backward *b, int64_t query, int64_t count, int64_t key)
{
    int64_t size = call->size, pair = pair_of(call->bf16), depth = size / pair, rows = padded(count, ROWS);
    int64_t ahead = query - key; /* keys of the block before the first query */
    Right k = {b->k_columns + key * depth, COLUMNS, COLUMNS * depth};
    Right v = {b->v_columns + key * depth, COLUMNS, COLUMNS * depth};
    Right k_pairs = {b->k_pairs + key / pair * size, size, COLUMNS};
    for (int64_t row = 0; row < rows; row += ROWS) {
        int64_t keys = least(KEYS, padded(ahead + row + ROWS, LANES));
        if (key == 0) {
            prefetch(call, call->q, b->next_head, b->next_token + row);
            prefetch(call, call->grad, b->next_head, b->next_token + row);
            prefetch(call, call->out, b->next_head, b->next_token + row);
        }
        product(call->bf16, keys, depth, (Left){b->q + row * depth, depth, 1}, k, b->scores, KEYS, 0);
        product(call->bf16, keys, depth, (Left){b->grad + row * depth, depth, 1}, v, b->grad_p, KEYS, 0);
        if (call->bf16)
            make_rows(1, b, row, keys, ahead + row + 1, call->scale * 1.4426950408889634f);
        else
            make_rows(0, b, row, keys, ahead + row + 1, call->scale * 1.4426950408889634f);
        product(call->bf16, size, least(KEYS, ahead + row + ROWS) / pair,
                (Left){b->grad_s + row * (KEYS / pair), KEYS / pair, 1}, k_pairs, b->grad_q + row * size, size, 1);
    }
    for (int64_t n = 0; n < least(KEYS, ahead + rows); n += ROWS) {
        int64_t from = n > ahead ? n - ahead : 0; /* the first query that sees any of these keys */
        int64_t at = from / pair * KEYS + n, words = (rows - from) / pair;
        product(call->bf16, size, words, (Left){b->p_pairs + at, 1, KEYS},
                (Right){b->grad_pairs + from / pair * size, size, COLUMNS}, b->grad_v + (key + n) * size, size, 1);
        product(call->bf16, size, words, (Left){b->grad_s_pairs + at, 1, KEYS},
                (Right){b->q_pairs + from / pair * size, size, COLUMNS}, b->grad_k + (key + n) * size, size, 1);
    }
}

/* Reads `count` queries of `head` from `token` of the row on, with their gradients and lse, and computes
 * rowsum(dO * O). */
static void read_queries(const Call *call, Backward *b, int64_t head, int64_t token, int64_t count)
{
    const char *q = place(call->q, head, token);
    const char *grad = place(call->grad, head, token);
    const char *out = place(call->out, head, token);
    copy_rows(call, b->q, q, call->q.token, count);
    copy_rows(call, b->grad, grad, call->grad.token, count);
    pack_pairs(call, b->q_pairs, q, call->q.token, count);
    pack_pairs(call, b->grad_pairs, grad, call->grad.token, count);
    memset(b->grad_q, 0, QUERIES * call->size * sizeof(float));
    memset(b->lse, 0, sizeof b->lse);
    memset(b->delta, 0, sizeof b->delta);
    memcpy(b->lse, call->lse + head * call->tokens + token, count * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < call->size; d += LANES) {
            int64_t at = d * size_of(call->bf16);
            sum = _mm512_fmadd_ps(load(call->bf16, ALL, grad + i * call->grad.token + at),
                                  load(call->bf16, ALL, out + i * call->out.token + at), sum);
        }
        b->delta[i] = _mm512_reduce_add_ps(sum);
    }
}

static void backward_item(const Call *call, word *space, int64_t begin, int64_t end, int64_t kv)
{
    int64_t length = end - begin, groups = call->heads / call->kv_heads;
    Backward b;
    lay_out(call, space, length, &b);
    const char *k = place(call->k, kv, begin);
    const char *v = place(call->v, kv, begin);
    pack_columns(call, b.k_columns, k, call->k.token, length);
    pack_columns(call, b.v_columns, v, call->v.token, length);
    pack_pairs(call, b.k_pairs, k, call->k.token, length);
    memset(b.grad_k, 0, padded(length, ROWS) * call->size * sizeof(float));
    memset(b.grad_v, 0, padded(length, ROWS) * call->size * sizeof(float));
    for (int64_t query = 0; query < length; query += QUERIES)
        for (int64_t head = kv * groups; head < (kv + 1) * groups; head++) {
            int64_t count = least(QUERIES, length - query), last = head + 1 == (kv + 1) * groups;
            read_queries(call, &b, head, begin + query, count);
            b.next_head = last ? kv * groups : head + 1;
            b.next_token = begin + (last ? query + QUERIES : query);
            for (int64_t key = 0; key <= query; key += KEYS)
                backward_block(call, &b, query, count, key);
            store_rows(call, place(call->grad_q, head, begin + query), call->grad_q.token, b.grad_q, count,
                       call->scale);
        }
    store_rows(call, place(call->grad_k, kv, begin), call->grad_k.token, b.grad_k, length, call->scale);
    store_rows(call, place(call->grad_v, kv, begin), call->grad_v.token, b.grad_v, length, 1.0f);
}

/* -------------------------------------------------------------------------------------------------------- threads */

typedef struct { int64_t begin, end; } Example;

static int longest_first(const void *a, const void *b)
{
    const Example *x = a, *y = b;
    int64_t difference = (y->end - y->begin) - (x->end - x->begin);
    return difference ? (difference > 0 ? 1 : -1) : (x->begin > y->begin) - (x->begin < y->begin);
}

/* Runs `item` for every example and key/value head, the longest first, each on the next free thread. */
static int run(const Call *call, int64_t (*words)(const Call *, int64_t),
               void (*item)(const Call *, word *, int64_t, int64_t, int64_t))
{
    int64_t count = call->examples;
    if (count < 0 || call->cu_seqlens[0] != 0 || call->cu_seqlens[count] != call->tokens)
        return BAD_BOUNDARIES;
    Example *examples = malloc((count + 1) * sizeof *examples);
    if (!examples)
        return NO_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        examples[i] = (Example){call->cu_seqlens[i], call->cu_seqlens[i + 1]};
        if (examples[i].end < examples[i].begin) {
            free(examples);
            return BAD_BOUNDARIES;
        }
    }
    qsort(examples, count, sizeof *examples, longest_first);
    int64_t each = count ? padded(words(call, examples[0].end - examples[0].begin), LANES) : 0;
    word *space = aligned_alloc(64, (each * call->threads + LANES) * sizeof(word));
    if (!space) {
        free(examples);
        return NO_MEMORY;
    }
#pragma omp parallel num_threads(call->threads)
    {
        word *own = space + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * call->kv_heads; i++) {
            Example example = examples[i / call->kv_heads];
            item(call, own, example.begin, example.end, i % call->kv_heads);
        }
    }
    free(space);
    free(examples);
    return OK;
}

/* Writes out and lse from q, k and v. */
int huarizo_attention_forward(const Call *call) { return run(call, forward_words, forward_item); }

/* Writes grad_q, grad_k and grad_v from q, k, v, out, lse and grad. */
int huarizo_attention_backward(const Call *call) { return run(call, backward_words, backward_item); }
