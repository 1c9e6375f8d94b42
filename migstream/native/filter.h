/* The bank filter: `migstream.codec` says what the bytes are; and questions to columns. Part of _native.c. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static size_t bitmap_bytes(size_t words) { return (words + 63) / 64 * 8; }

/* Which words differ from row 0 anywhere: their numbers into `columns`; how many. */
static size_t differing(const uint64_t *values, size_t rows, size_t words, uint64_t *any, uint32_t *columns)
{
    size_t count = 0;
    memset(any, 0, words * 8);
    for (size_t row = 1; row < rows; row++)
        for (size_t word = 0; word < words; word++)
            any[word] |= values[row * words + word] ^ values[word];
    for (size_t word = 0; word < words; word++)
        if (any[word])
            columns[count++] = (uint32_t)word;
    return count;
}

static void put_delta(const uint64_t *values, size_t rows, size_t words, const uint32_t *columns, size_t count,
                      uint8_t *out)
{
    uint8_t *bitmap = out + words * 8;
    uint64_t *steps = (uint64_t *)(bitmap + bitmap_bytes(words));
    memcpy(out, values, words * 8);
    memset(bitmap, 0, bitmap_bytes(words));
    for (size_t k = 0; k < count; k++)
        bitmap[columns[k] / 8] |= (uint8_t)(1u << columns[k] % 8);
    for (size_t row = 1; row < rows; row++, steps++) {
        const uint64_t *now = values + row * words, *before = now - words;
        for (size_t k = 0; k < count; k++)
            steps[k * (rows - 1)] = now[columns[k]] - before[columns[k]];
    }
}

/* 0, or 1 for what is no filtered bank: the path in Python then says what is wrong. */
static int take_delta(const uint8_t *raw, size_t length, size_t rows, size_t words, uint64_t *out, uint64_t *any,
                      uint32_t *columns)
{
    size_t head = words * 8 + bitmap_bytes(words), count = 0;
    if (length < head)
        return 1;
    for (size_t start = 0; start < words; start += 64) {
        uint64_t marked;
        memcpy(&marked, raw + words * 8 + start / 8, 8);
        for (; marked; marked &= marked - 1) {
            size_t bit = start + (size_t)__builtin_ctzll(marked);
            if (bit >= words)
                return 1;
            columns[count++] = (uint32_t)bit;
        }
    }
    if ((count && rows == 1) || length != head + count * (rows - 1) * 8)
        return 1;
    const uint64_t *steps = (const uint64_t *)(raw + head);
    memcpy(out, raw, words * 8);
    memset(any, 0, count * 8);
    for (size_t row = 1; row < rows; row++, steps++) {
        uint64_t *now = out + row * words;
        memcpy(now, raw, words * 8);
        for (size_t k = 0; k < count; k++) {
            uint64_t step = steps[k * (rows - 1)];
            any[k] |= step;
            now[columns[k]] = (now - words)[columns[k]] + step;
        }
    }
    for (size_t k = 0; k < count; k++)
        if (!any[k])
            return 1;
    return 0;
}

/* One question to a column: (word >> shift & mask) of every row is from `least` to `most`. */
struct bound { uint64_t word, shift, mask, least, most; };

static int within(const uint64_t *values, size_t rows, size_t words, const struct bound *bounds, size_t count)
{
    for (size_t k = 0; k < count; k++) {
        const struct bound *b = bounds + k;
        for (size_t row = 0; row < rows; row++) {
            uint64_t found = values[row * words + b->word] >> b->shift & b->mask;
            if (found - b->least > b->most - b->least) /* round the end of the numbers where most is below least */
                return 0;
        }
    }
    return 1;
}
