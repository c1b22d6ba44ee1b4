/* The augmentation of one view in one call, for CPUs: random numbers, crop box, crop, colours, blur, flip, normalise;
 * and Pillow's resize for evaluation.
 *
 * Python computes the same with NumPy, PIL and torch; the tests compare the two. setup.py compiles this file, and
 * kernel.py calls it through ctypes, which releases the interpreter lock. It is plain C: loops over whole rows and
 * planes, which compilers turn into vector instructions. Contraction of a*b+c must be off, so that results do not
 * depend on the processor.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The SHA-256 of the file that this was compiled from. */
const char *source_digest(void) { return SOURCE_DIGEST; }

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

/* The same with wide vectors; and along a row, two taps per step: pixels as pairs of 16-bit numbers (r0 r1 g0 g1 b0 b1
 * . .) times weights in the same order, for two pixels of the result at once. pair_weights() makes that order: 16 numbers
 * for pixels 2 i and 2 i + 1 and taps 2 j and 2 j + 1. */
#define QUAD 4 /* pixels per step of narrow() */
static void pair_weights(const int32_t *weights, int stride, int size, int steps, int16_t *pairs) {
    for (int i = 0; i < size; i += 2)
        for (int j = 0; j < steps; j++, pairs += 16)
            for (int e = 0; e < 16; e++)
                pairs[e] = e % 8 < 6 ? (int16_t)weights[(i + e / 8) * stride + 2 * j + e % 2] : 0;
}

#ifdef __AVX2__
#include <immintrin.h>
static void shrink(const uint8_t *rows, int64_t pitch, int taps, const int32_t *k, int n, uint8_t *out) {
    const __m256i start = _mm256_set1_epi16((short)(128 + taps / 2)), zero = _mm256_setzero_si256();
    if (n < 32 || taps > 254) { /* more taps would not fit 16 bits */
        shrink_scalar(rows, pitch, taps, k, n, out);
        return;
    }
    for (int x = 0; x < n; x = x + 32 < n && x + 64 > n ? n - 32 : x + 32) { /* the last block overlaps */
        __m256i a = start, b = start;
        const uint8_t *p = rows + x;
        for (int t = 0; t < taps; t++, p += pitch) {
            __m256i f = _mm256_set1_epi16((short)k[t]), u = _mm256_loadu_si256((const __m256i *)p);
            a = _mm256_add_epi16(a, _mm256_mulhi_epu16(_mm256_unpacklo_epi8(zero, u), f)); /* u << 8 */
            b = _mm256_add_epi16(b, _mm256_mulhi_epu16(_mm256_unpackhi_epi8(zero, u), f));
        }
        a = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        _mm256_storeu_si256((__m256i *)(out + x), a);
    }
}

static inline __m256i two_pixels(const uint8_t *row, const Span *spans, const __m256i *weights, int steps) {
    const __m256i even = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
                                          0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i odd = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,
                                         6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const uint8_t *p = row + 3 * spans[0].first, *q = row + 3 * spans[1].first;
    __m256i sum = _mm256_set1_epi32(1 << (X_BITS - 1));
    for (int j = 0; j < steps; j += 2, p += 12, q += 12) {
        __m256i pixels = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)), _mm_loadu_si128((const __m128i *)q), 1);
        __m256i k = _mm256_loadu_si256(weights + j), l = _mm256_loadu_si256(weights + j + 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, even), k));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, odd), l));
    }
    return _mm256_srai_epi32(sum, X_BITS);
}

/* steps is even. Writes 4 bytes beyond the pixels. */
static inline void narrow(const uint8_t *row, const Span *spans, const int16_t *weights, int steps, uint8_t *out,
                          int size) {
    const __m128i rgb = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (int x = 0; x < size; x += QUAD, spans += QUAD, weights += 32 * steps, out += 3 * QUAD) {
        __m256i a = two_pixels(row, spans, (const __m256i *)weights, steps);
        __m256i b = two_pixels(row, spans + 2, (const __m256i *)weights + steps, steps);
        a = _mm256_packs_epi32(a, b); /* pixels 0 2 | 1 3 */
        a = _mm256_packus_epi16(a, a);
        __m128i four = _mm_unpacklo_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(four, rgb));
    }
}
#else
static void shrink(const uint8_t *rows, int64_t pitch, int taps, const int32_t *k, int n, uint8_t *out) {
    shrink_scalar(rows, pitch, taps, k, n, out);
}

static inline void narrow(const uint8_t *row, const Span *spans, const int16_t *weights, int steps, uint8_t *out,
                          int size) {
    for (int x = 0; x < size; x++, out += 3) {
        const uint8_t *p = row + 3 * spans[x].first;
        const int16_t *pairs = weights + x / 2 * 16 * steps + x % 2 * 8;
        int32_t r = 1 << (X_BITS - 1), g = r, b = r;
        for (int j = 0; j < steps; j++, p += 6, pairs += 16) {
            r += p[0] * pairs[0] + p[3] * pairs[1], g += p[1] * pairs[2] + p[4] * pairs[3];
            b += p[2] * pairs[4] + p[5] * pairs[5];
        }
        out[0] = (uint8_t)(r >> X_BITS), out[1] = (uint8_t)(g >> X_BITS), out[2] = (uint8_t)(b >> X_BITS);
    }
}
#endif

