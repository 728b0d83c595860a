/* LoRA: layers of one input x (n, i), each with A (r, i) and B (o, r) in float32, rounded here; their outputs stand
 * side by side, and so do their ranks, each filled up to whole vectors.
 *
 * All is one product of bfloat16 pairs: C (m, 16 v) = sum over k of a pair of A's row, which is broadcast, and pairs of
 * B's columns, interleaved. */

#include "vectors.h"

enum { STORE, ADD, PLAIN }; /* C is bfloat16, bfloat16 that is added to, or float32 */
enum { TALL = 8, WIDE = 3, STRIP = WIDE * LANES };

typedef struct {
    const uint32_t *a; /* pairs: `down` from row to row, `along` from pair to pair */
    int64_t down, along;
    const bf16 *b; /* (k, columns, 2) */
    int64_t b_row, k;
    void *c;
    int64_t c_row, columns; /* columns: how many of C's there are, where the last vector is not whole */
    float scale;
} Pairs;

INLINE void pair_tile(int kind, int rows, int vecs, const Pairs *at, int64_t row, int64_t column) {
    const uint32_t *a = at->a + row * at->down;
    const bf16 *b = at->b + 2 * column;
    const int64_t down = at->down, along = at->along;
    vec sum[TALL][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) sum[r][v] = (vec){0};
    for (int64_t x = 0; x < at->k; x++, b += at->b_row) {
        __m512bh line[WIDE];
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) line[v] = (__m512bh)_mm512_loadu_si512(b + 2 * v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int v = 0; v < vecs; v++)
                sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_set1_epi32(a[r * down + x * along]), line[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) {
            const int64_t begin = column + v * LANES, place = (row + r) * at->c_row + begin;
            if (kind == PLAIN) {
                _mm512_mask_storeu_ps((float *)at->c + place, lanes(at->columns - begin), sum[r][v]);
            } else {
                bf16 *c = (bf16 *)at->c + place;
                narrow(c, kind == ADD ? widen(c) + sum[r][v] : sum[r][v] * at->scale);
            }
        }
}

INLINE void pair_strip(int kind, int vecs, const Pairs *at, int64_t row, int64_t stop, int64_t column) {
    for (; stop - row >= TALL; row += TALL) pair_tile(kind, TALL, vecs, at, row, column);
    for (; stop - row >= 4; row += 4) pair_tile(kind, 4, vecs, at, row, column);
    for (; row < stop; row++) pair_tile(kind, 1, vecs, at, row, column);
}

/* Rows [row, stop) and columns [column, end) of C. */
INLINE void pair_product(int kind, const Pairs *at, int64_t row, int64_t stop, int64_t column, int64_t end) {
    for (; end - column > 2 * LANES; column += STRIP) pair_strip(kind, WIDE, at, row, stop, column);
    if (end - column > LANES) pair_strip(kind, 2, at, row, stop, column);
    else if (end > column) pair_strip(kind, 1, at, row, stop, column);
}

static void pair_store(const Pairs *at, int64_t row, int64_t stop, int64_t columns) {
    pair_product(STORE, at, row, stop, 0, columns);
}

static void pair_add(const Pairs *at, int64_t row, int64_t stop, int64_t columns) {
    for (; row < stop; row += TALL) /* few rows at a time: C is walked along, B stays near */
        pair_product(ADD, at, row, least(row + TALL, stop), 0, columns);
}

static void pair_plain(const Pairs *at, int64_t row, int64_t stop, int64_t column, int64_t end) {
    pair_product(PLAIN, at, row, stop, column, end);
}

typedef struct {
    int64_t layers, inputs, outputs, rank; /* outputs and (filled) ranks of all layers */
    const float *const *a, *const *b;
    const int64_t *ranks, *heights; /* of each layer: r, o */
    float scale;
} Lora;

static int64_t filled(int64_t rank) { return (rank + LANES - 1) / LANES * LANES; }

INLINE __m512i paired(__m256i even, __m256i odd) { /* (even 0, odd 0, even 1, odd 1, …) */
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(_mm512_castsi256_si512(even), order, _mm512_castsi256_si512(odd));
}

