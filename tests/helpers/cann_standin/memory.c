/* Device memory: plain allocations, and the virtual-memory calls with the rules CANN's API reference states.
 * The reference says "0 on success, other values on failure" without naming codes; the codes returned here are those of
 * rt_error_codes.h whose comment describes the failure. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "standin.h"

pthread_mutex_t standin_lock = PTHREAD_MUTEX_INITIALIZER;
Physical *standin_physicals;
static Reservation *reservations;
static Mapping *mappings;
static Plain *plains;
static size_t used[STANDIN_MAX_DEVICES];

static char *reserve_pages(size_t size) {
    size_t slack = STANDIN_PAGE_2M;
    char *raw = mmap(NULL, size + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return NULL;
    char *aligned = (char *)(((uintptr_t)raw + slack - 1) & ~(uintptr_t)(slack - 1));
    if (aligned > raw) munmap(raw, (size_t)(aligned - raw));
    char *end = raw + size + slack;
    if (end > aligned + size) munmap(aligned + size, (size_t)(end - (aligned + size)));
    return aligned;
}

int standin_take(int device, size_t size) {
    if (used[device] + size > standin_capacity()) return 0;
    used[device] += size;
    return 1;
}

void standin_give(int device, size_t size) { used[device] -= size; }

int standin_in_reservation(const void *address) {
    const char *a = address;
    for (Reservation *r = reservations; r; r = r->next)
        if (a >= r->base && a < r->base + r->size) return 1;
    return 0;
}

int standin_device_of(const void *address, size_t size) {
    const char *a = address;
    for (Plain *p = plains; p; p = p->next)
        if (a >= p->base && a + size <= p->base + p->size) return p->device;
    /* A copy may run over neighbouring mappings of one reservation; a hole in between ends the search. */
    size_t left = size;
    int device = -1;
    while (1) {
        Mapping *m = mappings;
        while (m && !(a >= m->base && a < m->base + m->size)) m = m->next;
        if (!m) return -1;
        device = m->physical->home;
        size_t here = (size_t)(m->base + m->size - a);
        if (here >= left) return device;
        a += here;
        left -= here;
    }
}

/* For the simulated NPU (tests/helpers/npusim), which reads and writes device memory itself. */
int cann_standin_holds(const void *address, size_t size, int device) {
    pthread_mutex_lock(&standin_lock);
    int home = standin_device_of(address, size);
    pthread_mutex_unlock(&standin_lock);
    return home == device;
}

static aclError need_context(const char *call) {
    if (standin_current_device() >= 0) return ACL_SUCCESS;
    return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "%s: this thread has no context, call aclrtSetDevice first", call);
}

/* ---- plain allocations ---- */

aclError aclrtMalloc(void **out, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    aclError error = need_context("aclrtMalloc");
    if (error) return error;
    if (!out || !size) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMalloc: null pointer or size 0");
    size_t rounded = (size + 32 + STANDIN_PAGE_2M - 1) / STANDIN_PAGE_2M * STANDIN_PAGE_2M;
    int device = standin_current_device();
    pthread_mutex_lock(&standin_lock);
    char *base = standin_take(device, rounded) ? reserve_pages(rounded) : NULL;
    if (!base) {
        pthread_mutex_unlock(&standin_lock);
        return standin_error(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMalloc: device %d cannot give %zu bytes", device, size);
    }
    mprotect(base, rounded, PROT_READ | PROT_WRITE);
    Plain *plain = calloc(1, sizeof *plain);
    *plain = (Plain){base, rounded, device, plains};
    plains = plain;
    pthread_mutex_unlock(&standin_lock);
    *out = base;
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **out, size_t size, aclrtMemMallocPolicy policy) { return aclrtMalloc(out, size, policy); }

aclError aclrtFree(void *address) {
    pthread_mutex_lock(&standin_lock);
    for (Plain **at = &plains; *at; at = &(*at)->next)
        if ((*at)->base == address) {
            Plain *plain = *at;
            *at = plain->next;
            munmap(plain->base, plain->size);
            standin_give(plain->device, plain->size);
            free(plain);
            pthread_mutex_unlock(&standin_lock);
            return ACL_SUCCESS;
        }
    pthread_mutex_unlock(&standin_lock);
    return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p did not come from aclrtMalloc", address);
}

aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *free_bytes, size_t *total_bytes) {
    (void)attr;
    aclError error = need_context("aclrtGetMemInfo");
    if (error) return error;
    pthread_mutex_lock(&standin_lock);
    *total_bytes = standin_capacity();
    *free_bytes = *total_bytes - used[standin_current_device()];
    pthread_mutex_unlock(&standin_lock);
    return ACL_SUCCESS;
}

