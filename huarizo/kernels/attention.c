/* Causal attention over packed examples and its gradient.
 *
 * The scores of an example are never stored as a whole. The forward pass takes ROWS queries at a time with all the keys
 * that they see and stores, beside the result, the logarithm of each softmax's sum. From that the backward pass
 * recomputes the probabilities block by block, as in FlashAttention (arXiv 2205.14135):
 *
 *     S = Q K' scale    P = exp(S - lse)    O = P V
 *     dV = P' dO        dP = dO V'          dS = P * (dP - rowsum(dO * O))        dQ = dS K scale    dK = dS' Q scale
 *
 * Every product uses the same small kernel, `product`: ROWS rows times up to COLUMNS columns, summed in registers. Its
 * left operand is read 32 bits at a time and broadcast to a vector, its right operand LANES columns at a time. These 32
 * bits, a `word`, are one number in fp32, or two neighbours along the summed dimension in bf16 where the instruction set
 * multiplies such pairs (vdpbf16ps), so the same code serves both; `pair` is the number of elements in a word. Elsewhere
 * bf16 becomes fp32 when an operand is packed. Sums, softmax and partial gradients are fp32.
 *
 * Right operands are packed once per example and key/value head, and serve all the query heads that share it:
 *     columns  [panel of COLUMNS tokens][D / pair][COLUMNS]  words along D, for Q K' and dO V'
 *     pairs    [tokens / pair][D]                            words along the tokens, for P V, dS K, P' dO and dS' Q
 * P' and dS' need no transposition: a left operand has one stride for its rows and one for its depth.
 *
 * With a cap c the scores are S = c tanh(Q K' scale / c), and dS has the factor 1 - (S / c)^2. A sink is one more score
 * of every query of a head, whose probability is dropped: it is part of lse, and of nothing else. With a window query i
 * sees the keys i - window + 1 to i; what lies before them is skipped by whole panels and blocks.
 *
 * Each product ends at the diagonal, rounded up to ROWS x LANES scores. One thread computes all of one example and
 * key/value head, in a fixed order, on blocks counted from the example's first token. So results are bit-identical for
 * any number of threads and don't depend on the rest of the row. Padding is zeros, never a neighbour's tokens.
 */

#include "threads.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

enum {
    ROWS = 6,
    VECTORS = REGISTERS == 32 ? 4 : 2, /* ROWS x VECTORS sums, VECTORS of the right operand and 1 of the left fit */
    COLUMNS = VECTORS * LANES,
    TOGETHER = REGISTERS == 32 ? ROWS : 2, /* rows whose softmax is computed together */
    QUERIES = 16 * ROWS,    /* queries and keys of a block of the backward pass: its scores stay in the closest cache */
    KEYS = 2 * QUERIES,
    UNLIMITED = INT32_MAX,  /* a window that every example fits */
};
_Static_assert(KEYS % COLUMNS == 0 && KEYS % ROWS == 0 && QUERIES % ROWS == 0, "blocks are made of whole tiles");
_Static_assert(16 % LANES == 0 && ROWS % TOGETHER == 0, "a head is whole vectors");

#define LOG2_E 1.4426950408889634f

typedef uint32_t word;

/* A tensor [heads, tokens, D], D contiguous; strides in bytes. */
typedef struct { char *data; int64_t head, token; } Tensor;

/* The arguments of a call. H query heads share K key/value heads; cu_seqlens: [examples + 1]. */
typedef struct {
    const int32_t *cu_seqlens;
    int64_t examples, tokens, heads, kv_heads, size;
    int64_t window;     /* 0 for none */
    float scale, cap;   /* cap: 0 for none */
    int32_t bf16, threads;
    Tensor q, k, v, out, grad, grad_q, grad_k, grad_v;
    float *lse;         /* [heads, tokens], in base 2 */
    const float *sinks; /* [heads], or NULL */
} Call;

int64_t huarizo_call_size(void) { return sizeof(Call); }

