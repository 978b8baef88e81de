#include "jpeg.h"

#include <jerror.h>
#include <stdlib.h>
#include <string.h>

/* Progressive files repeat the whole picture scan by scan; more than this many is an attack on the processor. */
#define SCANS_MAX 500
/* Chroma is interpolated from its neighbours, so that the pixels at the edge of what libjpeg decodes are not those of
 * the whole picture. Two pixels would do for the halved chroma; four is what any sampling factor allows. */
#define MARGIN 4

/* What libjpeg warns of and no pixel is wrong for: cameras and web tools write such files. By text, as in
 * fastload/decode/pixels.py, since the numbers differ between versions. */
static const char *const harmless[] = {"extraneous bytes before marker", "Invalid SOS parameters",
                                       "Unknown Adobe color transform code"};

static struct jpeg *owner(j_common_ptr libjpeg) { return libjpeg->client_data; }

static void leave(struct jpeg *jpeg, int code)
{
    jpeg->code = code;
    longjmp(jpeg->escape, 1);
}

static void fail(j_common_ptr libjpeg)
{
    libjpeg->err->format_message(libjpeg, owner(libjpeg)->message);
    leave(owner(libjpeg), libjpeg->err->msg_code == JERR_OUT_OF_MEMORY ? JPEG_NO_MEMORY : JPEG_FAILED);
}

static void hear(j_common_ptr libjpeg, int level)
{
    if (level >= 0)
        return;
    char text[JMSG_LENGTH_MAX];
    libjpeg->err->format_message(libjpeg, text);
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        if (strstr(text, harmless[i]))
            return;
    fail(libjpeg);
}

static void say_nothing(j_common_ptr libjpeg) { (void)libjpeg; }

static void count_scans(j_common_ptr libjpeg)
{
    if (((j_decompress_ptr)libjpeg)->input_scan_number <= SCANS_MAX)
        return;
    snprintf(owner(libjpeg)->message, JMSG_LENGTH_MAX, "more than %d scans", SCANS_MAX);
    leave(owner(libjpeg), JPEG_FAILED);
}

void init_jpeg(struct jpeg *jpeg)
{
    memset(jpeg, 0, sizeof *jpeg);
    jpeg->libjpeg.err = jpeg_std_error(&jpeg->errors);
    jpeg->errors.error_exit = fail;
    jpeg->errors.emit_message = hear;
    jpeg->errors.output_message = say_nothing;
    jpeg->progress.progress_monitor = count_scans;
    jpeg->libjpeg.client_data = jpeg;
}

void free_jpeg(struct jpeg *jpeg) { release(&jpeg->ring); }

static int is_cmyk(const struct jpeg *jpeg)
{
    return jpeg->libjpeg.jpeg_color_space == JCS_CMYK || jpeg->libjpeg.jpeg_color_space == JCS_YCCK;
}

int open_jpeg(struct jpeg *jpeg, const uint8_t *file, size_t size)
{
    if (setjmp(jpeg->escape))
        return jpeg->code;
    /* Anew for each file: libjpeg keeps the tables of the last one, for files that have none of their own. */
    jpeg_create_decompress(&jpeg->libjpeg);
    jpeg->libjpeg.progress = &jpeg->progress;
    jpeg_mem_src(&jpeg->libjpeg, file, size);
    jpeg_read_header(&jpeg->libjpeg, TRUE);
    jpeg->libjpeg.out_color_space = is_cmyk(jpeg) ? JCS_CMYK : JCS_EXT_RGBX;
    return JPEG_OK;
}

/* As in Adobe's files 255 means no ink. The marker that would say otherwise is not looked at; Pillow and torchvision
 * do not, either. */
static void cmyk_to_rgbx(uint8_t *pixels, size_t count)
{
    for (uint8_t *end = pixels + 4 * count; pixels < end; pixels += 4)
        for (int i = 0; i < 3; i++)
            pixels[i] = (uint8_t)((pixels[i] * pixels[3] + 127) / 255);
}

/* A `struct source`'s. */
static int read_rows(void *of, int32_t end)
{
    struct jpeg *jpeg = of;
    struct source *source = &jpeg->source;
    if (setjmp(jpeg->escape))
        return jpeg->code;
    while (jpeg->next_row < end) {
        JSAMPROW rows[4];
        JDIMENSION wanted = 0;
        for (; wanted < 4 && jpeg->next_row + (int32_t)wanted < end; wanted++) {
            int32_t at = (jpeg->next_row + (int32_t)wanted) % source->kept;
            rows[wanted] = (JSAMPROW)source->pixels + at * source->stride;
        }
        JDIMENSION got = jpeg_read_scanlines(&jpeg->libjpeg, rows, wanted);
        if (got == 0) { /* it waits for more of the file, which there is not */
            strcpy(jpeg->message, "Premature end of JPEG file");
            return JPEG_FAILED;
        }
        if (is_cmyk(jpeg))
            for (JDIMENSION i = 0; i < got; i++)
                cmyk_to_rgbx(rows[i], jpeg->libjpeg.output_width);
        jpeg->next_row += (int32_t)got;
    }
    return JPEG_OK;
}

