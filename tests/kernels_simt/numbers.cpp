// The emulation's number conversions, for the test.
#include "simt/call.hpp"
#include "simt/numbers.hpp"

template <typename T> void widen(const uint16_t *from, float *to, int count) {
    for (int i = 0; i < count; ++i) to[i] = to_float(T{from[i]});
}
template <typename T> void narrow(const float *from, uint16_t *to, int count) {
    for (int i = 0; i < count; ++i) to[i] = from_float<T>(from[i]).bits;
}
REFERENCE(widen_bf16, widen<bf16>)
REFERENCE(widen_f16, widen<f16>)
REFERENCE(narrow_bf16, narrow<bf16>)
REFERENCE(narrow_f16, narrow<f16>)