typedef struct { const word *words; int64_t row, step; } Left;   /* strides in words: of a row, along the depth */
typedef struct { const word *words; int64_t step, panel; } Right; /* strides in words: along the depth, of a panel */

/* Which keys the rows of a block see: row i those at `from` + i and after, before `to` + i. They are counted from the
 * block's first key, and there are scores of `end` keys. */
typedef struct { int64_t from, to, end; } Span;

/* Whether operands are pairs of bf16. */
INLINE int paired(const Call *call) { return HALVES && call->bf16; }

INLINE int64_t window_of(const Call *call) { return call->window ? call->window : UNLIMITED; }

/* Whether one of `rows` rows does not see key 0. */
INLINE int is_cut(Span span, int64_t rows) { return span.from + rows > 1; }

/* Where scores begin if `key` is the first that is seen: where a panel of columns does, and no later than the ROWS keys
 * whose dK and dV are computed together with its own. */
INLINE int64_t first_panel(int64_t key) { return key > 0 ? key / ROWS * ROWS / COLUMNS * COLUMNS : 0; }

/* What a score, or with a cap its tanh, is multiplied with to be in base 2. */
INLINE float factor_of(const Call *call) { return (call->cap ? call->cap : call->scale) * LOG2_E; }

/* ------------------------------------------------------------------------------------------------------- products */

/* c [ROWS, LANES * vectors] = or += left times right, over `depth` words. */
INLINE void tile(const int pairs, const int vectors, int64_t depth, Left left, const word *right, int64_t right_step,
                 float *c, int64_t c_row, int add)
{
    vec sum[ROWS][VECTORS];
    const word *upper = left.words, *lower = left.words + ROWS / 2 * left.row;
    UNROLLED for (int i = 0; i < ROWS; i++)
        UNROLLED for (int j = 0; j < vectors; j++)
            sum[i][j] = add ? load_vec(c + i * c_row + j * LANES) : set(0);
    for (int64_t k = 0; k < depth; k++) {
        ints columns[VECTORS];
        UNROLLED for (int j = 0; j < vectors; j++)
            columns[j] = load_ints(right + j * LANES);
        UNROLLED for (int i = 0; i < ROWS; i++) {
            const word *at = i < ROWS / 2 ? upper + i * left.row : lower + (i - ROWS / 2) * left.row;
            ints spread = set_int((int32_t)*at);
            UNROLLED for (int j = 0; j < vectors; j++)
                sum[i][j] = multiply_add(pairs, sum[i][j], spread, columns[j]);
        }
        upper += left.step;
        lower += left.step;
        right += right_step;
    }
    UNROLLED for (int i = 0; i < ROWS; i++)
        UNROLLED for (int j = 0; j < vectors; j++)
            store_vec(c + i * c_row + j * LANES, sum[i][j]);
}

INLINE void tiles(const int pairs, int64_t columns, int64_t depth, Left left, Right right, float *c, int64_t c_row,
                  int add)
{
    for (; columns > 0; columns -= COLUMNS, right.words += right.panel, c += COLUMNS)
        if (columns >= COLUMNS)
            tile(pairs, VECTORS, depth, left, right.words, right.step, c, c_row, add);
        else if (VECTORS > 3 && columns == 3 * LANES)
            tile(pairs, 3, depth, left, right.words, right.step, c, c_row, add);
        else if (VECTORS > 2 && columns == 2 * LANES)
            tile(pairs, 2, depth, left, right.words, right.step, c, c_row, add);
        else
            tile(pairs, 1, depth, left, right.words, right.step, c, c_row, add);
}

/* c [ROWS, columns] = or += left [ROWS, depth] times right [depth, columns].
 * columns: a multiple of LANES; depth: in words. */
static __attribute__((noinline)) void product(int pairs, int64_t columns, int64_t depth, Left left, Right right,
                                              float *c, int64_t c_row, int add)
{
    if (pairs)
        tiles(HALVES, columns, depth, left, right, c, c_row, add);
    else
        tiles(0, columns, depth, left, right, c, c_row, add);
}

/* ---------------------------------------------------------------------------------------------- vectors and packing */

