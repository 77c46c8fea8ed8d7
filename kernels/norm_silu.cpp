// y = silu(group_norm(x)) and its gradient for channels_last tensors on the CPU, in one pass each.
//
// x, y: [B, S, C] in memory, S pixels, C channels in G groups. Arithmetic is float32, sums over
// pixels are float64, whatever the tensors hold. Plain loops over channels, which any compiler
// turns into vector code of the machine that it runs on.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

#define SIMD _Pragma("omp simd")

static inline float load(float value) { return value; }
static inline float load(uint16_t bits) {  // bfloat16
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
static inline void store(float value, float& to) { to = value; }
static inline void store(float value, uint16_t& to) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to the nearest, ties to even
    to = (wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;  // NaN stays NaN
}

// 1 / (1 + exp(-v)) to 2e-7: exp by powers of two and a polynomial, so that it vectorises.
// The clamp leaves NaN alone: comparisons with it are false.
static inline float sigmoid(float v) {
    float x = -v * 1.44269504f;
    x = x < -126.f ? -126.f : x;
    x = x > 126.f ? 126.f : x;
    float magic = x + 12582912.f;  // rounds to an integer in the low bits
    float f = x - (magic - 12582912.f);
    float p = 1.f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f +
              f * (0.00961812911f + f * (0.00133335581f + f * 0.000154035304f)))));
    uint32_t bits;
    std::memcpy(&bits, &magic, 4);
    bits = (bits - 0x4b400000 + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return 1.f / (1.f + p * power);
}

static inline float slope(float v) {  // of silu
    float g = sigmoid(v);
    return g * (1.f + v * (1.f - g));
}

const int ROWS = 64;  // pixels that are summed in float32 before they join the float64 sum

// How many parts a picture's groups are divided into, so that every thread has work.
static inline int64_t parts_of_a_picture(int64_t B, int64_t G) {
    const int64_t parts = (omp_get_max_threads() + B - 1) / B;
    return parts < G ? parts : G;
}

// Some groups of one picture: their channels stand side by side, in rows that are C apart.
struct Part {
    int64_t g0, groups, c0, n, x0;  // first group, how many; first channel, how many; where in x
    Part(int64_t task, int64_t parts, int64_t S, int64_t C, int64_t G) {
        const int64_t b = task / parts, k = task % parts, first = G * k / parts;
        groups = G * (k + 1) / parts - first;
        c0 = first * (C / G);
        n = groups * (C / G);
        g0 = b * G + first;
        x0 = b * S * C + c0;
    }
};

template <typename T, bool silu>
static void forward(const T* x, const float* weight, const float* bias, T* y, float* mean,
                    float* rstd, int64_t B, int64_t S, int64_t C, int64_t G, float eps) {
    const int64_t D = C / G, parts = parts_of_a_picture(B, G);
#pragma omp parallel for
    for (int64_t task = 0; task < B * parts; task++) {
        const Part p(task, parts, S, C, G);
        const int64_t n = p.n;
        const T* xp = x + p.x0;
        T* yp = y + p.x0;
        const float *w = weight + p.c0, *bp = bias + p.c0;
        std::vector<double> sum(n, 0.0), square(n, 0.0);
        std::vector<float> part(n), part2(n), shift(n), a(n), c0(n);
        SIMD
        for (int64_t c = 0; c < n; c++) shift[c] = load(xp[c]);  // the first pixel, against cancellation
        for (int64_t s0 = 0; s0 < S; s0 += ROWS) {
            std::fill(part.begin(), part.end(), 0.f);
            std::fill(part2.begin(), part2.end(), 0.f);
            const int64_t end = s0 + ROWS < S ? s0 + ROWS : S;
            for (int64_t s = s0; s < end; s++)
                SIMD
                for (int64_t c = 0; c < n; c++) {
                    float v = load(xp[s * C + c]) - shift[c];
                    part[c] += v;
                    part2[c] += v * v;
                }
            SIMD
            for (int64_t c = 0; c < n; c++) sum[c] += part[c], square[c] += part2[c];
        }
        for (int64_t g = 0; g < p.groups; g++) {
            double m = 0, m2 = 0;
            for (int64_t c = g * D; c < (g + 1) * D; c++) m += shift[c] + sum[c] / S;
            m /= D;
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                double own = sum[c] / S, off = shift[c] + own - m;  // the channel's mean is off by it
                m2 += square[c] / S - own * own + off * off;
            }
            double r = 1.0 / std::sqrt(m2 / D + eps);
            mean[p.g0 + g] = m;
            rstd[p.g0 + g] = r;
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                a[c] = w[c] * r;
                c0[c] = bp[c] - m * w[c] * r;
            }
        }
        for (int64_t s = 0; s < S; s++)
            SIMD
            for (int64_t c = 0; c < n; c++) {
                float v = a[c] * load(xp[s * C + c]) + c0[c];
                store(silu ? v * sigmoid(v) : v, yp[s * C + c]);
            }
    }
}

