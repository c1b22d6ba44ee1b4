/* The augmentation of one view in one call, for CPUs: random numbers, crop box, crop, colours, blur, flip, normalise;
 * and Pillow's resize for evaluation.
 *
 * Python computes the same with NumPy, PIL and torch; the tests compare the two. kernel.py compiles this file at first
 * use and calls it through ctypes, which releases the interpreter lock. It is plain C: loops over whole rows and
 * planes, which compilers turn into vector instructions. Contraction of a*b+c must be off, so that results do not
 * depend on the processor.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Philox4x32-10 (Salmon et al., SC 2011): n rows of `blocks` blocks of four 32-bit words. */
void philox_words(int64_t n, const int64_t *indices, uint32_t epoch, uint64_t seed, uint32_t first_block,
                  int64_t blocks, uint32_t *out) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t b = 0; b < blocks; b++, out += 4) {
            uint64_t index = (uint64_t)indices[i];
            uint32_t c0 = first_block + (uint32_t)b, c1 = (uint32_t)index, c2 = (uint32_t)(index >> 32), c3 = epoch;
            uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
            for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
                uint64_t a = (uint64_t)c0 * 0xD2511F53u, d = (uint64_t)c2 * 0xCD9E8D57u;
                c0 = (uint32_t)(d >> 32) ^ c1 ^ k0;
                c1 = (uint32_t)d;
                c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
                c3 = (uint32_t)a;
            }
            out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
        }
}

/* torchvision's RandomResizedCrop: ten tries, then the widest or tallest box in the centre. u: 22 numbers in [0, 1);
 * rule: smallest and largest share of the area, smallest and largest width / height. box: left, top, width, height. */
#define TRIES 10
static void crop_box(const double *u, int64_t width, int64_t height, const double *rule, int64_t *box) {
    double low = log(rule[2]), high = log(rule[3]);
    for (int t = 0; t < TRIES; t++) {
        double area = (double)(width * height) * (rule[0] + (rule[1] - rule[0]) * u[2 * t]);
        double ratio = exp(low + (high - low) * u[2 * t + 1]);
        int64_t w = (int64_t)rint(sqrt(area * ratio)), h = (int64_t)rint(sqrt(area / ratio));
        if (w > 0 && w <= width && h > 0 && h <= height) {
            box[0] = (int64_t)(u[2 * TRIES] * (double)(width - w + 1));
            box[1] = (int64_t)(u[2 * TRIES + 1] * (double)(height - h + 1));
            box[2] = w, box[3] = h;
            return;
        }
    }
    int64_t w = (int64_t)rint((double)height * rule[3]), h = (int64_t)rint((double)width / rule[2]);
    w = w < 1 ? 1 : w > width ? width : w;
    h = h < 1 ? 1 : h > height ? height : h;
    box[0] = (width - w) / 2, box[1] = (height - h) / 2, box[2] = w, box[3] = h;
}

/* The boxes of n images of `sizes` (width, height). */
void crop_boxes(int64_t n, const double *u, const int64_t *sizes, const double *rule, int64_t *boxes) {
    for (int64_t i = 0; i < n; i++)
        crop_box(u + i * (2 * TRIES + 2), sizes[2 * i], sizes[2 * i + 1], rule, boxes + 4 * i);
}

/* Antialiased bilinear resize, within one level of PIL's: a triangle filter as wide as the scale, along the columns
 * first, a row of bytes at a time, then along that row. All in integers, so that every processor and compiler gives the
 * same bytes. The weights of a pixel sum to exactly 1 << bits: each passes its rounding error on to the next.
 * triangle() returns the largest number of taps. */
typedef struct { int first, taps; } Span;

static double height(double x, double width) {
    double y = width - fabs(x);
    return y > 0 ? y : 0;
}

static int triangle(int in, int out, int bits, int stride, Span *spans, int32_t *weights) {
    double scale = (double)in / out, width = scale < 1 ? 1 : scale;
    int most = 0;
    for (int o = 0; o < out; o++, weights += stride) {
        double centre = (o + 0.5) * scale, sum = 0, left = 0;
        int first = (int)(centre - width + 0.5), last = (int)(centre + width + 0.5);
        first = first < 0 ? 0 : first;
        last = last > in ? in : last;
        for (int i = first; i < last; i++) sum += height(i - centre + 0.5, width);
        double full = (1 << bits) / sum;
        for (int i = first; i < last; i++) {
            double k = height(i - centre + 0.5, width) * full + left;
            weights[i - first] = (int32_t)rint(k);
            left = k - weights[i - first];
            if (bits == 16 && weights[i - first] > 65535) weights[i - first] = 65535;
        }
        memset(weights + (last - first), 0, (size_t)(stride - (last - first)) * sizeof *weights);
        spans[o] = (Span){first, last - first};
        most = last - first > most ? last - first : most;
    }
    return most;
}

