/* Resizing with antialias, in fixed point, one output row at a time.
 *
 * Each output row or column is a weighted mean of source rows or columns under a triangle, as in
 * torch.nn.functional.interpolate(mode="bilinear", antialias=True). Weights are integers that add up to a power of
 * two, so that white stays white, and every sum is exact: the AVX2 loops, the plain ones and the numba ones of
 * fastload/kernels/resize.py give the same bits.
 *
 * The vertical pass comes first, since it runs over contiguous bytes. It makes 15-bit values, 7 bits finer than the
 * pixels' levels; the horizontal pass sums them in 32 bits.
 */
#ifndef FASTLOAD_RESIZE_H
#define FASTLOAD_RESIZE_H

#include <stddef.h>
#include <stdint.h>

#include "view.h"

/* Bytes behind a row of pixels that are read, and do not count. */
#define ROW_PADDING 32

/* Memory that grows and is used again. */
struct room {
    void *bytes;
    size_t size;
};

/* Room for `size` bytes whose content may be lost, or NULL. New memory is zero. */
void *reserve(struct room *room, size_t size);
void release(struct room *room);

/* Output i is the sum of weights[i * stride + k] times source[first[i] + k], for k below taps[i], over 2^bits. */
struct axis {
    int32_t count, stride, bits;
    int32_t *first, *taps;
    int16_t *weights; /* 0 from taps[i] on; stride is a multiple of 4 */
    int32_t taps_max;   /* the largest of taps[i] */
    int32_t begin, end; /* the least of first[i], the largest of first[i] + taps[i] */
    struct span made_for;
    struct room room;
};

/* Fills `axis` with `count` outputs; 0 where there is no memory. */
int make_axis(struct axis *axis, struct span span, int32_t count);

/* Where rows of pixels (RGBX) come from. Row y lies at pixels + (y % kept) * stride, once `advance` was asked for rows
 * up to y + 1; its first pixel is number `left` of the picture. `advance` is NULL where all are there, and returns 0 or
 * a code. */
struct source {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int32_t kept, left;
    int32_t ready; /* rows that are there */
    int (*advance)(void *owner, int32_t end);
    void *owner;
};

struct resizer {
    struct axis rows, columns;
    struct room row, sums, pointers;
    int avx2;
};

void init_resizer(struct resizer *resizer);
void free_resizer(struct resizer *resizer);

/* Fills the tables for a view; 0 where there is no memory. */
int prepare_resize(struct resizer *resizer, const struct settings *settings, const struct view *view);

/* Resizes into `out`, whose type and layout are those of the settings. 0, or what `advance` returned. */
int resize(struct resizer *resizer, const struct settings *settings, const struct view *view, struct source *source,
           void *out);

#endif