/* (w, h) pixels of an RGB image, `pitch` bytes per row -> (size, size, 3). */
static int resize(const uint8_t *image, int64_t pitch, int w, int h, uint8_t *out, int size) {
    int sx = 2 * (int)ceil(w > size ? (double)w / size : 1) + 1;
    int sy = 2 * (int)ceil(h > size ? (double)h / size : 1) + 1;
    int n = 3 * w, room = (sx + 3) / 4 * 4, padded = (size + QUAD - 1) / QUAD * QUAD;
    Span *spans = calloc((size_t)(padded + size), sizeof *spans);
    int32_t *weights = calloc((size_t)padded * (room > sy ? room : sy), sizeof *weights);
    int16_t *pairs = malloc((size_t)padded * room * 4 * sizeof *pairs);
    uint8_t *row = calloc((size_t)n + 3 * room + 16, 1), *line = malloc((size_t)3 * padded + 4);
    int failed = !spans || !weights || !pairs || !row || !line;
    if (!failed) {
        int steps = (triangle(w, size, X_BITS, room, spans, weights) + 3) / 4 * 2;
        pair_weights(weights, room, padded, steps, pairs);
        triangle(h, size, Y_BITS, sy, spans + padded, weights);
        for (int y = 0; y < size; y++) {
            Span span = spans[padded + y];
            shrink(image + span.first * pitch, pitch, span.taps, weights + (size_t)y * sy, n, row);
            if (steps == 2) narrow(row, spans, pairs, 2, line, size); /* a copy of the loop for the usual scales */
            else narrow(row, spans, pairs, steps, line, size);
            memcpy(out + (size_t)y * 3 * size, line, 3 * (size_t)size);
        }
    }
    free(spans), free(weights), free(pairs), free(row), free(line);
    return failed;
}

/* Colours in [0, 1]: a block of n pixels in three planes, computed as torchvision does on float images, clamped after
 * each operator. A block fits the cache, so that several operators cost one pass over memory. */
#define BLOCK 4096
#define GRAY(r, g, b) (0.2989f * (r) + 0.587f * (g) + 0.114f * (b))
typedef struct { float *r, *g, *b; } Planes;

static inline float clamp(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

/* Mixes with one value: black for brightness, the mean gray of the view for contrast. */
static void blend(Planes x, int64_t n, float f, float other) {
    float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
    other *= 1 - f;
    for (int64_t i = 0; i < n; i++) r[i] = clamp(f * r[i] + other);
    for (int64_t i = 0; i < n; i++) g[i] = clamp(f * g[i] + other);
    for (int64_t i = 0; i < n; i++) b[i] = clamp(f * b[i] + other);
}

static double sum_gray(Planes x, int64_t n) {
    const float *r = x.r, *g = x.g, *b = x.b;
    float lane[16] = {0}; /* for vector instructions */
    double sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] += GRAY(r[i + j], g[i + j], b[i + j]);
    for (; i < n; i++) lane[0] += GRAY(r[i], g[i], b[i]);
    for (int j = 0; j < 16; j++) sum += lane[j];
    return sum;
}

