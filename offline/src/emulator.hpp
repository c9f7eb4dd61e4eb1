// A warp machine in one host thread: enough of CUDA C++ to run the generated kernels on a CPU.
//
// Every unit is a fiber. A plane operation waits for its 32 units and is then carried out for all of them; a barrier
// waits for every unit that has not ended. Whoever would wait for ever is reported.
#pragma once
#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#define __restrict__
#endif

struct Index {
    unsigned x, y, z;
};

template <class To, class From>
To bits_of(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&y, &x, sizeof y);
    return y;
}

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) {
        uint32_t u = bits_of<uint32_t>(x);
        bits = std::isnan(x) ? 0x7fff : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    explicit operator float() const { return bits_of<float>(uint32_t(bits) << 16); }
};
struct half16 {
    uint16_t bits;
    half16() = default;
    explicit half16(float x) : bits(_cvtss_sh(x, 0)) {}
    explicit operator float() const { return _cvtsh_ss(bits); }
};
#define __half half16
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 operator*(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__nv_bfloat16(float(a.x) * float(b.x)), __nv_bfloat16(float(a.y) * float(b.y))};
}
struct __half2 {
    half16 x, y;
};
inline __half2 operator*(__half2 a, __half2 b) {
    return {half16(float(a.x) * float(b.x)), half16(float(a.y) * float(b.y))};
}

namespace machine {
enum Status { READY, IN_PLANE, AT_BARRIER, ENDED };
struct Unit {
    ucontext_t context;
    std::vector<char> stack;
    Status status;
    Index index;
    // What a plane operation reads and writes.
    const void* operation;
    float number;
    uint32_t from;
    uint32_t a[4], b[2];
    float c[4];
    char* row;
};
inline std::vector<Unit> units;
inline ucontext_t scheduler;
inline unsigned current;
inline void (*body)();

inline void yield() { swapcontext(&units[current].context, &scheduler); }

/// Lets all units go on if each has come to the barrier or ended.
inline void release() {
    for (Unit& unit : units) {
        if (unit.status != AT_BARRIER && unit.status != ENDED) return;
    }
    for (Unit& unit : units) {
        if (unit.status == AT_BARRIER) unit.status = READY;
    }
}

inline void enter() {
    body();
    units[current].status = ENDED;
    release();
    yield();
}

/// Waits for the plane; the last unit to come runs `all` on the 32 of it.
template <class All>
void together(const void* operation, All all) {
    unsigned first = current / 32 * 32;
    units[current].operation = operation;
    units[current].status = IN_PLANE;
    for (unsigned i = first; i < first + 32; i++) {
        if (units[i].status != IN_PLANE) return yield();
    }
    for (unsigned i = first; i < first + 32; i++) {
        if (units[i].operation != operation) {
            std::fprintf(stderr, "the units of a plane take part in different operations\n");
            std::abort();
        }
    }
    all(&units[first]);
    for (unsigned i = first; i < first + 32; i++) units[i].status = READY;
}

inline void barrier() {
    units[current].status = AT_BARRIER;
    release();
    if (units[current].status == AT_BARRIER) yield();
}

/// Runs one cube: plane by plane, each as far as it gets. With `backwards` the last plane goes first, so that what is not
/// ordered by barriers is done in another order.
inline bool run_cube(bool backwards) {
    for (unsigned i = 0; i < units.size(); i++) {
        Unit& unit = units[i];
        unit.stack.resize(1 << 18);
        unit.status = READY;
        unit.index = {i, 0, 0};
        getcontext(&unit.context);
        unit.context.uc_stack.ss_sp = unit.stack.data();
        unit.context.uc_stack.ss_size = unit.stack.size();
        unit.context.uc_link = nullptr;
        makecontext(&unit.context, enter, 0);
    }
    unsigned planes = units.size() / 32;
    for (;;) {
        bool moved = false, ended = true;
        for (unsigned p = 0; p < planes; p++) {
            unsigned first = 32 * (backwards ? planes - 1 - p : p);
            for (bool again = true; again;) {
                again = false;
                for (unsigned i = first; i < first + 32; i++) {
                    if (units[i].status != READY) continue;
                    current = i;
                    swapcontext(&scheduler, &units[i].context);
                    moved = again = true;
                }
            }
        }
        for (Unit& unit : units) ended &= unit.status == ENDED;
        if (ended) return true;
        if (!moved) return false;
    }
}

inline uint32_t* word(Unit& unit, unsigned column) { return reinterpret_cast<uint32_t*>(unit.row) + column; }
inline uint16_t* element(Unit& unit, unsigned column) { return reinterpret_cast<uint16_t*>(unit.row) + column; }

/// Unit l gets columns 2 (l % 4) and the next of row l / 4 of matrix m, or of its transpose.
inline void move_matrices(Unit* plane, bool into, bool transposed) {
    for (unsigned m = 0; m < 4; m++) {
        for (unsigned l = 0; l < 32; l++) {
            for (unsigned e = 0; e < 2; e++) {
                unsigned row = l / 4, column = l % 4 * 2 + e;
                if (transposed) std::swap(row, column);
                uint16_t* memory = element(plane[8 * m + row], column);
                uint16_t* reg = reinterpret_cast<uint16_t*>(&plane[l].a[m]) + e;
                if (into) *reg = *memory;
                else *memory = *reg;
            }
        }
    }
}

template <class F>
float as_float(uint32_t word, unsigned e) {
    F x;
    x.bits = uint16_t(word >> (16 * e));
    return float(x);
}

template <class F>
void multiply(Unit* plane) {
    static float a[16][16], b[16][8];
    for (unsigned l = 0; l < 32; l++) {
        for (unsigned e = 0; e < 2; e++) {
            unsigned row = l / 4, depth = l % 4 * 2 + e;
            for (unsigned r = 0; r < 4; r++) a[row + r % 2 * 8][depth + r / 2 * 8] = as_float<F>(plane[l].a[r], e);
            for (unsigned r = 0; r < 2; r++) b[depth + r * 8][row] = as_float<F>(plane[l].b[r], e);
        }
    }
    for (unsigned l = 0; l < 32; l++) {
        for (unsigned r = 0; r < 4; r++) {
            unsigned row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
            float sum = 0;
            for (unsigned d = 0; d < 16; d++) sum += a[row][d] * b[d][column];
            plane[l].c[r] += sum;
        }
    }
}
}  // namespace machine

