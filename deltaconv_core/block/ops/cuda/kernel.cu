// Depth-wise K x K convolution with zeros around, and the gate of its two halves, on tensor cores (mma.sync, sm_80 and later).
//
// From -D: K (odd, 3 to 13), BF16 (1: u, w, bias are bfloat16; 0: float16), OUT (0: out has u's dtype; 1: float32),
// SIG (1: a * sigmoid(b); 0: a * b * factor), BIAS (1: the convolution has one), WARPS (of a block of threads).
// With EMULATED, a test supplies multiply16, multiply8, wide and narrow, and runs the rest on a CPU.
//
// A convolution of a row is a product with a Toeplitz matrix. A unit is 8 neighboring columns and R rows of an image's
// channel. A warp has 16 units of channel ch and of channel ch + half, and goes down their rows together. For each row
// that it reads, A is 16 units x (8 + K - 1, rounded up) pixels, B holds row dy of the taps, shifted by one for each of
// the 8 columns, and the product is added to the sums of the output row that sees this row as its row dy. So each pixel
// is read once for K products, K rows of sums stay in registers, and no shared memory is used.
//
// Fragments as in the PTX manual, "Matrix Fragments for mma.m16n8k16": with g = lane / 4 and q = 2 (lane % 4), a lane has
// of A rows g and g + 8, columns q, q + 1 and q + 8, q + 9; of B rows q, q + 1, q + 8, q + 9 of column g; of the sums
// rows g and g + 8, columns q and q + 1.
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;  // long has 32 bits on Windows

constexpr int PAD = K / 2;
constexpr int SHIFT = PAD & 1;  // one column more on the left, so that pairs of pixels stay aligned
constexpr int NEED = K + 7 + SHIFT;
constexpr int K16 = NEED / 16 + (NEED % 16 > 8);           // products of depth 16 for a row
constexpr int K8 = (NEED % 16 > 0 && NEED % 16 <= 8);      // and of depth 8
constexpr int PAIRS = 2 * K16 + K8;                        // of pixels that a lane reads for each of its two units
constexpr int A_WORDS = 4 * K16 + 2 * K8, B_WORDS = 2 * K16 + K8;

