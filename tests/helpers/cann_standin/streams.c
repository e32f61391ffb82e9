/* Streams, events and what is late on them.
 *
 * With CANN_STANDIN_LATE a copy in a stream is carried out when somebody waits for it, and not before: at the next
 * synchronisation of its stream, of its device, or of an event recorded after it, or when another stream waits for such an
 * event. The value is a seed: 0 makes every copy late, any other lets some be carried out at once. A copy whose memory is
 * gone by then ends in an error of the synchronisation.
 *
 * The simulated NPU computes at once, in the order of its calls. Its own copies to the host come here with their bytes
 * (`cann_standin_arrives_late`): what is late is their arrival, and what orders them is the device, not the stream.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "standin.h"

typedef struct Late {
    uint64_t number;     /* its place among all late copies of this process */
    const void *stream;  /* NULL: ordered by the device */
    int device;
    char *to;
    const char *from;
    size_t size;
    aclrtMemcpyKind kind;
    char *bytes;         /* `from`, where it is a copy that belongs to this */
    void (*release)(void *);
    void *held;          /* for `release`, when it is done */
    struct Late *next;
} Late;

typedef struct Stream { int device; } Stream;
typedef struct Event { const Stream *stream; int device; uint64_t upto; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Late *first;
static uint64_t issued, dice;

static int enabled(void) {
    static int is = -1;
    if (is < 0) {
        const char *seed = getenv("CANN_STANDIN_LATE");
        dice = seed ? strtoull(seed, NULL, 0) : 0;
        is = seed != NULL;
    }
    return is;
}

static int is_late(void) {
    if (!dice) return 1;
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    return dice % 4 != 0;
}

static int waits_for(const Late *late, const Stream *stream, int device, uint64_t upto) {
    return late->device == device && late->number <= upto && (!stream || !late->stream || late->stream == stream);
}

/* Whatever is as old as `upto` of this stream (NULL: of all) on this device, in its order; and what the device orders. */
static aclError settle(const Stream *stream, int device, uint64_t upto) {
    aclError error = ACL_SUCCESS;
    Late *done = NULL;
    pthread_mutex_lock(&lock);
    for (Late **at = &first; *at;) {
        Late *late = *at;
        if (!waits_for(late, stream, device, upto)) {
            at = &late->next;
            continue;
        }
        aclError failed = late->bytes ? ACL_SUCCESS
                                      : standin_check_ends("a late copy", late->to, late->from, late->size, late->kind);
        if (!failed) memmove(late->to, late->from, late->size);
        if (failed && !error) error = failed;
        *at = late->next;
        late->next = done;
        done = late;
    }
    pthread_mutex_unlock(&lock);
    while (done) { /* without the lock: `release` may call back into this library */
        Late *late = done;
        done = late->next;
        free(late->bytes);
        if (late->release) late->release(late->held);
        free(late);
    }
    return error;
}

static void enqueue(Late late) {
    Late *made = malloc(sizeof *made);
    *made = late;
    pthread_mutex_lock(&lock);
    made->number = ++issued;
    Late **at = &first;
    while (*at) at = &(*at)->next;
    *at = made;
    pthread_mutex_unlock(&lock);
}

aclError standin_copy_in_stream(void *to, const void *from, size_t size, aclrtMemcpyKind kind, const void *stream) {
    int device = standin_current_device();
    if (!enabled() || !stream) {
        memmove(to, from, size);
        return ACL_SUCCESS;
    }
    enqueue((Late){.stream = stream, .device = device, .to = to, .from = from, .size = size, .kind = kind});
    return is_late() ? ACL_SUCCESS : settle(stream, device, UINT64_MAX);
}

/* For the simulated NPU: these bytes of the device come to the host when somebody waits for them; `release(held)` then.
 * 0: nothing is late here, and nothing was done. */
int cann_standin_arrives_late(void *to, const void *from, size_t size, int device, void (*release)(void *), void *held) {
    if (!enabled() || !is_late()) return 0;
    char *bytes = malloc(size);
    memcpy(bytes, from, size);
    enqueue((Late){.device = device, .to = to, .from = bytes, .bytes = bytes, .size = size, .release = release, .held = held});
    return 1;
}

/* For the simulated NPU: somebody waits for all that this device has been given. */
int cann_standin_settle(int device) { return settle(NULL, device, UINT64_MAX); }

static aclError need_context(void) {
    if (standin_current_device() >= 0) return ACL_SUCCESS;
    return standin_error(ACL_ERROR_RT_CONTEXT_NULL, "no context for a stream or event");
}

aclError aclrtCreateStream(aclrtStream *out) {
    aclError error = need_context();
    if (error) return error;
    Stream *made = calloc(1, sizeof *made);
    made->device = standin_current_device();
    *out = made;
    return ACL_SUCCESS;
}
aclError aclrtCreateStreamWithConfig(aclrtStream *out, uint32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    return aclrtCreateStream(out);
}
aclError aclrtSynchronizeStream(aclrtStream stream) {
    const Stream *of = stream;
    return settle(of, of ? of->device : standin_current_device(), UINT64_MAX);
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
    (void)timeout;
    return aclrtSynchronizeStream(stream);
}
aclError aclrtDestroyStream(aclrtStream stream) {
    aclError error = aclrtSynchronizeStream(stream);
    free(stream);
    return error;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeDevice(void) { return settle(NULL, standin_current_device(), UINT64_MAX); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    (void)timeout;
    return aclrtSynchronizeDevice();
}

aclError aclrtCreateEvent(aclrtEvent *out) {
    aclError error = need_context();
    if (!error) *out = calloc(1, sizeof(Event));
    return error;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *out, uint32_t flag) { (void)flag; return aclrtCreateEvent(out); }
aclError aclrtCreateEventExWithFlag(aclrtEvent *out, uint32_t flag) { (void)flag; return aclrtCreateEvent(out); }
aclError aclrtDestroyEvent(aclrtEvent event) { free(event); return ACL_SUCCESS; }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    Event *of = event;
    of->stream = stream;
    of->device = stream ? ((Stream *)stream)->device : standin_current_device();
    pthread_mutex_lock(&lock);
    of->upto = issued;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { (void)event, (void)stream; return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent event) {
    const Event *of = event;
    return settle(of->stream, of->device, of->upto);
}
/* The other stream's work comes after the event: what the event follows may as well be done now. */
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) { (void)stream; return aclrtSynchronizeEvent(event); }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    const Event *of = event;
    int waits = 0;
    pthread_mutex_lock(&lock);
    for (const Late *late = first; late; late = late->next)
        waits |= waits_for(late, of->stream, of->device, of->upto);
    pthread_mutex_unlock(&lock);
    *status = waits ? ACL_EVENT_RECORDED_STATUS_NOT_READY : ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}
