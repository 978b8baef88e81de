/* JPEG files, decoded region by region and row by row over libjpeg-turbo's libjpeg API.
 *
 * One `struct jpeg` a thread, used for one file after the other: open_jpeg, start_jpeg, rows as far down as is wanted,
 * close_jpeg. What lies below is never decoded, what lies above and beside costs only its Huffman codes.
 *
 * libjpeg reports errors by a callback that must not return. It jumps back into the function here that called libjpeg,
 * which returns a code; the reason is in `message`. Warnings are errors too, except where no pixel can be wrong:
 * libjpeg would paint the rest grey.
 */
#ifndef FASTLOAD_JPEG_H
#define FASTLOAD_JPEG_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h> /* jpeglib.h needs it */

#include <jpeglib.h>

#include "resize.h"

enum { JPEG_OK = 0, JPEG_FAILED = 1, JPEG_NO_MEMORY = 2 };

struct jpeg {
    struct jpeg_decompress_struct libjpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf escape;
    int code; /* what a function returns that was jumped back into */
    char message[JMSG_LENGTH_MAX];

    struct source source; /* the rows that have been read, a ring */
    struct room ring;
    int32_t next_row; /* of the picture, that libjpeg would give next */
};

void init_jpeg(struct jpeg *jpeg);
void free_jpeg(struct jpeg *jpeg);

/* Reads the header. The picture's size is then in libjpeg.image_width and image_height. Whatever is returned,
 * close_jpeg must follow. */
int open_jpeg(struct jpeg *jpeg, const uint8_t *file, size_t size);

/* Starts decoding at 1/denominator, columns from `left` to `right` and rows from `top`, and makes jpeg->source give
 * them; it keeps the last `kept` rows. Rows can be asked for in rising order. */
int start_jpeg(struct jpeg *jpeg, int32_t denominator, int32_t left, int32_t right, int32_t top, int32_t kept);

/* Ends work on the file, at whatever point. */
void close_jpeg(struct jpeg *jpeg);

/* EXIF orientation, 1 to 8; 1 (as it lies in the file) where the file says nothing that can be understood. */
int32_t orientation_of(const uint8_t *file, size_t size);

/* Whether there is an end marker behind the last start of a scan. */
int is_complete(const uint8_t *file, size_t size);

#endif
