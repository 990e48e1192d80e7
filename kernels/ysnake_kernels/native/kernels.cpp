// One token of each row through a Mamba-2 model, or through its recurrence alone, on a CPU.
//
// build.py compiles this file on the machine that runs it. model_step.py and state_step.py declare
// the structs below in the same order of fields. All memory belongs to the caller. Arrays are
// contiguous unless a comment says otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "products.hpp"

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

// The states of one layer. The strides are those of conv, in elements.
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
    float* history = state.conv + row * state.batch_stride;
    for (int64_t c = first; c < last; c++) {
        float* past = history + c * state.channel_stride;
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
    // A may be -inf. A finite limit keeps the decay of a step of size zero at 1, not NaN.
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
                    const float* projected, const float* convolved, float* y) {
    int64_t size = s.d_inner / s.heads, n = s.state, group = i / (s.heads / s.groups);
    const float *B = convolved + s.d_inner, *C = B + s.groups * n;
    float dt = softplus(projected[2 * s.d_inner + 2 * s.groups * n + i] + layer.dt_bias[i]);
    Head head{size, n, 0, convolved + i * size, B + group * n, C + group * n, layer.D + i,
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
    std::vector<float> projected(batch * features), convolved(batch * channels);
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
                             std::min(channels, (i + 1) * SLICE), &convolved[b * channels]);
#pragma omp for schedule(static) collapse(2)
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < s.heads; i++)
                    recur_in_layer(layer, s, state.ssm + b * s.d_inner * s.state, i,
                                   &projected[b * features], &convolved[b * channels],
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
