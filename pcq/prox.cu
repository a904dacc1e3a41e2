// The map L of prox.py as one kernel: each weight is read once and written once.
// Operation by operation what prox.py does on evenly spaced levels (_even) and on listed ones (_nearest, _search).

struct Even {  // levels scale * (code - zero), code = 0 .. top; slope, shrink = r / 2, end = (1 - v) / 2: see prox.py
  float scale, zero, top, slope, shrink, end;
  int hard, ramps, clipped;
};

struct Listed {  // ascending levels; rho and varrho in units of: 0 the gap, 1 the row's widest half gap, 2 the weight
  const float* levels;
  int count;
  float rho, varrho;
  int unit, hard;
};

__device__ __forceinline__ float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

__device__ __forceinline__ float mapped(float w, const Even& e) {
  const float aside = e.ramps ? 0.5f : 0.0f, zero = __fsub_rn(e.zero, aside);
  float rest = __fadd_rn(__fdiv_rn(w, e.scale > 0 ? e.scale : 1.0f), zero);
  if (e.clipped) rest = clamped(rest, -aside, e.top - aside);
  float code = rintf(rest);
  if (!e.clipped) code = clamped(code, 0.0f, e.top);
  if (!e.hard) {
    rest = __fsub_rn(rest, code);
    if (!e.ramps && e.shrink > 0)
      rest = rest > e.shrink ? __fsub_rn(rest, e.shrink) : rest < -e.shrink ? __fadd_rn(rest, e.shrink) : 0.0f;
    code = e.slope > 1 ? __fadd_rn(code, clamped(__fmul_rn(rest, e.slope), -e.end, e.end)) : fmaf(e.slope, rest, code);
  }
  return __fmul_rn(__fsub_rn(code, zero), e.scale);
}

__device__ __forceinline__ float middle(float a, float b) {
  const float m = (float)(((double)a + (double)b) / 2);
  return m < b ? m : a;  // neighbouring floats have no middle
}

__device__ __forceinline__ float mapped(float w, const Listed& e) {
  int low = 0, high = e.hard ? e.count - 1 : e.count - 2;  // of the nearest level, or of the gap that holds w
  while (low < high) {
    const int half = (low + high) / 2;
    const float end = e.hard ? middle(e.levels[half], e.levels[half + 1]) : e.levels[half + 1];
    if (end < w) low = half + 1; else high = half;
  }
  const float a = e.levels[low];
  if (e.hard) return a;
  const float b = e.levels[low + 1], p = __fadd_rn(b, a) / 2, h = __fsub_rn(b, a) / 2;
  float r = e.rho, v = e.varrho, steep = 0;
  if (e.unit) {
    float unit = 1;
    if (e.unit == 1) {
      unit = h;
      for (int i = 1; i < e.count; i++) unit = fmaxf(unit, __fsub_rn(e.levels[i], e.levels[i - 1]) / 2);
    }
    r = __fdiv_rn(__fmul_rn(r, unit), h), v = __fdiv_rn(__fmul_rn(v, unit), h);
  }
  if (h > 1.17549435e-38f && r < 1 && v < 1)
    steep = __fdiv_rn(__fdiv_rn(__fsub_rn(1, v), __fsub_rn(1, r)), h);
  else
    v = 1;
  const float y = __fadd_rn(__fmul_rn(__fsub_rn(w, p), steep), w > p ? v : -v);
  return __fadd_rn(p, __fmul_rn(clamped(y, -1, 1), h));
}

__device__ __forceinline__ float low(const Even& e) { return __fmul_rn(__fsub_rn(0, e.zero), e.scale); }
__device__ __forceinline__ float high(const Even& e) { return __fmul_rn(__fsub_rn(e.top, e.zero), e.scale); }
__device__ __forceinline__ float low(const Listed& e) { return e.levels[0]; }
__device__ __forceinline__ float high(const Listed& e) { return e.levels[e.count - 1]; }

template <typename Levels>
__device__ __forceinline__ float whole(float w, const Levels& e, float outside) {
  const float inside = mapped(w, e);
  return outside > 0 ? fmaf(outside, __fsub_rn(w, clamped(w, low(e), high(e))), inside) : inside;
}

#ifdef VECTOR
// rows [g, n] -> out [g, n], contiguous, VECTOR weights of one row a thread. Of `apart` 0 one row of levels serves all.
// Scalars come as the bits of float32: how a launch converts Python's floats depends on torch's version.

template <typename Levels>
__device__ __forceinline__ void work(const float* rows, float* out, long long at, const Levels& e, float outside) {
#if VECTOR == 4
  float4 w = *reinterpret_cast<const float4*>(rows + at);
  w = make_float4(whole(w.x, e, outside), whole(w.y, e, outside), whole(w.z, e, outside), whole(w.w, e, outside));
  *reinterpret_cast<float4*>(out + at) = w;
#else
  out[at] = whole(rows[at], e, outside);
#endif
}

__device__ __forceinline__ long long place() { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR; }

__device__ __forceinline__ long long row(long long at, int g, int n) {
  return (long long)g * n <= 0x7fffffff ? (unsigned)at / (unsigned)n : at / n;
}

extern "C" __global__ void even(const float* rows, float* out, int g, int n, int apart, const float* scales,
                                const float* zeros, int zero, int count, int slope, int shrink, int end, int hard,
                                int ramps, int clipped, int outside, int zeros_apart) {
  const long long at = place();
  if (at >= (long long)g * n) return;
  const long long r = row(at, g, n);
  const float z = zeros_apart ? zeros[r * apart] : __int_as_float(zero);
  const Even e = {scales[r * apart], z, (float)(count - 1), __int_as_float(slope), __int_as_float(shrink),
                  __int_as_float(end), hard, ramps, clipped};
  work(rows, out, at, e, __int_as_float(outside));
}

extern "C" __global__ void listed(const float* rows, float* out, int g, int n, int apart, const float* table, int count,
                                  int rho, int varrho, int unit, int hard, int outside) {
  const long long at = place();
  if (at >= (long long)g * n) return;
  const float* levels = table + row(at, g, n) * apart * count;
  const Listed e = {levels, count, __int_as_float(rho), __int_as_float(varrho), unit, hard};
  work(rows, out, at, e, __int_as_float(outside));
}
#endif
