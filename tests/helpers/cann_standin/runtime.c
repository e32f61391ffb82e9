/* Devices, contexts and copies. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

static __thread char recent[512];
static __thread int current = -1;
static char contexts[STANDIN_MAX_DEVICES]; /* a context is the address of its device's byte */
static unsigned char peer[STANDIN_MAX_DEVICES][STANDIN_MAX_DEVICES];
static int64_t sys_params[64];

aclError standin_error(aclError code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(recent, sizeof recent, format, args);
    va_end(args);
    return code;
}

const char *aclGetRecentErrMsg(void) { return recent[0] ? recent : NULL; }

/* ASCEND_RT_VISIBLE_DEVICES as torch_npu's own reading of it (npu/__init__.py) says: what follows a character that is
 * neither digit nor comma is dropped, ids must ascend or none is visible, and the list ends at one that does not exist. */
static int visible(int count) {
    const char *text = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!text) return count;
    int seen = 0, last = -1;
    while (*text >= '0' && *text <= '9') {
        char *end;
        long id = strtol(text, &end, 10);
        if (id <= last) return 0;
        if (id >= count) break;
        last = (int)id;
        seen++;
        text = end + (*end == ',');
    }
    return seen;
}

int standin_device_count(void) {
    const char *text = getenv("CANN_STANDIN_DEVICES");
    int count = text ? atoi(text) : 2;
    return visible(count < 1 ? 1 : count > STANDIN_MAX_DEVICES ? STANDIN_MAX_DEVICES : count);
}

size_t standin_capacity(void) {
    const char *text = getenv("CANN_STANDIN_HBM_BYTES");
    return text ? strtoull(text, NULL, 0) : (size_t)4 << 30;
}

/* Smaller than CANN's where a test wants a tiny model to have more than one piece of anything. */
size_t standin_page(void) {
    const char *text = getenv("CANN_STANDIN_PAGE");
    return text ? strtoull(text, NULL, 0) : STANDIN_PAGE_2M;
}

int standin_current_device(void) { return current; }
int standin_peer_enabled(int device, int other) { return device == other || peer[device][other]; }

aclError aclInit(const char *config) { (void)config; return ACL_SUCCESS; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel level, const char *function, const char *file, uint32_t line, const char *format, ...) {
    (void)level, (void)function, (void)file, (void)line, (void)format;
}

const char *aclrtGetSocName(void) {
    const char *soc = getenv("CANN_STANDIN_SOC");
    return soc ? soc : "Ascend910B3";
}

/* ---- devices and contexts ---- */

aclError aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)standin_device_count(); return ACL_SUCCESS; }

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= standin_device_count())
        return standin_error(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtSetDevice: device %d does not exist", device);
    current = device;
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device) { if (device == current) current = -1; return ACL_SUCCESS; }

aclError aclrtGetDevice(int32_t *device) {
    if (current < 0) return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetDevice: this thread has no context");
    *device = current;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *out) {
    if (current < 0) return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetCurrentContext: this thread has no context");
    *out = &contexts[current];
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    char *at = context;
    if (at < contexts || at >= contexts + STANDIN_MAX_DEVICES)
        return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtSetCurrentContext: no such context");
    current = (int)(at - contexts);
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t other) {
    *can = device != other && device < standin_device_count() && other < standin_device_count();
    return ACL_SUCCESS;
}

/* One way: the current device may reach `other`, not the reverse. */
aclError aclrtDeviceEnablePeerAccess(int32_t other, uint32_t flags) {
    if (current < 0) return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "aclrtDeviceEnablePeerAccess: no context");
    if (flags || other == current || other < 0 || other >= standin_device_count())
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtDeviceEnablePeerAccess: peer %d, flags %u", other, flags);
    peer[current][other] = 1;
    return ACL_SUCCESS;
}

aclError aclrtDeviceDisablePeerAccess(int32_t other) {
    if (current < 0 || other < 0 || other >= standin_device_count() || !peer[current][other])
        return standin_error(ACL_ERROR_RT_PARAM_INVALID, "aclrtDeviceDisablePeerAccess: peer %d is not enabled", other);
    peer[current][other] = 0;
    return ACL_SUCCESS;
}

/* ---- copies ---- */

aclError aclrtMallocHost(void **out, size_t size) {
    *out = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    return *out ? ACL_SUCCESS : standin_error(ACL_ERROR_RT_MEMORY_ALLOCATION, "aclrtMallocHost: %zu bytes", size);
}

aclError aclrtFreeHost(void *address) { free(address); return ACL_SUCCESS; }

/* Whether both ends are (still) mapped device memory where they are said to be. */
aclError standin_check_ends(const char *call, const void *to, const void *from, size_t size, aclrtMemcpyKind kind) {
    int to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
    int from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&standin_lock);
    if (to_device && standin_device_of(to, size) < 0)
        error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: destination %p is not mapped device memory", call, to);
    else if (from_device && standin_device_of(from, size) < 0)
        error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: source %p is not mapped device memory", call, from);
    pthread_mutex_unlock(&standin_lock);
    return error;
}

static aclError check_copy(const char *call, void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind,
                           int in_stream) {
    if (current < 0) return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "%s: this thread has no context", call);
    if (!to || !from || size > room)
        return standin_error(ACL_ERROR_INVALID_PARAM, "%s: null pointer, or %zu bytes into %zu", call, size, room);
    aclError error = standin_check_ends(call, to, from, size, kind);
    if (error || kind != ACL_MEMCPY_DEVICE_TO_DEVICE) return error;
    pthread_mutex_lock(&standin_lock);
    int target = standin_device_of(to, size), source = standin_device_of(from, size);
    if (target != source) {
        int other = current == target ? source : target;
        if (current != target && current != source)
            error = standin_error(ACL_ERROR_RT_PARAM_INVALID, "%s: device %d is neither end of the copy", call, current);
        else if (!peer[current][other])
            error = standin_error(ACL_ERROR_RT_DRV_INTERNAL_ERROR, "%s: device %d has no peer access to device %d", call,
                                  current, other);
        else if (!in_stream && (standin_in_reservation(to) || standin_in_reservation(from)))
            error = standin_error(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                                  "%s: between devices, reserved addresses are for aclrtMemcpyAsync only", call);
    }
    pthread_mutex_unlock(&standin_lock);
    return error;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    aclError error = check_copy("aclrtMemcpy", to, room, from, size, kind, 0);
    if (!error) memmove(to, from, size);
    return error;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
    aclError error = check_copy("aclrtMemcpyAsync", to, room, from, size, kind, 1);
    return error ? error : standin_copy_in_stream(to, from, size, kind, stream);
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t size) {
    pthread_mutex_lock(&standin_lock);
    int mapped = standin_device_of(to, size) >= 0;
    pthread_mutex_unlock(&standin_lock);
    if (size > room || !mapped) return standin_error(ACL_ERROR_INVALID_PARAM, "aclrtMemset: %p is not mapped device memory", to);
    memset(to, value, size);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, aclrtStream stream) {
    (void)stream;
    return aclrtMemset(to, room, value, size);
}

aclError aclrtProcessReport(int32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    *value = (unsigned)option < 64 ? sys_params[option] : 0;
    return ACL_SUCCESS;
}
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    if ((unsigned)option < 64) sys_params[option] = value;
    return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return ACL_SUCCESS; }
