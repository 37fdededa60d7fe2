// Copies scattered runs of bytes: run i from sources[i] to targets[i]. For transfer/gpu.py, which
// loads it compiled:
//
//   nvcc -ptx -O3 -arch=compute_80 copy_runs.cu && sed -i 's/^.version .*/.version 7.4/' copy_runs.ptx
//
// A run is cut into `pieces` of PIECE bytes, the last one shorter. Blocks draw tickets, each good for
// `per_ticket` consecutive pieces of the whole, so that all end together though some reach the memory
// faster. `*counter` only grows: by the number of tickets and of blocks in each launch, from `base` on.
// The two lists may lie in host memory, so the next addresses are read while bytes move.

constexpr unsigned PIECE = 32768;
constexpr unsigned UNROLL = 4;

template <typename Word>
__device__ void copy(unsigned long long* counter, unsigned long long base,
                     const unsigned long long* sources, const unsigned long long* targets,
                     unsigned total, unsigned per_ticket, unsigned pieces,
                     unsigned long long run_bytes) {
    __shared__ unsigned long long tickets[2];
    if (threadIdx.x == 0) tickets[0] = atomicAdd(counter, 1ULL) - base;
    __syncthreads();
    unsigned long long ticket = tickets[0];
    for (unsigned turn = 1; ticket * per_ticket < total; ++turn) {
        if (threadIdx.x == 0) tickets[turn & 1] = atomicAdd(counter, 1ULL) - base;
        unsigned first = (unsigned)ticket * per_ticket;
        unsigned end = min(first + per_ticket, total);
        unsigned long long source = sources[first / pieces];
        unsigned long long target = targets[first / pieces];
        for (unsigned piece = first; piece < end; ++piece) {
            unsigned next = min(piece + 1, total - 1) / pieces;
            unsigned long long next_source = sources[next];
            unsigned long long next_target = targets[next];
            unsigned long long start = (unsigned long long)(piece % pieces) * PIECE;
            unsigned long long left = run_bytes - start;
            unsigned words = (unsigned)(left < PIECE ? left : PIECE) / sizeof(Word);
            const Word* from = reinterpret_cast<const Word*>(source + start);
            Word* to = reinterpret_cast<Word*>(target + start);
            unsigned word = threadIdx.x;
            for (; word + (UNROLL - 1) * blockDim.x < words; word += UNROLL * blockDim.x) {
                Word values[UNROLL];
#pragma unroll
                for (unsigned k = 0; k < UNROLL; ++k)
                    values[k] = __ldcs(from + word + k * blockDim.x);
#pragma unroll
                for (unsigned k = 0; k < UNROLL; ++k) __stcs(to + word + k * blockDim.x, values[k]);
            }
            for (; word < words; word += blockDim.x) __stcs(to + word, __ldcs(from + word));
            source = next_source;
            target = next_target;
        }
        __syncthreads();
        ticket = tickets[turn & 1];
    }
}

#define COPY_RUNS(bytes, Word)                                                                   \
    extern "C" __global__ void __launch_bounds__(512) copy_runs_##bytes(                         \
        unsigned long long* counter, unsigned long long base, const unsigned long long* sources, \
        const unsigned long long* targets, unsigned total, unsigned per_ticket, unsigned pieces, \
        unsigned long long run_bytes) {                                                          \
        copy<Word>(counter, base, sources, targets, total, per_ticket, pieces, run_bytes);       \
    }

COPY_RUNS(16, uint4)
COPY_RUNS(1, unsigned char)
