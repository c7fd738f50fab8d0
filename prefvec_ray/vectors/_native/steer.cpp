// y[t, start_p + o] += sum_c S[t, c] (x[t] . A[p C + c]) B_p[c, o], in fp32, for the few tokens of a decode step.
//
// Two small products with the coefficients between them. Columns whose coefficients are all 0 are not read. Four tokens
// at a time share what is loaded of A and B. Threads are those of the OpenMP library that torch has loaded already: a
// second pool beside it would wait for the same cores.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
typedef float vec __attribute__((vector_size(V * 4)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline float sum(vec v) {
  float s = 0;
  for (int i = 0; i < V; ++i) s += v[i];
  return s;
}

struct Part {
  const float* B;
  int64_t start, size;
};

// As Python packs it.
struct Call {
  float* y;
  int64_t y_stride;
  const float* x;
  int64_t x_stride;
  const float *A, *S;
  int64_t S_stride, tokens, inputs, columns, parts;
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, or null for one thread
  int64_t threads;
  Part part[];
};

// h[g] = x[g] . a, h[G + g] = x[g] . b for G tokens.
template <int G>
void dots(const float* x, int64_t x_stride, const float* a, const float* b, int64_t n, float* h) {
  vec left[G] = {}, right[G] = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) {
    vec va = load(a + i), vb = load(b + i);
    for (int g = 0; g < G; ++g) {
      vec vx = load(x + g * x_stride + i);
      left[g] += vx * va;
      right[g] += vx * vb;
    }
  }
  for (int g = 0; g < G; ++g) {
    float l = sum(left[g]), r = sum(right[g]);
    for (int64_t k = i; k < n; ++k) {
      l += x[g * x_stride + k] * a[k];
      r += x[g * x_stride + k] * b[k];
    }
    h[g] = l;
    h[G + g] = r;
  }
}

// y[g, 0..n) += sum over the active columns of h[c, g] B[c, 0..n).
template <int G>
void spread(float* y, int64_t y_stride, const float* B, int64_t n, const int64_t* active, int64_t count, const float* h) {
  int64_t o = 0;
  for (; o + 2 * V <= n; o += 2 * V) {
    vec low[G], high[G];
    for (int g = 0; g < G; ++g) {
      low[g] = load(y + g * y_stride + o);
      high[g] = load(y + g * y_stride + o + V);
    }
    for (int64_t k = 0; k < count; ++k) {
      const float* row = B + active[k] * n + o;
      vec b0 = load(row), b1 = load(row + V);
      for (int g = 0; g < G; ++g) {
        low[g] += b0 * h[k * G + g];
        high[g] += b1 * h[k * G + g];
      }
    }
    for (int g = 0; g < G; ++g) {
      store(y + g * y_stride + o, low[g]);
      store(y + g * y_stride + o + V, high[g]);
    }
  }
  for (; o < n; ++o)
    for (int g = 0; g < G; ++g) {
      float s = y[g * y_stride + o];
      for (int64_t k = 0; k < count; ++k) s += h[k * G + g] * B[active[k] * n + o];
      y[g * y_stride + o] = s;
    }
}

template <int G>
void group(const Call& c, int64_t t, std::vector<int64_t>& active, std::vector<float>& h) {
  const float* S = c.S + t * c.S_stride;
  active.clear();
  for (int64_t k = 0; k < c.columns; ++k) {
    bool any = false;
    for (int g = 0; g < G; ++g) any |= S[g * c.S_stride + k] != 0.0f;
    if (any) active.push_back(k);
  }
  if (active.empty()) return;
  const int64_t count = int64_t(active.size());
  h.resize((count + 1) * G);
  for (int64_t p = 0; p < c.parts; ++p) {
    const float* A = c.A + p * c.columns * c.inputs;
    for (int64_t k = 0; k < count; k += 2) {
      const float* a = A + active[k] * c.inputs;
      const float* b = k + 1 < count ? A + active[k + 1] * c.inputs : a;
      dots<G>(c.x + t * c.x_stride, c.x_stride, a, b, c.inputs, h.data() + k * G);
    }
    for (int64_t k = 0; k < count; ++k)
      for (int g = 0; g < G; ++g) h[k * G + g] *= S[g * c.S_stride + active[k]];
    const Part& part = c.part[p];
    spread<G>(c.y + t * c.y_stride + part.start, c.y_stride, part.B, part.size, active.data(), count, h.data());
  }
}

struct Work {
  const Call& call;
  std::atomic<int64_t> next;
};

// Each thread takes the next four tokens until none is left: OpenMP may give fewer threads than were asked for.
void take(void* data) {
  Work& work = *static_cast<Work*>(data);
  const Call& c = work.call;
  std::vector<int64_t> active;
  std::vector<float> h;
  for (int64_t t; (t = work.next.fetch_add(4)) < c.tokens;) {
    if (t + 4 <= c.tokens)
      group<4>(c, t, active, h);
    else
      for (; t < c.tokens; ++t) group<1>(c, t, active, h);
  }
}

}  // namespace

extern "C" void prefvec_steer(const Call* call) {
  Work work{*call, {0}};
  if (!call->parallel || call->threads < 2 || call->tokens < 2 * call->threads)
    take(&work);
  else
    call->parallel(take, &work, unsigned(call->threads), 0);
}
