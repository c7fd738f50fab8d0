// out = round(base + sum_k eta_k * phi_k): one pass over memory, fp32 inside, one rounding at the end.
//
// Bit for bit what fused.py does with torch: products and sums are rounded apart (-ffp-contract=off), terms are
// added in the order given, and a term whose eta is 0 is not read. Every block of BLOCK elements is summed in L1 and
// leaves through non-temporal stores, so the traffic is one read of each input and one write of the output.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };
constexpr int64_t BLOCK = 128;      // elements summed at a time; larger blocks starve the hardware's prefetchers
constexpr int64_t AHEAD = 512;      // elements between what is summed and what is asked of memory
constexpr int64_t TILE = 64 << 10;  // elements a thread claims at a time

struct Term {
  const void* data;
  const float* scale;  // int8 only: one per row of `row` elements
  int64_t row;
  int32_t dtype;
  int32_t eta;  // index into the coefficients
};

struct Segment {
  void* out;
  const void* base;
  int64_t n;
  int32_t out_dtype, base_dtype;
  int32_t first_term, n_terms;
};

inline int64_t size_of(int32_t dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }
inline const char* at(const void* p, int32_t dtype, int64_t i) {
  return static_cast<const char*>(p) + i * size_of(dtype);
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return as_float(uint32_t(x) << 16); }  // bf16 is the upper half of fp32

template <class T>
void load(float* __restrict acc, const void* from, int64_t n) {
  auto x = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) acc[i] = widen(x[i]);
}

template <class T>
void add(float* __restrict acc, const void* from, float eta, int64_t n) {
  auto x = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) acc[i] += eta * widen(x[i]);
}

// GCC leaves loops over _Float16 scalar, hence the intrinsics.
void load_f16(float* __restrict acc, const void* from, int64_t n) {
  auto x = static_cast<const _Float16*>(from);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) acc[i] = float(x[i]);
}

void add_f16(float* __restrict acc, const void* from, float eta, int64_t n) {
  alignas(64) float phi[BLOCK];
  load_f16(phi, from, n);
  add<float>(acc, phi, eta, n);
}

void add_int8(float* __restrict acc, const Term& t, float eta, int64_t start, int64_t n) {
  auto q = static_cast<const int8_t*>(t.data) + start;
  for (int64_t done = 0; done < n;) {
    int64_t row = (start + done) / t.row, stop = (row + 1) * t.row - start;
    if (stop > n) stop = n;
    float scale = t.scale[row];
    for (; done < stop; ++done) acc[done] += eta * (float(q[done]) * scale);
  }
}

// The narrowing loops return non-zero where a result is infinite or NaN.
uint32_t narrow_f32(float* __restrict out, const float* __restrict acc, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = acc[i];
    bad |= (as_bits(acc[i]) & 0x7f800000u) == 0x7f800000u;
  }
  return bad;
}
uint32_t narrow_bf16(uint16_t* __restrict out, const float* __restrict acc, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t b = as_bits(acc[i]);
    uint32_t r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // nearest, ties to even
    out[i] = uint16_t(r);
    bad |= (r & 0x7f80u) == 0x7f80u;
    bad |= (b & 0x7f800000u) == 0x7f800000u;
  }
  return bad;
}
uint32_t narrow_f16(_Float16* __restrict out, const float* __restrict acc, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(acc + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = _Float16(acc[i]);
  uint32_t bad = 0;
  for (i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, out + i, 2);
    bad |= (bits & 0x7c00u) == 0x7c00u;
  }
  return bad;
}

// Past the caches: the output is not read again, so reading its lines in first would be a third of the traffic.
void stream(void* to, const void* from, int64_t bytes) {
  auto d = static_cast<char*>(to);
  auto s = static_cast<const char*>(from);
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(d) % 64 == 0)
    for (; bytes >= 64; bytes -= 64, d += 64, s += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#elif defined(__AVX__)
  if (reinterpret_cast<uintptr_t>(d) % 32 == 0)
    for (; bytes >= 32; bytes -= 32, d += 32, s += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(d), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
#endif
  std::memcpy(d, s, bytes);
}

void prefetch(const void* from, int64_t bytes) {
  auto p = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

uint32_t merge_tile(const Segment& s, const Term* terms, const float* eta, int64_t start, int64_t stop) {
  alignas(64) float acc[BLOCK];
  alignas(64) char staged[BLOCK * 4];
  uint32_t bad = 0;
  for (int64_t i = start; i < stop; i += BLOCK) {
    int64_t n = stop - i < BLOCK ? stop - i : BLOCK;
    prefetch(at(s.base, s.base_dtype, i + AHEAD), n * size_of(s.base_dtype));
    auto base = at(s.base, s.base_dtype, i);
    if (s.base_dtype == F32) load<float>(acc, base, n);
    else if (s.base_dtype == BF16) load<uint16_t>(acc, base, n);
    else load_f16(acc, base, n);
    for (int32_t k = s.first_term; k < s.first_term + s.n_terms; ++k) {
      const Term& t = terms[k];
      float e = eta[t.eta];
      if (e == 0.0f) continue;
      prefetch(at(t.data, t.dtype, i + AHEAD), n * size_of(t.dtype));
      auto phi = at(t.data, t.dtype, i);
      if (t.dtype == F32) add<float>(acc, phi, e, n);
      else if (t.dtype == BF16) add<uint16_t>(acc, phi, e, n);
      else if (t.dtype == F16) add_f16(acc, phi, e, n);
      else add_int8(acc, t, e, i, n);
    }
    if (s.out_dtype == F32) bad |= narrow_f32(reinterpret_cast<float*>(staged), acc, n);
    else if (s.out_dtype == BF16) bad |= narrow_bf16(reinterpret_cast<uint16_t*>(staged), acc, n);
    else bad |= narrow_f16(reinterpret_cast<_Float16*>(staged), acc, n);
    stream(const_cast<char*>(at(s.out, s.out_dtype, i)), staged, n * size_of(s.out_dtype));
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
  return bad;
}

}  // namespace

// Returns the index of a segment whose result holds an infinity or a NaN, or -1.
extern "C" int64_t prefvec_merge(const Segment* segments, int64_t n_segments, const Term* terms, const float* eta,
                                 int32_t threads) {
  std::vector<int64_t> first_tile(n_segments + 1, 0);
  for (int64_t i = 0; i < n_segments; ++i) first_tile[i + 1] = first_tile[i] + (segments[i].n + TILE - 1) / TILE;
  std::atomic<int64_t> next{0}, bad{-1};
  auto work = [&] {
    int64_t segment = 0;
    for (int64_t tile; (tile = next.fetch_add(1)) < first_tile[n_segments];) {
      while (first_tile[segment + 1] <= tile) ++segment;
      int64_t start = (tile - first_tile[segment]) * TILE, n = segments[segment].n;
      int64_t stop = start + TILE < n ? start + TILE : n;
      if (merge_tile(segments[segment], terms, eta, start, stop)) bad = segment;
    }
  };
  std::vector<std::thread> crew;
  if (threads > first_tile[n_segments]) threads = int32_t(first_tile[n_segments]);
  for (int32_t i = 1; i < threads; ++i) crew.emplace_back(work);
  work();
  for (auto& t : crew) t.join();
  return bad;
}