#ifndef EMULATED
#if BF16
#define TYPES ".f32.bf16.bf16.f32"
#else
#define TYPES ".f32.f16.f16.f32"
#endif
__device__ __forceinline__ void multiply16(float (&d)[4], const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col" TYPES " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply8(float (&d)[4], const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col" TYPES " {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
__device__ __forceinline__ float wide(u16 v) {
#if BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}
__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 v;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
#endif

// One of a lane's two units.
struct Unit {
  const u16* pixel;  // of channel ch: the first pair of the row to read next
  int y;             // that row
  u32 inside;        // bit h: whether pair h lies inside the image
  i64 place;         // in out: of the sums that were finished last
  bool writes;
};

__device__ __forceinline__ void read(u32 (&a)[A_WORDS], u32 (&b)[A_WORDS], const Unit& unit, int m, i64 to_b, int H) {
  bool in = (u32)unit.y < (u32)H;
#pragma unroll
  for (int h = 0; h < PAIRS; ++h) {
    u32 v = 0, w = 0;
    if (in && (unit.inside >> h & 1)) {
      v = *(const u32*)(unit.pixel + 8 * h);
      w = *(const u32*)(unit.pixel + to_b + 8 * h);
    }
    const int word = (h / 2 < K16) ? 4 * (h / 2) + 2 * (h % 2) + m : 4 * K16 + m;
    a[word] = v;
    b[word] = w;
  }
}

// u (B, 2 half, H, W), w (2 half, K, K), bias (2 half), out (B, half, H, W); W even, u 4-byte aligned, out by two entries.
// blocks = ceil(W / 8), tiles = ceil(blocks * ceil(H / R) / 16), total = tiles * half * B warps.
extern "C" __global__ void __launch_bounds__(WARPS * 32) depthwise_gate(
    const u16* __restrict__ u, const u16* __restrict__ w, const u16* __restrict__ bias, void* __restrict__ out,
    int half, int H, int W, int R, int blocks, int tiles, int total, float factor) {
  int id = blockIdx.x * WARPS + threadIdx.x / 32;
  if (id >= total) return;
  int lane = threadIdx.x & 31, g = lane >> 2, q = (lane & 3) * 2;
  int tile = id % tiles, ch = (id / tiles) % half, image = id / tiles / half;
  i64 plane = (i64)H * W, to_b = half * plane;
  const u16* channel = u + ((i64)image * 2 * half + ch) * plane;
  Unit units[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    Unit& unit = units[m];
    int number = tile * 16 + g + 8 * m, segment = number / blocks;
    int x0 = (number - segment * blocks) * 8 + q, x = x0 - PAD - SHIFT;
    i64 top = (i64)segment * R;
    unit.writes = top < H && x0 < W;
    unit.y = top < H ? (int)top - PAD : 1 << 30;
    unit.pixel = channel + (top - PAD) * W + x;
    unit.inside = 0;
#pragma unroll
    for (int h = 0; h < PAIRS; ++h) unit.inside |= (u32)((u32)(x + 8 * h) < (u32)W) << h;
    unit.place = ((i64)image * half + ch) * plane + (top - (K - 1)) * W + x0;
  }
  u32 taps_a[K][B_WORDS], taps_b[K][B_WORDS];
#pragma unroll
  for (int dy = 0; dy < K; ++dy)
#pragma unroll
    for (int r = 0; r < B_WORDS; ++r) {
      u32 va = 0, vb = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int dx = 8 * r + q + e - g - SHIFT;
        if ((u32)dx < K) {
          va |= (u32)w[(ch * K + dy) * K + dx] << (16 * e);
          vb |= (u32)w[((ch + half) * K + dy) * K + dx] << (16 * e);
        }
      }
      taps_a[dy][r] = va;
      taps_b[dy][r] = vb;
    }
  float start_a = 0.f, start_b = 0.f;
  if (BIAS) {
    start_a = wide(bias[ch]);
    start_b = wide(bias[ch + half]);
  }
  float sums_a[K][4], sums_b[K][4];  // entry i: the output row whose first input row was read in step i, modulo K
#pragma unroll
  for (int i = 0; i < K; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums_a[i][j] = sums_b[i][j] = 0.f;  // of rows above the unit, which nobody writes
  u32 a[A_WORDS], b[A_WORDS];
  read(a, b, units[0], 0, to_b, H);
  read(a, b, units[1], 1, to_b, H);
  int last = R + K - 1;
  for (int first = 0; first < last; first += K) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      int t = first + i;
      if (t >= last) return;
      u32 next_a[A_WORDS], next_b[A_WORDS];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        units[m].y += 1;
        units[m].pixel += W;
        read(next_a, next_b, units[m], m, to_b, H);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums_a[i][j] = start_a;
        sums_b[i][j] = start_b;
      }
#pragma unroll
      for (int dy = 0; dy < K; ++dy) {
        const int s = (i - dy + K) % K;
#pragma unroll
        for (int k = 0; k < K16; ++k) {
          multiply16(sums_a[s], a + 4 * k, taps_a[dy] + 2 * k);
          multiply16(sums_b[s], b + 4 * k, taps_b[dy] + 2 * k);
        }
        if (K8) {
          multiply8(sums_a[s], a + 4 * K16, taps_a[dy] + 2 * K16);
          multiply8(sums_b[s], b + 4 * K16, taps_b[dy] + 2 * K16);
        }
      }
      const int done = (i + 1) % K;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float gated[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float A = sums_a[done][2 * m + e], B = sums_b[done][2 * m + e];
          gated[e] = SIG ? A * (1.f / (1.f + __expf(-B))) : A * (B * factor);
        }
        // The row that was read is units[m].y - 1; the one that it finishes is PAD rows above.
        if (t >= K - 1 && units[m].writes && units[m].y - 1 - PAD < H) {
          if (OUT) *(float2*)((float*)out + units[m].place) = make_float2(gated[0], gated[1]);
          else *(u32*)((u16*)out + units[m].place) = narrow(gated[0], gated[1]);
        }
        units[m].place += W;
      }
#pragma unroll
      for (int j = 0; j < A_WORDS; ++j) {
        a[j] = next_a[j];
        b[j] = next_b[j];
      }
    }
  }
}
