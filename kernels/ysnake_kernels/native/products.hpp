// Products of few rows with a weight matrix in float32, bfloat16, int8 or int4.
//
// matrix.py packs the weights and declares `Matrix` in the same order of fields.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;       // numbers that a vector register is taken to hold
constexpr int GROUP = 32;      // int4 weights that share a scale
constexpr int ROWS = 4;        // rows of weights that are multiplied at the same time
constexpr int UNPACKED = 4;    // from this many input rows on, bfloat16 weights become float32 first
constexpr int64_t LARGEST = 2047;  // of the integers to which inputs are rounded

using Floats = float __attribute__((vector_size(LANES * 4)));
using Ints = int32_t __attribute__((vector_size(LANES * 4)));
using Words = uint32_t __attribute__((vector_size(LANES * 4)));
using HalfWords = uint16_t __attribute__((vector_size(LANES * 2)));
using Shorts = int16_t __attribute__((vector_size(LANES * 4)));
using Bytes = int8_t __attribute__((vector_size(LANES * 2)));
using Nibbles = uint8_t __attribute__((vector_size(LANES * 2)));

template <class Vector>
Vector load(const void* at) {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

template <class Vector>
auto sum(Vector v) {
    auto total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
}

// GCC's own conversions to a wider type take several times as many instructions as AVX2's.
#ifdef __AVX2__
Shorts widen(Bytes v) { return (Shorts)_mm256_cvtepi8_epi16((__m128i)v); }
Shorts widen(Nibbles v) { return (Shorts)_mm256_cvtepu8_epi16((__m128i)v); }
Words widen(HalfWords v) { return (Words)_mm256_cvtepu16_epi32((__m128i)v); }
#else
Shorts widen(Bytes v) { return __builtin_convertvector(v, Shorts); }
Shorts widen(Nibbles v) { return __builtin_convertvector(v, Shorts); }
Words widen(HalfWords v) { return __builtin_convertvector(v, Words); }
#endif

// Multiplies 16 pairs and adds neighbouring products: 8 sums.
Ints multiply_and_add(Shorts a, Shorts b) {
#ifdef __AVX2__
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    Ints result;
    for (int i = 0; i < LANES; i++) result[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return result;
#endif
}

}  // namespace

enum Format : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

// A weight matrix (rows, columns) with a bias (rows,) or null.
struct Matrix {
    int64_t format, rows, columns;
    const void* weights;  // as matrix.py lays them out
    const float* scales;  // likewise; null for float32 and bfloat16
    const float* bias;
};

namespace {

// How many groups a row has, of which the last one may end with zeros.
int64_t groups(int64_t columns) { return (columns + GROUP - 1) / GROUP; }

// Inputs (batch, columns) of a product, as its weights need them. Each thread has its own.
class Inputs {
public:
    // Fill each `row`, then call `prepare`.
    Inputs(int64_t batch, int64_t columns)
        : batch(batch), columns(columns), steps(groups(columns)), floats(batch * steps * GROUP),
          integers(batch * steps * GROUP), offsets(batch * steps), scales(batch, 1) {}

    float* row(int64_t b) { return &floats[b * steps * GROUP]; }
    const float* row(int64_t b) const { return &floats[b * steps * GROUP]; }
    const int16_t* integers_of(int64_t b) const { return &integers[b * steps * GROUP]; }
    const int32_t* offsets_of(int64_t b) const { return &offsets[b * steps]; }
    float scale(int64_t b) const { return scales[b]; }

    // Round the inputs to integers, where the weights are integers.
    void prepare(int64_t format) {
        if (format == FLOAT32 || format == BFLOAT16) return;
        std::fill(integers.begin(), integers.end(), 0);
        std::fill(offsets.begin(), offsets.end(), 0);
        // The sum over all columns must fit into 32 bits.
        float most = std::min(LARGEST, INT32_MAX / 128 / (steps * GROUP));
        for (int64_t b = 0; b < batch; b++) {
            const float* x = row(b);
            float largest = 0, check = 0;
            for (int64_t i = 0; i < columns; i++) {
                largest = std::max(largest, std::fabs(x[i]));
                check += x[i] * 0;  // NaN if an entry is infinite or NaN
            }
            scales[b] = largest / most + check;
            float factor = largest > 0 && check == 0 ? most / largest : 0;
            if (factor == 0) continue;
            for (int64_t i = 0; i < columns; i++) {
                int16_t rounded = int16_t(std::rint(x[i] * factor));
                integers[b * steps * GROUP + i] = rounded;
                offsets[b * steps + i / GROUP] -= 8 * rounded;
            }
        }
    }

private:
    int64_t batch, columns, steps;
    std::vector<float> floats;
    std::vector<int16_t> integers;
    std::vector<int32_t> offsets;
    std::vector<float> scales;
};

// Products of ROWS rows of weights, from row `first` on, with X rows of inputs. `result` gets
// (ROWS, X).

template <int X>
void dot_float32(const float* const* row, int64_t columns, const float* const* x, float* result) {
    Floats sums[ROWS][X] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        Floats inputs[X];
        for (int k = 0; k < X; k++) inputs[k] = load<Floats>(x[k] + i);
        for (int r = 0; r < ROWS; r++) {
            Floats w = load<Floats>(row[r] + i);
            for (int k = 0; k < X; k++) sums[r][k] += w * inputs[k];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < X; k++) {
            float total = sum(sums[r][k]);
            for (int64_t j = i; j < columns; j++) total += row[r][j] * x[k][j];
            result[r * X + k] = total;
        }
}

template <int X>
void dot_bfloat16(const Matrix& m, int64_t first, const float* const* x, float* result) {
    int64_t steps = groups(m.columns);
    const uint16_t* weights = (const uint16_t*)m.weights + first * steps * GROUP;
    Floats sums[ROWS][X] = {};
    for (int64_t g = 0; g < steps; g++, weights += ROWS * GROUP)
        for (int i = 0; i < GROUP; i += LANES) {
            Floats inputs[X];
            for (int k = 0; k < X; k++) inputs[k] = load<Floats>(x[k] + g * GROUP + i);
            for (int r = 0; r < ROWS; r++) {
                Floats w = (Floats)(widen(load<HalfWords>(weights + r * GROUP + i)) << 16);
                for (int k = 0; k < X; k++) sums[r][k] += w * inputs[k];
            }
        }
    for (int i = 0; i < ROWS * X; i++) result[i] = sum(sums[i / X][i % X]);
}

template <int X>
void dot_int8(const Matrix& m, int64_t first, const int16_t* const* x, float* result) {
    int64_t steps = groups(m.columns);
    const int8_t* weights = (const int8_t*)m.weights + first * steps * GROUP;
    Ints sums[ROWS][X] = {};
    for (int64_t g = 0; g < steps; g++, weights += ROWS * GROUP)
        for (int i = 0; i < GROUP; i += 2 * LANES) {
            Shorts inputs[X];
            for (int k = 0; k < X; k++) inputs[k] = load<Shorts>(x[k] + g * GROUP + i);
            for (int r = 0; r < ROWS; r++) {
                Shorts w = widen(load<Bytes>(weights + r * GROUP + i));
                for (int k = 0; k < X; k++) sums[r][k] += multiply_and_add(w, inputs[k]);
            }
        }
    for (int i = 0; i < ROWS * X; i++)
        result[i] = float(sum(sums[i / X][i % X])) * m.scales[first + i / X];
}

// The stored numbers are 0 to 15, which stand for -8 to 7. So 8 times the sum of a group's inputs
// is taken off: `offsets` (groups,) for each input.
template <int X>
void dot_int4(const Matrix& m, int64_t first, const int16_t* const* x,
              const int32_t* const* offsets, float* result) {
    int64_t steps = groups(m.columns);
    const uint8_t* weights = (const uint8_t*)m.weights + first * steps * GROUP / 2;
    const float* scales = m.scales + first * steps;
    Floats sums[ROWS][X] = {};
    for (int64_t g = 0; g < steps; g++, weights += ROWS * GROUP / 2, scales += ROWS) {
        Shorts low[X], high[X];
        Ints start[X];
        for (int k = 0; k < X; k++) {
            start[k] = Ints{offsets[k][g]};
            low[k] = load<Shorts>(x[k] + g * GROUP);
            high[k] = load<Shorts>(x[k] + g * GROUP + GROUP / 2);
        }
        for (int r = 0; r < ROWS; r++) {
            Shorts pairs = widen(load<Nibbles>(weights + r * GROUP / 2));
            for (int k = 0; k < X; k++) {
                Ints total = start[k] + multiply_and_add(pairs & 15, low[k]);
                total += multiply_and_add(pairs >> 4, high[k]);
                sums[r][k] += __builtin_convertvector(total, Floats) * scales[r];
            }
        }
    }
    for (int i = 0; i < ROWS * X; i++) result[i] = sum(sums[i / X][i % X]);
}

// `unpacked` has what `unpack` gives for these rows, or is null.
template <int X>
void dots(const Matrix& m, int64_t first, const float* unpacked, const Inputs& inputs, int64_t from,
          float* y, bool add) {
    float result[ROWS * X];
    const float* floats[X];
    const int16_t* integers[X];
    const int32_t* offsets[X];
    for (int k = 0; k < X; k++) {
        floats[k] = inputs.row(from + k);
        integers[k] = inputs.integers_of(from + k);
        offsets[k] = inputs.offsets_of(from + k);
    }
    int64_t rows = std::min<int64_t>(ROWS, m.rows - first);
    if (unpacked || m.format == FLOAT32) {
        int64_t columns = unpacked ? groups(m.columns) * GROUP : m.columns;
        const float* from_row = unpacked ? unpacked : (const float*)m.weights + first * columns;
        const float* row[ROWS];  // the last row stands in for rows beyond the end
        for (int r = 0; r < ROWS; r++) row[r] = from_row + std::min<int64_t>(r, rows - 1) * columns;
        dot_float32<X>(row, columns, floats, result);
    } else if (m.format == BFLOAT16) {
        dot_bfloat16<X>(m, first, floats, result);
    } else if (m.format == INT8) {
        dot_int8<X>(m, first, integers, result);
    } else {
        dot_int4<X>(m, first, integers, offsets, result);
    }
    for (int k = 0; k < X; k++)
        for (int64_t r = 0; r < rows; r++) {
            float value = result[r * X + k] * inputs.scale(from + k);
            if (m.bias) value += m.bias[first + r];
            float& at = y[(from + k) * m.rows + first + r];
            at = add ? at + value : value;
        }
}

// The group of weights at `group` of a packed matrix, in row `row`, as float32.
void unpack_group(const Matrix& m, int64_t row, int64_t group, float* y) {
    if (m.format == BFLOAT16) {
        const uint16_t* weights = (const uint16_t*)m.weights + group * GROUP;
        for (int i = 0; i < GROUP; i++) {
            uint32_t word = uint32_t(weights[i]) << 16;
            std::memcpy(y + i, &word, sizeof word);
        }
    } else if (m.format == INT8) {
        const int8_t* weights = (const int8_t*)m.weights + group * GROUP;
        float scale = m.scales[row];
        for (int i = 0; i < GROUP; i++) y[i] = weights[i] * scale;
    } else {
        const uint8_t* pairs = (const uint8_t*)m.weights + group * GROUP / 2;
        float scale = m.scales[group];
        for (int i = 0; i < GROUP / 2; i++) y[i] = float((pairs[i] & 15) - 8) * scale;
        for (int i = 0; i < GROUP / 2; i++) y[GROUP / 2 + i] = float((pairs[i] >> 4) - 8) * scale;
    }
}

// ROWS rows of a packed matrix, from row `first` on, as float32 (ROWS, columns in whole groups).
void unpack(const Matrix& m, int64_t first, float* y) {
    int64_t steps = groups(m.columns);
    for (int64_t i = 0; i < ROWS * steps; i++) {
        int64_t r = i % ROWS, g = i / ROWS, row = std::min(first + r, m.rows - 1);
        unpack_group(m, row, first * steps + i, y + (r * steps + g) * GROUP);
    }
}

// y (batch, rows) = or += inputs weights^T + bias. All threads of the team call it.
void product(const Matrix& m, const Inputs& inputs, int64_t batch, float* y, bool add) {
    bool unpack_first = m.format == BFLOAT16 && batch >= UNPACKED;
    std::vector<float> room(unpack_first ? ROWS * groups(m.columns) * GROUP : 0);
    const float* unpacked = unpack_first ? room.data() : nullptr;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < m.rows; first += ROWS) {
        if (unpack_first) unpack(m, first, room.data());
        for (int64_t b = 0; b < batch;) {
            int64_t left = batch - b;
            if (left == 1) {
                dots<1>(m, first, unpacked, inputs, b, y, add);
                b += 1;
            } else if (left == 2 || left == 4) {
                dots<2>(m, first, unpacked, inputs, b, y, add);
                b += 2;
            } else {
                dots<3>(m, first, unpacked, inputs, b, y, add);
                b += 3;
            }
        }
    }
}

}  // namespace
