/* What fastload.decode.native calls, through ctypes and so without the GIL: one call for a group of images. */
#include <stdlib.h>
#include <string.h>

#include "jpeg.h"
#include "resize.h"
#include "view.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised with every change of what is declared here or in view.h, and in fastload/decode/native.py. */
#define ABI 1

/* More than this is given back after each file, so that one huge picture does not hold memory for the rest of a run. */
#define KEPT_BYTES_MAX ((size_t)64 << 20)
#define SIDE_MAX 65535

enum { DONE = 0, NOT_JPEG = 1, DAMAGED = 2, REFUSED = 3, NO_MEMORY = 4 };

/* Why an image was not decoded. Laid out as `fastload.decode.native.DecodeReport`. */
struct report {
    int32_t code;
    int32_t width, height;
    char message[JMSG_LENGTH_MAX];
};

/* One thread's: tables, and rows, made once and used again. */
struct decoder {
    struct jpeg jpeg;
    struct resizer resizer;
};

EXPORT int32_t fastload_abi(void) { return ABI; }

EXPORT void fastload_free(struct decoder *decoder)
{
    if (!decoder)
        return;
    free_jpeg(&decoder->jpeg);
    free_resizer(&decoder->resizer);
    free(decoder);
}

/* NULL where there is no memory. */
EXPORT struct decoder *fastload_new(void)
{
    struct decoder *decoder = malloc(sizeof *decoder);
    if (!decoder)
        return NULL;
    init_resizer(&decoder->resizer);
    init_jpeg(&decoder->jpeg);
    return decoder;
}

/* Lets tests take the path of processors without AVX2; returns whether there is another. */
EXPORT int32_t fastload_set_avx2(struct decoder *decoder, int32_t wanted)
{
    struct resizer fresh;
    init_resizer(&fresh);
    decoder->resizer.avx2 = fresh.avx2 && wanted;
    return fresh.avx2;
}

static int32_t code_of(int jpeg_code)
{
    return jpeg_code == JPEG_OK ? DONE : jpeg_code == JPEG_NO_MEMORY ? NO_MEMORY : DAMAGED;
}

static int too_large(const struct settings *settings, int64_t width, int64_t height)
{
    return width > SIDE_MAX || height > SIDE_MAX || width * height > settings->pixels_max;
}

static int32_t decode_region(struct decoder *decoder, const struct settings *settings, const struct view *view,
                             void *out)
{
    struct resizer *resizer = &decoder->resizer;
    struct jpeg *jpeg = &decoder->jpeg;
    if (!prepare_resize(resizer, settings, view))
        return NO_MEMORY;
    int code = start_jpeg(jpeg, view->denominator, resizer->columns.begin, resizer->columns.end,
                          resizer->rows.begin, resizer->rows.taps_max);
    if (!code)
        code = resize(resizer, settings, view, &jpeg->source, out);
    return code_of(code);
}

static int32_t decode_jpeg(struct decoder *decoder, const struct settings *settings, uint64_t key,
                           const uint8_t *file, size_t size, void *out, struct report *report)
{
    struct jpeg *jpeg = &decoder->jpeg;
    int code = open_jpeg(jpeg, file, size);
    if (code)
        return code_of(code);
    report->width = (int32_t)jpeg->libjpeg.image_width;
    report->height = (int32_t)jpeg->libjpeg.image_height;
    if (too_large(settings, report->width, report->height))
        return REFUSED;
    if (!is_complete(file, size)) {
        strcpy(jpeg->message, "Premature end of JPEG file");
        return DAMAGED;
    }
    int32_t orientation = settings->turn ? orientation_of(file, size) : 1;
    struct view view = choose_view(settings, key, report->width, report->height, orientation);
    return decode_region(decoder, settings, &view, out);
}

static size_t output_bytes(const struct settings *settings)
{
    size_t element = settings->dtype == TO_FLOAT32 ? 4 : settings->dtype == TO_UINT8 ? 1 : 2;
    return 3 * element * (size_t)settings->size * (size_t)settings->size;
}

/* Decodes images `first` to `count`; image i is values[offsets[i]] to values[offsets[i + 1]] and goes to place i of
 * `out`. Returns the number of the first that it could not decode, with `report` saying why, or `count`. `keys` may be
 * NULL where nothing is random. */
EXPORT int64_t fastload_decode(struct decoder *decoder, const struct settings *settings, const uint8_t *values,
                               const int64_t *offsets, const uint64_t *keys, int64_t first, int64_t count, char *out,
                               struct report *report)
{
    size_t bytes = output_bytes(settings);
    for (int64_t i = first; i < count; i++) {
        const uint8_t *file = values + offsets[i];
        size_t size = (size_t)(offsets[i + 1] - offsets[i]);
        report->code = NOT_JPEG;
        if (size >= 3 && !memcmp(file, "\xff\xd8\xff", 3)) {
            uint64_t key = keys ? keys[i] : 0;
            report->code = decode_jpeg(decoder, settings, key, file, size, out + (size_t)i * bytes, report);
            if (report->code == DAMAGED)
                memcpy(report->message, decoder->jpeg.message, sizeof report->message);
            close_jpeg(&decoder->jpeg);
            if (decoder->jpeg.ring.size > KEPT_BYTES_MAX)
                release(&decoder->jpeg.ring);
        }
        if (report->code != DONE)
            return i;
    }
    return count;
}

/* The same for pixels (RGBX, rows without gaps, ROW_PADDING readable bytes behind them) that somebody else decoded.
 * Returns a code. */
EXPORT int32_t fastload_resize(struct decoder *decoder, const struct settings *settings, uint64_t key,
                               const uint8_t *pixels, int32_t width, int32_t height, int32_t orientation, char *out)
{
    struct settings whole = *settings;
    whole.dct_scaling = 0;
    struct view view = choose_view(&whole, key, width, height, orientation);
    if (!prepare_resize(&decoder->resizer, &whole, &view))
        return NO_MEMORY;
    struct source source = {.pixels = pixels, .stride = 4 * (ptrdiff_t)width, .kept = height, .ready = height};
    resize(&decoder->resizer, &whole, &view, &source, out);
    return DONE;
}
