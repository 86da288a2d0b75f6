// Runs the kernel of convolution.cu on a CPU, a thousand times slower and the same to the last index. The threads of a
// block are contexts that take turns: each runs to the next point where threads wait for each other, so that all have
// come there before the first goes on.
#define ON_CPU
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define float2 Float2
#define uint2 Uint2
#define uint4 Uint4

using std::max, std::min;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
struct Float2 { float x, y; };
struct Uint2 { u32 x, y; };
struct Uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };
struct Warp {
  const void* rows[32];
  u32 a[32][4], b[32][2];
};

static u8* block_memory;
static Warp* warps;
static ucontext_t* contexts;
static Index threadIdx, blockIdx;

static void meet();
static Warp& warp_of_thread() { return warps[threadIdx.x / 32]; }
static u8* shared_memory() { return block_memory; }
static void __syncthreads() { meet(); }
static void copy_async(void* to, const void* from, bool valid) {
  if (valid) memcpy(to, from, 16); else memset(to, 0, 16);
}
static void copies_issued() {}
template <int> static void await_copies() {}
static float from_half(u16 bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
}
static u32 to_halves(float low, float high) {
  const _Float16 halves[2] = {(_Float16)low, (_Float16)high};
  u32 both;
  memcpy(&both, halves, 4);
  return both;
}
static bool is_finite(float value) { return std::isfinite(value); }

// Fragments lie as the PTX manual says for `ldmatrix` and `mma.m16n8k16`.
static void load_matrices(u32 (&to)[4], const void* row) {
  Warp& warp = warp_of_thread();
  const int lane = threadIdx.x % 32;
  warp.rows[lane] = row;
  meet();
  for (int i = 0; i < 4; i++) memcpy(&to[i], (const u8*)warp.rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
  meet();
}
static float element(u32 pair, int i) { return from_half((u16)(pair >> 16 * i)); }
static float of_a(const Warp& warp, int row, int k) {
  return element(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
}
static void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  Warp& warp = warp_of_thread();
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, 16);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  meet();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++)
      c[i] += of_a(warp, row, k) * element(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2);
  }
  meet();
}
#if GROUP
static void multiply_add_group(float (&c)[OUT / 8][4], const u32 (&a)[4], const void* weights) {
  Warp& warp = warp_of_thread();
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, 16);
  meet();
  for (int n = 0; n < OUT / 8; n++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) {
        u16 b;
        memcpy(&b, (const u8*)weights + n * 256 + k / 8 * 128 + column * 16 + k % 8 * 2, 2);
        c[n][i] += of_a(warp, row, k) * from_half(b);
      }
    }
  meet();
}
static void group_begins() {}
static void group_issued() {}
static void show_copies() {}
template <int> static void await_groups() {}
#endif

#include SOURCE

static void meet() {
  const int thread = threadIdx.x, next = (thread + 1) % THREADS;
  threadIdx.x = next;
  swapcontext(&contexts[thread], &contexts[next]);
  threadIdx.x = thread;
}

static const Layer* layer_of_launch;
static void run_thread() { convolve(*layer_of_launch); }

extern "C" void launch(int columns, int rows, int images, size_t shared_bytes, const Layer* layer) {
  constexpr size_t stack_bytes = 1 << 17;
  std::vector<u8> memory(shared_bytes + 128), stacks(THREADS * stack_bytes);
  block_memory = (u8*)(((uintptr_t)memory.data() + 127) / 128 * 128);
  layer_of_launch = layer;
  for (int block = 0; block < columns * rows * images; block++) {
    blockIdx = {block % columns, block / columns % rows, block / columns / rows};
    std::fill(memory.begin(), memory.end(), 0xff);  // What is read and was never written is not a number.
    std::vector<Warp> all(WARPS);
    std::vector<ucontext_t> each(THREADS + 1);
    warps = all.data(), contexts = each.data();
    // A thread at its end hands over to the next one, the last to this function: all end in the same round.
    for (int thread = THREADS - 1; thread >= 0; thread--) {
      getcontext(&each[thread]);
      each[thread].uc_stack.ss_sp = stacks.data() + thread * stack_bytes, each[thread].uc_stack.ss_size = stack_bytes;
      each[thread].uc_link = &each[thread + 1];
      makecontext(&each[thread], run_thread, 0);
    }
    threadIdx = {0, 0, 0};
    swapcontext(&each[THREADS], &each[0]);
  }
}
