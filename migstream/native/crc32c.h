/* CRC-32C (RFC 3720, B.4), with the CPU's instruction where there is one. The package that Python uses can't be called
 * from here. Part of _native.c. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint32_t crc_steps[8][256];

static void make_crc_steps(void)
{
    for (uint32_t n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
        crc_steps[0][n] = crc;
    }
    for (uint32_t n = 0; n < 256; n++)
        for (int k = 1; k < 8; k++)
            crc_steps[k][n] = crc_steps[k - 1][n] >> 8 ^ crc_steps[0][crc_steps[k - 1][n] & 0xff];
}

static uint32_t crc_portable(uint32_t crc, const uint8_t *data, size_t length)
{
    crc = ~crc;
    for (; length >= 8; data += 8, length -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++)
            crc ^= crc_steps[7 - k][word >> 8 * k & 0xff];
    }
    for (; length; data++, length--)
        crc = crc >> 8 ^ crc_steps[0][(crc ^ *data) & 0xff];
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_instruction(uint32_t crc, const uint8_t *data, size_t length)
{
    uint64_t wide = ~crc, word;
    for (; length >= 8; data += 8, length -= 8) {
        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    for (; length; data++, length--)
        crc = __builtin_ia32_crc32qi(crc, *data);
    return ~crc;
}

static int has_crc_instruction(void) { return __builtin_cpu_supports("sse4.2"); }
#else
static uint32_t crc_instruction(uint32_t crc, const uint8_t *data, size_t length)
{
    return crc_portable(crc, data, length);
}

static int has_crc_instruction(void) { return 0; }
#endif

static uint32_t (*crc32c)(uint32_t crc, const uint8_t *data, size_t length) = crc_portable;

static void choose_crc(void)
{
    make_crc_steps();
    if (has_crc_instruction())
        crc32c = crc_instruction;
}