// d_weight, d_bias: [B, C], to be summed over B.
template <typename T, bool silu>
static void backward(const T* dy, const T* x, const float* weight, const float* bias,
                     const float* mean, const float* rstd, T* dx, float* d_weight, float* d_bias,
                     int64_t B, int64_t S, int64_t C, int64_t G) {
    const int64_t D = C / G, parts = parts_of_a_picture(B, G);
#pragma omp parallel for
    for (int64_t task = 0; task < B * parts; task++) {
        const Part p(task, parts, S, C, G);
        const int64_t n = p.n, b = task / parts;
        const T *xp = x + p.x0, *dyp = dy + p.x0;
        T* dxp = dx + p.x0;
        const float *w = weight + p.c0, *bp = bias + p.c0;
        std::vector<float> r(n), mr(n), part(n), part2(n), m1(n), m2(n);
        std::vector<double> sum(n, 0.0), sum2(n, 0.0);
        SIMD
        for (int64_t c = 0; c < n; c++) {
            r[c] = rstd[p.g0 + c / D];
            mr[c] = mean[p.g0 + c / D] * r[c];
        }
        for (int64_t s0 = 0; s0 < S; s0 += ROWS) {
            std::fill(part.begin(), part.end(), 0.f);
            std::fill(part2.begin(), part2.end(), 0.f);
            const int64_t end = s0 + ROWS < S ? s0 + ROWS : S;
            for (int64_t s = s0; s < end; s++)
                SIMD
                for (int64_t c = 0; c < n; c++) {
                    float normal = load(xp[s * C + c]) * r[c] - mr[c];
                    float d = load(dyp[s * C + c]);
                    if (silu) d *= slope(w[c] * normal + bp[c]);
                    part[c] += d;
                    part2[c] += d * normal;
                }
            SIMD
            for (int64_t c = 0; c < n; c++) sum[c] += part[c], sum2[c] += part2[c];
        }
        SIMD
        for (int64_t c = 0; c < n; c++) {
            d_bias[b * C + p.c0 + c] = sum[c];
            d_weight[b * C + p.c0 + c] = sum2[c];
        }
        for (int64_t g = 0; g < p.groups; g++) {
            double t1 = 0, t2 = 0;
            for (int64_t c = g * D; c < (g + 1) * D; c++) t1 += w[c] * sum[c], t2 += w[c] * sum2[c];
            for (int64_t c = g * D; c < (g + 1) * D; c++) m1[c] = t1 / (D * S), m2[c] = t2 / (D * S);
        }
        for (int64_t s = 0; s < S; s++)
            SIMD
            for (int64_t c = 0; c < n; c++) {
                float normal = load(xp[s * C + c]) * r[c] - mr[c];
                float d = load(dyp[s * C + c]);
                if (silu) d *= slope(w[c] * normal + bp[c]);
                store(r[c] * (w[c] * d - m1[c] - normal * m2[c]), dxp[s * C + c]);
            }
    }
}

#define EXPORT(NAME, T)                                                                            \
    extern "C" void forward_##NAME(const T* x, const float* w, const float* b, T* y, float* mean,  \
                                   float* rstd, int64_t B, int64_t S, int64_t C, int64_t G,        \
                                   float eps, int silu) {                                          \
        (silu ? forward<T, true> : forward<T, false>)(x, w, b, y, mean, rstd, B, S, C, G, eps);                                 \
    }                                                                                              \
    extern "C" void backward_##NAME(const T* dy, const T* x, const float* w, const float* b,       \
                                    const float* mean, const float* rstd, T* dx, float* dw,        \
                                    float* db, int64_t B, int64_t S, int64_t C, int64_t G,         \
                                    int silu) {                                                    \
        (silu ? backward<T, true> : backward<T, false>)(dy, x, w, b, mean, rstd, dx, dw, db, B, S, C, G);                        \
    }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
