/* What part of a picture is wanted, and how it lies in the output: random choices, crops, EXIF orientation.
 *
 * Pure arithmetic in integers and doubles without libm (sqrt is exact everywhere), compiled without contraction:
 * fastload/kernels/view.py computes the same, bit for bit, and so does any other machine.
 */
#ifndef FASTLOAD_VIEW_H
#define FASTLOAD_VIEW_H

#include <stdint.h>

enum { WHOLE = 0, RANDOM_RESIZED_CROP = 1, CENTER_CROP = 2 };
enum { TO_FLOAT32 = 0, TO_UINT8 = 1, TO_FLOAT16 = 2 };
enum { NCHW = 0, NHWC = 1 };

/* What the user asked for. Laid out as `fastload.decode.native.Settings`: change both, and ABI in image.c. */
struct settings {
    double area_min, area_max;           /* of a random crop, as a part of the picture's */
    double log_ratio_min, log_ratio_max; /* width to height of a random crop */
    double flip;                         /* how likely a picture is mirrored */
    int64_t pixels_max;
    float factor[3], offset[3]; /* output = level * factor + offset, for red, green, blue; cut off where bytes */
    int32_t mode;
    int32_t size;   /* rows and columns of the output */
    int32_t resize; /* length of the shorter side before CENTER_CROP */
    int32_t dtype, layout;
    int32_t turn; /* whether EXIF orientation is followed */
    int32_t dct_scaling;
};

/* One axis of the file's picture: output i is centred on origin + step * (i + 0.5), from pixels in [low, high). */
struct span {
    double origin, step;
    int32_t low, high;
    int32_t mirrored; /* whether output 0 is the last one of this axis */
};

struct view {
    struct span rows, columns;
    int32_t transposed;  /* whether the file's rows become columns */
    int32_t denominator; /* the picture is decoded at 1/denominator; spans are in pixels of that */
};

/* The view of a picture of `width` x `height` pixels (as they are in the file) with this EXIF orientation (1 to 8). */
struct view choose_view(const struct settings *settings, uint64_t key, int32_t width, int32_t height,
                        int32_t orientation);

#endif