/* Rows x (k, columns), `row` apart, by twos: pairs (k / 2, columns, 2), `to_row` apart; 0 in what fills them up. */
static void pair_rows(const float *x, int64_t row, int64_t k, int64_t columns, bf16 *to, int64_t to_row) {
#pragma omp for nowait
    for (int64_t i = 0; i < filled(k); i += 2)
        for (int64_t j = 0; j < columns; j += LANES) {
            const __mmask16 some = lanes(columns - j);
            vec even = _mm512_maskz_loadu_ps(i < k ? some : 0, x + i * row + j);
            vec odd = _mm512_maskz_loadu_ps(i + 1 < k ? some : 0, x + (i + 1) * row + j);
            __m512i both = paired((__m256i)_mm512_cvtneps_pbh(even), (__m256i)_mm512_cvtneps_pbh(odd));
            _mm512_storeu_si512(to + i / 2 * to_row + 2 * j, both);
        }
}

/* The same of x turned, (columns, k), whose rows are k long. */
static void pair_columns(const float *x, int64_t k, int64_t columns, bf16 *to, int64_t to_row) {
#pragma omp for collapse(2) nowait
    for (int64_t i = 0; i < k; i += LANES)
        for (int64_t c = 0; c < columns; c++) {
            uint32_t pairs[LANES / 2];
            vec some = _mm512_maskz_loadu_ps(lanes(k - i), x + c * k + i);
            _mm256_storeu_si256((void *)pairs, (__m256i)_mm512_cvtneps_pbh(some));
            for (int64_t p = 0; p < LANES / 2; p++) memcpy(to + (i / 2 + p) * to_row + 2 * c, pairs + p, sizeof *pairs);
        }
}

/* Rows of bfloat16, by twos, as pairs: (n, columns) -> ((n + 1) / 2, columns, 2). */
static void interleave(const bf16 *x, int64_t row, int64_t n, int64_t columns, bf16 *to, int64_t to_row) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t j = 0; j < columns; j += LANES) {
            __m256i even = _mm256_loadu_si256((const void *)(x + i * row + j)), odd = _mm256_setzero_si256();
            if (i + 1 < n) odd = _mm256_loadu_si256((const void *)(x + (i + 1) * row + j));
            _mm512_storeu_si512(to + i / 2 * to_row + 2 * j, paired(even, odd));
        }
}

/* low (n, R) = scale * A x, of all layers. */
void lora_down(const Lora *at, const bf16 *x, bf16 *low, int64_t n, int64_t threads) {
    bf16 *packed = calloc(at->inputs * at->rank, sizeof(bf16)); /* (i / 2, R, 2), 0 where no rank is */
#pragma omp parallel num_threads(threads)
    {
        int64_t column = 0;
        for (int64_t l = 0; l < at->layers; column += filled(at->ranks[l++]))
            pair_columns(at->a[l], at->inputs, at->ranks[l], packed + 2 * column, 2 * at->rank);
#pragma omp barrier
        const Pairs pairs = {(const uint32_t *)x, at->inputs / 2, 1, packed, 2 * at->rank, at->inputs / 2,
                             low, at->rank, at->rank, at->scale};
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < n; i += 2 * TALL) pair_store(&pairs, i, least(i + 2 * TALL, n), at->rank);
    }
    free(packed);
}

/* B of all layers as lora_up takes it: of each (r / 2, o, 2); R * O numbers. */
void lora_pack(const Lora *at, bf16 *packed, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        bf16 *to = packed;
        for (int64_t l = 0; l < at->layers; to += filled(at->ranks[l]) * at->heights[l], l++)
            pair_columns(at->b[l], at->ranks[l], at->heights[l], to, 2 * at->heights[l]);
    }
}

/* out (n, O) += B low, of all layers, each in its columns. */
void lora_up(const Lora *at, const bf16 *packed, const bf16 *low, int64_t low_row, bf16 *out, int64_t out_row,
             int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t i = 0; i < n; i += 2 * TALL) {
        const bf16 *b = packed;
        int64_t rank = 0, column = 0;
        for (int64_t l = 0; l < at->layers; l++) {
            const int64_t own = filled(at->ranks[l]), height = at->heights[l];
            const Pairs pairs = {(const uint32_t *)(low + rank), low_row / 2, 1, b, 2 * height, (at->ranks[l] + 1) / 2,
                                 out + column, out_row, height, 1};
            pair_add(&pairs, i, least(i + 2 * TALL, n), height);
            b += own * height, rank += own, column += height;
        }
    }
}

