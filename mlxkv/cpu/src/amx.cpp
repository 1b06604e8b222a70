// Products of many rows in the tiles of AMX, and of a few in whole numbers; all else is AVX-512's.
// For many, words of 16 rows of a weight are turned, so that a lane has those of a row, and are
// unpacked to one factor of a product of tiles; parts of 16 rows of activations are the other. What that
// gives for a group is scaled and added.
#include "kernels.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <utility>

namespace avx512 {
extern const Kernels table;
}

namespace amx {

#define TGT                                                                                      \
  __attribute__((                                                                                \
      target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni," \
             "amx-tile,amx-bf16,prefer-vector-width=512")))
#define FN TGT static
#define IN TGT static inline __attribute__((always_inline))

// Values of a row that are unpacked at a time, a multiple of groups: their tiles stay in a core's
// first cache.
constexpr int SLICE = 256;
// Parts of an activation.
constexpr int PARTS = 3;

// Tiles: parts of activations, sums, and what a weight is unpacked to.
constexpr int PART = 0, SUM = 3, UNPACKED = 6;

struct Shapes {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

FN void begin() {
  Shapes shapes;
  for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
FN void end() { asm volatile("tilerelease"); }

template <int T>
IN void load(const void* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(64l), "i"(T) : "memory");
}
template <int T>
IN void store(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64l), "i"(T) : "memory");
}
template <int T>
IN void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
IN void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

IN __m512i words_at(const void* p) { return _mm512_loadu_si512(p); }

// Lane i of out[j] is word j of the 4 at `rows` + i * stride.
IN void turn(const char* rows, size_t stride, uint32_t* out) {
  const size_t thrice = 3 * stride;
  const char *b = rows + 4 * stride, *c = b + 4 * stride, *d = c + 4 * stride;
#define OF(row, offset) _mm_loadu_si128((const __m128i*)((row) + (offset)))
#define FOUR(offset)                                                                      \
  _mm512_inserti32x4(                                                                     \
      _mm512_inserti32x4(                                                                 \
          _mm512_inserti32x4(_mm512_castsi128_si512(OF(rows, offset)), OF(b, offset), 1), \
          OF(c, offset), 2),                                                              \
      OF(d, offset), 3)
  const __m512i z0 = FOUR(0), z1 = FOUR(stride), z2 = FOUR(2 * stride), z3 = FOUR(thrice);
#undef FOUR
#undef OF
  const __m512i low = _mm512_unpacklo_epi32(z0, z1), high = _mm512_unpackhi_epi32(z0, z1);
  const __m512i other_low = _mm512_unpacklo_epi32(z2, z3),
                other_high = _mm512_unpackhi_epi32(z2, z3);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, other_low));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low, other_low));
  _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(high, other_high));
  _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(high, other_high));
}

// The 16-bit words K of a step's first 16 codes in the low halves of lanes, and of the others in
// the high halves: `w` are its words.
template <int BITS, int K>
IN __m512i halves(const uint32_t* w) {
  constexpr int LOW = K, HIGH = BITS + K;
  __m512i low = words_at(w + LOW / 2 * 16), high = words_at(w + HIGH / 2 * 16);
  if constexpr (LOW % 2) low = _mm512_srli_epi32(low, 16);
  if constexpr (HIGH % 2 == 0) high = _mm512_slli_epi32(high, 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

// 16-bit floats in the low halves of lanes, or in the high halves.
IN __m512 of_halves(__m512i w, bool high, Scale kind) {
  if (kind == Scale::BF16)
    return _mm512_castsi512_ps(high ? _mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000)))
                                    : _mm512_slli_epi32(w, 16));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high ? _mm512_srli_epi32(w, 16) : w));
}

// 16 rows of a weight, a slice of whose values is turned as it is unpacked. Lane i of a vector of
// scales, or of biases for signed codes, is row i's.
class Block {
 public:
  // Rows from `first` on.
  TGT void place(const Weight& p, int first) {
    p_ = &p, first_ = first, bits_ = bits_of(p.kind);
    stride_ = size_t(int64_t(p.K) * bits_ / 8);
  }

  // Begins with values [start, start + n).
  TGT void slice(int start, int n) {
    rows_ = (const char*)p_->w + first_ * stride_ + size_t(start) * bits_ / 8;
    n_words_ = n / 32 * bits_, n_turned_ = 0;
    if (!is_packed(p_->kind)) return;
    const int at = start / p_->group, groups = n / p_->group;
    turn_scales(p_->scales, at, groups, scales_);
    if (!p_->biases) return;
    turn_scales(p_->biases, at, groups, biases_);
    const __m512 middle = _mm512_set1_ps(float(1 << (bits_ - 1)));
    for (int g = 0; g < groups * 16; g += 16)
      _mm512_store_ps(biases_ + g, _mm512_fmadd_ps(middle, _mm512_load_ps(scales_ + g),
                                                   _mm512_load_ps(biases_ + g)));
  }

