/* What the kernels share: vectors of 16 floats, and how bfloat16 numbers come in and go out.
 *
 * Everything is computed in float32, and rounded where it is stored, ties to even. Sums are taken in an order that does
 * not depend on the number of threads. The callers, with shapes and conditions, are in native.py.
 */
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX512BF16__
#error "these kernels are for processors with AVX512-BF16, as is bfloat16 on a CPU"
#endif

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef __m512 vec;

enum { LANES = 16 };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE __mmask16 lanes(int64_t count) { return count < LANES ? (1 << count) - 1 : 0xffff; } /* the first */

INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec widened(__m256i x) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
INLINE vec widen(const bf16 *p) { return widened(_mm256_loadu_si256((const void *)p)); }
INLINE void narrow(bf16 *p, vec x) { _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE vec rounded(vec x) { return widened((__m256i)_mm512_cvtneps_pbh(x)); }

/* e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes); 0 from -104 on. */
INLINE vec exponential(vec x) {
    x = _mm512_max_ps((vec){0} - 104.0f, x);
    vec n = _mm512_roundscale_ps(x * 1.44269504f, 0);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
             + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    return _mm512_scalef_ps(p * r * r + r + 1.0f, n);
}