/* Rows begin 8 bytes behind a multiple of 64: where they are aligned to a vector, libjpeg-turbo's colour conversion
 * writes around the cache, and the vertical pass took 240 us a picture where it takes 35. */
#define ALIGNMENT 64

static intptr_t aligned(intptr_t size) { return (size + ALIGNMENT - 1) & ~(intptr_t)(ALIGNMENT - 1); }

int start_jpeg(struct jpeg *jpeg, int32_t denominator, int32_t left, int32_t right, int32_t top, int32_t kept)
{
    j_decompress_ptr libjpeg = &jpeg->libjpeg;
    if (setjmp(jpeg->escape))
        return jpeg->code;
    libjpeg->scale_num = 1;
    libjpeg->scale_denom = (unsigned)denominator;
    jpeg_start_decompress(libjpeg);

    JDIMENSION from = left < MARGIN ? 0 : (JDIMENSION)(left - MARGIN), to = (JDIMENSION)(right + MARGIN);
    JDIMENSION width = (to < libjpeg->output_width ? to : libjpeg->output_width) - from;
    if (width < libjpeg->output_width)
        jpeg_crop_scanline(libjpeg, &from, &width); /* moves `from` to the left, to a whole MCU */
    if (top > 0)
        jpeg_skip_scanlines(libjpeg, (JDIMENSION)top);

    ptrdiff_t stride = aligned(4 * (ptrdiff_t)libjpeg->output_width + ROW_PADDING);
    uint8_t *pixels = reserve(&jpeg->ring, (size_t)stride * (size_t)kept + 2 * ALIGNMENT);
    if (!pixels)
        return JPEG_NO_MEMORY;
    pixels = (uint8_t *)aligned((intptr_t)pixels) + ALIGNMENT / 8;
    jpeg->next_row = top;
    jpeg->source = (struct source){
        .pixels = pixels, .stride = stride, .kept = kept, .left = (int32_t)from, .ready = top, .advance = read_rows,
        .owner = jpeg,
    };
    return JPEG_OK;
}

void close_jpeg(struct jpeg *jpeg) { jpeg_destroy_decompress(&jpeg->libjpeg); }

int is_complete(const uint8_t *file, size_t size)
{
    for (size_t i = size; i-- > 1;)
        if (file[i - 1] == 0xFF && (file[i] == 0xD9 || file[i] == 0xDA))
            return file[i] == 0xD9;
    return 0;
}

/* ---- EXIF ---- */

struct tiff {
    const uint8_t *bytes;
    size_t size;
    int big_endian;
};

/* An unsigned number of 2 or 4 bytes, or 0 where there are none. */
static uint32_t number(const struct tiff *tiff, size_t at, int bytes)
{
    uint32_t found = 0;
    if (at > tiff->size || tiff->size - at < (size_t)bytes)
        return 0;
    for (int i = 0; i < bytes; i++)
        found |= (uint32_t)tiff->bytes[at + (size_t)i] << 8 * (tiff->big_endian ? bytes - 1 - i : i);
    return found;
}

static int32_t orientation_of_tiff(const struct tiff *tiff)
{
    size_t directory = number(tiff, 4, 4);
    uint32_t count = number(tiff, directory, 2);
    for (uint32_t i = 0; i < count; i++) {
        size_t entry = directory + 2 + 12 * (size_t)i;
        if (number(tiff, entry, 2) != 0x112)
            continue;
        uint32_t value = number(tiff, entry + 8, 2);
        return number(tiff, entry + 2, 2) == 3 && value >= 1 && value <= 8 ? (int32_t)value : 1;
    }
    return 1;
}

int32_t orientation_of(const uint8_t *file, size_t size)
{
    size_t at = 2;
    while (size >= 4 && at <= size - 4 && file[at] == 0xFF && file[at + 1] != 0xDA && file[at + 1] != 0xD9) {
        size_t length = (size_t)file[at + 2] << 8 | file[at + 3];
        const uint8_t *body = file + at + 4;
        if (length < 2 || length > size - at - 2)
            return 1;
        if (file[at + 1] == 0xE1 && length >= 16 && !memcmp(body, "Exif\0", 6)) {
            struct tiff tiff = {.bytes = body + 6, .size = length - 8, .big_endian = body[6] == 'M'};
            return orientation_of_tiff(&tiff);
        }
        at += 2 + length;
    }
    return 1;
}
