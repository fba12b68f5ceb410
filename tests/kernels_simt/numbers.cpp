// The emulation's number conversions, for the test.
#include "simt/numbers.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT uint16_t to_bf16(float x) { return from_float<bf16>(x).bits; }
EXPORT uint16_t to_f16(float x) { return from_float<f16>(x).bits; }
EXPORT float of_bf16(uint16_t x) { return to_float(bf16{x}); }
EXPORT float of_f16(uint16_t x) { return to_float(f16{x}); }