#define X_BITS 14 /* so that weights fit 16 bits, and a pixel times a weight of the other axis ... */
#define Y_BITS 16 /* ... is the upper half of a product of two 16-bit numbers */

/* A weighted sum of `taps` rows of n bytes. Products are truncated to 1/256 of a level; half a unit each makes up. */
static void shrink_scalar(const uint8_t *rows, int64_t pitch, int taps, const int32_t *k, int n, uint8_t *out) {
    for (int x = 0; x < n; x++) {
        uint32_t sum = 128 + (uint32_t)taps / 2;
        for (int t = 0; t < taps; t++)
            sum += ((uint32_t)rows[t * pitch + x] << 8) * (uint32_t)k[t] >> 16;
        out[x] = (uint8_t)(sum > 65535 ? 255 : sum >> 8);
    }
}

/* Four taps per step: pixels as pairs of 16-bit numbers (r0 r1 g0 g1 b0 b1 . .) times weights in the same order. */
#ifdef __AVX2__
#include <immintrin.h>
static void shrink(const uint8_t *rows, int64_t pitch, int taps, const int32_t *k, int n, uint8_t *out) {
    const __m256i start = _mm256_set1_epi16((short)(128 + taps / 2));
    if (n < 32 || taps > 254) { /* more taps would not fit 16 bits */
        shrink_scalar(rows, pitch, taps, k, n, out);
        return;
    }
    for (int x = 0; x < n; x = x + 32 < n && x + 64 > n ? n - 32 : x + 32) { /* the last block overlaps */
        __m256i a = start, b = start;
        const uint8_t *p = rows + x;
        for (int t = 0; t < taps; t++, p += pitch) {
            __m256i f = _mm256_set1_epi16((short)k[t]);
            __m256i u = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
            __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p + 16)));
            a = _mm256_add_epi16(a, _mm256_mulhi_epu16(_mm256_slli_epi16(u, 8), f));
            b = _mm256_add_epi16(b, _mm256_mulhi_epu16(_mm256_slli_epi16(v, 8), f));
        }
        a = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_permute4x64_epi64(a, 0xD8));
    }
}

static inline void narrow(const uint8_t *row, const Span *spans, const int16_t *weights, int groups, uint8_t *out,
                          int size) {
    const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                           6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m128i half = _mm_set1_epi32(1 << (X_BITS - 1));
    for (int x = 0; x < size; x++, out += 3) {
        const uint8_t *p = row + 3 * spans[x].first;
        __m256i sum = _mm256_setzero_si256();
        for (int g = 0; g < groups; g++, p += 12, weights += 16) {
            __m256i pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
            __m256i k = _mm256_loadu_si256((const __m256i *)weights);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, pairs), k));
        }
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_srai_epi32(_mm_add_epi32(s, half), X_BITS);
        s = _mm_packus_epi16(_mm_packs_epi32(s, s), s);
        uint32_t rgb = (uint32_t)_mm_cvtsi128_si32(s);
        if (x < size - 1) memcpy(out, &rgb, 4); /* the fourth byte is the next pixel's */
        else memcpy(out, &rgb, 3);
    }
}
#else
static void shrink(const uint8_t *rows, int64_t pitch, int taps, const int32_t *k, int n, uint8_t *out) {
    shrink_scalar(rows, pitch, taps, k, n, out);
}

static inline void narrow(const uint8_t *row, const Span *spans, const int16_t *weights, int groups, uint8_t *out,
                          int size) {
    for (int x = 0; x < size; x++, out += 3) {
        const uint8_t *p = row + 3 * spans[x].first;
        int32_t r = 1 << (X_BITS - 1), g = r, b = r;
        for (int i = 0; i < groups; i++, p += 12, weights += 16)
            for (int t = 0; t < 4; t++) {
                int32_t k = weights[8 * (t / 2) + t % 2];
                r += p[3 * t] * k, g += p[3 * t + 1] * k, b += p[3 * t + 2] * k;
            }
        out[0] = (uint8_t)(r >> X_BITS), out[1] = (uint8_t)(g >> X_BITS), out[2] = (uint8_t)(b >> X_BITS);
    }
}
#endif

