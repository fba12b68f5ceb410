// One block of threads on the CPU: fibres, barriers, warp collectives, shared memory, faults.
//
// Fibres run one at a time until they must wait, in an order drawn from the launch's seed, so that a missing
// barrier shows as a result that depends on the seed or as poison (NaN) read from shared memory. Stricter than
// the hardware on purpose: a barrier or collective that not every thread meets at the same source line is an
// error, and so is one that waits for a thread that has left.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#if defined(__x86_64__) && defined(__ELF__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY
#else
#include <ucontext.h>
#endif

#if !defined(MAP_ANONYMOUS)
#define MAP_ANONYMOUS MAP_ANON
#endif

namespace simt {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP = 32;
// What a block may have on sm_80, in bytes; sm_90 has more.
constexpr size_t MAX_SHARED = 163 << 10;
constexpr size_t MAX_STATIC_SHARED = 16 << 10;

struct Dim3 {
    unsigned x, y, z;
};

// Where in the source something was called.
struct Site {
    const char *what;
    const char *file;
    int line;
    bool operator==(const Site &other) const { return line == other.line && !strcmp(what, other.what); }
};

// Switching between stacks. Assembly where we have it: swapcontext makes a system call each time.
#ifdef SIMT_ASSEMBLY
extern "C" void simt_switch(void **save, void *load);
asm(R"(
.text
.local simt_switch
.type simt_switch,@function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch,.-simt_switch
)");
struct Context {
    void *stack = nullptr;
    void prepare(char *base, size_t bytes, void (*entry)()) {
        // On entry the stack must be as a call leaves it: 8 bytes below a multiple of 16.
        void **top = reinterpret_cast<void **>(base + bytes);
        *--top = nullptr;
        *--top = reinterpret_cast<void *>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack = top;
    }
    void go(Context &to) { simt_switch(&stack, to.stack); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(char *base, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = base;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void go(Context &to) { swapcontext(&context, &to.context); }
};
#endif

struct Copy {
    void *to;
    const void *from;
    bool present;
    unsigned group;
};

struct Fiber {
    Context context;
    unsigned index;
    bool done;
    Site waits; // .what is null while it may run
    // Asynchronous copies land when they are waited for, the latest moment the hardware allows.
    std::vector<Copy> copies;
    unsigned group;
    bool landed; // copies, since this lane last met a barrier that would show them to other lanes
};

// What the lanes of a warp hand in to a collective and get back. A lane writes only its own entry.
struct alignas(16) LaneData {
    uint32_t in[12];
    uint32_t out[4];
    const void *address;
};

struct Warp {
    Site site;
    uint32_t arrived;
    LaneData lanes[WARP];
};

// Memory followed by a page that traps, and kept from launch to launch.
struct Guarded {
    char *pages = nullptr;
    size_t bytes = 0;
    explicit Guarded(size_t want) {
        size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        bytes = (want + page - 1) / page * page;
        void *at = mmap(nullptr, bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) abort();
        pages = static_cast<char *>(at) + page;
        mprotect(pages, bytes, PROT_READ | PROT_WRITE);
    }
};

struct StaticArray {
    const void *site;
    size_t at;
};

struct Block {
    Dim3 grid, index;
    unsigned threads;
    Fiber *current;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Guarded> stacks;
    std::vector<unsigned> ready;
    Context main;
    uint64_t seed, random;
    unsigned live, at_barrier;
    Site barrier_site;
    Guarded shared{MAX_SHARED}, fixed{MAX_STATIC_SHARED};
    size_t shared_bytes;
    std::vector<StaticArray> statics;
    size_t statics_used;
    void (*body)(void *);
    void *arguments;
    const char *name;
    char *error;
    size_t error_bytes;
    bool failed;
    sigjmp_buf escape;
    volatile bool running = false;
    void *volatile fault = nullptr;
    volatile int signal = 0;

    unsigned lane() const { return current->index % WARP; }
    Warp &warp() { return warps[current->index / WARP]; }
    Fiber &sibling(unsigned of_lane) { return fibers[current->index / WARP * WARP + of_lane]; }
    char *dynamic() { return shared.pages + shared.bytes - (shared_bytes + 15) / 16 * 16; }

    uint64_t draw() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return random;
    }

    [[gnu::format(printf, 2, 3)]] void describe(const char *format, ...) {
        int used = snprintf(error, error_bytes, "%s, block (%u, %u, %u), thread %u: ", name, index.x,
                            index.y, index.z, current ? current->index : 0);
        va_list list;
        va_start(list, format);
        if (used >= 0 && static_cast<size_t>(used) < error_bytes)
            vsnprintf(error + used, error_bytes - used, format, list);
        va_end(list);
        failed = true;
    }

    // Ends the launch; the caller must have described why.
    [[noreturn]] void leave() {
        current->context.go(main);
        abort(); // nobody goes back to a failed block
    }

    // The next fibre that may run, or the launcher if there is none.
    Context &next() {
        if (ready.empty()) {
            if (live != 0) stuck();
            return main;
        }
        // Seeds 0 and 1 run forwards and backwards, others in random order.
        size_t pick = seed == 0 ? 0 : seed == 1 ? ready.size() - 1 : draw() % ready.size();
        unsigned chosen = ready[pick];
        if (seed <= 1) {
            ready.erase(ready.begin() + static_cast<long>(pick));
        } else {
            ready[pick] = ready.back();
            ready.pop_back();
        }
        current = &fibers[chosen];
        return current->context;
    }

    void wait(const Site &site) {
        Fiber *self = current;
        self->waits = site;
        Context &to = next();
        if (&to != &self->context) self->context.go(to);
    }

    void wake(unsigned fiber) {
        fibers[fiber].waits.what = nullptr;
        ready.push_back(fiber);
    }

    void stuck() {
        unsigned waiting = 0;
        while (fibers[waiting].done) ++waiting;
        const Site &site = fibers[waiting].waits;
        unsigned same = 0, left = 0;
        for (const Fiber &fiber : fibers) {
            same += !fiber.done && fiber.waits == site;
            left += fiber.done;
        }
        current = &fibers[waiting];
        describe("waits for ever at %s (%s:%d): %u of %u threads are there, %u have left, the others wait "
                 "elsewhere",
                 site.what, site.file, site.line, same, threads, left);
    }

    void barrier(const Site &site) {
        if (at_barrier == 0) barrier_site = site;
        if (live != threads || !(barrier_site == site)) {
            describe("%s at %s:%d, while %s", site.what, site.file, site.line,
                     live != threads ? "threads have left" : "others wait at another line");
            leave();
        }
        if (++at_barrier < threads) return wait(site);
        at_barrier = 0;
        for (unsigned fiber = 0; fiber < threads; ++fiber) {
            fibers[fiber].landed = false;
            if (fiber != current->index) wake(fiber);
        }
    }

    // Runs `complete` once all lanes are here; every lane then finds its result in its entry.
    template <typename F> void collective(const Site &site, F complete) {
        Warp &own = warp();
        if (own.arrived == 0) own.site = site;
        if (!(own.site == site)) {
            describe("%s at %s:%d, while other lanes of its warp are at %s (line %d)", site.what, site.file,
                     site.line, own.site.what, own.site.line);
            leave();
        }
        own.arrived |= 1u << lane();
        if (own.arrived != 0xffffffffu) return wait(site);
        complete(own);
        own.arrived = 0;
        unsigned first = current->index / WARP * WARP;
        for (unsigned fiber = first; fiber < first + WARP; ++fiber)
            if (fiber != current->index) wake(fiber);
    }

    void *static_shared(const void *site, size_t bytes) {
        for (const StaticArray &known : statics)
            if (known.site == site) return fixed.pages + known.at;
        size_t at = statics_used;
        // 16 poisoned bytes lie between two arrays.
        statics_used += (bytes + 15) / 16 * 16 + 16;
        if (statics_used > fixed.bytes) {
            describe("more than %zu bytes of fixed shared memory", fixed.bytes);
            leave();
        }
        statics.push_back({site, at});
        return fixed.pages + at;
    }

    void require_aligned(const void *address, size_t to, const char *what) {
        if (reinterpret_cast<uintptr_t>(address) % to != 0) {
            describe("%s of an address that is no multiple of %zu", what, to);
            leave();
        }
    }
};

// The block under way on this system thread.
static thread_local Block *block = nullptr;

static void fiber_entry() {
    Block &own = *block;
    own.body(own.arguments);
    Fiber &self = *own.current;
    if (!self.copies.empty()) {
        own.describe("leaves with asynchronous copies that nobody waited for");
        own.leave();
    }
    self.done = true;
    --own.live;
    self.context.go(own.next());
}

static struct sigaction old_segv, old_bus, old_fpe;

static void on_fault(int number, siginfo_t *info, void *context) {
    if (block && block->running) {
        block->fault = info->si_addr;
        block->signal = number;
        siglongjmp(block->escape, 1);
    }
    struct sigaction *old = number == SIGSEGV ? &old_segv : number == SIGBUS ? &old_bus : &old_fpe;
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(number, info, context);
    else
        sigaction(number, old, nullptr); // the default: faults again and ends the process
}

static void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv);
        sigaction(SIGBUS, &action, &old_bus);
        sigaction(SIGFPE, &action, &old_fpe);
    });
}

} // namespace simt
