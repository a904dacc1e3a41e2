// How many weights of each row are nearest to each of its levels, and their sum: of all of a network's weights in two
// launches. `cells` sums pieces of rows, `combine` adds these up. No sum depends on chance: each has one order.

#define LEVELS 16
#define PIECE 16384  // weights that a block sums

struct Weight {  // rows [g, n], contiguous
  const float* rows;
  const float* levels;  // count of them, ascending
  int g, n, count;
  int apart;   // 0: one row of levels serves all
  int pieces;  // of a row
  int first;   // block
  int at;      // row of the result
};

struct Batch {
  Weight weights[WEIGHTS];
  double* piece_counts;  // [blocks, LEVELS]: of the weights above the middle below each level
  double* piece_sums;
  double* counts;  // [rows, LEVELS]
  double* sums;
  int count;
};

struct Shared {
  double sums[LEVELS][THREADS + 1];
  int counts[LEVELS - 1][THREADS + 1];  // that of the lowest level is known
};

struct Piece {
  const Weight* weight;
  long long row;
  int begin, end;
};

__device__ __forceinline__ Piece piece_of(const Batch& b, int block) {
  int i = 0;
  while (i + 1 < b.count && block >= b.weights[i + 1].first) i++;
  const Weight& w = b.weights[i];
  const int own = block - w.first, row = own / w.pieces, begin = (own - row * w.pieces) * PIECE;
  return {&w, row, begin, w.n - begin < PIECE ? w.n : begin + PIECE};
}

__device__ __forceinline__ void gather(const Batch& b, int block, int thread, Shared& s) {
  const Piece p = piece_of(b, block);
  const Weight& w = *p.weight;
  const float* levels = w.levels + (w.apart ? p.row * w.count : 0);
  const float* row = w.rows + p.row * w.n;
  float middles[LEVELS - 1];
  double sums[LEVELS] = {};
  int counts[LEVELS - 1] = {};
#pragma unroll
  for (int j = 0; j < LEVELS - 1; j++) middles[j] = j + 1 < w.count ? __fadd_rn(levels[j + 1], levels[j]) / 2 : 0;
  for (int at = p.begin + thread; at < p.end; at += THREADS) {
    const float weight = row[at];
    sums[0] += weight;
#pragma unroll
    for (int j = 0; j < LEVELS - 1; j++)
      if (j + 1 < w.count && weight > middles[j]) sums[j + 1] += weight, counts[j]++;
  }
#pragma unroll
  for (int j = 0; j < LEVELS; j++) {
    if (j < w.count) s.sums[j][thread] = sums[j];
    if (j + 1 < w.count) s.counts[j][thread] = counts[j];
  }
}

__device__ __forceinline__ void fold(const Batch& b, int block, int thread, const Shared& s) {
  if (thread >= LEVELS) return;
  const Piece p = piece_of(b, block);
  double count = thread ? 0 : p.end - p.begin, sum = 0;
  if (thread < p.weight->count)
    for (int i = 0; i < THREADS; i++) {
      sum += s.sums[thread][i];
      if (thread) count += s.counts[thread - 1][i];
    }
  const long long at = (long long)block * LEVELS + thread;
  b.piece_counts[at] = count;
  b.piece_sums[at] = sum;
}

__device__ __forceinline__ void add(const Batch& b, int row, int level) {
  int i = 0;
  while (i + 1 < b.count && row >= b.weights[i + 1].at) i++;
  const Weight& w = b.weights[i];
  const int own = row - w.at;
  double count = 0, sum = 0;
  for (int piece = 0; piece < w.pieces; piece++) {
    const long long at = ((long long)w.first + (long long)own * w.pieces + piece) * LEVELS + level;
    count += b.piece_counts[at];
    sum += b.piece_sums[at];
    if (level + 1 < w.count) count -= b.piece_counts[at + 1], sum -= b.piece_sums[at + 1];
  }
  const long long out = (long long)row * LEVELS + level;
  b.counts[out] = level < w.count ? count : 0;
  b.sums[out] = level < w.count ? sum : 0;
}

#ifndef HOST
extern "C" __global__ void cells(const __grid_constant__ Batch b) {
  __shared__ Shared s;
  gather(b, blockIdx.x, threadIdx.x, s);
  __syncthreads();
  fold(b, blockIdx.x, threadIdx.x, s);
}

// Each block adds up as many rows as it has threads for their levels.
extern "C" __global__ void combine(const __grid_constant__ Batch b) {
  const Weight& last = b.weights[b.count - 1];
  const int row = b.weights[0].at + blockIdx.x * (THREADS / LEVELS) + threadIdx.x / LEVELS;
  if (row < last.at + last.g) add(b, row, threadIdx.x % LEVELS);
}
#endif