/* (w, h) pixels of an RGB image, `pitch` bytes per row -> (size, size, 3). */
static int resize(const uint8_t *image, int64_t pitch, int w, int h, uint8_t *out, int size) {
    int sx = 2 * (int)ceil(w > size ? (double)w / size : 1) + 1;
    int sy = 2 * (int)ceil(h > size ? (double)h / size : 1) + 1;
    int n = 3 * w, room = (sx + 3) / 4 * 4;
    Span *spans = malloc(2 * (size_t)size * sizeof *spans);
    int32_t *weights = malloc((size_t)size * (room > sy ? room : sy) * sizeof *weights);
    int16_t *pairs = malloc((size_t)size * room * 4 * sizeof *pairs);
    uint8_t *row = calloc((size_t)n + 3 * room + 16, 1);
    int failed = !spans || !weights || !pairs || !row;
    if (!failed) {
        int groups = (triangle(w, size, X_BITS, room, spans, weights) + 3) / 4;
        for (int i = 0; i < size * groups; i++)
            for (int j = 0; j < 16; j++) {
                int32_t k = weights[i / groups * room + i % groups * 4 + 2 * (j / 8) + j % 2];
                pairs[16 * i + j] = j % 8 < 6 ? (int16_t)k : 0;
            }
        triangle(h, size, Y_BITS, sy, spans + size, weights);
        for (int y = 0; y < size; y++) {
            Span span = spans[size + y];
            shrink(image + span.first * pitch, pitch, span.taps, weights + (size_t)y * sy, n, row);
            uint8_t *to = out + (size_t)y * 3 * size;
            if (groups == 1) narrow(row, spans, pairs, 1, to, size); /* a copy of the loop for the usual scales */
            else narrow(row, spans, pairs, groups, to, size);
        }
    }
    free(spans), free(weights), free(pairs), free(row);
    return failed;
}

/* Colours: planes of n floats in [0, 1], computed as torchvision does on float images, clamped after each operator. */
#define GRAY(r, g, b) (0.2989f * (r) + 0.587f * (g) + 0.114f * (b))

static inline float clamp(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

static void brightness(float *restrict x, int64_t n, float f) {
    for (int64_t i = 0; i < 3 * n; i++) x[i] = clamp(f * x[i]);
}

static void contrast(float *restrict x, int64_t n, float f) {
    const float *r = x, *g = x + n, *b = x + 2 * n;
    double sum = 0;
    for (int64_t from = 0; from < n; from += 4096) { /* lanes for vector instructions, chunks for small sums */
        float lane[16] = {0};
        int64_t i = from, end = n < from + 4096 ? n : from + 4096;
        for (; i + 16 <= end; i += 16)
            for (int j = 0; j < 16; j++) lane[j] += GRAY(r[i + j], g[i + j], b[i + j]);
        for (; i < end; i++) lane[0] += GRAY(r[i], g[i], b[i]);
        for (int j = 0; j < 16; j++) sum += lane[j];
    }
    float other = (1 - f) * (float)(sum / (double)n);
    for (int64_t i = 0; i < 3 * n; i++) x[i] = clamp(f * x[i] + other);
}

static void saturation(float *restrict x, int64_t n, float f) {
    float *r = x, *g = x + n, *b = x + 2 * n;
    for (int64_t i = 0; i < n; i++) {
        float other = (1 - f) * GRAY(r[i], g[i], b[i]);
        r[i] = clamp(f * r[i] + other), g[i] = clamp(f * g[i] + other), b[i] = clamp(f * b[i] + other);
    }
}

/* The hue shift, exactly in HSV: channel n is V - C max(0, min(k, 4 - k, 1)), k = (n + H) mod 6, in sixths. */
static inline float turned(float hue, float n, float value, float chroma) {
    float k = hue + n;
    k -= 6 * floorf(k * (1 / 6.0f));
    float m = 4 - k < k ? 4 - k : k;
    return value - chroma * clamp(m);
}

static void hue(float *restrict x, int64_t n, float shift) {
    float *restrict r = x, *restrict g = x + n, *restrict b = x + 2 * n;
    for (int64_t i = 0; i < n; i++) {
        float R = r[i], G = g[i], B = b[i];
        float high = R > G ? R : G, low = R < G ? R : G;
        high = high > B ? high : B, low = low < B ? low : B;
        float chroma = high - low, by = 1 / (chroma == 0 ? 1 : chroma);
        float h = high == R ? (G - B) * by : high == G ? (B - R) * by + 2 : (R - G) * by + 4;
        h += 6 * shift;
        r[i] = turned(h, 5, high, chroma), g[i] = turned(h, 3, high, chroma), b[i] = turned(h, 1, high, chroma);
    }
}

static void gray(float *restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = x[n + i] = x[2 * n + i] = GRAY(x[i], x[n + i], x[2 * n + i]);
}

/* out[i] = taps[0] before[0][i] + sum over o > 0 of taps[o] (before[o][i] + behind[o][i]); 32 at a time. */
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
static void weigh(const float *const *before, const float *const *behind, const float *taps, int radius, int n,
                  float *out) {
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        const eight *mid = (const eight *)(before[0] + i);
        eight s0 = taps[0] * mid[0], s1 = taps[0] * mid[1], s2 = taps[0] * mid[2], s3 = taps[0] * mid[3];
        for (int o = 1; o <= radius; o++) {
            const eight *a = (const eight *)(before[o] + i), *b = (const eight *)(behind[o] + i);
            s0 += taps[o] * (a[0] + b[0]), s1 += taps[o] * (a[1] + b[1]);
            s2 += taps[o] * (a[2] + b[2]), s3 += taps[o] * (a[3] + b[3]);
        }
        eight *to = (eight *)(out + i);
        to[0] = s0, to[1] = s1, to[2] = s2, to[3] = s3;
    }
    for (; i < n; i++) {
        float sum = taps[0] * before[0][i];
        for (int o = 1; o <= radius; o++) sum += taps[o] * (before[o][i] + behind[o][i]);
        out[i] = sum;
    }
}

