/* Shared by the files of the stand-in for CANN's libraries. Tests only; nothing here computes.
 *
 * "Device memory" is memfd pages of the host. Environment:
 *   CANN_STANDIN_DEVICES    how many devices exist                      default 2, at most 16
 *   ASCEND_RT_VISIBLE_DEVICES  which of them this process sees          default all
 *   CANN_STANDIN_HBM_BYTES  capacity of each device, per process        default 4 GiB
 *   CANN_STANDIN_SOC        what aclrtGetSocName answers                default Ascend910B3
 *   CANN_STANDIN_LATE       copies in streams are late: see streams.c   default: done before the call returns
 */
#ifndef CANN_STANDIN_H
#define CANN_STANDIN_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "acl/acl.h"
#include "acl/error_codes/rt_error_codes.h"

#define STANDIN_PAGE_2M ((size_t)2 << 20)
#define STANDIN_PAGE_1G ((size_t)1 << 30)
#define STANDIN_MAX_DEVICES 16

/* One physical allocation as one process sees it: allocated here, or imported from another process. */
typedef struct Physical {
    int fd;
    size_t size;
    int device;        /* the device whose address space it may be mapped into */
    int home;          /* the device whose HBM holds the pages */
    int imported;
    int mappings;
    uint64_t shareable; /* 0: never exported (local), or what it was imported from (imported) */
    struct ShareRecord *record;
    struct Physical *next;
} Physical;

typedef enum { BOUND_NONE, BOUND_LOCAL, BOUND_IMPORTED } Binding;

typedef struct Reservation {
    char *base;
    size_t size;
    uint64_t flags;
    int device; /* -1 while nothing is mapped */
    Binding binding;
    int mappings;
    struct Reservation *next;
} Reservation;

typedef struct Mapping {
    char *base;
    size_t size;
    Physical *physical;
    Reservation *reservation;
    struct Mapping *next;
} Mapping;

/* One aclrtMalloc. */
typedef struct Plain {
    char *base;
    size_t size;
    int device;
    struct Plain *next;
} Plain;

/* Remember a text for aclGetRecentErrMsg and return the code. */
aclError standin_error(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));

int standin_device_count(void);
int standin_current_device(void); /* -1: this thread has no context */
int standin_peer_enabled(int device, int peer);
size_t standin_capacity(void);
size_t standin_page(void);

aclError standin_check_ends(const char *call, const void *to, const void *from, size_t size, aclrtMemcpyKind kind);
aclError standin_copy_in_stream(void *to, const void *from, size_t size, aclrtMemcpyKind kind, const void *stream);

/* For the simulated NPU. */
int cann_standin_arrives_late(void *to, const void *from, size_t size, int device, void (*release)(void *), void *held);
int cann_standin_settle(int device);
int cann_standin_holds(const void *address, size_t size, int device); /* whether all of it is that device's */

/* All of these want the lock held. */
extern pthread_mutex_t standin_lock;
extern Physical *standin_physicals;
int standin_device_of(const void *address, size_t size); /* -1: not (wholly) mapped device memory */
int standin_in_reservation(const void *address);
int standin_take(int device, size_t size);               /* 0 when the device has no room */
void standin_give(int device, size_t size);
Physical *standin_find_physical(aclrtDrvMemHandle handle);
void standin_drop_record(Physical *physical);

#endif
