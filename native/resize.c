#include "resize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

#define FRACTION_BITS 7
/* A weight may be 1. Sums of 15-bit values, as the vertical pass makes them, fit 31 bits; those of the vertical pass
 * itself fit the 24 of a float, which numba's kernel uses. */
#define BITS_MIN 14
#define BITS_MAX 16

void release(struct room *room)
{
    free(room->bytes);
    *room = (struct room){0};
}

void *reserve(struct room *room, size_t size)
{
    if (size > room->size) {
        release(room);
#ifndef EXACT_ROOMS   /* for the sanitizers */
        size += size / 4; /* slowly growing pictures do not make new memory each time */
#endif
        room->bytes = calloc(1, size);
        room->size = room->bytes ? size : 0;
    }
    return room->bytes;
}

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

/* The finest weights that fit 16 bits: none is more than 8/7 of 1/step. */
static int32_t bits_of(double step)
{
    int32_t bits = BITS_MIN;
    while (bits < BITS_MAX && step >= (double)(2 << (bits - BITS_MIN)))
        bits++;
    return bits;
}

/* Rounds the running sum, not each weight, so that the weights add up to exactly 2^bits and errors do not. */
static void make_weights(const struct axis *axis, struct span span, double support, int32_t i, int32_t place)
{
    double center = span.origin + span.step * (i + 0.5);
    int32_t low = larger((int32_t)(center - support + 0.5), span.low);
    int32_t high = smaller(smaller((int32_t)(center + support + 0.5), span.high), low + axis->stride);
    int16_t *weights = axis->weights + (size_t)place * axis->stride;
    double total = 0, running = 0;
    for (int32_t k = low; k < high; k++)
        total += fmax(0, 1 - fabs(k - center + 0.5) / support);
    double one = (double)(1 << axis->bits) / total;
    int32_t before = 0;
    for (int32_t k = low; k < high; k++) {
        running += fmax(0, 1 - fabs(k - center + 0.5) / support);
        int32_t after = (int32_t)(running * one + 0.5);
        weights[k - low] = (int16_t)(after - before);
        before = after;
    }
    memset(weights + (high - low), 0, sizeof *weights * (size_t)(axis->stride - (high - low)));
    axis->first[place] = low;
    axis->taps[place] = high - low;
}

static int same(struct span a, struct span b)
{
    return a.origin == b.origin && a.step == b.step && a.low == b.low && a.high == b.high &&
           a.mirrored == b.mirrored;
}

int make_axis(struct axis *axis, struct span span, int32_t count)
{
    if (axis->count == count && same(axis->made_for, span))
        return 1;
    axis->count = 0;
    double support = fmax(span.step, 1);
    axis->stride = ((int32_t)(2 * support) + 1 + 3) & ~3;
    axis->bits = bits_of(span.step);
    size_t numbers = sizeof *axis->first * (size_t)count;
    axis->first = reserve(&axis->room, 2 * numbers + sizeof *axis->weights * (size_t)count * axis->stride);
    if (!axis->first)
        return 0;
    axis->taps = axis->first + count;
    axis->weights = (int16_t *)(axis->taps + count);
    axis->taps_max = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t place = span.mirrored ? count - 1 - i : i;
        make_weights(axis, span, support, i, place);
        axis->taps_max = larger(axis->taps_max, axis->taps[place]);
    }
    int32_t last = span.mirrored ? 0 : count - 1;
    axis->begin = axis->first[count - 1 - last];
    axis->end = axis->first[last] + axis->taps[last];
    axis->count = count;
    axis->made_for = span;
    return 1;
}

/* ---- the vertical pass: `out` = the sum of `rows` under `weights`, for `count` bytes ---- */

static void sum_rows(const uint8_t *const *rows, const int16_t *weights, int32_t taps, int32_t bits, int32_t count,
                     int16_t *out)
{
    int32_t shift = bits - FRACTION_BITS, half = 1 << (shift - 1);
    for (int32_t start = 0; start < count; start += 16) {
        int32_t sums[16];
        for (int i = 0; i < 16; i++)
            sums[i] = half;
        for (int32_t k = 0; k < taps; k++) {
            const uint8_t *row = rows[k] + start;
            int32_t weight = weights[k];
            for (int i = 0; i < 16; i++)
                sums[i] += (int16_t)weight * (int16_t)row[i];
        }
        for (int i = 0; i < 16; i++)
            out[start + i] = (int16_t)(sums[i] >> shift);
    }
}

