/* Sharing physical memory between processes: one export a handle, a list of admitted processes, imports elsewhere only.
 *
 * A shareable handle is (pid << 32 | descriptor) of a small shared record; the importer opens both the record and the
 * pages through /proc/PID/fd, so the exporter must be alive and the allocation not yet freed, as CANN asks. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "standin.h"

#define RECORD_MAGIC 0x53544e44494e4331ull
#define MAX_ADMITTED 64

typedef struct ShareRecord {
    uint64_t magic;
    uint64_t size;
    int32_t home;
    int32_t pages_fd;
    int32_t admit_all;
    int32_t admitted_count;
    int32_t admitted[MAX_ADMITTED];
} ShareRecord;

void standin_drop_record(Physical *p) {
    if (!p->record) return;
    int fd = (int)(p->shareable & 0xffffffffu);
    p->record->magic = 0; /* an importer that still holds the number finds a dead record */
    munmap(p->record, sizeof *p->record);
    close(fd);
    p->record = NULL;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType type, uint64_t flags, uint64_t *out) {
    if (!out) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMemExportToShareableHandle: null pointer");
    if (type != ACL_MEM_HANDLE_TYPE_NONE)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemExportToShareableHandle: handleType must be NONE");
    if (flags & ~ACL_RT_VMM_EXPORT_FLAG_DISABLE_PID_VALIDATION)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemExportToShareableHandle: flags %#lx", (unsigned long)flags);
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&standin_lock);
    Physical *p = standin_find_physical(handle);
    if (!p) error = standin_error(ACL_ERROR_RT_INVALID_HANDLE, "aclrtMemExportToShareableHandle: %p is no live handle", handle);
    else if (p->imported)
        error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemExportToShareableHandle: an imported handle cannot be exported");
    else if (p->record)
        error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemExportToShareableHandle: the handle was exported already");
    if (!error) {
        int fd = memfd_create("cann-standin-share", MFD_CLOEXEC);
        ShareRecord *record = MAP_FAILED;
        if (fd >= 0 && !ftruncate(fd, sizeof *record))
            record = mmap(NULL, sizeof *record, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (record == MAP_FAILED) {
            error = standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMemExportToShareableHandle: no record");
        } else {
            *record = (ShareRecord){.magic = RECORD_MAGIC, .size = p->size, .home = p->home, .pages_fd = p->fd,
                                    .admit_all = (int32_t)(flags & ACL_RT_VMM_EXPORT_FLAG_DISABLE_PID_VALIDATION)};
            p->record = record;
            p->shareable = (uint64_t)getpid() << 32 | (uint32_t)fd;
            *out = p->shareable;
        }
    }
    pthread_mutex_unlock(&standin_lock);
    return error;
}

static Physical *by_shareable(uint64_t shareable, int imported) {
    for (Physical *p = standin_physicals; p; p = p->next)
        if (p->imported == imported && p->shareable == shareable && shareable) return p;
    return NULL;
}

aclError aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t count) {
    if (!pids || !count) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMemSetPidToShareableHandle: no pids");
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&standin_lock);
    Physical *p = by_shareable(shareable, 0);
    if (!p || !p->record)
        error = standin_error(ACL_ERROR_RT_INVALID_HANDLE,
                              "aclrtMemSetPidToShareableHandle: this process did not export %#lx", (unsigned long)shareable);
    else if (p->record->admitted_count + count > MAX_ADMITTED)
        error = standin_error(ACL_ERROR_RT_OVER_LIMIT, "aclrtMemSetPidToShareableHandle: more than %d pids", MAX_ADMITTED);
    else
        for (size_t i = 0; i < count; i++) p->record->admitted[p->record->admitted_count++] = pids[i];
    pthread_mutex_unlock(&standin_lock);
    return error;
}

static int admitted(const ShareRecord *record) {
    if (record->admit_all) return 1;
    for (int i = 0; i < record->admitted_count; i++)
        if (record->admitted[i] == getpid()) return 1;
    return 0;
}

static int open_of_process(uint64_t pid, int fd) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%u/fd/%d", (unsigned)pid, fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

aclError aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t device, aclrtDrvMemHandle *out) {
    if (!out) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMemImportFromShareableHandle: null pointer");
    if (device < 0 || device >= standin_device_count())
        return standin_error(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtMemImportFromShareableHandle: device %d does not exist", device);
    if (shareable >> 32 == (uint64_t)getpid())
        return standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMemImportFromShareableHandle: not in the exporting process");
    pthread_mutex_lock(&standin_lock);
    int again = by_shareable(shareable, 1) != NULL;
    pthread_mutex_unlock(&standin_lock);
    if (again)
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtMemImportFromShareableHandle: imported in this process already");

    int record_fd = open_of_process(shareable >> 32, (int)(shareable & 0xffffffffu));
    if (record_fd < 0)
        return standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMemImportFromShareableHandle: nothing is shared as %#lx",
                             (unsigned long)shareable);
    ShareRecord record = {0};
    ssize_t got = pread(record_fd, &record, sizeof record, 0);
    close(record_fd);
    if (got != (ssize_t)sizeof record || record.magic != RECORD_MAGIC)
        return standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMemImportFromShareableHandle: %#lx was freed",
                             (unsigned long)shareable);
    if (!admitted(&record))
        return standin_error(ACL_ERROR_RT_NO_PERMISSION, "aclrtMemImportFromShareableHandle: process %d is not admitted", getpid());
    int fd = open_of_process(shareable >> 32, record.pages_fd);
    if (fd < 0) return standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "aclrtMemImportFromShareableHandle: pages are gone");
    Physical *p = calloc(1, sizeof *p);
    *p = (Physical){.fd = fd, .size = record.size, .device = device, .home = record.home, .imported = 1, .shareable = shareable};
    pthread_mutex_lock(&standin_lock);
    p->next = standin_physicals;
    standin_physicals = p;
    pthread_mutex_unlock(&standin_lock);
    *out = p;
    return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t *pid) {
    *pid = getpid();
    return ACL_SUCCESS;
}
