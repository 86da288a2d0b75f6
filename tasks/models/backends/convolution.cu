// A square convolution on tensor cores, with all that surrounds it in the networks of this project.
//
// Activations are halves, channels side by side, `pitch` elements per pixel: a layer can read the first channels of a
// wider buffer and write the ones after them, so nothing is ever concatenated. A block of threads makes a tile of
// COLUMNS x (WARPS * ROWS) pixels, OUT channels deep. The part of the input it needs, with the border that the filter
// reaches into, is copied into shared memory once, IN_STEP channels at a time, and read from there for every tap.
// Products are added up in floats, in an order that depends on the filter alone: a pixel comes out the same bit for bit
// wherever it lies in a tile, an image or a batch.
//
// Compiled for one layer's shape at a time; the names below are macros then:
//   OUT      channels a block makes, a multiple of 16
//   IN_STEP  channels of the input copied at a time, 16: `packed_weights` knows no other
//   RADIUS   of the filter: 1 for 3x3, 2 for 5x5
//   ROWS     rows of a tile that a warp makes
//   WARPS    in a block
//   STAGES   copies of the input that are on their way or in use at a time
//   BLOCKS   that shall fit onto a multiprocessor, as far as registers go
//   GROUP    1: multiply as Hopper does, four warps together, with the weights in shared memory
//   ENDING   0 activation; 1 residuals; 2 residual of the picture itself; 3 code values
//   SAMPLE_BYTES  of a code value, 1 or 2
// and, for GROUP, the lists of operands that depend on OUT.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#ifndef ON_CPU
__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// Four 8x8 matrices of halves, each row of which is 16 bytes at the address that one thread gives.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}
// c += a b for 16x16 and 16x8 halves.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 to_halves(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float from_half(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

#if GROUP
// c += a b for the 64x16 halves that four warps hold, 16 rows each, and 16xOUT of them in shared memory.
__device__ __forceinline__ void multiply_add_group(float (&c)[OUT / 8][4], const u32 (&a)[4], const void* weights) {
  // Eight by eight weights lie together in 128 bytes; the next eight channels of the input follow, then those of OUT.
  const unsigned long long descriptor = (shared_address(weights) & 0x3ffff) >> 4 | 128ull / 16 << 16 | 256ull / 16 << 32;
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n" OUT_TEXT
      "k16.f32.f16.f16 {" SUM_PLACES "}, {" A_PLACES "}, " WEIGHTS_PLACE ", add, 1, 1, 0;}"
      : SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));
}
__device__ __forceinline__ void group_begins() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void await_groups() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
#endif

struct Layer {
  const u16* input;
  u16* output;
  const u32* weights;   // halves as threads or, with GROUP, four warps want them: `cuda_network.packed_weights` lays them out
  const float* bias;
  const float* slope;   // ENDING 0: what a negative value is multiplied by, per channel
  const u16* residual;  // ENDING 1: result = value * scale + residual; 2: the picture, 3 channels
  const u16* residual2; // ENDING 1: where given, result * scale2 + residual2
  const float* down;    // ENDING 3: gains [OUT][height]
  const float* across;  // ENDING 3: gains [OUT][width]
  u32* not_finite;      // ENDING 2: per image, where wanted
  float scale, scale2;  // ENDING 1
  float least, most;    // ENDING 2, 3: limits of the result
  int height, width;    // of the output
  int steps;            // copies of IN_STEP channels to take into account
  int input_steps;      // input channels / IN_STEP; further steps begin again with the first
  int enlarged;         // 1: the input has half the height and width, each pixel stands for four
  int input_pitch, output_pitch, residual_pitch, residual2_pitch;
  int stored;           // channels to write, a multiple of 8
  int phases;           // ENDING 2: channels per colour of the picture
};

constexpr int COLUMNS = 16, THREADS = 32 * WARPS, TILE_ROWS = ROWS * WARPS, EDGE = 2 * RADIUS + 1, TAPS = EDGE * EDGE;
constexpr int HALO_COLUMNS = COLUMNS + 2 * RADIUS, HALO_ROWS = TILE_ROWS + 2 * RADIUS, HALO = HALO_COLUMNS * HALO_ROWS;
constexpr int PARTS = IN_STEP / 8;  // pieces of 16 bytes of a pixel in shared memory
constexpr int STEPS16 = IN_STEP / 16, OUT16 = OUT / 16;
constexpr int HALO_BYTES = HALO * IN_STEP * 2, WEIGHT_BYTES = TAPS * IN_STEP * OUT * 2;
constexpr int STAGE_BYTES = HALO_BYTES + WEIGHT_BYTES;
constexpr int HALO_COPIES = (HALO * PARTS + THREADS - 1) / THREADS;
constexpr int WEIGHT_COPIES = WEIGHT_BYTES / 16;
constexpr int RESULT_PITCH = OUT + 8;  // in shared memory, so that rows of threads do not share banks

