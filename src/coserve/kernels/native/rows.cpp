// Kernels over the rows of a pass on a CPU: norm, rotary embedding, gated activation, sum, the key-value cache's writes, and
// attention over its blocks; and matrices in 8-bit floats decoded. Each is one call where tensor operations would be many.
//
// T rows, H query heads, G key-value heads, K head width. A stride is in elements, from a row to the next; features of a row
// lie side by side. Elements are float or bfloat16; sums and intermediate values are float. The threads of the caller's OpenMP
// team share attention, and other work where it is large enough to be worth waking them.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef int64_t Index;

const Index kElementsPerTeam = 1 << 16;  // fewer are done sooner by one thread
const int kLanes = 16, kLine = 64;       // floats that are worked on at once; bytes that memory is read by
const int kTile = kLanes;                // tokens, and rows of a sequence, that attention works on at once
const int kMostQueries = 48;             // query heads of those rows, likewise
const int kMostWidth = 512;              // of a head; the caller asks for no more
const int kRoom = 8 * kMostWidth;        // floats of those query heads

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));

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

// Rows of `width` values as floats, padded with zeros to `padded` of them: where they lie, or copied to `room`.
template <typename T>
inline const float* copied(const T* values, float* room, Index rows, Index width, Index padded) {
    for (Index row = 0; row < rows; ++row) {
#pragma omp simd
        for (Index k = 0; k < width; ++k) room[row * padded + k] = load(values[row * width + k]);
        for (Index k = width; k < padded; ++k) room[row * padded + k] = 0;
    }
    return room;
}

inline const float* widened(const float* values, float* room, Index rows, Index width, Index padded) {
    return width == padded ? values : copied(values, room, rows, width, padded);
}

inline const float* widened(const Bfloat16* values, float* room, Index rows, Index width, Index padded) {
    return copied(values, room, rows, width, padded);
}

inline Lanes load_lanes(const void* values) {
    Lanes result;
    memcpy(&result, values, sizeof result);
    return result;
}

// Whether the processor multiplies elements of a type as they are, and adds the products up as floats.
template <typename T>
inline constexpr bool kMultiplied = false;

#ifdef __AVX512BF16__
template <>
inline constexpr bool kMultiplied<Bfloat16> = true;

// x and y are 2 * kLanes elements each: lane i gains the products of elements 2 i and 2 i + 1.
inline Lanes add_products(Lanes sums, Lanes x, Lanes y) {
    return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
}
#else
inline Lanes add_products(Lanes sums, Lanes, Lanes) { return sums; }  // is never called
#endif

// 2 * kLanes elements as floats: those with even numbers first, which takes one instruction, and then the odd ones.
inline void widen_two(const Bfloat16* values, Lanes* even, Lanes* odd) {
    Places bits;
    memcpy(&bits, values, sizeof bits);
    *even = reinterpret_cast<Lanes>(bits << 16), *odd = reinterpret_cast<Lanes>(bits & -0x10000);
}

inline void store_lanes(float* place, Lanes values) { memcpy(place, &values, sizeof values); }

