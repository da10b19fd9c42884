// Kernels over the rows of a pass on a CPU: norm, rotary embedding, gated activation, the key-value cache's writes, and decode
// attention over its blocks. Each is one call where tensor operations would be five to twenty-five.
//
// T rows, H query heads, G key-value heads, K head width. A stride is in elements, from a row to the next; features of a row
// lie side by side. Elements are float or bfloat16; sums and intermediate values are float. Work is shared among the threads of
// the calling thread's OpenMP team where it is large enough to be worth waking them.

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef int64_t Index;

const Index kElementsPerTeam = 1 << 14;  // fewer are done sooner by one thread
const int kMostWidth = 512;              // of a head, in decode attention; the caller asks for no more
const int kTile = 16;                    // tokens of a block that are worked on at once
const int kLanes = 16;                   // features, likewise
const int kLine = 64;                    // bytes that memory is read by

struct Bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(Bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* place, float value) { *place = value; }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(Bfloat16* place, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

template <typename T>
inline float rounded(float value) {
    T result;
    store(&result, value);
    return load(result);
}

// Values as float: where they lie, or turned to it in `room`.
inline const float* widened(const float* values, float*, Index) { return values; }

inline const float* widened(const Bfloat16* values, float* room, Index count) {
#pragma omp simd
    for (Index i = 0; i < count; ++i) room[i] = load(values[i]);
    return room;
}

// e^x within two units in the last place, as a loop over it becomes vector instructions. Below -87 it is e^-87, above 88 e^88.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = nearbyintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Rounded to the element type before the weight, as Hugging Face's norm does.
template <typename T>
void rmsnorm(T* out, const T* x, const T* weight, Index rows, Index groups, Index width, Index out_stride, Index x_stride,
             float eps) {
#pragma omp parallel for schedule(static) if (rows * groups * width > kElementsPerTeam)
    for (Index i = 0; i < rows * groups; ++i) {
        const T* from = x + (i / groups) * x_stride + (i % groups) * width;
        T* to = out + (i / groups) * out_stride + (i % groups) * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index k = 0; k < width; ++k) sum += load(from[k]) * load(from[k]);
        float factor = 1 / sqrtf(sum / width + eps);
#pragma omp simd
        for (Index k = 0; k < width; ++k) store(to + k, rounded<T>(load(from[k]) * factor) * load(weight[k]));
    }
}

// out may be x. The first half of sine is negated; sign -1 turns back.
template <typename T>
void rope(T* out, const T* x, const T* cosine, const T* sine, Index rows, Index heads, Index width, Index out_stride,
          Index x_stride, float sign) {
    Index half = width / 2;
#pragma omp parallel for schedule(static) if (rows * heads * width > kElementsPerTeam)
    for (Index i = 0; i < rows * heads; ++i) {
        const T* from = x + (i / heads) * x_stride + (i % heads) * width;
        T* to = out + (i / heads) * out_stride + (i % heads) * width;
        const T *c = cosine + (i / heads) * width, *s = sine + (i / heads) * width;
#pragma omp simd
        for (Index k = 0; k < half; ++k) {
            float first = load(from[k]), second = load(from[half + k]);
            store(to + k, first * load(c[k]) + sign * second * load(s[k]));
            store(to + half + k, second * load(c[half + k]) + sign * first * load(s[half + k]));
        }
    }
}

// The activation is rounded to the element type before the product, as Hugging Face's is. out may be gate or up.
template <typename T>
void silu_mul(T* out, const T* gate, const T* up, Index rows, Index width, Index out_stride, Index gate_stride,
              Index up_stride) {
#pragma omp parallel for schedule(static) if (rows * width > kElementsPerTeam)
    for (Index row = 0; row < rows; ++row) {
        const T *g = gate + row * gate_stride, *u = up + row * up_stride;
        T* to = out + row * out_stride;
#pragma omp simd
        for (Index k = 0; k < width; ++k) {
            float x = load(g[k]);
            store(to + k, rounded<T>(x / (1 + exponential(-x))) * load(u[k]));
        }
    }
}

