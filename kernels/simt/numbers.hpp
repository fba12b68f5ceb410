// 16-bit floats with round-to-nearest-even, and the arithmetic of the tensor-core instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
} // namespace simt

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return simt::float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
    uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    uint32_t rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return simt::float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return simt::float_of(sign | ((rest << 13) + (112u << 23)));
    float small = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -small : small;
}

template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    uint32_t bits = simt::bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
    uint32_t bits = simt::bits_of(x);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {0x7fff};
    if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (bits < 0x38800000) {
        // Subnormal: the addition rounds at the right bit.
        float small = simt::float_of(bits) + 0.5f;
        return {static_cast<uint16_t>(sign | (simt::bits_of(small) - 0x3f000000))};
    }
    bits += 0xfff + (bits >> 13 & 1) - (112u << 23);
    return {static_cast<uint16_t>(sign | bits >> 13)};
}
template <typename T> uint32_t pack2(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
