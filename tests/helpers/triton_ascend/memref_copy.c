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