/* The true Gaussian, cut off at 4 sigma; edge pixels repeat. Each plane is (size, size), blurred along columns first;
 * tmp: one plane, line: size + 2 radius floats, rows: 2 radius + 2 pointers. */
static void blur(float *x, int planes, int size, const float *taps, int radius, float *tmp, float *line,
                 const float **rows) {
    const float **before = rows, **behind = rows + radius + 1;
    for (int c = 0; c < planes; c++, x += (int64_t)size * size) {
        for (int y = 0; y < size; y++) {
            for (int o = 0; o <= radius; o++) {
                before[o] = x + (int64_t)(y - o < 0 ? 0 : y - o) * size;
                behind[o] = x + (int64_t)(y + o >= size ? size - 1 : y + o) * size;
            }
            weigh(before, behind, taps, radius, size, tmp + (int64_t)y * size);
        }
        for (int o = 0; o <= radius; o++) before[o] = line + radius - o, behind[o] = line + radius + o;
        for (int y = 0; y < size; y++) {
            const float *from = tmp + (int64_t)y * size;
            for (int i = 0; i < radius; i++) line[i] = from[0], line[radius + size + i] = from[size - 1];
            memcpy(line + radius, from, (size_t)size * sizeof *line);
            weigh(before, behind, taps, radius, size, x + (int64_t)y * size);
        }
    }
}

/* All steps after the crop: bytes (size, size, 3) -> floats (size, size, 3). p is a row of augment.Finish.table:
 * jitter, four operators in order (0 brightness, 1 contrast, 2 saturation, 3 hue), their factors, gray, sigma, flip. */
#define PARAMETERS 12
static int radius_of(const float *p) { return (int)ceilf(4 * p[10]); }

/* Room for pointers to rows, planes and one for blur, taps, a line, and the crop. The caller keeps it: new memory is
 * slow. */
int64_t scratch_bytes(int64_t n, const float *parameters, int size) {
    int64_t radius = 0, pixels = (int64_t)size * size;
    for (int64_t i = 0; parameters && i < n; i++)
        if (radius < radius_of(parameters + i * PARAMETERS)) radius = radius_of(parameters + i * PARAMETERS);
    int64_t floats = parameters ? 4 * pixels + size + 3 * radius + 1 : 0;
    return (2 * radius + 2) * (int64_t)sizeof(float *) + floats * (int64_t)sizeof(float) + 3 * pixels;
}

