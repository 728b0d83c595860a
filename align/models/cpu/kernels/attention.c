/* Attention over blocks of up to QUERIES queries, which see the keys of their spans, KEYS at a time (Dao et al. 2022, arXiv
 * 2205.14135). The last keys of a block are its own tokens, of which a query sees those up to itself.
 *
 * T tokens, H query heads, G key/value heads, D head size. QUERIES and WIDEST, the largest D, come from compiled.py.
 */
#include "vectors.h"

enum { KEYS = 128, LINE = KEYS + LANES, ROWS = 6, VECS = 4 }; /* LINE: a stride that is no power of 2 */

/* ---- small products: C (m, 16 n) = or += A (m, k) B (k, 16 n); A by any strides ---- */

INLINE void tile(int rows, int vecs, int64_t k, const float *a, int64_t down, int64_t along, const float *b,
                 int64_t b_row, float *c, int64_t c_row, int more) {
    vec sum[ROWS][VECS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[r][v] = more ? load(c + r * c_row + v * LANES) : (vec){0};
    for (int64_t x = 0; x < k; x++) {
        vec line[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) line[v] = load(b + x * b_row + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[r][v] += a[r * down + x * along] * line[v];
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

INLINE void strip(int vecs, int64_t m, int64_t k, const float *a, int64_t down, int64_t along, const float *b,
                  int64_t b_row, float *c, int64_t c_row, int more) {
    for (; m >= ROWS; m -= ROWS, a += ROWS * down, c += ROWS * c_row)
        tile(ROWS, vecs, k, a, down, along, b, b_row, c, c_row, more);
    switch (m) {
        case 5: tile(5, vecs, k, a, down, along, b, b_row, c, c_row, more); break;
        case 4: tile(4, vecs, k, a, down, along, b, b_row, c, c_row, more); break;
        case 3: tile(3, vecs, k, a, down, along, b, b_row, c, c_row, more); break;
        case 2: tile(2, vecs, k, a, down, along, b, b_row, c, c_row, more); break;
        case 1: tile(1, vecs, k, a, down, along, b, b_row, c, c_row, more); break;
    }
}

static void multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t down, int64_t along, const float *b,
                     int64_t b_row, float *c, int64_t c_row, int more) {
    for (; n >= VECS; n -= VECS, b += VECS * LANES, c += VECS * LANES)
        strip(VECS, m, k, a, down, along, b, b_row, c, c_row, more);
    switch (n) {
        case 3: strip(3, m, k, a, down, along, b, b_row, c, c_row, more); break;
        case 2: strip(2, m, k, a, down, along, b, b_row, c, c_row, more); break;
        case 1: strip(1, m, k, a, down, along, b, b_row, c, c_row, more); break;
    }
}

typedef struct {
    const bf16 *query, *key, *value;                 /* (T, H or G, D), with a stride from token to token */
    int64_t query_row, key_row, value_row;
    const int64_t *blocks, *spans;                   /* (b, 4): start, stop, first span, last span; (s, 2): start, stop */
    int64_t heads, groups, size;
    float scale;
} Attention;

typedef struct {
    const int64_t *span;
    int64_t next;
} Walk;

static int64_t seen_by(const Attention *at, const int64_t *block, Walk *walk) { /* how many keys a block sees */
    int64_t n = 0;
    for (int64_t s = block[2]; s < block[3]; s++) n += at->spans[2 * s + 1] - at->spans[2 * s];
    *walk = (Walk){at->spans + 2 * block[2], at->spans[2 * block[2]]};
    return n;
}

static void walk_on(Walk *walk, int64_t count, int64_t *tokens) { /* the next keys */
    for (int64_t j = 0; j < count; j++) {
        while (walk->next == walk->span[1]) {
            walk->span += 2;
            walk->next = walk->span[0];
        }
        tokens[j] = walk->next++;
    }
}

static void take(const bf16 *from, int64_t row, int64_t m, int64_t size, float times, float *to) { /* (m, D) */
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < size; j += LANES) store(to + i * size + j, widen(from + i * row + j) * times);
}

/* Keys or values of some tokens as float32, as they are, (count, D), and turned, (D, LINE) filled up with 0. */
static void take_keys(const bf16 *from, int64_t row, const int64_t *tokens, int64_t count, int64_t size, float *plain,
                      float *turned) {
    const int64_t filled = (count + LANES - 1) / LANES * LANES;
    float local[WIDEST];
    for (int64_t j = 0; j < filled; j++) {
        float *line = plain ? plain + j * size : local;
        if (j < count)
            for (int64_t x = 0; x < size; x += LANES) store(line + x, widen(from + tokens[j] * row + x));
        else if (plain && !turned)
            break;
        else
            line = memset(local, 0, sizeof local);
        if (turned)
            for (int64_t x = 0; x < size; x++) turned[x * LINE + j] = line[x];
    }
}

static int64_t visible(int64_t n, int64_t m, int64_t i, int64_t first, int64_t count) { /* of these keys, to query i */
    const int64_t seen = n - m + i + 1 - first;
    return seen < 0 ? 0 : seen < count ? seen : count;
}

static void hide(float *scores, int64_t seen, int64_t vecs) { /* what lies behind those that are seen */
    for (int64_t j = seen / LANES; j < vecs; j++) {
        const __mmask16 behind = seen > j * LANES ? ~lanes(seen - j * LANES) : 0xffff;
        _mm512_mask_storeu_ps(scores + j * LANES, behind, (vec){0} - INFINITY);
    }
}

void attention_forward(const Attention *at, int64_t block_count, bf16 *out, float *logsum, int64_t threads) {
    const int64_t size = at->size, shared = at->heads / at->groups, each = QUERIES * size;
#pragma omp parallel num_threads(threads)
    {
        float *keys = malloc(sizeof(float) * (LINE * size + KEYS * size + QUERIES * LINE + shared * (2 * each + 2 * QUERIES)));
        float *values = keys + LINE * size, *scores = values + KEYS * size, *query = scores + QUERIES * LINE;
        float *sums = query + shared * each, *top = sums + shared * each, *mass = top + shared * QUERIES;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < block_count * at->groups; unit++) {
            const int64_t *block = at->blocks + 4 * (unit / at->groups), group = unit % at->groups, start = block[0];
            Walk walk;
            const int64_t m = block[1] - start, n = seen_by(at, block, &walk);
            for (int64_t h = 0; h < shared; h++)
                take(at->query + start * at->query_row + (group * shared + h) * size, at->query_row, m, size, at->scale,
                     query + h * each);
            for (int64_t first = 0; first < n; first += KEYS) {
                const int64_t count = least(n - first, KEYS), vecs = (count + LANES - 1) / LANES;
                int64_t tokens[KEYS];
                walk_on(&walk, count, tokens);
                take_keys(at->key + group * size, at->key_row, tokens, count, size, NULL, keys);
                take_keys(at->value + group * size, at->value_row, tokens, count, size, values, NULL);
                for (int64_t h = 0; h < shared; h++) {
                    multiply(m, vecs, size, query + h * each, size, 1, keys, LINE, scores, LINE, 0);
                    for (int64_t i = 0; i < m; i++) {
                        float *row = scores + i * LINE, *sum = sums + h * each + i * size;
                        hide(row, visible(n, m, i, first, count), vecs);
                        vec most = load(row), masses = {0};
                        for (int64_t j = LANES; j < vecs * LANES; j += LANES)
                            most = _mm512_max_ps(load(row + j), most);
                        float before = first ? top[h * QUERIES + i] : -INFINITY, now = _mm512_reduce_max_ps(most);
                        now = now > before ? now : before;
                        for (int64_t j = 0; j < vecs * LANES; j += LANES) {
                            vec p = exponential(load(row + j) - now);
                            masses += p;
                            store(row + j, p);
                        }
                        top[h * QUERIES + i] = now;
                        if (!first) {
                            mass[h * QUERIES + i] = _mm512_reduce_add_ps(masses);
                        } else {
                            const float kept = expf(before - now);
                            mass[h * QUERIES + i] = mass[h * QUERIES + i] * kept + _mm512_reduce_add_ps(masses);
                            for (int64_t j = 0; j < size; j += LANES) store(sum + j, load(sum + j) * kept);
                        }
                    }
                    multiply(m, size / LANES, count, scores, LINE, 1, values, size, sums + h * each, size, first > 0);
                }
            }
            for (int64_t h = 0; h < shared; h++)
                for (int64_t i = 0; i < m; i++) {
                    const int64_t at_row = (start + i) * at->heads + group * shared + h;
                    logsum[at_row] = top[h * QUERIES + i] + logf(mass[h * QUERIES + i]);
                    for (int64_t j = 0; j < size; j += LANES)
                        narrow(out + at_row * size + j, load(sums + h * each + i * size + j) / mass[h * QUERIES + i]);
                }
        }
        free(keys);
    }
}

/* `trees` (t + 1): where each tree's blocks begin; of_keys and of_values (T, H, D) float32 to sum in; the
 * gradients (T, H or G, D). */
void attention_backward(const Attention *at, const int64_t *trees, int64_t tree_count, int64_t tokens_in_all,
                        const bf16 *out, const float *logsum, const bf16 *above, float *of_keys, float *of_values,
                        bf16 *grad_query, bf16 *grad_key, bf16 *grad_value, int64_t threads) {
    const int64_t size = at->size, heads = at->heads, shared = heads / at->groups, line = heads * size;
#pragma omp parallel num_threads(threads)
    {
        float *keys = malloc(sizeof(float) * (2 * (KEYS + LINE) * size + 2 * QUERIES * LINE + 3 * QUERIES * size));
        float *turned_keys = keys + KEYS * size, *turned_values = turned_keys + LINE * size;
        float *part = turned_values + LINE * size, *likely = part + KEYS * size, *slope = likely + QUERIES * LINE;
        float *query = slope + QUERIES * LINE, *up = query + QUERIES * size, *sums = up + QUERIES * size;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < tree_count * heads; unit++) {
            const int64_t tree = unit / heads, h = unit % heads, group = h / shared;
            for (int64_t i = at->blocks[4 * trees[tree]]; i < at->blocks[4 * trees[tree + 1] - 3]; i++) {
                memset(of_keys + i * line + h * size, 0, sizeof(float) * size);
                memset(of_values + i * line + h * size, 0, sizeof(float) * size);
            }
            for (int64_t b = trees[tree]; b < trees[tree + 1]; b++) {
                const int64_t *block = at->blocks + 4 * b, start = block[0], m = block[1] - start;
                Walk walk;
                const int64_t n = seen_by(at, block, &walk);
                float along[QUERIES];
                take(at->query + start * at->query_row + h * size, at->query_row, m, size, at->scale, query);
                take(above + start * line + h * size, line, m, size, 1.0f, up);
                for (int64_t i = 0; i < m; i++) {
                    vec sum = {0};
                    for (int64_t j = 0; j < size; j += LANES)
                        sum += load(up + i * size + j) * widen(out + (start + i) * line + h * size + j);
                    along[i] = _mm512_reduce_add_ps(sum);
                }
                for (int64_t first = 0; first < n; first += KEYS) {
                    const int64_t count = least(n - first, KEYS), vecs = (count + LANES - 1) / LANES;
                    int64_t tokens[KEYS];
                    walk_on(&walk, count, tokens);
                    take_keys(at->key + group * size, at->key_row, tokens, count, size, keys, turned_keys);
                    take_keys(at->value + group * size, at->value_row, tokens, count, size, NULL, turned_values);
                    multiply(m, vecs, size, query, size, 1, turned_keys, LINE, likely, LINE, 0);
                    multiply(m, vecs, size, up, size, 1, turned_values, LINE, slope, LINE, 0);
                    for (int64_t i = 0; i < m; i++) {
                        float *p = likely + i * LINE, *s = slope + i * LINE;
                        hide(p, visible(n, m, i, first, count), vecs);
                        for (int64_t j = 0; j < vecs * LANES; j += LANES) {
                            vec share = exponential(load(p + j) - logsum[(start + i) * heads + h]);
                            store(p + j, share);
                            store(s + j, share * (load(s + j) - along[i]));
                        }
                    }
                    multiply(m, size / LANES, count, slope, LINE, 1, keys, size, sums, size, first > 0);
                    for (int what = 0; what < 2; what++) {
                        float *all = what ? of_values : of_keys;
                        multiply(count, size / LANES, m, what ? likely : slope, 1, LINE, what ? up : query, size, part,
                                 size, 0);
                        for (int64_t j = 0; j < count; j++) {
                            float *to = all + tokens[j] * line + h * size;
                            for (int64_t x = 0; x < size; x += LANES)
                                store(to + x, load(to + x) + load(part + j * size + x));
                        }
                    }
                }
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < size; j += LANES)
                        narrow(grad_query + (start + i) * line + h * size + j, load(sums + i * size + j) * at->scale);
            }
        }
        free(keys);
#pragma omp for
        for (int64_t i = 0; i < tokens_in_all * at->groups; i++)
            for (int64_t j = 0; j < size; j += LANES) {
                vec key = {0}, value = {0};
                for (int64_t h = 0; h < shared; h++) {
                    key += load(of_keys + (i * shared + h) * size + j);
                    value += load(of_values + (i * shared + h) * size + j);
                }
                narrow(grad_key + i * size + j, key);
                narrow(grad_value + i * size + j, value);
            }
    }
}