// Where piece `part` of a pixel lies: any eight pixels side by side lie in different banks.
__device__ __forceinline__ int place(int pixel, int part) {
  const int turn = PARTS == 8 ? pixel & 7 : PARTS == 4 ? (pixel >> 1) & 3 : (pixel >> 2) & 1;
  return (pixel * PARTS + (part ^ turn)) * 16;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) convolve(const Layer layer) {
#ifdef ON_CPU
  u8* memory = shared_memory();
#else
  extern __shared__ __align__(128) u8 memory[];
#endif
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int left = blockIdx.x * COLUMNS, top = blockIdx.y * TILE_ROWS, image = blockIdx.z;
  const int input_width = layer.width >> layer.enlarged, input_height = layer.height >> layer.enlarged;
  const u16* input = layer.input + (size_t)image * input_height * input_width * layer.input_pitch;

  int offsets[HALO_COPIES];  // of what this thread copies of each step, in pieces; negative outside the image
#pragma unroll
  for (int i = 0; i < HALO_COPIES; i++) {
    const int piece = thread + i * THREADS, pixel = piece / PARTS;
    const int y = top + pixel / HALO_COLUMNS - RADIUS, x = left + pixel % HALO_COLUMNS - RADIUS;
    const bool inside = pixel < HALO && y >= 0 && y < layer.height && x >= 0 && x < layer.width;
    offsets[i] = inside ? ((y >> layer.enlarged) * input_width + (x >> layer.enlarged)) * (layer.input_pitch / 8) + piece % PARTS : -1;
  }
  auto copy_step = [&](int step) {
    u8* halo = memory + step % STAGES * STAGE_BYTES;
    const int channel = step % layer.input_steps * IN_STEP;
#pragma unroll
    for (int i = 0; i < HALO_COPIES; i++) {
      const int piece = thread + i * THREADS;
      if (piece < HALO * PARTS) {
        const bool valid = offsets[i] >= 0;
        copy_async(halo + place(piece / PARTS, piece % PARTS), valid ? input + (size_t)offsets[i] * 8 + channel : input, valid);
      }
    }
    const u8* weights = (const u8*)layer.weights + (size_t)step * WEIGHT_BYTES;
    for (int i = thread; i < WEIGHT_COPIES; i += THREADS) copy_async(halo + HALO_BYTES + i * 16, weights + i * 16, true);
  };

  float sums[ROWS][2 * OUT16][4];
#pragma unroll
  for (int row = 0; row < ROWS; row++)
#pragma unroll
    for (int j = 0; j < 2 * OUT16; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) sums[row][j][k] = 0.f;

#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < layer.steps) copy_step(step);
    copies_issued();
  }
  for (int step = 0; step < layer.steps; step++) {
    await_copies<STAGES - 2>();
#if GROUP
    show_copies();
#endif
    __syncthreads();
    if (step + STAGES - 1 < layer.steps) copy_step(step + STAGES - 1);
    copies_issued();
    const u8* halo = memory + step % STAGES * STAGE_BYTES;
#if GROUP
    const u8* weights = halo + HALO_BYTES;
    u32 a[2][ROWS][4];
#pragma unroll
    for (int part = 0; part < TAPS * STEPS16; part++) {
      const int tap = part / STEPS16, k = part % STEPS16;
      const int first = (warp * ROWS + tap / EDGE) * HALO_COLUMNS + tap % EDGE + (lane & 15);
#pragma unroll
      for (int row = 0; row < ROWS; row++)
        load_matrices(a[part & 1][row], halo + place(first + row * HALO_COLUMNS, 2 * k + (lane >> 4)));
      group_begins();
#pragma unroll
      for (int row = 0; row < ROWS; row++) multiply_add_group(sums[row], a[part & 1][row], weights + part * OUT * 32);
      group_issued();
      await_groups<1>();
    }
    await_groups<0>();
  }
#else
    const u8* weights = halo + HALO_BYTES + lane * 16;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      const int first = (warp * ROWS + tap / EDGE) * HALO_COLUMNS + tap % EDGE + (lane & 15);
#pragma unroll
      for (int k = 0; k < STEPS16; k++) {
        uint4 b[OUT16];
#pragma unroll
        for (int j = 0; j < OUT16; j++) b[j] = *(const uint4*)(weights + ((tap * STEPS16 + k) * OUT16 + j) * 512);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          u32 a[4];
          load_matrices(a, halo + place(first + row * HALO_COLUMNS, 2 * k + (lane >> 4)));
#pragma unroll
          for (int j = 0; j < OUT16; j++) {
            multiply_add(sums[row][2 * j], a, b[j].x, b[j].y);
            multiply_add(sums[row][2 * j + 1], a, b[j].z, b[j].w);
          }
        }
      }
    }
  }