#define threadIdx (machine::units[machine::current].index)
inline Index blockIdx, blockDim, gridDim;
inline const unsigned warpSize = 32;

inline void __syncthreads() { machine::barrier(); }
inline void __syncwarp() {
    static char operation;
    machine::together(&operation, [](machine::Unit*) {});
}
inline float shuffle(float x, uint32_t from) {
    static char operation;
    machine::Unit& unit = machine::units[machine::current];
    unit.number = x;
    unit.from = from;
    machine::together(&operation, [](machine::Unit* plane) {
        float all[32];
        for (unsigned l = 0; l < 32; l++) all[l] = plane[l].number;
        for (unsigned l = 0; l < 32; l++) plane[l].number = all[plane[l].from % 32];
    });
    return unit.number;
}
inline float __shfl_sync(unsigned, float x, uint32_t from) { return shuffle(x, from); }
inline float __shfl_xor_sync(unsigned, float x, uint32_t mask) { return shuffle(x, threadIdx.x % 32 ^ mask); }
inline float __shfl_up_sync(unsigned, float x, uint32_t by) {
    uint32_t lane = threadIdx.x % 32;
    return shuffle(x, lane >= by ? lane - by : lane);
}
inline float __shfl_down_sync(unsigned, float x, uint32_t by) {
    uint32_t lane = threadIdx.x % 32;
    return shuffle(x, lane + by < 32 ? lane + by : lane);
}

namespace machine {
/// What a kernel has asked for, and whether a row of a matrix lay outside.
inline const char* shared = nullptr;
inline size_t shared_bytes = 0;
inline bool strayed = false;
inline char* row_in_shared(const void* row) {
    const char* at = (const char*)row;
    if (at < shared || at + 16 > shared + shared_bytes) strayed = true;
    return (char*)row;
}
}