static void saturation(Planes x, int64_t n, float f) {
    float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
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

static void hue(Planes x, int64_t n, float shift) {
    float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
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

static void gray(Planes x, int64_t n) {
    float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
    for (int64_t i = 0; i < n; i++) r[i] = g[i] = b[i] = GRAY(r[i], g[i], b[i]);
}

static void to_floats(const uint8_t *restrict crop, Planes x, int64_t n) {
    float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
    for (int64_t i = 0; i < n; i++)
        r[i] = crop[3 * i] * (1 / 255.0f), g[i] = crop[3 * i + 1] * (1 / 255.0f), b[i] = crop[3 * i + 2] * (1 / 255.0f);
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

/* The true Gaussian, cut off at 4 sigma; edge pixels repeat. */
typedef struct { int radius; float *taps, *line; const float **rows; } Blur; /* line: size + 2 radius; rows: 2 radius + 2 */

static void blur_taps(Blur b, double sigma) {
    double sum = 0;
    for (int o = -b.radius; o <= b.radius; o++) sum += exp(-0.5 * (o / sigma) * (o / sigma));
    for (int o = 0; o <= b.radius; o++) b.taps[o] = (float)(exp(-0.5 * (o / sigma) * (o / sigma)) / sum);
}

/* Row y of the blurred plane x (size, size): along the columns, then along that row. */
static void blur_row(Blur b, const float *x, int size, int y, float *out) {
    const float **before = b.rows, **behind = b.rows + b.radius + 1;
    for (int o = 0; o <= b.radius; o++) {
        before[o] = x + (int64_t)(y - o < 0 ? 0 : y - o) * size;
        behind[o] = x + (int64_t)(y + o >= size ? size - 1 : y + o) * size;
    }
    float *mid = b.line + b.radius;
    weigh(before, behind, b.taps, b.radius, size, mid);
    for (int i = 1; i <= b.radius; i++) mid[-i] = mid[0], mid[size - 1 + i] = mid[size - 1];
    for (int o = 0; o <= b.radius; o++) before[o] = mid - o, behind[o] = mid + o;
    weigh(before, behind, b.taps, b.radius, size, out);
}

/* Normalises a row of n pixels by ImageNet's statistics, and flips it. */
static void store(Planes x, int n, int flip, float *restrict out) {
    const float *restrict r = x.r, *restrict g = x.g, *restrict b = x.b;
    const float kr = 1 / 0.229f, kg = 1 / 0.224f, kb = 1 / 0.225f;
    const float mr = 0.485f * kr, mg = 0.456f * kg, mb = 0.406f * kb;
    if (flip)
        for (int i = 0, j = n - 1; i < n; i++, j--)
            out[3 * i] = r[j] * kr - mr, out[3 * i + 1] = g[j] * kg - mg, out[3 * i + 2] = b[j] * kb - mb;
    else
        for (int i = 0; i < n; i++)
            out[3 * i] = r[i] * kr - mr, out[3 * i + 1] = g[i] * kg - mg, out[3 * i + 2] = b[i] * kb - mb;
}

/* All steps after the crop: bytes (size, size, 3) -> floats (size, size, 3). p is a row of augment.Finish.table:
 * jitter, four operators in order (0 brightness, 1 contrast, 2 saturation, 3 hue), their factors, gray, sigma, flip. */
#define PARAMETERS 12
static int radius_of(const float *p) { return (int)ceilf(4 * p[10]); }

/* Room for pointers to rows, planes, three rows, taps, a line, and the crop. The caller keeps it: new memory is slow. */
int64_t scratch_bytes(int64_t n, const float *parameters, int size) {
    int64_t radius = 0, pixels = (int64_t)size * size;
    for (int64_t i = 0; parameters && i < n; i++)
        if (radius < radius_of(parameters + i * PARAMETERS)) radius = radius_of(parameters + i * PARAMETERS);
    int64_t floats = parameters ? 3 * pixels + 4 * size + 3 * radius + 1 : 0;
    return (2 * radius + 2) * (int64_t)sizeof(float *) + floats * (int64_t)sizeof(float) + 3 * pixels;
}

/* The operators of the slots from .. to, both included; `mean` is that of contrast. */
static void jitter(Planes x, int64_t n, const float *p, int from, int to, float mean) {
    for (int slot = from; slot <= to; slot++) {
        if (p[slot] == 0) blend(x, n, p[5], 0);
        if (p[slot] == 1) blend(x, n, p[6], mean);
        if (p[slot] == 2) saturation(x, n, p[7]);
        if (p[slot] == 3) hue(x, n, p[8]);
    }
}

static void finish(const uint8_t *crop, const float *p, float *out, int size, void *scratch) {
    int64_t n = (int64_t)size * size;
    int first = 1, rows = size < BLOCK ? BLOCK / size : 1, on = p[0] != 0, grayed = p[9] != 0, flip = p[11] != 0;
    Blur b = {.radius = radius_of(p), .rows = scratch};
    float *x = (float *)(b.rows + 2 * b.radius + 2), *line = x + 3 * n;
    b.taps = line + 3 * size, b.line = b.taps + b.radius + 1;
    double sum = 0;
    while (first < 4 && p[first] != 1) first++; /* contrast, which needs the mean of the whole view at its place */
    for (int64_t i = 0; on && i < n; i += BLOCK) {
        Planes block = {x + i, x + n + i, x + 2 * n + i};
        int64_t pixels = n - i < BLOCK ? n - i : BLOCK;
        to_floats(crop + 3 * i, block, pixels);
        jitter(block, pixels, p, 1, first - 1, 0);
        sum += sum_gray(block, pixels);
    }
    for (int y = 0; y < size; y += rows) {
        int count = size - y < rows ? size - y : rows;
        int64_t i = (int64_t)y * size, pixels = (int64_t)count * size;
        Planes block = {x + i, x + n + i, x + 2 * n + i};
        if (on) jitter(block, pixels, p, first, 4, (float)(sum / (double)n));
        else to_floats(crop + 3 * i, block, pixels);
        if (grayed) gray(block, pixels);
        if (p[10] > 0) continue;
        for (int row = 0; row < count; row++, i += size)
            store((Planes){x + i, x + n + i, x + 2 * n + i}, size, flip, out + 3 * i);
    }
    if (p[10] <= 0) return;
    blur_taps(b, p[10]);
    for (int y = 0; y < size; y++) {
        for (int c = 0; c < (grayed ? 1 : 3); c++) blur_row(b, x + c * n, size, y, line + c * size);
        store((Planes){line, line + (grayed ? 0 : size), line + (grayed ? 0 : 2 * size)}, size, flip,
              out + 3 * (int64_t)y * size);
    }
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