/* ---- the horizontal pass: `sums` = a row of reds, of greens and of blues, each `axis->count` long ---- */

static void sum_columns(const int16_t *row, const struct axis *axis, int32_t left, int32_t *sums)
{
    for (int32_t x = 0; x < axis->count; x++) {
        const int16_t *pixel = row + 4 * (size_t)(axis->first[x] - left);
        const int16_t *weights = axis->weights + (size_t)x * axis->stride;
        int32_t red = 0, green = 0, blue = 0;
        for (int32_t k = 0; k < axis->taps[x]; k++, pixel += 4) {
            red += weights[k] * pixel[0];
            green += weights[k] * pixel[1];
            blue += weights[k] * pixel[2];
        }
        sums[x] = red;
        sums[axis->count + x] = green;
        sums[2 * axis->count + x] = blue;
    }
}

#ifdef AVX2

AVX2 static void sum_rows_avx2(const uint8_t *const *rows, const int16_t *weights, int32_t taps, int32_t bits,
                               int32_t count, int16_t *out)
{
    int32_t shift = bits - FRACTION_BITS;
    for (int32_t start = 0; start < count; start += 16) {
        __m256i low = _mm256_set1_epi32(1 << (shift - 1)), high = low;
        for (int32_t k = 0; k < taps; k += 2) {
            int32_t pair;
            memcpy(&pair, weights + k, sizeof pair);
            __m256i weight = _mm256_set1_epi32(pair);
            __m128i one = _mm_loadu_si128((const __m128i *)(rows[k] + start));
            __m128i two = _mm_loadu_si128((const __m128i *)(rows[k + 1] + start));
            __m256i pairs_low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, two));
            __m256i pairs_high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, two));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(pairs_low, weight));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(pairs_high, weight));
        }
        __m128i by = _mm_cvtsi32_si128(shift);
        __m256i packed = _mm256_packs_epi32(_mm256_sra_epi32(low, by), _mm256_sra_epi32(high, by));
        _mm256_storeu_si256((__m256i *)(out + start),
                            _mm256_permute4x64_epi64(packed, 0xD8));
    }
}

/* Four columns of RGBX in 32 bits, of `taps` taps (a multiple of 4, the same for all: weights beyond are 0). */
AVX2 static inline __m128i sum_column(const int16_t *pixel, const int16_t *weights, int32_t taps)
{
    /* two pixels beside each other become pairs of each channel */
    const __m256i to_pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m256i sum = _mm256_setzero_si256();
    for (int32_t k = 0; k < taps; k += 4) {
        __m256i four = _mm256_loadu_si256((const __m256i *)(pixel + 4 * (size_t)k));
        __m256i weight = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(weights + k)));
        weight = _mm256_permutevar8x32_epi32(weight, spread);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(four, to_pairs), weight));
    }
    return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

