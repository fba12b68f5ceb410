// The kernels between products and attention written out in f64, one number after the other.
#include "../simt/call.hpp"
#include "../simt/numbers.hpp"
#include <cmath>

namespace {
template <typename T> double at(const T *from, int64_t i) { return to_float(from[i]); }

template <typename T> double inverse_root_mean_square(const T *x, int width, double eps) {
    double squares = 0;
    for (int i = 0; i < width; ++i) squares += at(x, i) * at(x, i);
    return 1 / std::sqrt(squares / width + eps);
}

template <typename T>
void rms_norm(const T *x, const T *residual, const T *weight, T *residual_out, double *out, int rows, int width,
              float eps) {
    for (int64_t row = 0; row < rows; ++row) {
        const T *normalised = x + row * width;
        if (residual) {
            for (int64_t i = row * width; i < (row + 1) * width; ++i)
                residual_out[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
            normalised = residual_out + row * width;
        }
        const double scale = inverse_root_mean_square(normalised, width, eps);
        for (int i = 0; i < width; ++i) out[row * width + i] = at(normalised, i) * scale * at(weight, i);
    }
}

// dx = r h - x r^3 mean(h x), h = slope * weight, of one row.
template <typename T> void norm_gradient(const T *x, const T *weight, double *slope, int width, double eps) {
    const double r = inverse_root_mean_square(x, width, eps);
    double along = 0;
    for (int i = 0; i < width; ++i) along += slope[i] * at(weight, i) * at(x, i);
    for (int i = 0; i < width; ++i) slope[i] = slope[i] * at(weight, i) * r - at(x, i) * r * r * r * along / width;
}

template <typename T>
void rms_norm_backward(const T *x, const T *weight, const T *grad, const T *add, double *dx, int rows, int width,
                       float eps) {
    for (int64_t row = 0; row < rows; ++row) {
        double *slope = dx + row * width;
        for (int i = 0; i < width; ++i) slope[i] = at(grad, row * width + i);
        norm_gradient(x + row * width, weight, slope, width, eps);
        for (int i = 0; add && i < width; ++i) slope[i] += at(add, row * width + i);
    }
}

template <typename T> void swiglu(const T *gate, const T *up, double *out, int rows, int width, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        for (int i = 0; i < width; ++i) {
            const double g = at(gate, row * stride + i);
            out[row * width + i] = g / (1 + std::exp(-g)) * at(up, row * stride + i);
        }
}

template <typename T>
void swiglu_backward(const T *gate, const T *up, const T *grad, double *d_gate, double *d_up, int rows, int width,
                     int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        for (int i = 0; i < width; ++i) {
            const double g = at(gate, row * stride + i), slope = at(grad, row * width + i), s = 1 / (1 + std::exp(-g));
            d_gate[row * stride + i] = slope * at(up, row * stride + i) * s * (1 + g * (1 - s));
            d_up[row * stride + i] = slope * g * s;
        }
}

void rotate(double *x, const float *cos, const float *sin, int dim, double direction) {
    for (int i = 0; i < dim / 2; ++i) {
        const double a = x[i], b = x[i + dim / 2], turn = sin[i] * direction;
        x[i] = a * cos[i] - b * turn;
        x[i + dim / 2] = b * cos[i] + a * turn;
    }
}

// Of queries or of keys; [tokens, heads, D] in `out`.
template <typename T>
void rope(const T *x, const T *norm, const float *cos, const float *sin, double *out, int tokens, int heads, int dim,
          int64_t stride, float eps) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int head = 0; head < heads; ++head) {
            const T *from = x + token * stride + head * dim;
            double *to = out + (token * heads + head) * dim;
            const double scale = norm ? inverse_root_mean_square(from, dim, eps) : 1;
            for (int i = 0; i < dim; ++i) to[i] = at(from, i) * scale * (norm ? at(norm, i) : 1);
            rotate(to, cos + token * (dim / 2), sin + token * (dim / 2), dim, 1);
        }
}

template <typename T>
void rope_backward(const T *grad, const T *x, const T *norm, const float *cos, const float *sin, double *dx,
                   int tokens, int heads, int dim, int64_t x_stride, float eps) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int head = 0; head < heads; ++head) {
            const int64_t row = (token * heads + head) * dim;
            for (int i = 0; i < dim; ++i) dx[row + i] = at(grad, row + i);
            rotate(dx + row, cos + token * (dim / 2), sin + token * (dim / 2), dim, -1);
            if (norm) norm_gradient(x + token * x_stride + head * dim, norm, dx + row, dim, eps);
        }
}
} // namespace

#define INSTANCE(T, name)                                                  \
    REFERENCE(reference_rms_norm_##name, rms_norm<T>)                      \
    REFERENCE(reference_rms_norm_backward_##name, rms_norm_backward<T>)    \
    REFERENCE(reference_swiglu_##name, swiglu<T>)                          \
    REFERENCE(reference_swiglu_backward_##name, swiglu_backward<T>)        \
    REFERENCE(reference_rope_##name, rope<T>)                              \
    REFERENCE(reference_rope_backward_##name, rope_backward<T>)

INSTANCE(bf16, bf16)
INSTANCE(f16, f16)
INSTANCE(float, f32)
