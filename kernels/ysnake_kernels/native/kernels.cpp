// One token of each row through a Mamba-2 model, and products with few rows, on a CPU.
//
// build.py compiles this file on the machine that runs it. matrix.py, model_step.py and
// state_step.py declare the structs below in the same order of fields. All memory belongs to the
// caller. Arrays are contiguous unless a comment says otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;       // numbers that a vector register is taken to hold
constexpr int GROUP = 32;      // int4 weights that share a scale
constexpr int ROWS = 4;        // rows of weights that are multiplied at the same time
constexpr int UNPACKED = 4;    // rows of inputs from which bfloat16 is turned into float32 first
constexpr float LARGEST = 2047;  // of the integers to which inputs are rounded

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

// A block of the model. The mixer's sizes are those of all layers.
struct Layer {
    const float* norm;  // (d_model,)
    Matrix in, out;
    const float *taps, *conv_bias;  // (width, channels); (channels,) or null
    const float *dt_bias, *A, *D;   // (heads,)
    const float* gated_norm;        // (d_inner,)
    double eps, gated_eps;
};

struct Sizes {
    int64_t d_model, d_inner, heads, groups, state, width;
    double dt_low, dt_high;
};

struct Model {
    Sizes sizes;
    int64_t layers, outputs;
    const Layer* layer;    // (layers,)
    const Matrix* output;  // (outputs,), one after the other, from the last norm to the logits
    const float* norm;
    double eps;
};

// The states of one layer. The strides are those of conv, in numbers.
struct State {
    float *conv, *ssm;  // (batch, channels, width - 1); (batch, heads, head_dim, state)
    int64_t batch_stride, channel_stride, token_stride;
};

// The recurrence of a layer for one token. D, z and dt_bias may be null.
struct Recurrence {
    int64_t batch, heads, groups, head_dim, state, softplus, D_per_channel;
    double dt_low, dt_high;
    float* S;                      // (batch, heads, head_dim, state)
    const float *x, *dt, *A;       // (batch, heads, head_dim); (batch, heads); (heads,)
    const float *B, *C;            // (batch, groups, state) each
    const float *D, *z, *dt_bias;  // (heads,) or (heads, head_dim); as x; (heads,)
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
        float most = std::floor(std::min(LARGEST, float(INT32_MAX) / 128 / float(steps * GROUP)));
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
        const float* row[ROWS];  // where rows are missing, the last one comes again
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

// x / rms(x) * weight for each of the groups of x (n,).
void norm(const float* x, const float* weight, double eps, int64_t n, int64_t groups, float* y) {
    int64_t size = n / groups;
    for (int64_t g = 0; g < groups; g++) {
        double squares = 0;
        for (int64_t i = g * size; i < (g + 1) * size; i++) squares += double(x[i]) * x[i];
        float factor = float(1 / std::sqrt(squares / size + eps));
        for (int64_t i = g * size; i < (g + 1) * size; i++) y[i] = x[i] * factor * weight[i];
    }
}

float silu(float x) { return x / (1 + std::exp(-x)); }
float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// One token of a row through the convolution, for the channels from `first` to `last`.
void convolve(const Layer& layer, const Sizes& s, const State& state, int64_t row, const float* x,
              int64_t first, int64_t last, float* y) {
    int64_t channels = s.d_inner + 2 * s.groups * s.state, before = s.width - 1;
    float* memory = state.conv + row * state.batch_stride;
    for (int64_t c = first; c < last; c++) {
        float* past = memory + c * state.channel_stride;
        float total = layer.conv_bias ? layer.conv_bias[c] : 0;
        for (int64_t t = 0; t < before; t++) {
            float value = past[t * state.token_stride];
            total += value * layer.taps[t * channels + c];
            if (t > 0) past[(t - 1) * state.token_stride] = value;
        }
        past[(before - 1) * state.token_stride] = x[c];
        y[c] = silu(total + x[c] * layer.taps[before * channels + c]);
    }
}

// One token of a row for one head. D and z may be null.
struct Head {
    int64_t size, n, D_stride;       // D_stride: 0 where all channels share a number, else 1
    const float *x, *B, *C, *D, *z;  // (size,); (n,) each; D of the head; (size,)
    float dt, A;
};

float clamp(float dt, double low, double high) {
    if (dt < low) dt = float(low);
    if (dt > high) dt = float(high);
    return dt;
}

// S = exp(dt A) S + dt x B^T, in place, and y = (S C + D x) silu(z). S (size, n), y (size,).
void recur(const Head& head, float* states, float* y) {
    int64_t n = head.n;
    const float *B = head.B, *C = head.C;
    // A may be -inf, and a step of size zero has no decay all the same
    float decay = std::exp(head.dt * std::max(head.A, std::numeric_limits<float>::lowest()));
    for (int64_t p = 0; p < head.size; p++) {
        float* S = states + p * n;
        float u = head.dt * head.x[p], total = 0;
        for (int64_t i = 0; i < n; i++) {
            S[i] = S[i] * decay + u * B[i];
            total += S[i] * C[i];
        }
        if (head.D) total += head.D[p * head.D_stride] * head.x[p];
        y[p] = head.z ? total * silu(head.z[p]) : total;
    }
}

// `recur` for head `i` of a row of the model. The arrays are those of the row.
void recur_in_layer(const Layer& layer, const Sizes& s, float* states, int64_t i,
                    const float* projected, const float* mixed, float* y) {
    int64_t size = s.d_inner / s.heads, n = s.state, group = i / (s.heads / s.groups);
    const float *B = mixed + s.d_inner, *C = B + s.groups * n;
    float dt = softplus(projected[2 * s.d_inner + 2 * s.groups * n + i] + layer.dt_bias[i]);
    Head head{size, n, 0, mixed + i * size, B + group * n, C + group * n, layer.D + i,
              projected + i * size, clamp(dt, s.dt_low, s.dt_high), layer.A[i]};
    recur(head, states + i * size * n, y + i * size);
}

constexpr int64_t SLICE = 64;  // channels of the convolution that a thread takes at a time

}  // namespace