AVX2 static inline __attribute__((always_inline)) void sum_columns_of(const int16_t *row, const struct axis *axis,
                                                                      int32_t left, int32_t *sums, int32_t taps)
{
    const int16_t *weights = axis->weights;
    const int32_t *first = axis->first;
    int32_t count = axis->count, x = 0;
    row -= 4 * (ptrdiff_t)left;
#define COLUMN(x) sum_column(row + 4 * (ptrdiff_t)first[x], weights + (ptrdiff_t)(x) * taps, taps)
    for (; x + 4 <= count; x += 4) {
        __m128i a = COLUMN(x), b = COLUMN(x + 1), c = COLUMN(x + 2), d = COLUMN(x + 3);
        __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
        __m128i blue = _mm_unpacklo_epi64(_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
        _mm_storeu_si128((__m128i *)(sums + x), _mm_unpacklo_epi64(ab, cd));
        _mm_storeu_si128((__m128i *)(sums + count + x), _mm_unpackhi_epi64(ab, cd));
        _mm_storeu_si128((__m128i *)(sums + 2 * count + x), blue);
    }
    for (; x < count; x++) {
        __m128i a = COLUMN(x);
        sums[x] = _mm_extract_epi32(a, 0);
        sums[count + x] = _mm_extract_epi32(a, 1);
        sums[2 * count + x] = _mm_extract_epi32(a, 2);
    }
#undef COLUMN
}

AVX2 static void sum_columns_avx2(const int16_t *row, const struct axis *axis, int32_t left, int32_t *sums)
{
    if (axis->stride == 4) /* as a constant, for the usual shrinking by less than 1.5 */
        sum_columns_of(row, axis, left, sums, 4);
    else if (axis->stride == 8)
        sum_columns_of(row, axis, left, sums, 8);
    else
        sum_columns_of(row, axis, left, sums, axis->stride);
}

#endif

/* ---- from sums to the output ---- */

/* IEEE half precision, to nearest even; for finite values, of which too large ones become infinite. No branches, so
 * that loops around it vectorise. */
static inline uint16_t half_of(float value)
{
    uint32_t bits, small;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    float tiny;
    memcpy(&tiny, &rest, sizeof tiny);
    tiny += 0.5f; /* whose last bit is worth 2^-24, as that of the smallest halves */
    memcpy(&small, &tiny, sizeof small);
    uint32_t half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
    uint32_t is_small = -(uint32_t)(rest < 0x38800000);  /* below 2^-14 */
    uint32_t is_large = -(uint32_t)(rest >= 0x477FF000); /* from 65520 on */
    half = (half & ~is_small) | ((small - 0x3F000000) & is_small);
    half = (half & ~is_large) | (0x7C00 & is_large);
    return (uint16_t)(sign | half);
}

struct writing {
    int32_t dtype;
    int32_t count;            /* pixels of a row */
    ptrdiff_t pixel, channel; /* how far apart these are in the output, in elements */
    float factor[3], offset[3];
};

static inline float float32_of(const struct writing *w, int32_t sum, int c)
{
    return (float)sum * w->factor[c] + w->offset[c];
}

static inline uint8_t uint8_of(const struct writing *w, int32_t sum, int c)
{
    return (uint8_t)(int32_t)float32_of(w, sum, c); /* the offset is 0.5 */
}

static inline uint16_t float16_of(const struct writing *w, int32_t sum, int c)
{
    return half_of(float32_of(w, sum, c));
}

/* The strides of the usual layouts are constants in loops of their own, so that those vectorise. */
#define WRITE(element, element_of, sums, w, to)                                                          \
    do {                                                                                                 \
        const int32_t *red = sums, *green = red + w->count, *blue = green + w->count;                    \
        element *out = to;                                                                               \
        if (w->pixel == 1)                                                                               \
            for (int c = 0; c < 3; c++)                                                                  \
                for (int32_t x = 0; x < w->count; x++)                                                   \
                    out[c * w->channel + x] = element_of(w, red[c * w->count + x], c);                   \
        else if (w->pixel == 3 && w->channel == 1)                                                       \
            for (int32_t x = 0; x < w->count; x++) {                                                     \
                out[3 * x] = element_of(w, red[x], 0);                                                   \
                out[3 * x + 1] = element_of(w, green[x], 1);                                             \
                out[3 * x + 2] = element_of(w, blue[x], 2);                                              \
            }                                                                                            \
        else                                                                                             \
            for (int c = 0; c < 3; c++)                                                                  \
                for (int32_t x = 0; x < w->count; x++)                                                   \
                    out[c * w->channel + x * w->pixel] = element_of(w, red[c * w->count + x], c);        \
    } while (0)

static inline __attribute__((always_inline)) void write_row(const int32_t *restrict sums,
                                                            const struct writing *restrict w, void *restrict to)
{
    if (w->dtype == TO_FLOAT32)
        WRITE(float, float32_of, sums, w, to);
    else if (w->dtype == TO_UINT8)
        WRITE(uint8_t, uint8_of, sums, w, to);
    else
        WRITE(uint16_t, float16_of, sums, w, to);
}

static void write_row_plain(const int32_t *sums, const struct writing *w, void *to) { write_row(sums, w, to); }

#ifdef AVX2
AVX2 static void write_row_avx2(const int32_t *sums, const struct writing *w, void *to) { write_row(sums, w, to); }
#endif

/* ---- the whole ---- */

void init_resizer(struct resizer *resizer)
{
    memset(resizer, 0, sizeof *resizer);
#ifdef AVX2
    resizer->avx2 = __builtin_cpu_supports("avx2");
#endif
}

void free_resizer(struct resizer *resizer)
{
    release(&resizer->rows.room);
    release(&resizer->columns.room);
    release(&resizer->row);
    release(&resizer->sums);
    release(&resizer->pointers);
}

int prepare_resize(struct resizer *r, const struct settings *settings, const struct view *view)
{
    struct span down = view->rows;
    down.mirrored = 0; /* rows come from above; `resize` writes them from below */
    if (!make_axis(&r->rows, down, settings->size) ||
        !make_axis(&r->columns, view->columns, settings->size))
        return 0;
    /* The vertical pass writes up to 15 values too many, and every column is summed over all taps that any has. */
    size_t width = (size_t)(r->columns.end - r->columns.begin + r->columns.stride);
    return reserve(&r->row, sizeof(int16_t) * (4 * width + 16)) &&
           reserve(&r->sums, sizeof(int32_t) * 3 * (size_t)settings->size) &&
           reserve(&r->pointers, sizeof(uint8_t *) * (size_t)(r->rows.taps_max + 1));
}

int resize(struct resizer *r, const struct settings *settings, const struct view *view, struct source *source,
           void *out)
{
    const struct axis *rows = &r->rows, *columns = &r->columns;
    int32_t size = settings->size, left = columns->begin;
    int32_t count = 4 * (columns->end - left);
    ptrdiff_t pixel = settings->layout == NCHW ? 1 : 3;
    size_t element = settings->dtype == TO_FLOAT32 ? 4 : settings->dtype == TO_UINT8 ? 1 : 2;
    ptrdiff_t line = pixel * size;
    struct writing writing = {
        .count = size,
        .pixel = view->transposed ? line : pixel,
        .channel = settings->layout == NCHW ? (ptrdiff_t)size * size : 1,
        .dtype = settings->dtype,
    };
    for (int c = 0; c < 3; c++) {
        writing.factor[c] = ldexpf(settings->factor[c], -(columns->bits + FRACTION_BITS));
        writing.offset[c] = settings->offset[c];
    }
    const uint8_t **pointers = r->pointers.bytes;
    for (int32_t y = 0; y < size; y++) {
        int32_t first = rows->first[y], taps = rows->taps[y];
        if (first + taps > source->ready) {
            int code = source->advance(source->owner, first + taps);
            if (code)
                return code;
            source->ready = first + taps;
        }
        for (int32_t k = 0; k < taps; k++)
            pointers[k] = source->pixels + ((first + k) % source->kept) * source->stride + 4 * (left - source->left);
        pointers[taps] = pointers[taps - 1]; /* with weight 0, where taps are taken in pairs */
        const int16_t *weights = rows->weights + (size_t)y * rows->stride;
        int32_t to = view->rows.mirrored ? size - 1 - y : y;
        char *place = (char *)out + (size_t)to * (size_t)(view->transposed ? pixel : line) * element;
#ifdef AVX2
        if (r->avx2) {
            sum_rows_avx2(pointers, weights, taps, rows->bits, count, r->row.bytes);
            sum_columns_avx2(r->row.bytes, columns, left, r->sums.bytes);
            write_row_avx2(r->sums.bytes, &writing, place);
            continue;
        }
#endif
        sum_rows(pointers, weights, taps, rows->bits, count, r->row.bytes);
        sum_columns(r->row.bytes, columns, left, r->sums.bytes);
        write_row_plain(r->sums.bytes, &writing, place);
    }
    return 0;
}