// keys, values: a layer's memory, as heads of K elements; heads [T * G]: where each head of each row goes.
template <typename T>
void write_cache(T* keys, T* values, const Index* heads, const T* k, const T* v, Index rows, Index kv_heads, Index width,
                 Index k_stride, Index v_stride) {
#pragma omp parallel for schedule(static) if (rows * kv_heads * width > kElementsPerTeam)
    for (Index i = 0; i < rows * kv_heads; ++i) {
        Index row = i / kv_heads, column = (i % kv_heads) * width;
        memcpy(keys + heads[i] * width, k + row * k_stride + column, width * sizeof(T));
        memcpy(values + heads[i] * width, v + row * v_stride + column, width * sizeof(T));
    }
}

// Attention of HEADS query heads of one key-value head over tokens [first, last) of their sequence, block by block: of each head
// the running maximum, sum and weighted values. A block is turned to float once for all of them. WIDTH is K where that is known
// when this is compiled, else 0.
template <typename T, int WIDTH, int HEADS>
void attend(T* out, const T* q, const T* cache, const int32_t* table, Index first, Index last, Index block_tokens,
            Index block_stride, Index values_offset, Index any_width, float scale) {
    const int kWidth = WIDTH ? WIDTH : kMostWidth;
    const Index width = WIDTH ? WIDTH : any_width;
    float query[HEADS][kWidth], sums[HEADS][kWidth], largest[HEADS], total[HEADS];
    for (int h = 0; h < HEADS; ++h) {
        for (Index k = 0; k < width; ++k) query[h][k] = load(q[h * width + k]) * scale, sums[h][k] = 0;
        largest[h] = -INFINITY, total[h] = first < last ? 0.0f : 1.0f;  // nothing to see: zeros
    }
    for (Index start = first; start < last;) {
        Index block = start / block_tokens, offset = start - block * block_tokens, left = block_tokens - offset;
        Index count = left < last - start ? left : last - start;
        count = count < kTile ? count : kTile;
        const T* keys = cache + table[block] * block_stride + offset * width;
        const T* values = keys + values_offset;
        if (start + count < last) {  // the processor does not guess where the next block lies
            const T* next = cache + table[(start + count) / block_tokens] * block_stride;
            for (Index k = 0; k < block_tokens * width; k += kLine / sizeof(T)) {
                __builtin_prefetch(next + k);
                __builtin_prefetch(next + values_offset + k);
            }
        }
        float room[kTile * kWidth], weights[HEADS][kTile];
        const float* tile = widened(keys, room, count * width);
        for (int h = 0; h < HEADS; ++h) {
            float most = largest[h];
            for (Index t = 0; t < count; ++t) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (Index k = 0; k < width; ++k) dot += query[h][k] * tile[t * width + k];
                weights[h][t] = dot;
                most = dot > most ? dot : most;
            }
            if (most > largest[h]) {
                float factor = largest[h] == -INFINITY ? 0 : exponential(largest[h] - most);
                total[h] *= factor;
#pragma omp simd
                for (Index k = 0; k < width; ++k) sums[h][k] *= factor;
                largest[h] = most;
            }
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (Index t = 0; t < count; ++t) {
                weights[h][t] = exponential(weights[h][t] - most);
                sum += weights[h][t];
            }
            total[h] += sum;
        }
        tile = widened(values, room, count * width);
        for (Index k = 0; k < width; k += kLanes) {
            Index lanes = width - k < kLanes ? width - k : kLanes;
            for (int h = 0; h < HEADS; ++h) {
                float sum[kLanes];
                for (Index i = 0; i < lanes; ++i) sum[i] = sums[h][k + i];
                for (Index t = 0; t < count; ++t) {
#pragma omp simd
                    for (Index i = 0; i < lanes; ++i) sum[i] += weights[h][t] * tile[t * width + k + i];
                }
                for (Index i = 0; i < lanes; ++i) sums[h][k + i] = sum[i];
            }
        }
        start += count;
    }
    for (int h = 0; h < HEADS; ++h) {
        for (Index k = 0; k < width; ++k) store(out + h * width + k, sums[h][k] / total[h]);
    }
}