static void finish(const uint8_t *restrict crop, const float *p, float *restrict out, int size, void *scratch) {
    int64_t n = (int64_t)size * size;
    int radius = radius_of(p);
    const float **rows = scratch;
    float *x = (float *)(rows + 2 * radius + 2);
    float *restrict r = x, *restrict g = x + n, *restrict b = x + 2 * n;
    for (int64_t i = 0; i < n; i++)
        r[i] = crop[3 * i] * (1 / 255.0f), g[i] = crop[3 * i + 1] * (1 / 255.0f), b[i] = crop[3 * i + 2] * (1 / 255.0f);
    for (int slot = 1; p[0] && slot <= 4; slot++) {
        if (p[slot] == 0) brightness(x, n, p[5]);
        if (p[slot] == 1) contrast(x, n, p[6]);
        if (p[slot] == 2) saturation(x, n, p[7]);
        if (p[slot] == 3) hue(x, n, p[8]);
    }
    if (p[9]) gray(x, n);
    if (p[10] > 0) {
        float *tmp = x + 3 * n, *taps = tmp + n, *line = taps + radius + 1;
        double sum = 0, sigma = p[10];
        for (int o = -radius; o <= radius; o++) sum += exp(-0.5 * (o / sigma) * (o / sigma));
        for (int o = 0; o <= radius; o++) taps[o] = (float)(exp(-0.5 * (o / sigma) * (o / sigma)) / sum);
        blur(x, p[9] ? 1 : 3, size, taps, radius, tmp, line, rows);
        if (p[9]) memcpy(x + n, x, (size_t)n * sizeof *x), memcpy(x + 2 * n, x, (size_t)n * sizeof *x);
    }
    const float kr = 1 / 0.229f, kg = 1 / 0.224f, kb = 1 / 0.225f;
    const float mr = 0.485f * kr, mg = 0.456f * kg, mb = 0.406f * kb;
    for (int y = 0; y < size; y++, r += size, g += size, b += size, out += 3 * size)
        if (p[11])
            for (int i = 0, j = size - 1; i < size; i++, j--)
                out[3 * i] = r[j] * kr - mr, out[3 * i + 1] = g[j] * kg - mg, out[3 * i + 2] = b[j] * kb - mb;
        else
            for (int i = 0; i < size; i++)
                out[3 * i] = r[i] * kr - mr, out[3 * i + 1] = g[i] * kg - mg, out[3 * i + 2] = b[i] * kb - mb;
}

/* n views, each from an RGB image (height, width, 3) of bytes, 22 numbers for its box, and a row of PARAMETERS. Writes
 * the finished floats to `out`, or without parameters the bytes of the crops. Returns 1 if memory runs out. */
int views(int64_t n, const uint8_t *const *images, const int64_t *sizes, const double *u, const double *rule,
          const float *parameters, void *const *out, int size, void *scratch) {
    uint8_t *crop = (uint8_t *)scratch + scratch_bytes(n, parameters, size) - 3 * (int64_t)size * size;
    for (int64_t i = 0; i < n; i++, u += 2 * TRIES + 2) {
        int64_t width = sizes[2 * i], height = sizes[2 * i + 1], box[4];
        crop_box(u, width, height, rule, box);
        const uint8_t *corner = images[i] + (box[1] * width + box[0]) * 3;
        if (resize(corner, 3 * width, (int)box[2], (int)box[3], parameters ? crop : out[i], size)) return 1;
        if (parameters) finish(crop, parameters + i * PARAMETERS, out[i], size, scratch);
    }
    return 0;
}

/* Pillow's antialiased bilinear resize, bit for bit, for evaluation: 22-bit weights; along the rows first, rounded to
 * bytes, then along the columns. Computes only a window of the result, and reads only the pixels that it needs. */
#define BITS 22
typedef int32_t four __attribute__((vector_size(16)));
typedef uint8_t four_bytes __attribute__((vector_size(4)));

static inline four widened(const uint8_t *p) {
#ifdef __AVX2__ /* compilers would load the bytes one by one */
    int x;
    memcpy(&x, p, 4);
    return (four)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(x));
#else
    four_bytes x;
    memcpy(&x, p, 4);
    return __builtin_convertvector(x, four);
#endif
}