/* 2^x to 3 units in the last place, for x up to about 0, and 0 below about 2^-127: 2^round(x) times a Taylor polynomial
 * of the rest, which is in [-.5, .5]. */
INLINE vec power_of_2(vec x)
{
    x = larger(set(LEAST_POWER), x); /* in this order a NaN stays a NaN */
    vec shift = set(12582912.0f); /* 3 << 22: adding it rounds to an integer */
    vec whole = (x + shift) - shift;
    vec rest = x - whole;
    vec y = set(1.5403530393e-4f);
    y = fused(y, rest, set(1.3333558146e-3f));
    y = fused(y, rest, set(9.6181291076e-3f));
    y = fused(y, rest, set(5.5504108665e-2f));
    y = fused(y, rest, set(2.4022650696e-1f));
    y = fused(y, rest, set(6.9314718056e-1f));
    y = fused(y, rest, set(1.0f));
    return times_power(y, whole);
}

/* To 2 units in the last place. Near 0 a polynomial, elsewhere (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x. The
 * polynomial is that of Cephes' tanhf. */
INLINE vec tanh_of(vec x)
{
    vec size = (vec)magnitude(x), square = x * x;
    vec power = power_of_2(size * set(-2.8853900818f));
    vec far = (set(1.0f) - power) / (set(1.0f) + power);
    vec near = set(-5.70498872745e-3f);
    near = fused(near, square, set(2.06390887954e-2f));
    near = fused(near, square, set(-5.37397155531e-2f));
    near = fused(near, square, set(1.33314422036e-1f));
    near = fused(near, square, set(-3.33332819422e-1f));
    near = fused(near * square, x, x);
    far = (vec)((ints)far | ((ints)x ^ magnitude(x)));
    return choose(above(size, set(0.625f)), far, near); /* a NaN stays one */
}

/* Replaces scores [ROWS, keys] by tanh(score * factor). */
static void bend(float *scores, int64_t stride, int64_t keys, float factor)
{
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t j = 0; j < keys; j += LANES)
            store_vec(scores + i * stride + j, tanh_of(load_vec(scores + i * stride + j) * set(factor)));
}

/* Stores rows of fp32 as elements, times `factor`. from: [count, size]. */
static void store_rows(const Call *call, char *to, int64_t stride, const float *from, int64_t count, float factor)
{
    for (int64_t row = 0; row < count; row++)
        for (int64_t d = 0; d < call->size; d += LANES)
            store(call->bf16, to + row * stride + d * size_of(call->bf16),
                  load_vec(from + row * call->size + d) * set(factor));
}

/* The first `count` words, or LANES if there are more, of a row of elements, from word `at` on. */
INLINE ints load_words(const Call *call, const char *row, int64_t at, int64_t count)
{
    if (call->bf16 && !HALVES)
        return (ints)load(1, row + at * size_of(1));
    return count >= LANES ? load_ints(row + at * WORD) : load_first(row + at * WORD, count);
}

/* Left operand: `count` contiguous rows, padded with zeros to a multiple of ROWS. */
static void copy_rows(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    int64_t depth = call->size / pair_of(paired(call));
    for (int64_t row = 0; row < count; row++)
        if (call->bf16 && !HALVES)
            for (int64_t k = 0; k < depth; k += LANES)
                store_ints(to + row * depth + k, load_words(call, from + row * stride, k, LANES));
        else
            for (int64_t k = 0; k < depth; k += 8)
                memcpy(to + row * depth + k, from + row * stride + k * WORD, 8 * WORD);
    memset(to + count * depth, 0, (padded(count, ROWS) - count) * depth * WORD);
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
            __builtin_prefetch(from + i * tensor.token + at);
}