/* ---- reservations ---- */

aclError aclrtReserveMemAddress(void **out, size_t size, size_t alignment, void *expected, uint64_t flags) {
    aclError error = need_context("aclrtReserveMemAddress");
    if (error) return error;
    if (!out || !size) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtReserveMemAddress: null pointer or size 0");
    if (alignment) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtReserveMemAddress: alignment is reserved, must be 0");
    if (expected) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtReserveMemAddress: expectPtr must be null");
    if (flags > 1) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtReserveMemAddress: flags are 0 (normal) or 1 (huge pages)");
    char *base = reserve_pages((size + STANDIN_PAGE_2M - 1) / STANDIN_PAGE_2M * STANDIN_PAGE_2M);
    if (!base) return standin_error(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtReserveMemAddress: no address space for %zu bytes", size);
    Reservation *r = calloc(1, sizeof *r);
    *r = (Reservation){.base = base, .size = size, .flags = flags, .device = -1};
    pthread_mutex_lock(&standin_lock);
    r->next = reservations;
    reservations = r;
    pthread_mutex_unlock(&standin_lock);
    *out = base;
    return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void *address) {
    aclError error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %p is no reservation's start", address);
    pthread_mutex_lock(&standin_lock);
    for (Reservation **at = &reservations; *at; at = &(*at)->next) {
        Reservation *r = *at;
        if (r->base != address) continue;
        if (r->mappings) {
            error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %d mappings are left in it", r->mappings);
            break;
        }
        *at = r->next;
        munmap(r->base, (r->size + STANDIN_PAGE_2M - 1) / STANDIN_PAGE_2M * STANDIN_PAGE_2M);
        free(r);
        error = ACL_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&standin_lock);
    return error;
}

/* ---- physical memory ---- */

static size_t granularity(aclrtMemAttr attr) {
    switch (attr) {
        case ACL_HBM_MEM_HUGE:
        case ACL_HBM_MEM_NORMAL:
        case ACL_HBM_MEM_P2P_HUGE:
        case ACL_HBM_MEM_P2P_NORMAL:
        case ACL_MEM_NORMAL:
        case ACL_MEM_HUGE:
        case ACL_MEM_P2P_NORMAL:
        case ACL_MEM_P2P_HUGE: return standin_page();
        case ACL_HBM_MEM_HUGE1G:
        case ACL_HBM_MEM_P2P_HUGE1G:
        case ACL_MEM_HUGE1G:
        case ACL_MEM_P2P_HUGE1G: return STANDIN_PAGE_1G;
        default: return 0;
    }
}

static aclError check_property(const char *call, const aclrtPhysicalMemProp *prop) {
    if (!prop) return standin_error(ACL_ERROR_INVALID_PARAM, "%s: null property", call);
    if (prop->handleType != ACL_MEM_HANDLE_TYPE_NONE)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: handleType must be NONE", call);
    if (prop->allocationType != ACL_MEM_ALLOCATION_TYPE_PINNED)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: allocationType must be PINNED", call);
    if (prop->location.type != ACL_MEM_LOCATION_TYPE_DEVICE)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: location type must be DEVICE", call);
    if (prop->location.id >= (uint32_t)standin_device_count())
        return standin_error(ACL_ERROR_RT_INVALID_DEVICEID, "%s: device %u does not exist", call, prop->location.id);
    if (!granularity(prop->memAttr))
        return standin_error(ACL_ERROR_RT_INVALID_MEMORY_TYPE, "%s: memory attribute %d", call, (int)prop->memAttr);
    if (prop->reserve) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: reserve must be 0", call);
    return ACL_SUCCESS;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *prop, aclrtMemGranularityOptions option, size_t *out) {
    aclError error = check_property("aclrtMemGetAllocationGranularity", prop);
    if (error) return error;
    if (!out || (option != ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM && option != ACL_RT_MEM_ALLOC_GRANULARITY_RECOMMENDED))
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemGetAllocationGranularity: option %d", (int)option);
    *out = granularity(prop->memAttr);
    return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *out, size_t size, const aclrtPhysicalMemProp *prop, uint64_t flags) {
    aclError error = check_property("aclrtMallocPhysical", prop);
    if (error) return error;
    if (!out || !size) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMallocPhysical: null pointer or size 0");
    if (flags) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMallocPhysical: flags are reserved, must be 0");
    size_t unit = granularity(prop->memAttr);
    if (size % unit)
        return standin_error(ACL_ERROR_RT_ADDR_UNALIGNED, "aclrtMallocPhysical: %zu is no multiple of %zu", size, unit);
    int device = (int)prop->location.id;
    pthread_mutex_lock(&standin_lock);
    int room = standin_take(device, size);
    int fd = room ? memfd_create("cann-standin-hbm", MFD_CLOEXEC) : -1;
    if (room && (fd < 0 || ftruncate(fd, (off_t)size))) {
        standin_give(device, size);
        if (fd >= 0) close(fd);
        room = 0;
    }
    if (!room) {
        pthread_mutex_unlock(&standin_lock);
        return standin_error(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocPhysical: device %d cannot give %zu bytes", device, size);
    }
    Physical *p = calloc(1, sizeof *p);
    *p = (Physical){.fd = fd, .size = size, .device = device, .home = device, .next = standin_physicals};
    standin_physicals = p;
    pthread_mutex_unlock(&standin_lock);
    *out = p;
    return ACL_SUCCESS;
}

Physical *standin_find_physical(aclrtDrvMemHandle handle) {
    for (Physical *p = standin_physicals; p; p = p->next)
        if (p == handle) return p;
    return NULL;
}

static void release(Physical *p) {
    for (Physical **at = &standin_physicals; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    if (!p->imported) standin_give(p->home, p->size);
    standin_drop_record(p);
    close(p->fd);
    free(p);
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&standin_lock);
    Physical *p = standin_find_physical(handle);
    if (!p) error = standin_error(ACL_ERROR_RT_INVALID_HANDLE, "aclrtFreePhysical: %p is no live handle", handle);
    else if (p->mappings)
        error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreePhysical: %d mappings are left, unmap first", p->mappings);
    else release(p);
    pthread_mutex_unlock(&standin_lock);
    return error;
}

/* ---- mappings ---- */

static aclError check_map(char *base, size_t size, size_t offset, Physical *p, uint64_t flags, Reservation **found) {
    if (flags) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: flags are reserved, must be 0");
    if (offset) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: offset must be 0, got %zu", offset);
    if (size != p->size)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: size %zu is not the allocation's %zu", size, p->size);
    if ((uintptr_t)base % standin_page())
        return standin_error(ACL_ERROR_RT_ADDR_UNALIGNED, "aclrtMapMem: %p is not aligned to the granularity", (void *)base);
    Reservation *r = reservations;
    while (r && !(base >= r->base && base + size <= r->base + r->size)) r = r->next;
    if (!r) return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %p is in no reservation", (void *)base);
    for (Mapping *m = mappings; m; m = m->next)
        if (base < m->base + m->size && m->base < base + size)
            return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %p is mapped already", (void *)base);
    Binding kind = p->imported ? BOUND_IMPORTED : BOUND_LOCAL;
    if (r->binding != BOUND_NONE && r->binding != kind)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: one reservation cannot hold local and imported pages");
    if (r->device >= 0 && r->device != p->device)
        return standin_error(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtMapMem: the reservation holds pages of device %d, not %d",
                             r->device, p->device);
    if (!r->flags)
        return standin_error(ACL_ERROR_RT_INVALID_MEMORY_TYPE, "aclrtMapMem: huge pages need a reservation with flags = 1");
    if (p->home != p->device && !standin_peer_enabled(p->device, p->home))
        return standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMapMem: device %d has no peer access to device %d",
                             p->device, p->home);
    *found = r;
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void *address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    aclError error = need_context("aclrtMapMem");
    if (error) return error;
    if (!address) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMapMem: null address");
    Reservation *r = NULL;
    pthread_mutex_lock(&standin_lock);
    Physical *p = standin_find_physical(handle);
    error = p ? check_map(address, size, offset, p, flags, &r)
              : standin_error(ACL_ERROR_RT_INVALID_HANDLE, "aclrtMapMem: %p is no live handle", handle);
    if (!error && mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, p->fd, 0) == MAP_FAILED)
        error = standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMapMem: mmap: %s", strerror(errno));
    if (!error) {
        Mapping *m = calloc(1, sizeof *m);
        *m = (Mapping){address, size, p, r, mappings};
        mappings = m;
        p->mappings++;
        r->mappings++;
        r->binding = p->imported ? BOUND_IMPORTED : BOUND_LOCAL;
        r->device = p->device;
    }
    pthread_mutex_unlock(&standin_lock);
    return error;
}

aclError aclrtUnmapMem(void *address) {
    aclError error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: nothing is mapped at %p", address);
    pthread_mutex_lock(&standin_lock);
    for (Mapping **at = &mappings; *at; at = &(*at)->next) {
        Mapping *m = *at;
        if (m->base != address) continue;
        *at = m->next;
        mmap(m->base, m->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        m->physical->mappings--;
        if (--m->reservation->mappings == 0) {
            m->reservation->binding = BOUND_NONE;
            m->reservation->device = -1;
        }
        free(m);
        error = ACL_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&standin_lock);
    return error;
}