  // Turned words of the slice, [word][16], from word `first` on to `stop` at least.
  TGT __attribute__((always_inline)) inline const uint32_t* words(int first, int stop) {
    for (; n_turned_ < stop; n_turned_ += 4) {
      const int at = n_turned_ < n_words_ - 4 ? n_turned_ : n_words_ - 4;
      turn(rows_ + at * 4, stride_, words_ + (4 + at) * 16);
    }
    return words_ + (4 + first) * 16;
  }

  // Of a group of the slice; no biases: null.
  const float* scale(int group) const { return is_packed(p_->kind) ? scales_ + group * 16 : ONES; }
  const float* bias(int group) const { return p_->biases ? biases_ + group * 16 : nullptr; }

 private:
  static constexpr int MOST = SLICE / 32;
  alignas(64) static constexpr float ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  TGT void turn_scales(const void* from, int at, int n, float* out) {
    const int n_groups = p_->n_groups();
    const size_t first = size_t(first_) * n_groups + at;
    if ((p_->scale == Scale::F16 || p_->scale == Scale::BF16) && n >= 8)
      return turn_halves((const char*)from + first * 2, size_t(n_groups) * 2, n, out);
    float of_rows[16][MOST + 4];
    for (int i = 0; i < 16; ++i)
      avx512::table.numbers(from, p_->scale, first + size_t(i) * n_groups, n, of_rows[i]);
    for (int g = 0; g < n; g += 4)
      turn((const char*)(of_rows[0] + g), sizeof of_rows[0], (uint32_t*)out + g * 16);
  }

  TGT void turn_halves(const char* rows, size_t stride, int n, float* out) {
    alignas(64) uint32_t pairs[4 * 16];
    for (int i = 0; i < n; i += 8) {
      const int g = i < n - 8 ? i : n - 8;
      turn(rows + g * 2, stride, pairs);
      for (int j = 0; j < 4; ++j) {
        const __m512i pair = _mm512_load_si512(pairs + j * 16);
        _mm512_store_ps(out + (g + 2 * j) * 16, of_halves(pair, false, p_->scale));
        _mm512_store_ps(out + (g + 2 * j + 1) * 16, of_halves(pair, true, p_->scale));
      }
    }
  }

  const Weight* p_;
  const char* rows_;
  size_t stride_, first_;
  int bits_, n_words_, n_turned_;
  alignas(64) uint32_t words_[(4 + SLICE / 2) * 16];
  alignas(64) float scales_[(MOST + 4) * 16], biases_[(MOST + 4) * 16];
};

// Whether products of many rows are made here; those of a few are of fewer kinds.
bool takes(const Weight& p) {
  return p.kind <= Kind::BF16 && (!is_packed(p.kind) || p.group % 32 == 0) && p.N >= 16 &&
         int64_t(p.K) * bits_of(p.kind) >= 4 * 32;
}

#include "amx_rows.inc"
#include "amx_prepare.inc"

// A prepared row takes three halves of each float, or the chunks of `rows`; AVX-512's are as they
// were, in as much room.
FN int length(const Weight& p) {
  const int own = avx512::table.length(p), parts = p.K / 2 * PARTS;
  const int chunks = takes_few(p) ? (p.K + CHUNK - 1) / CHUNK * chunk_floats(1) : 0;
  const int most = parts > chunks ? parts : chunks;
  return takes(p) && own < most ? most : own;
}

#include "amx_many.inc"

// Whether the machine has tiles of bfloat16 and what is used of AVX-512, and the system keeps their
// registers: the process has to ask for that.
__attribute__((target("xsave"))) bool is_there() {
  constexpr unsigned BF16 = 1 << 22, TILES = 1 << 24, OSXSAVE = 1 << 27;
  constexpr unsigned VBMI = 1 << 1, VBMI2 = 1 << 6, VNNI = 1 << 11, VECTORS = VBMI | VBMI2 | VNNI;
  constexpr unsigned long STATE = 3 << 17;
  constexpr long ASK = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE) || (_xgetbv(0) & STATE) != STATE)
    return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILES) ||
      (c & VECTORS) != VECTORS)
    return false;
  return !syscall(SYS_arch_prctl, ASK, TILE_DATA);
}

const Kernels* kernels() {
  static const bool has = is_there();
  static const Kernels found = [] {
    Kernels all = avx512::table;
    all.name = "amx";
    all.length = length, all.prepare = prepare, all.rows = rows;
    all.prepare_tile = prepare_tile, all.many = many;
    return all;
  }();
  return has ? &found : nullptr;
}

}  // namespace amx

#else
namespace amx {
const Kernels* kernels() { return nullptr; }
}  // namespace amx
#endif