/* Right operand `pairs` of `count` tokens, padded with zeros to a multiple of ROWS. */
static void pack_pairs(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    if (!paired(call)) {
        copy_rows(call, to, from, stride, count);
        return;
    }
    int64_t size = call->size;
    for (int64_t token = 0; token < count; token += 2)
        for (int64_t d = 0; d < size; d += LANES) {
            const char *at = from + token * stride + d * 2;
            ints next = token + 1 < count ? load_halves(at + stride) : set_int(0);
            store_ints(to + token / 2 * size + d, load_halves(at) | next << 16);
        }
    int64_t end = padded(count, 2) / 2 * size;
    memset(to + end, 0, (padded(count, ROWS) / 2 * size - end) * WORD);
}

/* Right operand `columns` of `count` tokens, padded with zeros to a multiple of ROWS and then of LANES. */
static void pack_columns(const Call *call, word *to, const char *from, int64_t stride, int64_t count)
{
    int64_t depth = call->size / pair_of(paired(call));
    for (int64_t token = 0; token < padded(count, ROWS); token += LANES) {
        word *panel = to + token / COLUMNS * COLUMNS * depth + token % COLUMNS;
        for (int64_t k = 0; k < depth; k += LANES) {
            ints block[LANES];
            UNROLLED for (int i = 0; i < LANES; i++)
                block[i] = token + i < count ? load_words(call, from + (token + i) * stride, k, depth - k) : set_int(0);
            transpose(block);
            UNROLLED for (int i = 0; i < LANES; i++)
                if (k + i < depth)
                    store_ints(panel + (k + i) * COLUMNS, block[i]);
        }
    }
}

/* -------------------------------------------------------------------------------------------------------- forward */

/* x in the lanes of the keys from j on that row i sees, and `other` in the rest. cut: whether `from` matters. */
INLINE vec seen_of(const int cut, Span span, int64_t i, int64_t j, vec x, vec other)
{
    x = choose(first(span.to + i - j), x, other);
    return cut ? choose(first(span.from + i - j), other, x) : x;
}

/* LANES scores of row i from j on, in base 2, -inf for keys that the row does not see. */
INLINE vec scores_at(const int cut, const float *scores, int64_t stride, Span span, int64_t i, int64_t j, vec factor)
{
    return seen_of(cut, span, i, j, load_vec(scores + i * stride + j) * factor, set(-INFINITY));
}

/* Softmax of TOGETHER rows of scores, not yet divided by their sums, as elements of an operand in `p`, with zeros for
 * keys that a row does not see. `scores` and `p` are [TOGETHER, stride]. Several rows are computed together, because a
 * single row is one chain of dependent instructions. cut: whether a row does not see key 0; sink: -inf for none. */
INLINE void softmax_rows(const int pairs, const int cut, const float *scores, char *p, int64_t stride, Span span,
                         float scale, float sink, float *tops, float *totals)
{
    vec factor = set(scale), top[TOGETHER], total[TOGETHER];
    int64_t j, whole = span.to / LANES * LANES;
    int64_t edge = cut ? least(span.end, padded(span.from + TOGETHER - 1, LANES)) : 0;
    UNROLLED for (int i = 0; i < TOGETHER; i++) {
        top[i] = set(sink);
        total[i] = set(0);
    }
    for (j = 0; j < edge; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++)
            top[i] = larger(top[i], scores_at(1, scores, stride, span, i, j, factor));
    for (; j < whole; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++)
            top[i] = larger(top[i], load_vec(scores + i * stride + j) * factor);
    for (; j < span.end; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++)
            top[i] = larger(top[i], scores_at(0, scores, stride, span, i, j, factor));
    UNROLLED for (int i = 0; i < TOGETHER; i++) {
        tops[i] = largest_of(top[i]);
        top[i] = set(-tops[i]);
    }
    for (j = 0; j < edge; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++) {
            vec x = power_of_2(fused(load_vec(scores + i * stride + j), factor, top[i]));
            x = seen_of(1, span, i, j, x, set(0));
            total[i] = total[i] + x;
            store(pairs, p + (i * stride + j) * size_of(pairs), x);
        }
    for (; j < whole; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++) {
            vec x = power_of_2(fused(load_vec(scores + i * stride + j), factor, top[i]));
            total[i] = total[i] + x;
            store(pairs, p + (i * stride + j) * size_of(pairs), x);
        }
    for (; j < span.end; j += LANES)
        UNROLLED for (int i = 0; i < TOGETHER; i++) {
            vec x = power_of_2(fused(load_vec(scores + i * stride + j), factor, top[i]));
            x = seen_of(0, span, i, j, x, set(0));
            total[i] = total[i] + x;
            store(pairs, p + (i * stride + j) * size_of(pairs), x);
        }
    UNROLLED for (int i = 0; i < TOGETHER; i++)
        totals[i] = sum_of(total[i]);
    if (sink != -INFINITY)
        for (int i = 0; i < TOGETHER; i++)
            totals[i] += power_of_2(set(sink - tops[i]))[0];
}

