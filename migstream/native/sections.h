/* Small banks between matrix and stream, a bank a section: formats/SPEC.md says what the bytes are, `migstream.frames`
 * and `migstream.sections` do the same for every section. Whatever is not just as expected is left to them. Part of
 * _native.c; little-endian machines only, as all of KVM's that have it here. */
#include "crc32c.h"
#include "filter.h"

struct head {
    uint8_t kind[4];
    uint16_t version, flags;
    uint8_t scope, codec, filter, reserved;
    uint32_t layout, first_vcpu, vcpu_count;
    uint64_t stored_length, raw_length;
    uint32_t payload_crc, header_crc;
} __attribute__((packed));

enum { HEAD = sizeof(struct head), CHECKED = HEAD - 4 };
_Static_assert(HEAD == 48, "the section header of formats/SPEC.md");

/* What has gone by so far: it is also what the end section states. */
struct counts { uint32_t sections, headers_crc; uint64_t total_length; };

/* A bank that is expected or to be sent: its header without lengths and checksums, its matrix, its values' bounds. */
struct bank {
    struct head head;
    uint64_t *values;
    size_t rows, words;
    const struct bound *bounds;
    size_t bound_count;
};

static size_t delta_bytes(const struct bank *bank, size_t columns)
{
    return bank->words * 8 + bitmap_bytes(bank->words) + columns * (bank->rows - 1) * 8;
}

static void pass(struct counts *counts, const struct head *head, int counted)
{
    if (counted)
        counts->headers_crc = crc32c(counts->headers_crc, (const uint8_t *)head, CHECKED);
    counts->sections++;
    counts->total_length += HEAD + head->stored_length;
}

/* Put the header before a payload that is in its place, a multiple of 8 bytes. */
static void seal(struct head head, uint8_t *at, size_t length, struct counts *counts, int counted)
{
    head.stored_length = head.raw_length = length;
    head.payload_crc = crc32c(0, at + HEAD, length);
    head.header_crc = crc32c(0, (const uint8_t *)&head, CHECKED);
    memcpy(at, &head, HEAD);
    pass(counts, &head, counted);
}

/* How many times `worth` a matrix may be: a larger one is seldom so much alike that little is left of it, and would be
 * looked through twice for nothing. */
enum { MOST_ALIKE = 32 };

/* Put a bank's section; its length, or 0 where a value is out of bounds or the payload is `worth` compressing. */
static size_t put_bank(const struct bank *bank, size_t worth, uint8_t *at, struct counts *counts, uint64_t *scratch)
{
    uint32_t *columns = (uint32_t *)(scratch + bank->words);
    if (bank->rows * bank->words * 8 / MOST_ALIKE > worth)
        return 0;
    size_t count = differing(bank->values, bank->rows, bank->words, scratch, columns);
    size_t length = delta_bytes(bank, count);
    if (length >= worth || !within(bank->values, bank->rows, bank->words, bank->bounds, bank->bound_count))
        return 0;
    put_delta(bank->values, bank->rows, bank->words, columns, count, at + HEAD);
    seal(bank->head, at, length, counts, 1);
    return HEAD + length;
}

static size_t put_end(struct head head, uint8_t *at, struct counts *counts)
{
    struct counts end = { counts->sections + 1, counts->headers_crc, counts->total_length + HEAD + sizeof end };
    memcpy(at + HEAD, &end, sizeof end);
    seal(head, at, sizeof end, counts, 0);
    return HEAD + sizeof end;
}

/* Whether a whole section with this header, stored without a codec, is at `at` with its checksums right. */
static int is_whole(struct head expected, const uint8_t *at, size_t left, struct head *found)
{
    if (left < HEAD)
        return 0;
    memcpy(found, at, HEAD);
    expected.stored_length = expected.raw_length = found->stored_length;
    expected.payload_crc = found->payload_crc;
    expected.header_crc = found->header_crc;
    return !memcmp(&expected, found, HEAD) && found->stored_length % 8 == 0 && found->stored_length <= left - HEAD
           && crc32c(0, at, CHECKED) == found->header_crc
           && crc32c(0, at + HEAD, found->stored_length) == found->payload_crc;
}

/* Take a bank's section; its length, or 0 where it is not what is expected (the matrix may have changed then). */
static size_t take_bank(const struct bank *bank, const uint8_t *at, size_t left, struct counts *counts,
                        uint64_t *scratch)
{
    struct head found;
    if (!is_whole(bank->head, at, left, &found)
        || take_delta(at + HEAD, found.stored_length, bank->rows, bank->words, bank->values, scratch,
                      (uint32_t *)(scratch + bank->words))
        || !within(bank->values, bank->rows, bank->words, bank->bounds, bank->bound_count))
        return 0;
    pass(counts, &found, 1);
    return HEAD + found.stored_length;
}

static size_t take_end(struct head head, const uint8_t *at, size_t left, struct counts *counts)
{
    struct counts end = { counts->sections + 1, counts->headers_crc, counts->total_length + HEAD + sizeof end };
    struct head found;
    if (!is_whole(head, at, left, &found) || found.stored_length != sizeof end || memcmp(at + HEAD, &end, sizeof end))
        return 0;
    pass(counts, &found, 0);
    return HEAD + sizeof end;
}