// The same for any number of heads, as many at once as are compiled.
template <typename T, int WIDTH>
void attend_heads(T* out, const T* q, const T* cache, const int32_t* table, Index first, Index last, Index block_tokens,
                  Index block_stride, Index values_offset, Index width, float scale, Index heads) {
    Index h = 0;
#define ATTEND(N)                                                                                                              \
    for (; heads - h >= N; h += N)                                                                                             \
        attend<T, WIDTH, N>(out + h * width, q + h * width, cache, table, first, last, block_tokens, block_stride,             \
                            values_offset, width, scale)
    ATTEND(4);
    ATTEND(3);
    ATTEND(2);
    ATTEND(1);
#undef ATTEND
}

// q, out: [B, G * share * K]; tables [B, N]: a sequence's blocks; contexts [B]: its tokens. window: how many of the last tokens
// are seen, 0 for all. cache: the layer's memory from its first key on; value heads lie values_offset elements behind key heads.
template <typename T>
void paged_decode(T* out, const T* q, const T* cache, const int32_t* tables, const int32_t* contexts, Index rows,
                  Index kv_heads, Index share, Index width, Index out_stride, Index q_stride, Index table_stride,
                  Index block_tokens, Index block_stride, Index values_offset, Index window, float scale) {
    Index together = rows * kv_heads < 8 ? 1 : share, parts = share / together;
#pragma omp parallel for schedule(dynamic, 1)
    for (Index i = 0; i < rows * kv_heads * parts; ++i) {
        Index row = i / (kv_heads * parts), group = i / parts % kv_heads, head = group * share + i % parts * together;
        Index context = contexts[row], first = window && context > window ? context - window : 0;
        T* to = out + row * out_stride + head * width;
        const T* from = q + row * q_stride + head * width;
        const T* keys = cache + group * block_tokens * width;
        const int32_t* table = tables + row * table_stride;
        if (width == 64) {
            attend_heads<T, 64>(to, from, keys, table, first, context, block_tokens, block_stride, values_offset, width, scale, together);
        } else if (width == 128) {
            attend_heads<T, 128>(to, from, keys, table, first, context, block_tokens, block_stride, values_offset, width, scale, together);
        } else {
            attend_heads<T, 0>(to, from, keys, table, first, context, block_tokens, block_stride, values_offset, width, scale, together);
        }
    }
}

}  // namespace

#define KERNELS(T, NAME)                                                                                                       \
    extern "C" void rmsnorm_##NAME(T* out, const T* x, const T* weight, Index rows, Index groups, Index width,                 \
                                   Index out_stride, Index x_stride, float eps) {                                              \
        rmsnorm(out, x, weight, rows, groups, width, out_stride, x_stride, eps);                                               \
    }                                                                                                                          \
    extern "C" void rope_##NAME(T* out, const T* x, const T* cosine, const T* sine, Index rows, Index heads, Index width,      \
                                Index out_stride, Index x_stride, float sign) {                                                \
        rope(out, x, cosine, sine, rows, heads, width, out_stride, x_stride, sign);                                            \
    }                                                                                                                          \
    extern "C" void silu_mul_##NAME(T* out, const T* gate, const T* up, Index rows, Index width, Index out_stride,             \
                                    Index gate_stride, Index up_stride) {                                                      \
        silu_mul(out, gate, up, rows, width, out_stride, gate_stride, up_stride);                                              \
    }                                                                                                                          \
    extern "C" void write_cache_##NAME(T* keys, T* values, const Index* heads, const T* k, const T* v, Index rows,             \
                                       Index kv_heads, Index width, Index k_stride, Index v_stride) {                          \
        write_cache(keys, values, heads, k, v, rows, kv_heads, width, k_stride, v_stride);                                     \
    }                                                                                                                          \
    extern "C" void paged_decode_##NAME(T* out, const T* q, const T* cache, const int32_t* tables, const int32_t* contexts,    \
                                        Index rows, Index kv_heads, Index share, Index width, Index out_stride,                \
                                        Index q_stride, Index table_stride, Index block_tokens, Index block_stride,            \
                                        Index values_offset, Index window, float scale) {                                      \
        paged_decode(out, q, cache, tables, contexts, rows, kv_heads, share, width, out_stride, q_stride, table_stride,        \
                     block_tokens, block_stride, values_offset, window, scale);                                                \
    }

KERNELS(float, float32)
KERNELS(Bfloat16, bfloat16)