#define LOAD(name, transposed)                                                                       \
    inline void name(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row) {      \
        static char operation;                                                                       \
        machine::Unit& unit = machine::units[machine::current];                                      \
        unit.row = machine::row_in_shared(row);                                                                       \
        machine::together(&operation, [](machine::Unit* p) { machine::move_matrices(p, true, transposed); }); \
        r0 = unit.a[0], r1 = unit.a[1], r2 = unit.a[2], r3 = unit.a[3];                              \
    }
#define STORE(name, transposed)                                                                      \
    inline void name(const uint32_t& r0, const uint32_t& r1, const uint32_t& r2, const uint32_t& r3, void* row) { \
        static char operation;                                                                       \
        machine::Unit& unit = machine::units[machine::current];                                      \
        unit.row = machine::row_in_shared(row);                                                                       \
        unit.a[0] = r0, unit.a[1] = r1, unit.a[2] = r2, unit.a[3] = r3;                              \
        machine::together(&operation, [](machine::Unit* p) { machine::move_matrices(p, false, transposed); }); \
    }
#define MULTIPLY(name, F)                                                                            \
    inline void name(const uint32_t& a0, const uint32_t& a1, const uint32_t& a2, const uint32_t& a3, \
                     const uint32_t& b0, const uint32_t& b1, const float& c0, const float& c1,       \
                     const float& c2, const float& c3, float& d0, float& d1, float& d2, float& d3) { \
        static char operation;                                                                       \
        machine::Unit& unit = machine::units[machine::current];                                      \
        unit.a[0] = a0, unit.a[1] = a1, unit.a[2] = a2, unit.a[3] = a3, unit.b[0] = b0, unit.b[1] = b1; \
        unit.c[0] = c0, unit.c[1] = c1, unit.c[2] = c2, unit.c[3] = c3;                              \
        machine::together(&operation, machine::multiply<F>);                                         \
        d0 = unit.c[0], d1 = unit.c[1], d2 = unit.c[2], d3 = unit.c[3];                              \
    }
LOAD(__ldmatrix_m8n8___nv_bfloat16_4x, false)
LOAD(__ldmatrix_m8n8___nv_bfloat16_4x_trans, true)
LOAD(__ldmatrix_m8n8___half_4x, false)
LOAD(__ldmatrix_m8n8___half_4x_trans, true)
STORE(__stmatrix_m8n8___nv_bfloat16_4x, false)
STORE(__stmatrix_m8n8___nv_bfloat16_4x_trans, true)
STORE(__stmatrix_m8n8___half_4x, false)
STORE(__stmatrix_m8n8___half_4x_trans, true)
MULTIPLY(__mma_m16n8k16___nv_bfloat16___nv_bfloat16_float, __nv_bfloat16)
MULTIPLY(__mma_m16n8k16___half___half_float, half16)

using std::fma;
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

alignas(128) unsigned char dynamic_shared_mem[232448];

/// Runs a grid. Returns false when a cube does not come to its end, or strays from its shared memory.
template <class Body>
bool run_grid(unsigned x, unsigned y, unsigned z, unsigned units, size_t shared_bytes, bool backwards, Body body) {
    machine::shared = (const char*)dynamic_shared_mem;
    machine::shared_bytes = shared_bytes;
    machine::strayed = false;
    static Body* kernel;
    kernel = &body;
    machine::body = [] { (*kernel)(); };
    machine::units.resize(units);
    blockDim = {units, 1, 1};
    gridDim = {x, y, z};
    for (unsigned i = 0; i < x * y * z; i++) {
        blockIdx = {i % x, i / x % y, i / x / y};
        // Nothing may be read that was not written before.
        std::memset(dynamic_shared_mem, 0xff, sizeof dynamic_shared_mem);
        if (!machine::run_cube(backwards) || machine::strayed) return false;
    }
    return true;
}