#endif
  await_copies<0>();
  __syncthreads();

  // Results go through shared memory, so that they reach global memory 16 bytes a thread, pixel after pixel.
  u16* results = (u16*)memory;
#pragma unroll
  for (int j = 0; j < 2 * OUT16; j++) {
    const int channel = j * 8 + lane % 4 * 2;
    const float2 bias = *(const float2*)(layer.bias + channel);
#if ENDING == 0
    const float2 slope = *(const float2*)(layer.slope + channel);
#endif
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = lane / 4 + 8 * half;
        float low = sums[row][j][2 * half], high = sums[row][j][2 * half + 1];
        u16* to = results + ((warp * ROWS + row) * COLUMNS + column) * RESULT_PITCH + channel;
#if ENDING == 3
        const int y = min(top + warp * ROWS + row, layer.height - 1), x = min(left + column, layer.width - 1);
        low *= layer.down[channel * layer.height + y] * layer.across[channel * layer.width + x];
        high *= layer.down[(channel + 1) * layer.height + y] * layer.across[(channel + 1) * layer.width + x];
        low = fminf(fmaxf(low + bias.x, layer.least), layer.most);
        high = fminf(fmaxf(high + bias.y, layer.least), layer.most);
        *(u32*)to = (u32)low | (u32)high << 16;
#else
        low += bias.x, high += bias.y;
#if ENDING == 0
        low = low < 0.f ? low * slope.x : low, high = high < 0.f ? high * slope.y : high;
#endif
        *(u32*)to = to_halves(low, high);
#endif
      }
  }
  __syncthreads();
  const int parts = layer.stored / 8;
#if ENDING == 2
  bool finite = true;
#endif
  for (int i = thread; i < TILE_ROWS * COLUMNS * parts; i += THREADS) {
    const int pixel = i / parts, channel = i % parts * 8;
    const int y = top + pixel / COLUMNS, x = left + pixel % COLUMNS;
    if (y >= layer.height || x >= layer.width) continue;
    const size_t at = ((size_t)image * layer.height + y) * layer.width + x;
    uint4 packed = *(const uint4*)(results + pixel * RESULT_PITCH + channel);
#if ENDING == 1
    const uint4 first = *(const uint4*)(layer.residual + at * layer.residual_pitch + channel);
    uint4 second = {0, 0, 0, 0};
    if (layer.residual2) second = *(const uint4*)(layer.residual2 + at * layer.residual2_pitch + channel);
    u32* values = (u32*)&packed;
    const u32 *added = (const u32*)&first, *added2 = (const u32*)&second;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float low = from_half((u16)values[k]) * layer.scale + from_half((u16)added[k]);
      float high = from_half((u16)(values[k] >> 16)) * layer.scale + from_half((u16)(added[k] >> 16));
      if (layer.residual2) {
        low = low * layer.scale2 + from_half((u16)added2[k]);
        high = high * layer.scale2 + from_half((u16)(added2[k] >> 16));
      }
      values[k] = to_halves(low, high);
    }
#elif ENDING == 2
    u32* values = (u32*)&packed;
    const u16* picture = layer.residual + at * layer.residual_pitch;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int colour = min((channel + 2 * k) / layer.phases, 2);
      const float added = from_half(picture[colour]);
      const float low = from_half((u16)values[k]) + added, high = from_half((u16)(values[k] >> 16)) + added;
      finite = finite && is_finite(low) && is_finite(high);
      values[k] = to_halves(fminf(fmaxf(low, layer.least), layer.most), fminf(fmaxf(high, layer.least), layer.most));
    }
#endif
#if ENDING == 3 && SAMPLE_BYTES == 1
    const u32* codes = (const u32*)&packed;
    uint2 bytes;
    bytes.x = (codes[0] & 255) | (codes[0] >> 16) << 8 | (codes[1] & 255) << 16 | (codes[1] >> 16) << 24;
    bytes.y = (codes[2] & 255) | (codes[2] >> 16) << 8 | (codes[3] & 255) << 16 | (codes[3] >> 16) << 24;
    *(uint2*)((u8*)layer.output + at * layer.output_pitch + channel) = bytes;
#else
    *(uint4*)(layer.output + at * layer.output_pitch + channel) = packed;
#endif
  }
#if ENDING == 2
  if (!finite && layer.not_finite) layer.not_finite[image] = 1;
#endif
}
