// STREAM's triad, a[i] = b[i] + s * c[i], with non-temporal stores: the machine's memory limit that merges are held to.
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static void part(float* a, const float* b, const float* c, float s, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  __m512 s16 = _mm512_set1_ps(s);
  for (; i + 16 <= n; i += 16)
    _mm512_stream_ps(a + i, _mm512_fmadd_ps(s16, _mm512_loadu_ps(c + i), _mm512_loadu_ps(b + i)));
#elif defined(__AVX__)
  __m256 s8 = _mm256_set1_ps(s);
  for (; i + 8 <= n; i += 8)
    _mm256_stream_ps(a + i, _mm256_add_ps(_mm256_loadu_ps(b + i), _mm256_mul_ps(s8, _mm256_loadu_ps(c + i))));
#endif
  for (; i < n; ++i) a[i] = b[i] + s * c[i];
}

// Arrays must be 64-byte aligned; n is the number of floats in each.
extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t n, int32_t threads) {
  int64_t each = (n / threads + 15) / 16 * 16;
  std::vector<std::thread> crew;
  for (int32_t t = 0; t < threads; ++t) {
    int64_t start = t * each < n ? t * each : n, stop = start + each < n && t + 1 < threads ? start + each : n;
    crew.emplace_back(part, a + start, b + start, c + start, s, stop - start);
  }
  for (auto& t : crew) t.join();
}