/* Returns the largest number of taps; pixels with fewer get zero weights. */
static int pillow_weights(int in, int out, int start, int n, int stride, Span *spans, int32_t *weights) {
    double scale = (double)in / out, width = scale < 1 ? 1 : scale, per = 1 / width;
    int most = 0;
    for (int o = 0; o < n; o++, weights += stride) {
        double centre = (start + o + 0.5) * scale, sum = 0;
        int first = (int)(centre - width + 0.5), last = (int)(centre + width + 0.5);
        first = first < 0 ? 0 : first;
        last = last > in ? in : last;
        for (int i = first; i < last; i++) sum += height((i - centre + 0.5) * per, 1);
        for (int i = first; i < last; i++)
            weights[i - first] = (int)(0.5 + height((i - centre + 0.5) * per, 1) / sum * (1 << BITS));
        memset(weights + (last - first), 0, (size_t)(stride - (last - first)) * sizeof *weights);
        spans[o] = (Span){first, last - first};
        most = last - first > most ? last - first : most;
    }
    return most;
}

/* Reads 3 taps + 1 bytes from the first pixel of each span, and writes one byte beyond the last pixel. */
static inline void pillow_row(const uint8_t *row, const Span *spans, const int32_t *weights, int stride, int taps,
                              int n, uint8_t *out) {
    for (int x = 0; x < n; x++, weights += stride, out += 3) {
        const uint8_t *p = row + 3 * spans[x].first;
        four sum = {1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1), 0};
        for (int t = 0; t < taps; t++) sum += widened(p + 3 * t) * weights[t]; /* the fourth lane is dropped */
        sum >>= BITS; /* at most 256, if the weights were rounded up */
        four_bytes pixel = __builtin_convertvector(sum - (sum >> 8), four_bytes);
        memcpy(out, &pixel, 4);
    }
}

/* (h, w, 3) bytes, resized to (to_h, to_w): writes the window of (n_h, n_w) at (left, top) to out (n_h, n_w, 3).
 * Returns 1 if memory runs out. */
int pillow_resize(const uint8_t *image, int w, int h, int to_w, int to_h, int left, int top, int n_w, int n_h,
                  uint8_t *out) {
    int sx = 2 * (int)ceil(w > to_w ? (double)w / to_w : 1) + 1;
    int sy = 2 * (int)ceil(h > to_h ? (double)h / to_h : 1) + 1;
    int n = 3 * n_w, pitch = n + 1;
    Span *spans = malloc((size_t)(n_w + n_h) * sizeof *spans);
    int32_t *kx = malloc((size_t)n_w * sx * sizeof *kx), *ky = malloc((size_t)n_h * sy * sizeof *ky);
    int32_t *sums = malloc((size_t)n * sizeof *sums);
    uint8_t *ring = malloc((size_t)sy * pitch); /* rows resized along x, as many as one row of the result needs */
    uint8_t *last = calloc((size_t)3 * (w + sx) + 1, 1);
    int failed = !spans || !kx || !ky || !sums || !ring || !last;
    if (!failed) {
        int taps = pillow_weights(w, to_w, left, n_w, sx, spans, kx);
        pillow_weights(h, to_h, top, n_h, sy, spans + n_w, ky);
        for (int y = 0, done = spans[n_w].first; y < n_h; y++, out += n) {
            Span span = spans[n_w + y];
            for (; done < span.first + span.taps; done++) {
                const uint8_t *row = image + 3 * (int64_t)w * done;
                if (done + sx / w + 1 >= h) row = memcpy(last, row, 3 * (size_t)w); /* reads nothing beyond the image */
                uint8_t *to = ring + (size_t)(done % sy) * pitch;
                if (taps <= 3) pillow_row(row, spans, kx, sx, 3, n_w, to); /* copies of the loop for usual scales */
                else if (taps == 4) pillow_row(row, spans, kx, sx, 4, n_w, to);
                else pillow_row(row, spans, kx, sx, taps, n_w, to);
            }
            for (int i = 0; i < n; i++) sums[i] = 1 << (BITS - 1);
            for (int t = 0; t < span.taps; t++) {
                const uint8_t *restrict row = ring + (size_t)((span.first + t) % sy) * pitch;
                int32_t k = ky[(size_t)y * sy + t];
                for (int i = 0; i < n; i++) sums[i] += row[i] * k;
            }
            for (int i = 0; i < n; i++) out[i] = (uint8_t)(sums[i] >> BITS > 255 ? 255 : sums[i] >> BITS);
        }
    }
    free(spans), free(kx), free(ky), free(sums), free(ring), free(last);
    return failed;
}