/* Softmax of ROWS rows. */
INLINE void softmax(const int pairs, const int cut, const float *scores, char *p, int64_t stride, Span span, float scale,
                    float sink, float *tops, float *totals)
{
    for (int i = 0; i < ROWS; i += TOGETHER)
        softmax_rows(pairs, cut, scores + i * stride, p + i * stride * size_of(pairs), stride,
                     (Span){span.from + i, span.to + i, span.end}, scale, sink, tops + i, totals + i);
}

/* Words of one thread's workspace for an example of `length` tokens. */
static int64_t forward_words(const Call *call, int64_t length)
{
    int64_t keys = padded(length, COLUMNS) + COLUMNS;
    return 2 * keys * call->size + 2 * ROWS * keys + 2 * ROWS * call->size;
}

/* The softmax of ROWS rows of a head's scores; see softmax_rows. Scores are changed if there is a cap. */
static void make_probabilities(const Call *call, int64_t head, float *scores, char *p, int64_t stride, Span span,
                               float *tops, float *totals)
{
    float factor = factor_of(call), sink = call->sinks ? call->sinks[head] * LOG2_E : -INFINITY;
    if (call->cap)
        bend(scores, stride, span.end, call->scale / call->cap);
    if (is_cut(span, ROWS)) {
        if (paired(call))
            softmax(HALVES, 1, scores, p, stride, span, factor, sink, tops, totals);
        else
            softmax(0, 1, scores, p, stride, span, factor, sink, tops, totals);
    } else if (paired(call))
        softmax(HALVES, 0, scores, p, stride, span, factor, sink, tops, totals);
    else
        softmax(0, 0, scores, p, stride, span, factor, sink, tops, totals);
}

