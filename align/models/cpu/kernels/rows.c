/* What is computed row by row, in one pass over memory: n rows of d numbers, a multiple of 16. */
#include "vectors.h"

/* ---- norms: y = w * x / rms(x), and its gradient ---- */

void norm_forward(const bf16 *x, const bf16 *w, bf16 *y, float *scale, int64_t n, int64_t d, float eps,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *row = x + i * d;
        vec squares = {0};
        for (int64_t j = 0; j < d; j += LANES) squares += widen(row + j) * widen(row + j);
        scale[i] = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / d + eps);
        for (int64_t j = 0; j < d; j += LANES) narrow(y + i * d + j, widen(w + j) * rounded(widen(row + j) * scale[i]));
    }
}

void norm_backward(const bf16 *above, const bf16 *x, const bf16 *w, const float *scale, bf16 *below, int64_t n,
                   int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const bf16 *up = above + i * d, *row = x + i * d;
        vec sum = {0};
        for (int64_t j = 0; j < d; j += LANES) sum += widen(up + j) * widen(w + j) * widen(row + j);
        float along = _mm512_reduce_add_ps(sum) * scale[i] * scale[i] / d;
        for (int64_t j = 0; j < d; j += LANES)
            narrow(below + i * d + j, (widen(up + j) * widen(w + j) - widen(row + j) * along) * scale[i]);
    }
}

/* ---- gated MLPs: silu(gate) * up, of rows (gate, up), and its gradient ---- */

INLINE vec sigmoid(vec x) {
    vec y = 1.0f + exponential(_mm512_min_ps((vec){0} + 88.0f, -x)), guess = _mm512_rcp14_ps(y);
    const __mmask16 some = _mm512_cmp_ps_mask(x, (vec){0} - 88.0f, _CMP_NLT_UQ); /* below, 0 */
    return _mm512_maskz_mul_ps(some, guess, 2.0f - y * guess); /* Newton's step */
}

void gated_forward(const bf16 *both, int64_t row, bf16 *out, int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < d; j += LANES) {
            vec gate = widen(both + i * row + j), up = widen(both + i * row + d + j);
            narrow(out + i * d + j, rounded(gate * sigmoid(gate)) * up);
        }
}

void gated_backward(const bf16 *both, const bf16 *above, bf16 *below, int64_t n, int64_t d, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < d; j += LANES) {
            const int64_t at_gate = 2 * i * d + j, at_up = at_gate + d;
            vec gate = widen(both + at_gate), up = widen(both + at_up), slope = widen(above + i * d + j);
            vec share = sigmoid(gate);
            narrow(below + at_up, slope * rounded(gate * share));
            narrow(below + at_gate, slope * up * share * (1.0f + gate * (1.0f - share)));
        }
}
