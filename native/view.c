#include "view.h"

#include <math.h>

#define ATTEMPTS 10

/* Word `place` of splitmix64 from the seed `key`. */
static uint64_t splitmix(uint64_t key, uint64_t place)
{
    uint64_t word = key + place * 0x9E3779B97F4A7C15u;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

/* Uniform in [0, 1), 53 bits. */
static double draw(uint64_t key, uint64_t place)
{
    return (double)(splitmix(key, place) >> 11) * 0x1p-53;
}

/* exp, to 13 digits for |x| < 10. libm's differ in the last bit from machine to machine, which would now and then move
 * a crop by a pixel. */
static double exponential(double x)
{
    double t = x / 1024;
    double sum = 1 + t * (1 + t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5))));
    for (int i = 0; i < 10; i++)
        sum *= sum;
    return sum;
}

static int32_t rounded(double x)
{
    return (int32_t)(x + 0.5);
}

struct box {
    int32_t x, y, width, height;
};

/* As torchvision's RandomResizedCrop draws it: ten tries at a crop of random area and shape; then the largest centred
 * one whose shape is allowed. Word 0 of the key is for the flip. */
static struct box random_box(const struct settings *s, uint64_t key, int32_t width, int32_t height)
{
    double area = (double)width * height;
    for (uint64_t i = 0; i < ATTEMPTS; i++) {
        double wanted = area * (s->area_min + (s->area_max - s->area_min) * draw(key, 4 * i + 1));
        double ratio = exponential(s->log_ratio_min + (s->log_ratio_max - s->log_ratio_min) * draw(key, 4 * i + 2));
        double across = sqrt(wanted * ratio), down = sqrt(wanted / ratio);
        if (across >= width + 0.5 || down >= height + 0.5)
            continue;
        struct box box = {.width = rounded(across), .height = rounded(down)};
        if (box.width < 1 || box.height < 1)
            continue;
        box.x = (int32_t)(draw(key, 4 * i + 3) * (width - box.width + 1));
        box.y = (int32_t)(draw(key, 4 * i + 4) * (height - box.height + 1));
        return box;
    }
    double ratio = (double)width / height;
    double ratio_min = exponential(s->log_ratio_min), ratio_max = exponential(s->log_ratio_max);
    struct box box = {0, 0, width, height};
    if (ratio < ratio_min)
        box.height = rounded(fmin(fmax(width / ratio_min, 1), height));
    else if (ratio > ratio_max)
        box.width = rounded(fmin(fmax(height * ratio_max, 1), width));
    box.x = (width - box.width) / 2;
    box.y = (height - box.height) / 2;
    return box;
}

static struct span stretched(int32_t start, int32_t length, int32_t size)
{
    return (struct span){.origin = start, .step = (double)length / size, .low = start, .high = start + length};
}

/* The middle `size` of `length` pixels that are resized to `resized`. */
static struct span centered(int32_t length, int64_t resized, int32_t size)
{
    double step = (double)length / resized;
    int64_t spare = resized - size;
    int64_t first = spare / 2;
    if (spare % 2 == 1 && first % 2 == 1) /* torchvision rounds halves to the even neighbour */
        first++;
    return (struct span){.origin = step * first, .step = step, .low = 0, .high = length};
}

/* The span counted from the other end of the axis. */
static struct span reversed(struct span span, int32_t length, int32_t size)
{
    return (struct span){
        .origin = length - span.origin - span.step * size,
        .step = span.step,
        .low = length - span.high,
        .high = length - span.low,
        .mirrored = !span.mirrored,
    };
}

/* The span in a picture decoded at 1/denominator. A pixel there that lies partly in the span counts. */
static struct span scaled(struct span span, int32_t denominator)
{
    span.origin /= denominator;
    span.step /= denominator;
    span.low = span.low / denominator;
    span.high = (span.high + denominator - 1) / denominator;
    return span;
}

/* The smallest of the sizes that libjpeg decodes fast and from which the picture still has to shrink. */
static int32_t denominator_of(const struct settings *s, const struct view *view, int32_t width, int32_t height)
{
    /* So small, another scale could give the same size, which is all that the fallback can ask for. */
    if (!s->dct_scaling || (width < 8 && height < 8))
        return 1;
    double step = fmin(view->rows.step, view->columns.step);
    return step >= 8 ? 8 : step >= 4 ? 4 : step >= 2 ? 2 : 1;
}

struct view choose_view(const struct settings *s, uint64_t key, int32_t width, int32_t height, int32_t orientation)
{
    int transposed = orientation >= 5;
    int32_t across = transposed ? height : width, down = transposed ? width : height; /* as it is seen */
    struct span x, y;
    if (s->mode == RANDOM_RESIZED_CROP) {
        struct box box = random_box(s, key, across, down);
        x = stretched(box.x, box.width, s->size);
        y = stretched(box.y, box.height, s->size);
    } else if (s->mode == CENTER_CROP) {
        int64_t shorter = across < down ? across : down;
        x = centered(across, (int64_t)s->resize * across / shorter, s->size);
        y = centered(down, (int64_t)s->resize * down / shorter, s->size);
    } else {
        x = stretched(0, across, s->size);
        y = stretched(0, down, s->size);
    }
    x.mirrored = s->flip > 0 && draw(key, 0) < s->flip;
    y.mirrored = 0;

    struct view view = {.rows = transposed ? x : y, .columns = transposed ? y : x, .transposed = transposed};
    if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8)
        view.columns = reversed(view.columns, width, s->size);
    if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7)
        view.rows = reversed(view.rows, height, s->size);
    view.denominator = denominator_of(s, &view, width, height);
    view.rows = scaled(view.rows, view.denominator);
    view.columns = scaled(view.columns, view.denominator);
    return view;
}
