/* What MLIR's lowering calls for a copy between strided memrefs of unknown shape: memrefCopy(element size, from, to).
 * An unranked memref is {rank, descriptor}; a descriptor is {allocated, aligned, offset, sizes[rank], strides[rank]}. */
#include <stdint.h>
#include <string.h>

typedef struct { int64_t rank; int64_t *descriptor; } Unranked;

static char *first(const Unranked *m, int64_t element) { return (char *)m->descriptor[1] + m->descriptor[2] * element; }

void memrefCopy(int64_t element, Unranked *from, Unranked *to) {
    int64_t rank = from->rank, index[8] = {0};
    const int64_t *sizes = from->descriptor + 3, *from_strides = sizes + rank, *to_strides = to->descriptor + 3 + rank;
    for (int64_t d = 0; d < rank; d++)
        if (sizes[d] <= 0) return;
    char *source = first(from, element), *target = first(to, element);
    while (1) {
        int64_t source_at = 0, target_at = 0;
        for (int64_t d = 0; d < rank; d++) {
            source_at += index[d] * from_strides[d];
            target_at += index[d] * to_strides[d];
        }
        memcpy(target + target_at * element, source + source_at * element, (size_t)element);
        int64_t d = rank - 1;
        while (d >= 0 && ++index[d] == sizes[d]) index[d--] = 0;
        if (d < 0) return;
    }
}

// What compiler-rt has for processors without an instruction that rounds to bfloat16; Debian's libgcc 12 lacks it.
// To nearest, ties to even; a NaN stays one. Weak: a newer libgcc's comes first.
__attribute__((weak)) __bf16 __truncsfbf2(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int nan = (bits & 0x7fffffff) > 0x7f800000;
    uint16_t high = nan ? (uint16_t)(bits >> 16) | 0x40 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    __bf16 rounded;
    memcpy(&rounded, &high, sizeof rounded);
    return rounded;
}