/* From the gradient of the outputs, `above` (n, O): that of A x, `up` (n, R), times scale; and those of A and B. */
void lora_backward(const Lora *at, const bf16 *above, const bf16 *x, const bf16 *low, bf16 *up, float *const *of_a,
                   float *const *of_b, int64_t n, int64_t threads) {
    const int64_t pairs = (n + 1) / 2;
    bf16 *packed = malloc(sizeof(bf16) * at->outputs * at->rank); /* of each layer (o / 2, r, 2) */
    bf16 *lows = malloc(sizeof(bf16) * 4 * pairs * at->rank), *ups = lows + 2 * pairs * at->rank;
#pragma omp parallel num_threads(threads)
    {
        bf16 *strip = malloc(sizeof(bf16) * 2 * pairs * STRIP), *to = packed;
        for (int64_t l = 0; l < at->layers; to += filled(at->ranks[l]) * at->heights[l], l++)
            pair_rows(at->b[l], at->ranks[l], at->heights[l], at->ranks[l], to, 2 * filled(at->ranks[l]));
#pragma omp barrier
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < n; i += 2 * TALL) {
            const int64_t stop = least(i + 2 * TALL, n);
            const bf16 *b = packed;
            int64_t rank = 0, column = 0;
            for (int64_t l = 0; l < at->layers; l++) {
                const int64_t own = filled(at->ranks[l]);
                const Pairs product = {(const uint32_t *)(above + column), at->outputs / 2, 1, b, 2 * own,
                                       at->heights[l] / 2, up + rank, at->rank, own, at->scale};
                pair_store(&product, i, stop, own);
                b += own * at->heights[l], rank += own, column += at->heights[l];
            }
            interleave(low + i * at->rank, at->rank, stop - i, at->rank, lows + i * at->rank, 2 * at->rank);
            interleave(up + i * at->rank, at->rank, stop - i, at->rank, ups + i * at->rank, 2 * at->rank);
        }
        int64_t rank = 0, column = 0;
        for (int64_t l = 0; l < at->layers; l++) { /* B (o, r): o are the rows, so that it is written as it stands */
            const int64_t height = at->heights[l], own = filled(at->ranks[l]);
#pragma omp for schedule(static, 1) nowait
            for (int64_t begin = 0; begin < height; begin += STRIP) {
                const int64_t width = least(height - begin, STRIP);
                interleave(above + column + begin, at->outputs, n, width, strip, 2 * STRIP);
                const Pairs product = {(const uint32_t *)strip, 1, STRIP, lows + 2 * rank, 2 * at->rank, pairs,
                                       of_b[l] + begin * at->ranks[l], at->ranks[l], at->ranks[l], 1};
                pair_plain(&product, 0, width, 0, own);
            }
            rank += own, column += height;
        }
#pragma omp for schedule(static, 1) nowait
        for (int64_t begin = 0; begin < at->inputs; begin += STRIP) { /* A (r, i) */
            const int64_t width = least(at->inputs - begin, STRIP);
            interleave(x + begin, at->inputs, n, width, strip, 2 * STRIP);
            int64_t row = 0;
            for (int64_t l = 0; l < at->layers; row += filled(at->ranks[l++])) {
                const Pairs product = {(const uint32_t *)(ups + 2 * row), 1, at->rank, strip, 2 * STRIP, pairs,
                                       of_a[l] + begin, at->inputs, width, 1};
                pair_plain(&product, 0, at->ranks[l], 0, width);
            }
        }
        free(strip);
    }
    free(packed);
    free(lows);
}

/* below (n, i), the gradient of x, += up A, of all layers. */
void lora_onwards(const Lora *at, const bf16 *up, bf16 *below, int64_t n, int64_t threads) {
    bf16 *packed = malloc(sizeof(bf16) * at->rank * at->inputs); /* (R / 2, i, 2) */
#pragma omp parallel num_threads(threads)
    {
        int64_t rank = 0;
        for (int64_t l = 0; l < at->layers; rank += filled(at->ranks[l++]))
            pair_rows(at->a[l], at->inputs, at->ranks[l], at->inputs, packed + rank * at->inputs, 2 * at->inputs);
#pragma omp barrier
        const Pairs pairs = {(const uint32_t *)up, at->rank / 2, 1, packed, 2 * at->inputs, at->rank / 2,
                             below, at->inputs, at->inputs, 1};
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < n; i += 2 * TALL) pair_add(&pairs, i, least(i + 2 * TALL, n), at->inputs);
    }
    free(packed);
}
