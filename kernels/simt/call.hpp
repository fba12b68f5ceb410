// Calling a function of any signature with arguments as in cuLaunchKernel: an array of addresses.
#pragma once

#include <cstdint>
#include <cstdio>
#include <tuple>
#include <type_traits>
#include <utility>

namespace simt {

// What a test hands over; the same layout is declared in tests/kernels_support.
struct Launch {
    unsigned grid[3];
    unsigned argument_count;
    uint64_t seed;
    void *const *arguments;
    const uint32_t *argument_bytes;
    char *error;
    uint64_t error_bytes;
};

template <typename... A> struct Call {
    void (*function)(A...);
    std::tuple<A...> arguments;
    static void run(void *self) {
        Call &call = *static_cast<Call *>(self);
        std::apply(call.function, call.arguments);
    }
};

// Whether the arguments have the sizes that the function's have; if not, says so.
template <typename... A> bool takes(const char *name, const Launch &launch) {
    constexpr uint32_t sizes[] = {static_cast<uint32_t>(sizeof(A))...};
    if (launch.argument_count != sizeof...(A)) {
        snprintf(launch.error, launch.error_bytes, "%s takes %zu arguments, not %u", name, sizeof...(A),
                 launch.argument_count);
        return false;
    }
    for (unsigned i = 0; i < sizeof...(A); ++i) {
        if (launch.argument_bytes[i] == sizes[i]) continue;
        snprintf(launch.error, launch.error_bytes, "%s: argument %u has %u bytes, not %u", name, i, sizes[i],
                 launch.argument_bytes[i]);
        return false;
    }
    return true;
}

template <typename... A, size_t... I>
Call<A...> bind(void (*function)(A...), const Launch &launch, std::index_sequence<I...>) {
    return {function, {*static_cast<std::remove_const_t<A> *>(launch.arguments[I])...}};
}
template <typename... A> Call<A...> bind(void (*function)(A...), const Launch &launch) {
    return bind(function, launch, std::index_sequence_for<A...>{});
}

template <typename... A> int call(void (*function)(A...), const char *name, const Launch &launch) {
    if (!takes<A...>(name, launch)) return 1;
    Call<A...> bound = bind(function, launch);
    bound.run(&bound);
    return 0;
}

} // namespace simt

// Makes a plain function callable by tests as kernels are.
#define REFERENCE(name, function)                                                                       \
    extern "C" __attribute__((visibility("default"))) int name##_launch(const simt::Launch *how) {      \
        return simt::call(function, #name, *how);                                                       \
    }
