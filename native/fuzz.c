/* Feeds damaged JPEGs to the C unit, under the address and undefined-behaviour sanitizers: `make fuzz`.
 *
 *     fuzz SECONDS SEED FILE...
 *
 * Files and outputs lie in blocks of exactly their size, so that one byte too far is found. What the sanitizer stops
 * at is written to found.jpg.
 */
#include "image.c"

#include <time.h>

#define FILE_BYTES_MAX (1 << 18)
#define PIXELS_MAX 300000

void __sanitizer_set_death_callback(void (*callback)(void));

static uint64_t state;
static const uint8_t *current;
static size_t current_size;

static uint64_t draw_word(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static size_t below(size_t limit) { return limit ? (size_t)(draw_word() % limit) : 0; }
static double uniform(void) { return (double)(draw_word() >> 11) * 0x1p-53; }

static void keep_current(void)
{
    FILE *file = current ? fopen("found.jpg", "wb") : NULL;
    if (file && fwrite(current, 1, current_size, file) == current_size)
        fprintf(stderr, "the file is in found.jpg\n");
    if (file)
        fclose(file);
}

/* Bytes in, out, changed or repeated, mostly near the front, where the headers are. */
static size_t damage(uint8_t *file, size_t size)
{
    static const uint8_t telling[] = {0,    1,    2,    3,    4,    8,    0x11, 0x22, 0x41, 0x7F, 0x80, 0xC0,
                                      0xC2, 0xC4, 0xD0, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE, 0xFE, 0xFF};
    for (size_t n = 1 + below(6); n && size > 8; n--) {
        size_t at = 2 + below(below(2) ? size - 2 : size < 700 ? size - 2 : 700);
        size_t length = 1 + below(below(4) ? 4 : 300);
        if (at >= size)
            continue;
        if (length > size - at)
            length = size - at;
        switch (below(6)) {
        case 0:
            file[at] = (uint8_t)draw_word();
            break;
        case 1:
            file[at] = telling[below(sizeof telling)];
            break;
        case 2:
            file[at] ^= (uint8_t)(1 << below(8));
            break;
        case 3: /* out */
            memmove(file + at, file + at + length, size - at - length);
            size -= length;
            break;
        case 4: /* twice */
            if (size + length <= FILE_BYTES_MAX) {
                memmove(file + at + length, file + at, size - at);
                size += length;
            }
            break;
        default: /* cut off, mostly with an end */
            if (below(8) == 0) {
                size = at + 2 <= size ? at + 2 : size;
                if (below(4)) {
                    file[size - 2] = 0xFF;
                    file[size - 1] = 0xD9;
                }
            }
        }
    }
    return size;
}

static struct settings random_settings(void)
{
    struct settings s = {
        .area_min = uniform() * 0.5 + 1e-6,
        .log_ratio_min = -3 * uniform(),
        .log_ratio_max = 3 * uniform(),
        .flip = uniform(),
        .pixels_max = PIXELS_MAX,
        .factor = {1 / 255.f, 1, 0.5f},
        .mode = (int32_t)below(3),
        .size = 1 + (int32_t)below(below(8) ? 40 : 300),
        .dtype = (int32_t)below(3),
        .layout = (int32_t)below(2),
        .turn = (int32_t)below(2),
        .dct_scaling = (int32_t)below(2),
    };
    s.area_max = s.area_min + (1 - s.area_min) * uniform();
    s.resize = s.size + (int32_t)below(100);
    return s;
}

static void *exactly(size_t size)
{
    void *block = malloc(size ? size : 1);
    if (!block)
        abort();
    return block;
}

/* A picture that somebody else decoded, with just the padding that is promised. */
static void resize_something(struct decoder *decoder)
{
    struct settings settings = random_settings();
    int32_t width = 1 + (int32_t)below(below(4) ? 60 : 2000), height = 1 + (int32_t)below(60);
    size_t bytes = 4 * (size_t)width * (size_t)height + ROW_PADDING;
    uint8_t *pixels = memset(exactly(bytes), 200, bytes);
    char *out = exactly(output_bytes(&settings));
    fastload_resize(decoder, &settings, draw_word(), pixels, width, height, 1 + (int32_t)below(8), out);
    free(out);
    free(pixels);
}

int main(int count, char **arguments)
{
    if (count < 4)
        return 2;
    long files = count - 3;
    uint8_t **seeds = exactly(sizeof *seeds * (size_t)files);
    size_t *sizes = exactly(sizeof *sizes * (size_t)files);
    for (long i = 0; i < files; i++) {
        FILE *file = fopen(arguments[3 + i], "rb");
        if (!file)
            return 2;
        seeds[i] = exactly(FILE_BYTES_MAX);
        sizes[i] = fread(seeds[i], 1, FILE_BYTES_MAX, file);
        fclose(file);
    }
    state = strtoull(arguments[2], NULL, 10) * 2 + 1;
    __sanitizer_set_death_callback(keep_current);
    struct decoder *decoder = fastload_new();
    uint8_t *damaged = exactly(FILE_BYTES_MAX);
    long runs = 0, decoded = 0;
    for (time_t end = time(NULL) + atol(arguments[1]); time(NULL) < end; runs++) {
        long seed = (long)below((size_t)files);
        memcpy(damaged, seeds[seed], sizes[seed]);
        size_t size = damage(damaged, sizes[seed]);
        uint8_t *file = memcpy(exactly(size), damaged, size);
        struct settings settings = random_settings();
        char *out = exactly(output_bytes(&settings));
        int64_t offsets[2] = {0, (int64_t)size};
        uint64_t key = draw_word();
        struct report report;
        if (below(2)) { /* whose memory is just large enough for this file */
            fastload_free(decoder);
            decoder = fastload_new();
        }
        fastload_set_avx2(decoder, below(4) != 0);
        if (below(4) == 0)
            resize_something(decoder);
        current = file, current_size = size;
        decoded += fastload_decode(decoder, &settings, file, offsets, &key, 0, 1, out, &report);
        current = NULL;
        free(out);
        free(file);
    }
    printf("%ld damaged files, of which %ld were decoded all the same\n", runs, decoded);
    fastload_free(decoder);
    for (long i = 0; i < files; i++)
        free(seeds[i]);
    free(seeds);
    free(sizes);
    free(damaged);
    return 0;
}
