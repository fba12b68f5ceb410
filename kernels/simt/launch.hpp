// Running a grid on the CPU, block after block. Kernels take their arguments as in cuLaunchKernel.
#pragma once

#include "block.hpp"
#include "call.hpp"

namespace simt {

static void run_block(Block &own) {
    memset(own.shared.pages, 0xff, own.shared.bytes);
    memset(own.fixed.pages, 0xff, own.fixed.bytes);
    own.statics.clear();
    own.statics_used = 0;
    own.live = own.threads;
    own.at_barrier = 0;
    own.ready.clear();
    for (unsigned i = 0; i < own.threads; ++i) {
        Fiber &fiber = own.fibers[i];
        fiber.index = i;
        fiber.done = false;
        fiber.waits = {nullptr, "", 0};
        fiber.copies.clear();
        fiber.group = 0;
        fiber.landed = false;
        fiber.context.prepare(own.stacks[i].pages, own.stacks[i].bytes, fiber_entry);
        own.ready.push_back(i);
    }
    for (Warp &warp : own.warps) warp.arrived = 0;
    own.main.go(own.next());
}

// 0 if every block ran to its end; else 1, and the reason in `launch.error`.
template <typename... A>
int launch(void (*kernel)(A...), const char *name, unsigned threads, size_t shared_bytes, const Launch &launch) {
    static thread_local Block *kept = nullptr;
    if (!kept) kept = new Block;
    Block &own = *kept;
    own.name = name;
    own.error = launch.error;
    own.error_bytes = launch.error_bytes;
    own.failed = false;
    own.current = nullptr;
    own.index = {0, 0, 0};
    if (!takes<A...>(name, launch)) return 1;
    if (threads == 0 || threads % WARP != 0 || threads > MAX_THREADS || shared_bytes > MAX_SHARED) {
        own.describe("%u threads and %zu bytes of shared memory cannot be launched", threads, shared_bytes);
        return 1;
    }
    own.grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
    if (own.grid.x == 0 || own.grid.y == 0 || own.grid.z == 0 || own.grid.y > 65535 || own.grid.z > 65535) {
        own.describe("a grid of %u x %u x %u cannot be launched", own.grid.x, own.grid.y, own.grid.z);
        return 1;
    }
    own.threads = threads;
    own.shared_bytes = shared_bytes;
    own.seed = launch.seed;
    own.random = launch.seed * 0x9e3779b97f4a7c15u + 0x1234567;
    own.fibers.resize(threads);
    own.warps.resize(threads / WARP);
    while (own.stacks.size() < threads) own.stacks.emplace_back(STACK_BYTES);
    // Blocks run in any order, as those of the hardware do; like threads: forwards, backwards, or drawn.
    std::vector<size_t> order(static_cast<size_t>(own.grid.x) * own.grid.y * own.grid.z);
    for (size_t i = 0; i < order.size(); ++i) {
        order[i] = own.seed == 1 ? order.size() - 1 - i : i;
        if (own.seed > 1) std::swap(order[i], order[own.draw() % (i + 1)]);
    }
    Call<A...> call = bind(kernel, launch);
    own.body = Call<A...>::run;
    own.arguments = &call;

    catch_faults();
    static thread_local char *signal_stack = new char[64 << 10];
    stack_t ours, before;
    memset(&ours, 0, sizeof ours);
    ours.ss_sp = signal_stack;
    ours.ss_size = 64 << 10;
    sigaltstack(&ours, &before);
    block = &own;
    if (sigsetjmp(own.escape, 1) == 0) {
        own.running = true;
        for (size_t i = 0; i < order.size() && !own.failed; ++i) {
            const size_t at = order[i], layer = static_cast<size_t>(own.grid.x) * own.grid.y;
            own.index = {static_cast<unsigned>(at % own.grid.x), static_cast<unsigned>(at % layer / own.grid.x),
                         static_cast<unsigned>(at / layer)};
            run_block(own);
        }
    } else if (own.signal == SIGFPE) {
        own.describe("divides by zero");
    } else {
        own.describe("touches address %p, outside of every buffer", own.fault);
    }
    own.running = false;
    block = nullptr;
    sigaltstack(&before, nullptr);
    return own.failed;
}

} // namespace simt
