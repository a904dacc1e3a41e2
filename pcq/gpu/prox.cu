// The map L of prox.py, of all of a network's weights in one launch: each weight is read once and written once.
// Operation by operation what prox.py does on evenly spaced levels (_even) and on listed ones (_nearest, _search).

struct Weight {  // rows [g, n] -> out [g, n], contiguous
  const float* rows;
  float* out;
  const float* levels;  // evenly spaced: the scale of each row; listed: count levels, ascending
  const float* zeros;   // evenly spaced: the zero point of each row, or null: `zero`
  int g, n, count;
  int apart;  // 0: one row of levels serves all
  int first;  // block
  int vector, even;
  float zero;
};

struct Map {  // r, v: shifts in half gaps; slope = (1 - v) / (1 - r), shrink = r / 2, smooth: v = 0; see prox.py
  float slope, shrink, rho, varrho, outside;
  int hard, smooth, goes_on, identity, unit;
};

__device__ __forceinline__ float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// Levels scale * (code - zero), code = 0 .. top; `fixed`: zero is that of all rows.
__device__ __forceinline__ float even(float w, float scale, float zero, int fixed, float top, int clipped,
                                      const Map& m) {
  const int ramps = m.smooth && !(fixed && zero == rintf(zero));
  const float origin = ramps ? __fsub_rn(zero, 0.5f) : zero;
  const int moved = m.hard || !fixed || 2 * origin != rintf(2 * origin);
  const int halves = !moved && origin != rintf(origin);
  const float low = moved ? (ramps ? -0.5f : 0.0f) : -zero, high = __fadd_rn(low, top);
  float rest = __fdiv_rn(w, scale > 0 ? scale : 1.0f);
  if (moved) rest = __fadd_rn(rest, origin);
  if (clipped) rest = clamped(rest, low, high);
  float code = halves ? __fadd_rn(floorf(rest), 0.5f) : rintf(rest);
  if (!clipped) code = clamped(code, low, high);
  if (ramps) {
    code = __fadd_rn(code, clamped(__fmul_rn(__fsub_rn(rest, code), m.slope), -0.5f, 0.5f));
  } else if (!m.hard && m.slope == 1) {
    code = __fsub_rn(rest, clamped(__fsub_rn(rest, code), -m.shrink, m.shrink));
  } else if (!m.hard) {
    rest = __fsub_rn(rest, code);
    if (m.shrink > 0)
      rest = rest > m.shrink ? __fsub_rn(rest, m.shrink) : rest < -m.shrink ? __fadd_rn(rest, m.shrink) : 0.0f;
    code = fmaf(m.slope, rest, code);
  }
  return __fmul_rn(moved ? __fsub_rn(code, origin) : code, scale);
}

__device__ __forceinline__ float middle(float a, float b) {
  const float m = (float)(((double)a + (double)b) / 2);
  return m < b ? m : a;  // neighbouring floats have no middle
}

__device__ __forceinline__ float widest(const float* levels, int count) {
  float half = 0;
  for (int i = 1; i < count; i++) half = fmaxf(half, __fsub_rn(levels[i], levels[i - 1]) / 2);
  return half;
}

// The units of rho and varrho: 0 the gap, 1 the row's widest half gap, 2 the weight.
__device__ __forceinline__ float listed(float w, const float* levels, int count, const Map& m) {
  const int nearest = m.hard && m.unit < 2;
  int low = 0, high = nearest ? count - 1 : count - 2;  // of the nearest level, or of the gap that holds w
  while (low < high) {
    const int half = (low + high) / 2;
    const float end = nearest ? middle(levels[half], levels[half + 1]) : levels[half + 1];
    if (end < w) low = half + 1; else high = half;
  }
  const float a = levels[low];
  if (nearest) return a;
  const float b = levels[low + 1], p = __fadd_rn(b, a) / 2, h = __fsub_rn(b, a) / 2;
  float r = m.rho, v = m.varrho, steep = 0;
  if (m.unit) {
    const float unit = m.unit == 1 ? widest(levels, count) : 1;
    r = __fdiv_rn(__fmul_rn(r, unit), h), v = __fdiv_rn(__fmul_rn(v, unit), h);
  }
  if (h > 1.17549435e-38f && r < 1 && v < 1)
    steep = __fdiv_rn(__fdiv_rn(__fsub_rn(1, v), __fsub_rn(1, r)), h);
  else
    v = 1;
  const float y = __fadd_rn(__fmul_rn(__fsub_rn(w, p), steep), w > p ? v : -v);
  return __fadd_rn(p, __fmul_rn(clamped(y, -1, 1), h));
}