// The weights of a packed matrix as float32 (rows, columns).
extern "C" void ysnake_unpack(const Matrix* m, int64_t threads, float* y) {
    int64_t stride = groups(m->columns) * GROUP;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(ROWS * stride);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < m->rows; first += ROWS) {
            unpack(*m, first, room.data());
            for (int64_t r = 0; r < std::min<int64_t>(ROWS, m->rows - first); r++)
                std::copy_n(&room[r * stride], m->columns, y + (first + r) * m->columns);
        }
    }
}

// y (batch, rows) = x (batch, columns) weights^T + bias.
extern "C" void ysnake_product(const Matrix* m, const float* x, int64_t batch, int64_t threads,
                               float* y) {
#pragma omp parallel num_threads(threads)
    {
        Inputs inputs(batch, m->columns);
        for (int64_t b = 0; b < batch; b++)
            std::copy_n(x + b * m->columns, m->columns, inputs.row(b));
        inputs.prepare(m->format);
        product(*m, inputs, batch, y, false);
    }
}

// One token of each row through the recurrence. S is updated in place, y (batch, heads, head_dim).
extern "C" void ysnake_state_step(const Recurrence* r, int64_t threads, float* y) {
    int64_t size = r->head_dim, n = r->state;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < r->batch * r->heads; j++) {  // the heads of all rows
        int64_t i = j % r->heads, group = j / (r->heads / r->groups);
        float dt = r->dt[j] + (r->dt_bias ? r->dt_bias[i] : 0);
        if (r->softplus) dt = softplus(dt);
        Head head{size, n, r->D_per_channel, r->x + j * size, r->B + group * n, r->C + group * n,
                  r->D ? r->D + (r->D_per_channel ? i * size : i) : nullptr,
                  r->z ? r->z + j * size : nullptr, clamp(dt, r->dt_low, r->dt_high), r->A[i]};
        recur(head, r->S + j * size * n, y + j * size);
    }
}

// One token of each row: h (batch, d_model), which is overwritten, to logits (batch, vocabulary).
// The states of all layers are updated in place.
extern "C" void ysnake_step(const Model* model, const State* states, float* h, int64_t batch,
                            int64_t threads, float* logits) {
    const Sizes& s = model->sizes;
    int64_t channels = s.d_inner + 2 * s.groups * s.state, features = channels + s.d_inner + s.heads;
    int64_t slices = (channels + SLICE - 1) / SLICE, widest = 0;
    for (int64_t i = 0; i + 1 < model->outputs; i++) widest = std::max(widest, model->output[i].rows);
    std::vector<float> projected(batch * features), mixed(batch * channels);
    std::vector<float> gated(batch * s.d_inner), narrow(batch * widest);
#pragma omp parallel num_threads(threads)
    {
        Inputs normed(batch, s.d_model), inner(batch, s.d_inner);
        for (int64_t l = 0; l < model->layers; l++) {
            const Layer& layer = model->layer[l];
            const State& state = states[l];
            for (int64_t b = 0; b < batch; b++)
                norm(h + b * s.d_model, layer.norm, layer.eps, s.d_model, 1, normed.row(b));
            normed.prepare(layer.in.format);
            product(layer.in, normed, batch, projected.data(), false);
#pragma omp for schedule(static) collapse(2)
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < slices; i++)
                    convolve(layer, s, state, b, &projected[b * features + s.d_inner], i * SLICE,
                             std::min(channels, (i + 1) * SLICE), &mixed[b * channels]);
#pragma omp for schedule(static) collapse(2)
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < s.heads; i++)
                    recur_in_layer(layer, s, state.ssm + b * s.d_inner * s.state, i,
                                   &projected[b * features], &mixed[b * channels],
                                   &gated[b * s.d_inner]);
            for (int64_t b = 0; b < batch; b++)
                norm(&gated[b * s.d_inner], layer.gated_norm, layer.gated_eps, s.d_inner, s.groups,
                     inner.row(b));
            inner.prepare(layer.out.format);
            product(layer.out, inner, batch, h, true);
        }
        for (int64_t b = 0; b < batch; b++)
            norm(h + b * s.d_model, model->norm, model->eps, s.d_model, 1, normed.row(b));
        for (int64_t i = 0; i < model->outputs; i++) {
            bool last = i + 1 == model->outputs;
            float* y = last ? logits : narrow.data();
            if (i == 0) {
                normed.prepare(model->output[0].format);
                product(model->output[0], normed, batch, y, false);
            } else {
                Inputs between(batch, model->output[i].columns);
                for (int64_t b = 0; b < batch; b++)
                    std::copy_n(&narrow[b * model->output[i].columns], model->output[i].columns,
                                between.row(b));
                between.prepare(model->output[i].format);
                product(model->output[i], between, batch, y, false);
            }
        }
    }
}