// e^x within two units in the last place, without branches, so that a loop over it becomes vector instructions. Below -87 it is
// e^-87, above 88 infinity.
inline float exponential(float exponent) {
    float x = exponent < -87.0f ? -87.0f : exponent;
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
    return exponent > 88.0f ? INFINITY : p * power;
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
#pragma omp parallel for schedule(static) if (4 * rows * width > kElementsPerTeam)  // an exponential each
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

// out may be x or y.
template <typename T>
void add(T* out, const T* x, const T* y, Index rows, Index width, Index out_stride, Index x_stride, Index y_stride) {
#pragma omp parallel for schedule(static) if (rows * width > kElementsPerTeam)
    for (Index row = 0; row < rows; ++row) {
#pragma omp simd
        for (Index k = 0; k < width; ++k) {
            store(out + row * out_stride + k, load(x[row * x_stride + k]) + load(y[row * y_stride + k]));
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

// One sequence's part of a batch: rows [row, row_end), of which the last has `context` tokens to see, itself among them.
struct Sequence {
    const int32_t* table;
    Index row, row_end, context;
};

// Query heads of a key-value head, of some rows of one sequence, and what they have gathered so far. Padded to whole lanes.
// Q: float, or the element type where elements are multiplied as they are.
template <typename Q>
struct Queries {
    alignas(kLine) Q q[kRoom];
    alignas(kLine) float sums[kRoom], totals[kMostQueries * kLanes];  // a query's total is the sum of its lanes
    float largest[kMostQueries];
    Index first[kMostQueries], last[kMostQueries];  // the tokens that each sees
};

// lanes[i] of the result: sum of the lanes of values[i].
inline Lanes sums_of(Lanes* values) {
#define FOLD(STEP, LOW, HIGH)                                                                                                  \
    for (int i = 0; i < STEP; ++i)                                                                                             \
    values[i] = __builtin_shuffle(values[i], values[i + STEP], LOW) + __builtin_shuffle(values[i], values[i + STEP], HIGH)
    const Places low_8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const Places low_4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const Places low_2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const Places low_1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    FOLD(8, low_8, low_8 + 8);
    FOLD(4, low_4, low_4 + 4);
    FOLD(2, low_2, low_2 + 2);
    FOLD(1, low_1, low_1 + 1);
#undef FOLD
    return values[0];
}

// The largest lane, or `least` if that is larger.
inline float largest_of(Lanes values, float least) {
#pragma omp simd reduction(max : least)
    for (int i = 0; i < kLanes; ++i) least = values[i] > least ? values[i] : least;
    return least;
}

// COUNT queries, from number `from` on, meet the keys of tokens [start, start + tokens): their weights, and what they have
// gathered scaled to the new maximum. VECTORS: lanes of floats per head where that is known, else 0.
template <typename Q, int VECTORS, int COUNT>
void weigh(Queries<Q>& queries, Index from, const Q* tile, Index start, Index tokens, Index any_vectors, float scale,
           float* weights) {
    const Index vectors = VECTORS ? VECTORS : any_vectors;
    const Index per_load = kLanes * sizeof(float) / sizeof(Q), loads = vectors * kLanes / per_load;
    Lanes products[COUNT][kTile], query[COUNT][VECTORS ? VECTORS : kMostWidth / kLanes];
    for (int i = 0; i < COUNT; ++i) {
        for (Index v = 0; v < loads; ++v) query[i][v] = load_lanes(queries.q + ((from + i) * loads + v) * per_load);
    }
    for (Index t = 0; t < tokens; ++t) {
        Lanes sums[COUNT] = {};
        for (Index v = 0; v < loads; ++v) {
            Lanes key = load_lanes(tile + (t * loads + v) * per_load);
            for (int i = 0; i < COUNT; ++i) {
                sums[i] = kMultiplied<Q> ? add_products(sums[i], key, query[i][v]) : sums[i] + key * query[i][v];
            }
        }
        for (int i = 0; i < COUNT; ++i) products[i][t] = sums[i];
    }
    for (Index t = tokens; t < kTile; ++t) {
        for (int i = 0; i < COUNT; ++i) products[i][t] = Lanes{};
    }
    for (int i = 0; i < COUNT; ++i) {
        Index n = from + i, first = queries.first[n] - start, last = queries.last[n] - start;
        Lanes scores = sums_of(products[i]) * scale;
        float most = queries.largest[n];
        float* weight = weights + n * kTile;
        first = first > 0 ? first : 0, last = last < tokens ? last : tokens;
        const Places numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const Places seen = (numbers >= static_cast<int32_t>(first)) & (numbers < static_cast<int32_t>(last));
        most = largest_of(seen ? scores : Lanes{} - INFINITY, most);
        if (most > queries.largest[n]) {
            float factor = queries.largest[n] == -INFINITY ? 0 : exponential(queries.largest[n] - most);
            queries.largest[n] = most;
            float* total = queries.totals + n * kLanes;
            store_lanes(total, load_lanes(total) * factor);
            for (Index v = 0; v < vectors; ++v) {
                float* sum = queries.sums + (n * vectors + v) * kLanes;
                store_lanes(sum, load_lanes(sum) * factor);
            }
        }
        float* total = queries.totals + n * kLanes;
#pragma omp simd
        for (Index t = 0; t < kTile; ++t) {
            float value = exponential(scores[t] - most);
            weight[t] = t >= first && t < last ? value : 0;
            total[t] += weight[t];
        }
    }
}

// The same queries gather the values of those tokens. Sums over elements that are multiplied as they are lie as `widen_two`
// gives them.
template <typename Q, int VECTORS, int COUNT>
void gather(Queries<Q>& queries, Index from, const Q* tile, Index tokens, Index any_vectors, const float* weights) {
    const Index vectors = VECTORS ? VECTORS : any_vectors;
    if constexpr (kMultiplied<Q>) {
        for (Index v = 0; v < vectors; v += 2) {
            Lanes sums[2][COUNT], values[2];
            for (int i = 0; i < 2 * COUNT; ++i) {
                sums[i % 2][i / 2] = load_lanes(queries.sums + ((from + i / 2) * vectors + v + i % 2) * kLanes);
            }
            for (Index t = 0; t < tokens; ++t) {
                widen_two(tile + (t * vectors + v) * kLanes, values, values + 1);
                for (int i = 0; i < 2 * COUNT; ++i) sums[i % 2][i / 2] += weights[(from + i / 2) * kTile + t] * values[i % 2];
            }
            for (int i = 0; i < 2 * COUNT; ++i) {
                store_lanes(queries.sums + ((from + i / 2) * vectors + v + i % 2) * kLanes, sums[i % 2][i / 2]);
            }
        }
        return;
    }
    for (Index v = 0; v < vectors; ++v) {
        Lanes sums[COUNT];
        for (int i = 0; i < COUNT; ++i) sums[i] = load_lanes(queries.sums + ((from + i) * vectors + v) * kLanes);
        for (Index t = 0; t < tokens; ++t) {
            Lanes value = load_lanes(tile + (t * vectors + v) * kLanes);
            for (int i = 0; i < COUNT; ++i) sums[i] += weights[(from + i) * kTile + t] * value;
        }
        for (int i = 0; i < COUNT; ++i) store_lanes(queries.sums + ((from + i) * vectors + v) * kLanes, sums[i]);
    }
}

// Attention of `heads` query heads of one key-value head, of rows [row, row_end) of a sequence, tile by tile: of each query
// the running maximum, sum and weighted values. A tile of keys or values is turned to float once for all of them, unless its
// elements are multiplied as they are.
template <typename T, int VECTORS>
void attend(T* out, const T* q, const T* cache, const Sequence& sequence, Index row, Index row_end, Index heads, Index width,
            Index out_stride, Index q_stride, Index block_tokens, Index block_stride, Index values_offset, Index window,
            float scale) {
    constexpr bool as_they_are = kMultiplied<T> && VECTORS % 2 == 0 && VECTORS > 0;
    using Q = std::conditional_t<as_they_are, T, float>;
    const Index vectors = VECTORS ? VECTORS : (width + kLanes - 1) / kLanes, padded = vectors * kLanes;
    const Index count = (row_end - row) * heads;
    Queries<Q> queries;
    for (Index n = 0; n < count; ++n) {
        Index here = row + n / heads, last = sequence.context - (sequence.row_end - 1 - here);
        const T* from = q + here * q_stride + n % heads * width;
        if constexpr (as_they_are) memcpy(queries.q + n * padded, from, padded * sizeof(T));
        else copied(from, queries.q + n * padded, 1, width, padded);
        for (Index k = 0; k < padded; ++k) queries.sums[n * padded + k] = 0;
        queries.last[n] = last, queries.first[n] = window && last > window ? last - window : 0;
        for (Index t = 0; t < kLanes; ++t) queries.totals[n * kLanes + t] = last > 0 ? 0 : 1;  // nothing to see: zeros
        queries.largest[n] = -INFINITY;
    }
    alignas(kLine) float room[kTile * (VECTORS ? VECTORS * kLanes : kMostWidth)], weights[kMostQueries * kTile];
    Index end = queries.last[count - 1];
    // Tiles lie on a grid of their own, so that a row's bits do not depend on the rows beside it.
    for (Index start = queries.first[0] - queries.first[0] % block_tokens % kTile; start < end;) {
        Index block = start / block_tokens, offset = start - block * block_tokens, left = block_tokens - offset;
        Index tokens = left < end - start ? left : end - start;
        tokens = tokens < kTile ? tokens : kTile;
        const T* keys = cache + sequence.table[block] * block_stride + offset * width;
        if (start + left < end && offset + tokens == block_tokens) {  // the processor does not guess where the next block lies
            const T* next = cache + sequence.table[block + 1] * block_stride;
            for (Index k = 0; k < block_tokens * width; k += kLine / sizeof(T)) {
                __builtin_prefetch(next + k, 0, 2);
                __builtin_prefetch(next + values_offset + k, 0, 2);
            }
        }
        const Q* tile;
        if constexpr (as_they_are) tile = keys;
        else tile = widened(keys, room, tokens, width, padded);
        Index n = 0;
        for (; count - n >= 4; n += 4) weigh<Q, VECTORS, 4>(queries, n, tile, start, tokens, vectors, scale, weights);
        if (count - n == 3) weigh<Q, VECTORS, 3>(queries, n, tile, start, tokens, vectors, scale, weights);
        if (count - n == 2) weigh<Q, VECTORS, 2>(queries, n, tile, start, tokens, vectors, scale, weights);
        if (count - n == 1) weigh<Q, VECTORS, 1>(queries, n, tile, start, tokens, vectors, scale, weights);
        if constexpr (as_they_are) tile = keys + values_offset;
        else tile = widened(keys + values_offset, room, tokens, width, padded);
        n = 0;
        for (; count - n >= 4; n += 4) gather<Q, VECTORS, 4>(queries, n, tile, tokens, vectors, weights);
        if (count - n == 3) gather<Q, VECTORS, 3>(queries, n, tile, tokens, vectors, weights);
        if (count - n == 2) gather<Q, VECTORS, 2>(queries, n, tile, tokens, vectors, weights);
        if (count - n == 1) gather<Q, VECTORS, 1>(queries, n, tile, tokens, vectors, weights);
        start += tokens;
    }
    for (Index n = 0; n < count; ++n) {
        T* to = out + (row + n / heads) * out_stride + n % heads * width;
        float total = 0;
        for (Index t = 0; t < kLanes; ++t) total += queries.totals[n * kLanes + t];
        for (Index k = 0; k < width; ++k) {
            Index place = as_they_are ? k / (2 * kLanes) * (2 * kLanes) + k % 2 * kLanes + k % (2 * kLanes) / 2 : k;
            store(to + k, queries.sums[n * padded + place] / total);
        }
    }
}

// q, out: [T, G * share * K]; sequence b has rows [starts[b], starts[b + 1]), the blocks in row b of tables [B, N], and
// contexts[b] tokens with its last row's. window: how many of the last tokens are seen, 0 for all. cache: the layer's memory
// from its first key on; value heads lie values_offset elements behind key heads.
template <typename T>
void paged_attention(T* out, const T* q, const T* cache, const int32_t* tables, const int32_t* contexts, const int32_t* starts,
                     Index sequences, Index kv_heads, Index share, Index width, Index out_stride, Index q_stride,
                     Index table_stride, Index block_tokens, Index block_stride, Index values_offset, Index window,
                     float scale) {
    // A task is some rows of a sequence, one key-value head, and some of its query heads: as many of both as there is room for.
    const Index padded = (width + kLanes - 1) / kLanes * kLanes, room = kRoom / padded;
    const Index most = room < kMostQueries ? room : kMostQueries;
    Index heads = (starts[sequences] - starts[0]) * kv_heads < 3 ? 1 : share;  // small tasks where they are few
    while (heads > most) heads = (heads + 1) / 2;
    const Index parts = (share + heads - 1) / heads, together = most / heads < kTile ? most / heads : kTile;
    Index pieces = 0;  // of sequences, `together` rows each
    for (Index b = 0; b < sequences; ++b) pieces += (starts[b + 1] - starts[b] + together - 1) / together;
    const Index run = pieces < 8 ? 1 : kv_heads * parts;  // the key-value heads of a piece lie side by side
#pragma omp parallel for schedule(dynamic, run)
    for (Index i = 0; i < pieces * kv_heads * parts; ++i) {
        Index piece = i / (kv_heads * parts), group = i / parts % kv_heads, head = i % parts * heads, b = 0;
        for (;; ++b) {
            Index own = (starts[b + 1] - starts[b] + together - 1) / together;
            if (piece < own) break;
            piece -= own;
        }
        Sequence sequence = {tables + b * table_stride, starts[b], starts[b + 1], contexts[b]};
        Index row = starts[b] + piece * together, row_end = row + together < starts[b + 1] ? row + together : starts[b + 1];
        Index column = (group * share + head) * width, own_heads = share - head < heads ? share - head : heads;
        const T* keys = cache + group * block_tokens * width;
#define ATTEND(VECTORS)                                                                                                        \
    attend<T, VECTORS>(out + column, q + column, keys, sequence, row, row_end, own_heads, width, out_stride, q_stride,         \
                       block_tokens, block_stride, values_offset, window, scale)
        if (width == 64) ATTEND(4);
        else if (width == 128) ATTEND(8);
        else ATTEND(0);
#undef ATTEND
    }
}

typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// GNU's compiler converts vectors of different sizes element by element.
#ifdef __AVX512F__
inline Places widen_bytes(Bytes bytes) {
    return reinterpret_cast<Places>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
}
inline Halves low_halves(Words words) {
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
}
#else
inline Places widen_bytes(Bytes bytes) { return __builtin_convertvector(bytes, Places); }
inline Halves low_halves(Words words) { return __builtin_convertvector(words, Halves); }
#endif

inline void store_finite(float* place, Lanes values) { store_lanes(place, values); }

// As `store`, for numbers and for the NaN that the processor makes.
inline void store_finite(Bfloat16* place, Lanes values) {
    Words bits = reinterpret_cast<Words>(values);
    Halves halves = low_halves((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    memcpy(place, &halves, sizeof halves);
}

// The sign is shifted along when bytes become words; what it fills between itself and the exponent is cleared. 2^120 makes up
// for the exponent's other bias.
inline Lanes e4m3_lanes(const int8_t* from, float scale) {
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    Places moved = widen_bytes(bytes) << 20 & ~0x78000000;
    return reinterpret_cast<Lanes>(moved) * 0x1p120f * scale;
}

// out = the numbers that e4m3 bytes stand for, times the row's scale. The bytes of NaN are not told apart from a number.
template <typename T>
void decode_e4m3(T* out, const int8_t* bits, const float* scales, Index rows, Index width, Index out_stride,
                 Index bits_stride) {
#pragma omp parallel for schedule(static) if (rows * width > kElementsPerTeam)
    for (Index row = 0; row < rows; ++row) {
        const int8_t* from = bits + row * bits_stride;
        T* to = out + row * out_stride;
        Index k = 0;
        for (; k + kLanes <= width; k += kLanes) store_finite(to + k, e4m3_lanes(from + k, scales[row]));
        if (k < width) {
            int8_t last[kLanes] = {};
            T decoded[kLanes];
            memcpy(last, from + k, width - k);
            store_finite(decoded, e4m3_lanes(last, scales[row]));
            memcpy(to + k, decoded, (width - k) * sizeof(T));
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
    extern "C" void add_##NAME(T* out, const T* x, const T* y, Index rows, Index width, Index out_stride, Index x_stride,      \
                               Index y_stride) {                                                                               \
        add(out, x, y, rows, width, out_stride, x_stride, y_stride);                                                           \
    }                                                                                                                          \
    extern "C" void write_cache_##NAME(T* keys, T* values, const Index* heads, const T* k, const T* v, Index rows,             \
                                       Index kv_heads, Index width, Index k_stride, Index v_stride) {                          \
        write_cache(keys, values, heads, k, v, rows, kv_heads, width, k_stride, v_stride);                                     \
    }                                                                                                                          \
    extern "C" void paged_attention_##NAME(T* out, const T* q, const T* cache, const int32_t* tables, const int32_t* contexts, \
                                           const int32_t* starts, Index sequences, Index kv_heads, Index share, Index width,   \
                                           Index out_stride, Index q_stride, Index table_stride, Index block_tokens,           \
                                           Index block_stride, Index values_offset, Index window, float scale) {               \
        paged_attention(out, q, cache, tables, contexts, starts, sequences, kv_heads, share, width, out_stride, q_stride,      \
                        table_stride, block_tokens, block_stride, values_offset, window, scale);                               \
    }                                                                                                                          \
    extern "C" void decode_e4m3_##NAME(T* out, const int8_t* bits, const float* scales, Index rows, Index width,               \
                                       Index out_stride, Index bits_stride) {                                                  \
        decode_e4m3(out, bits, scales, rows, width, out_stride, bits_stride);                                                  \
    }

KERNELS(float, float32)
KERNELS(Bfloat16, bfloat16)