__device__ __forceinline__ float mapped(float w, const Weight& weight, long long row, const Map& m) {
  float low, high, inside;
  int beyond = m.outside > 0;
  if (weight.even) {
    const float scale = weight.levels[row], zero = weight.zeros ? weight.zeros[row] : weight.zero;
    const float top = weight.count - 1;
    low = __fmul_rn(__fsub_rn(0, zero), scale), high = __fmul_rn(__fsub_rn(top, zero), scale);
    if (m.goes_on && scale > 0) beyond = 0;  // the map of the outermost half gap goes on by itself
    inside = m.identity ? clamped(w, low, high) : even(w, scale, zero, !weight.zeros, top, !(m.goes_on && scale > 0), m);
  } else {
    const float* levels = weight.levels + row * weight.count;
    low = levels[0], high = levels[weight.count - 1];
    inside = m.identity ? clamped(w, low, high) : listed(w, levels, weight.count, m);
  }
  if (!beyond) return inside;
  float rest = __fsub_rn(w, clamped(w, low, high));
  if (rest != 0 && m.rho > 0) {
    float unit = 1;
    if (weight.even) {
      unit = weight.levels[row] / 2;
    } else if (m.unit < 2) {
      const float* levels = weight.levels + row * weight.count;
      const int i = rest < 0 ? 1 : weight.count - 1;
      unit = m.unit == 1 ? widest(levels, weight.count) : __fsub_rn(levels[i], levels[i - 1]) / 2;
    }
    const float shift = __fmul_rn(m.rho, unit);
    rest = __fsub_rn(rest, clamped(rest, -shift, shift));
  }
  return fmaf(m.outside, rest, inside);
}

struct Batch {
  Weight weights[WEIGHTS];
  Map map;
  int count;
};

#ifndef HOST
__device__ __forceinline__ long long row(long long at, const Weight& weight) {
  if (!weight.apart) return 0;
  return (long long)weight.g * weight.n <= 0x7fffffff ? (unsigned)at / (unsigned)weight.n : at / weight.n;
}

// Each thread maps four weights: of one row and side by side where they lie so.
extern "C" __global__ void proximal(const __grid_constant__ Batch b) {
  int i = 0;
  while (i + 1 < b.count && (int)blockIdx.x >= b.weights[i + 1].first) i++;
  const Weight& weight = b.weights[i];
  const long long size = (long long)weight.g * weight.n, begin = (long long)(blockIdx.x - weight.first) * THREADS * 4;
  if (weight.vector) {
    const long long at = begin + threadIdx.x * 4;
    if (at >= size) return;
    const long long r = row(at, weight);
    const float4 w = *reinterpret_cast<const float4*>(weight.rows + at);
    *reinterpret_cast<float4*>(weight.out + at) =
        make_float4(mapped(w.x, weight, r, b.map), mapped(w.y, weight, r, b.map), mapped(w.z, weight, r, b.map),
                    mapped(w.w, weight, r, b.map));
    return;
  }
  for (int k = 0; k < 4; k++) {
    const long long at = begin + k * THREADS + threadIdx.x;
    if (at < size) weight.out[at] = mapped(weight.rows[at], weight, row(at, weight), b.map);
  }
}
#endif