/* All query heads that share key/value head `kv` of the example at tokens begin to end. */
static void forward_item(const Call *call, word *space, int64_t begin, int64_t end, int64_t kv)
{
    int64_t length = end - begin, size = call->size, pair = pair_of(paired(call)), depth = size / pair;
    int64_t keys = padded(length, COLUMNS) + COLUMNS, groups = call->heads / call->kv_heads;
    word *k_columns = space, *v_pairs = k_columns + keys * size, *q = v_pairs + keys * size;
    word *p = q + ROWS * size;
    float *scores = (float *)(p + ROWS * keys), *sums = scores + ROWS * keys;
    pack_columns(call, k_columns, place(call->k, kv, begin), call->k.token, length);
    pack_pairs(call, v_pairs, place(call->v, kv, begin), call->v.token, length);
    for (int64_t row = 0; row < length; row += ROWS) {
        int64_t count = least(ROWS, length - row), token = begin + row;
        int64_t key = first_panel(row + 1 - window_of(call)); /* from which on there are scores */
        Span span = {row + 1 - window_of(call) - key, row + 1 - key, padded(row + ROWS, LANES) - key};
        Right k = {k_columns + key * depth, COLUMNS, COLUMNS * depth};
        Right v = {v_pairs + key / pair * size, size, COLUMNS};
        for (int64_t head = kv * groups; head < (kv + 1) * groups; head++) {
            int64_t last = head + 1 == (kv + 1) * groups;
            float top[ROWS], total[ROWS];
            copy_rows(call, q, place(call->q, head, token), call->q.token, count);
            prefetch(call, call->q, last ? kv * groups : head + 1, last ? token + ROWS : token);
            product(paired(call), span.end, depth, (Left){q, depth, 1}, k, scores, keys, 0);
            make_probabilities(call, head, scores, (char *)p, keys, span, top, total);
            for (int64_t i = 0; i < count; i++)
                call->lse[head * call->tokens + token + i] = top[i] + log2f(total[i]);
            product(paired(call), size, (row + ROWS - key) / pair, (Left){p, keys / pair, 1}, v, sums, size, 0);
            for (int64_t i = 0; i < count; i++)
                store_rows(call, place(call->out, head, token + i), 0, sums + i * size, 1, 1.0f / total[i]);
        }
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
    int64_t first_key;                          /* of the first block that the queries see */
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
    b->q_pairs = paired(call) ? space + 2 * block : b->q; /* the layouts differ only in pairs */
    b->grad_pairs = paired(call) ? space + 3 * block : b->grad;
    b->grad_q = (float *)(space + 4 * block);
    space += 5 * block;
    b->scores = (float *)space;
    b->grad_p = b->scores + ROWS * KEYS;
    b->p_pairs = space + 2 * ROWS * KEYS;
    b->grad_s_pairs = b->p_pairs + QUERIES * KEYS;
    b->grad_s = paired(call) ? b->grad_s_pairs + QUERIES * KEYS : b->grad_s_pairs;
}

/* How the scores of a block become P and dS, known when its code is compiled. */
typedef struct { int pairs, cut, capped; } Kind;
typedef enum { INSIDE, AT_THE_END, AT_BOTH_ENDS } Part; /* of the keys that a row sees */

/* P and dS of LANES keys from j on and queries `row` and `row` + 1 of the block, at `i` and `i` + 1 of scores and
 * grad_p, with zeros for keys that a query does not see. `span` is that of query `row`. */
INLINE void make_pair(const Kind kind, const Part part, const Backward *b, int64_t row, int64_t i, int64_t j, Span span,
                      vec factor)
{
    vec p[2], grad_s[2];
    UNROLLED for (int y = 0; y < 2; y++) {
        int64_t at = (i + y) * KEYS + j;
        vec score = load_vec(b->scores + at);
        p[y] = power_of_2(fused(score, factor, set(-b->lse[row + y])));
        if (part != INSIDE)
            p[y] = seen_of(part == AT_BOTH_ENDS, span, y, j, p[y], set(0));
        grad_s[y] = p[y] * (load_vec(b->grad_p + at) - set(b->delta[row + y]));
        if (kind.capped)
            grad_s[y] = grad_s[y] * fused(-score, score, set(1));
    }
    if (kind.pairs) {
        int64_t at = row / 2 * KEYS + j;
        char *left = (char *)(b->grad_s + row * (KEYS / 2) + j / 2);
        store_pairs((char *)(b->p_pairs + at), NULL, NULL, p[0], p[1]);
        store_pairs((char *)(b->grad_s_pairs + at), left, left + KEYS / 2 * WORD, grad_s[0], grad_s[1]);
    } else
        UNROLLED for (int y = 0; y < 2; y++) {
            store_vec(b->p_pairs + (row + y) * KEYS + j, p[y]);
            store_vec(b->grad_s + (row + y) * KEYS + j, grad_s[y]);
        }
}

/* make_pair for TOGETHER queries. */
INLINE void make_part(const Kind kind, const Part part, const Backward *b, int64_t row, int64_t at, int64_t j, Span span,
                      vec factor)
{
    UNROLLED for (int64_t i = 0; i < TOGETHER; i += 2)
        make_pair(kind, part, b, row + i, at + i, j, (Span){span.from + i, span.to + i, span.end}, factor);
}

/* P and dS of TOGETHER queries, from query `row` of the block on and `at` of scores and grad_p on, and the block's keys
 * from `key` on. `span` is that of query `row`. */
INLINE void make_some(const Kind kind, const Backward *b, int64_t row, int64_t at, int64_t key, Span span, vec factor)
{
    int64_t j = kind.cut ? key : 0, whole = least(span.end, span.to / LANES * LANES);
    int64_t edge = kind.cut ? least(span.end, padded(span.from + TOGETHER - 1, LANES)) : 0;
    for (; j < edge; j += LANES)
        make_part(kind, AT_BOTH_ENDS, b, row, at, j, span, factor);
    for (; j < whole; j += LANES)
        make_part(kind, INSIDE, b, row, at, j, span, factor);
    for (; j < span.end; j += LANES)
        make_part(kind, AT_THE_END, b, row, at, j, span, factor);
}

/* P and dS of ROWS queries. */
INLINE void make_rows(const Kind kind, const Backward *b, int64_t row, int64_t key, Span span, float factor)
{
    for (int64_t i = 0; i < ROWS; i += TOGETHER)
        make_some(kind, b, row + i, i, key, (Span){span.from + i, span.to + i, span.end}, set(factor));
}

/* make_rows of the kind that a call needs. */
INLINE void make_rows_of(const int pairs, const Call *call, const Backward *b, int64_t row, int64_t key, Span span)
{
    float factor = factor_of(call);
    if (!call->cap && !is_cut(span, ROWS))
        make_rows((Kind){pairs, 0, 0}, b, row, key, span, factor);
    else if (!call->cap)
        make_rows((Kind){pairs, 1, 0}, b, row, key, span, factor);
    else if (!is_cut(span, ROWS))
        make_rows((Kind){pairs, 0, 1}, b, row, key, span, factor);
    else
        make_rows((Kind){pairs, 1, 1}, b, row, key, span, factor);
}

/* P and dS of ROWS queries from `row` of their block on and the block of keys at `key`, and their part of dQ. `span` is
 * that of query `row`. */
static void backward_rows(const Call *call, const Backward *b, int64_t row, int64_t key, Span span)
{
    int64_t size = call->size, pair = pair_of(paired(call)), depth = size / pair;
    int64_t from = first_panel(span.from), columns = span.end - from; /* whose scores are computed */
    int64_t until = least(KEYS, span.to + ROWS - 1);
    Right k = {b->k_columns + (key + from) * depth, COLUMNS, COLUMNS * depth};
    Right v = {b->v_columns + (key + from) * depth, COLUMNS, COLUMNS * depth};
    Right k_pairs = {b->k_pairs + (key + from) / pair * size, size, COLUMNS};
    product(paired(call), columns, depth, (Left){b->q + row * depth, depth, 1}, k, b->scores + from, KEYS, 0);
    product(paired(call), columns, depth, (Left){b->grad + row * depth, depth, 1}, v, b->grad_p + from, KEYS, 0);
    if (call->cap)
        bend(b->scores + from, KEYS, columns, call->scale / call->cap);
    if (paired(call))
        make_rows_of(HALVES, call, b, row, from, span);
    else
        make_rows_of(0, call, b, row, from, span);
    product(paired(call), size, (until - from) / pair,
            (Left){b->grad_s + (row * KEYS + from) / pair, KEYS / pair, 1}, k_pairs, b->grad_q + row * size, size, 1);
}

/* Adds the contribution of `count` queries at `query` and the keys from `key` on to all three gradients. Both are
 * counted from the example's first token, and query >= key. */
static void backward_block(const Call *call, const Backward *b, int64_t query, int64_t count, int64_t key)
{
    int64_t size = call->size, pair = pair_of(paired(call)), rows = padded(count, ROWS);
    int64_t ahead = query - key; /* keys of the block before the first query */
    int64_t behind = ahead + 1 - window_of(call); /* keys of the block before those that the first query sees */
    for (int64_t row = 0; row < rows; row += ROWS) {
        if (key == b->first_key) {
            prefetch(call, call->q, b->next_head, b->next_token + row);
            prefetch(call, call->grad, b->next_head, b->next_token + row);
            prefetch(call, call->out, b->next_head, b->next_token + row);
        }
        if (behind + row < KEYS)
            backward_rows(call, b, row, key,
                          (Span){behind + row, ahead + row + 1, least(KEYS, padded(ahead + row + ROWS, LANES))});
    }
    for (int64_t n = behind > 0 ? behind / ROWS * ROWS : 0; n < least(KEYS, ahead + rows); n += ROWS) {
        int64_t from = n > ahead ? n - ahead : 0; /* the first query that sees any of these keys */
        int64_t to = least(rows, padded(n + ROWS - behind, ROWS)); /* after the last one */
        int64_t at = from / pair * KEYS + n, words = (to - from) / pair;
        product(paired(call), size, words, (Left){b->p_pairs + at, 1, KEYS},
                (Right){b->grad_pairs + from / pair * size, size, COLUMNS}, b->grad_v + (key + n) * size, size, 1);
        product(paired(call), size, words, (Left){b->grad_s_pairs + at, 1, KEYS},
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
    if (paired(call)) {
        pack_pairs(call, b->q_pairs, q, call->q.token, count);
        pack_pairs(call, b->grad_pairs, grad, call->grad.token, count);
    }
    memset(b->grad_q, 0, QUERIES * call->size * sizeof(float));
    memset(b->lse, 0, sizeof b->lse);
    memset(b->delta, 0, sizeof b->delta);
    memcpy(b->lse, call->lse + head * call->tokens + token, count * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        vec sum = set(0);
        for (int64_t d = 0; d < call->size; d += LANES) {
            int64_t at = d * size_of(call->bf16);
            sum = fused(load(call->bf16, grad + i * call->grad.token + at),
                        load(call->bf16, out + i * call->out.token + at), sum);
        }
        b->delta[i] = sum_of(sum);
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
    for (int64_t query = 0; query < length; query += QUERIES) {
        int64_t first_seen = query + 1 - window_of(call);
        b.first_key = first_seen > 0 ? first_seen / KEYS * KEYS : 0;
        for (int64_t head = kv * groups; head < (kv + 1) * groups; head++) {
            int64_t count = least(QUERIES, length - query), last = head + 1 == (kv + 1) * groups;
            read_queries(call, &b, head, begin + query, count);
            b.next_head = last ? kv * groups : head + 1;
            b.next_token = begin + (last ? query + QUERIES : query);
            for (int64_t key = b.first_key; key <= query; key += KEYS)
                backward_block(call, &b, query, count, key);
            store_rows(call, place(call->grad_q, head, begin + query), call->grad_q.token, b.grad_q, count,
                       call->scale);
        }
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

typedef void Item(const Call *, word *, int64_t, int64_t, int64_t);

/* Every example and key/value head, the longest first, each on the next free thread. */
typedef struct {
    const Call *call;
    Item *item;
    const Example *examples;
    word *space; /* [threads, each] */
    int64_t each, next;
} Items;

static void run_items(void *shared, int64_t thread, int64_t threads)
{
    (void)threads;
    Items *items = shared;
    int64_t kv_heads = items->call->kv_heads, count = items->call->examples * kv_heads, i;
    while ((i = __atomic_fetch_add(&items->next, 1, __ATOMIC_RELAXED)) < count) {
        Example example = items->examples[i / kv_heads];
        items->item(items->call, items->space + thread * items->each, example.begin, example.end, i % kv_heads);
    }
}

static int run(const Call *call, int64_t (*words)(const Call *, int64_t), Item *item)
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
    int64_t each = count ? padded(words(call, examples[0].end - examples[0].begin), LINE / WORD) : 0;
    word *space = aligned_alloc(LINE, each * call->threads * WORD + LINE);
    if (space) {
        Items items = {call, item, examples, space, each, 0};
        parallel(call->threads, run_items, &items);
    }
    int status = space ? OK : NO_MEMORY;
    free(space);
    free(examples);
    return status;
}

/* Writes out and lse from q, k, v and sinks. */
int huarizo_attention_forward(const Call *call) { return run(call, forward_words, forward_item); }

/* Writes grad_q, grad_k and grad_v from q, k, v, out, lse and grad. */
int huarizo_attention_backward(const Call *call) { return run(call, backward_words, backward_item); }
