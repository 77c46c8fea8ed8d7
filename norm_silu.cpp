// y = silu(group_norm(x)) and its gradient for channels_last tensors on the CPU, in one pass each.
//
// x, y: [B, S, C] in memory, S pixels, C channels in G groups. Arithmetic is float32, sums over
// pixels are float64, whatever the tensors hold. Plain loops over channels, which any compiler
// turns into vector code of the machine that it runs on.

#include <cmath>
#include <cstdint>
#include <cstring>
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

template <typename T, bool silu>
static void forward(const T* x, const float* weight, const float* bias, T* y, float* mean,
                    float* rstd, int64_t B, int64_t S, int64_t C, int64_t G, float eps) {
    const int64_t D = C / G;
#pragma omp parallel for
    for (int64_t b = 0; b < B; b++) {
        const T* xb = x + b * S * C;
        T* yb = y + b * S * C;
        std::vector<double> sum(C, 0.0), square(C, 0.0);
        std::vector<float> part(C), part2(C), shift(C), a(C), c0(C);
        SIMD
        for (int64_t c = 0; c < C; c++) shift[c] = load(xb[c]);  // the first pixel, against cancellation
        for (int64_t s0 = 0; s0 < S; s0 += ROWS) {
            std::fill(part.begin(), part.end(), 0.f);
            std::fill(part2.begin(), part2.end(), 0.f);
            const int64_t end = s0 + ROWS < S ? s0 + ROWS : S;
            for (int64_t s = s0; s < end; s++)
                SIMD
                for (int64_t c = 0; c < C; c++) {
                    float v = load(xb[s * C + c]) - shift[c];
                    part[c] += v;
                    part2[c] += v * v;
                }
            SIMD
            for (int64_t c = 0; c < C; c++) sum[c] += part[c], square[c] += part2[c];
        }
        for (int64_t g = 0; g < G; g++) {
            double m = 0, m2 = 0;
            for (int64_t c = g * D; c < (g + 1) * D; c++) m += shift[c] + sum[c] / S;
            m /= D;
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                double own = sum[c] / S, off = shift[c] + own - m;  // the channel's mean is off by it
                m2 += square[c] / S - own * own + off * off;
            }
            double r = 1.0 / std::sqrt(m2 / D + eps);
            mean[b * G + g] = m;
            rstd[b * G + g] = r;
            for (int64_t c = g * D; c < (g + 1) * D; c++) {
                a[c] = weight[c] * r;
                c0[c] = bias[c] - m * weight[c] * r;
            }
        }
        for (int64_t s = 0; s < S; s++)
            SIMD
            for (int64_t c = 0; c < C; c++) {
                float v = a[c] * load(xb[s * C + c]) + c0[c];
                store(silu ? v * sigmoid(v) : v, yb[s * C + c]);
            }
    }
}

// d_weight, d_bias: [B, C], to be summed over B.
template <typename T, bool silu>
static void backward(const T* dy, const T* x, const float* weight, const float* bias,
                     const float* mean, const float* rstd, T* dx, float* d_weight, float* d_bias,
                     int64_t B, int64_t S, int64_t C, int64_t G) {
    const int64_t D = C / G;
#pragma omp parallel for
    for (int64_t b = 0; b < B; b++) {
        const T *xb = x + b * S * C, *dyb = dy + b * S * C;
        T* dxb = dx + b * S * C;
        std::vector<float> r(C), mr(C), part(C), part2(C), m1(C), m2(C);
        std::vector<double> sum(C, 0.0), sum2(C, 0.0);
        SIMD
        for (int64_t c = 0; c < C; c++) {
            r[c] = rstd[b * G + c / D];
            mr[c] = mean[b * G + c / D] * r[c];
        }
        for (int64_t s0 = 0; s0 < S; s0 += ROWS) {
            std::fill(part.begin(), part.end(), 0.f);
            std::fill(part2.begin(), part2.end(), 0.f);
            const int64_t end = s0 + ROWS < S ? s0 + ROWS : S;
            for (int64_t s = s0; s < end; s++)
                SIMD
                for (int64_t c = 0; c < C; c++) {
                    float normal = load(xb[s * C + c]) * r[c] - mr[c];
                    float d = load(dyb[s * C + c]);
                    if (silu) d *= slope(weight[c] * normal + bias[c]);
                    part[c] += d;
                    part2[c] += d * normal;
                }
            SIMD
            for (int64_t c = 0; c < C; c++) sum[c] += part[c], sum2[c] += part2[c];
        }
        SIMD
        for (int64_t c = 0; c < C; c++) {
            d_bias[b * C + c] = sum[c];
            d_weight[b * C + c] = sum2[c];
        }
        for (int64_t g = 0; g < G; g++) {
            double t1 = 0, t2 = 0;
            for (int64_t c = g * D; c < (g + 1) * D; c++) t1 += weight[c] * sum[c], t2 += weight[c] * sum2[c];
            for (int64_t c = g * D; c < (g + 1) * D; c++) m1[c] = t1 / (D * S), m2[c] = t2 / (D * S);
        }
        for (int64_t s = 0; s < S; s++)
            SIMD
            for (int64_t c = 0; c < C; c++) {
                float normal = load(xb[s * C + c]) * r[c] - mr[c];
                float d = load(dyb[s * C + c]);
                if (silu) d *= slope(weight[c] * normal + bias[c]);
                store(r[c] * (weight[c] * d - m1[c] - normal * m2[c]), dxb[s * C + c]);
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
