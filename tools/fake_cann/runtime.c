/* The functions of the stub CANN with results: memory, devices, streams, events, tensor descriptions, NZ shapes.

   All other functions are generated (stubs.c) and return success. Device memory is host memory, every stream is
   always finished, and a kernel only adds its name to the trace:

       launch aclnnAdd        an aclnn kernel, or `launch aclop:TransData` through the old interface
       sync aclrtSynchronizeStream      the host waited
       copy D2H 4096          bytes that crossed between host and device (D2D copies are `launch memcpy:D2D`)
       strided 18x64/192x1    an aclnn kernel is about to get a tensor of this shape with these strides
       stub aclrtDoSomething  a function that is not modelled here was called

   Structures and numbers are those of the headers in the torch_npu wheel (include/third_party/acl). */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, FAILED = 500000, ND = 2, NZ = 29, MAX_DIMS = 16 };
static const size_t GIB = (size_t)1 << 30;

/* ---- the trace ------------------------------------------------------------------------------- */

static pthread_mutex_t trace_lock = PTHREAD_MUTEX_INITIALIZER;
static char *trace;
static size_t trace_length, trace_room;

void fake_cann_record(const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    size_t length = strlen(line) + 1;
    pthread_mutex_lock(&trace_lock);
    if (trace_length + length + 1 > trace_room) {
        trace_room = 2 * (trace_room + length) + 65536;
        trace = realloc(trace, trace_room);
    }
    sprintf(trace + trace_length, "%s\n", line);
    trace_length += length;
    pthread_mutex_unlock(&trace_lock);
}

/* All lines since the last call; the caller frees them with fake_cann_free. */
char *fake_cann_take(void) {
    pthread_mutex_lock(&trace_lock);
    char *taken = trace ? trace : calloc(1, 1);
    trace = NULL;
    trace_length = trace_room = 0;
    pthread_mutex_unlock(&trace_lock);
    return taken;
}

void fake_cann_free(char *taken) { free(taken); }

/* ---- devices --------------------------------------------------------------------------------- */

static __thread int32_t device;
static int context; /* its address is the only context */

const char *aclrtGetSocName(void) {
    const char *name = getenv("FAKE_CANN_SOC");
    return name ? name : "Ascend910B1";
}
int aclrtSetDevice(int32_t id) { return device = id, OK; }
int aclrtGetDevice(int32_t *id) { return *id = device, OK; }
int aclrtGetDeviceCount(uint32_t *count) { return *count = 1, OK; }
int aclrtGetCurrentContext(void **out) { return *out = &context, OK; }
int aclrtGetPrimaryCtxState(int32_t id, uint32_t *flags, int32_t *active) {
    (void)id;
    if (flags) *flags = 0;
    return *active = 1, OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { return (void)a, (void)b, *can = 1, OK; }
int aclrtGetMemInfo(int attribute, size_t *available, size_t *total) {
    (void)attribute;
    return *available = *total = 64 * GIB, OK;
}
int aclGetDeviceCapability(uint32_t id, int info, int64_t *value) {
    (void)id, (void)info;
    return *value = 24, OK; /* cores; also used for the bytes of L2, which nothing depends on */
}
int aclrtGetDeviceInfo(uint32_t id, int attribute, int64_t *value) {
    (void)id, (void)attribute;
    return *value = 24, OK;
}
int aclGetCannAttribute(int attribute, int32_t *value) { return (void)attribute, *value = 1, OK; }
int aclGetCannAttributeList(const int **list, size_t *count) { return *list = NULL, *count = 0, OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return (void)option, *value = 0, OK; }
int aclsysGetCANNVersion(int package, void *version) { return (void)package, (void)version, FAILED; }
int aclsysGetVersionStr(char *package, char *version) { return (void)package, (void)version, FAILED; }
/* Options of the compiler of the old interface, such as jit_compile: as text, all "0". */
size_t aclGetCompileoptSize(int option) { return (void)option, 8; }
int aclGetCompileopt(int option, char *value, size_t room) {
    (void)option;
    return room < 8 ? FAILED : (strcpy(value, "disable"), OK);
}
const char *aclGetRecentErrMsg(void) { return ""; }

/* ---- memory ---------------------------------------------------------------------------------- */

static int allocate(void **out, size_t size) {
    size = (size + 511) & ~(size_t)511;
    if (posix_memalign(out, 512, size ? size : 512)) return FAILED;
    memset(*out, 0, size);
    return OK;
}
int aclrtMalloc(void **out, size_t size, int policy) { return (void)policy, allocate(out, size); }
int aclrtMallocAlign32(void **out, size_t size, int policy) { return (void)policy, allocate(out, size); }
int aclrtMallocHost(void **out, size_t size) { return allocate(out, size); }
int aclrtMallocHostWithCfg(void **out, uint64_t size, void *config) {
    return (void)config, allocate(out, size);
}
int aclrtFree(void *memory) { return free(memory), OK; }
int aclrtFreeHost(void *memory) { return free(memory), OK; }

/* Expandable segments: reserved addresses are host pages, allocated when they are first accessed. */
static const size_t HEADER = 1 << 21;
int aclrtReserveMemAddress(void **out, size_t size, size_t alignment, void *hint, uint64_t flags) {
    (void)alignment, (void)hint, (void)flags;
    int mode = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *memory = mmap(NULL, size + HEADER, PROT_READ | PROT_WRITE, mode, -1, 0);
    if (memory == MAP_FAILED) return FAILED;
    *(size_t *)memory = size + HEADER;
    return *out = memory + HEADER, OK;
}
int aclrtReleaseMemAddress(void *memory) {
    char *start = (char *)memory - HEADER;
    return munmap(start, *(size_t *)start) ? FAILED : OK;
}
int aclrtMallocPhysical(void **out, size_t size, const void *property, uint64_t flags) {
    (void)size, (void)property, (void)flags;
    return *out = malloc(1), OK;
}
int aclrtFreePhysical(void *handle) { return free(handle), OK; }

static int copy(void *to, size_t room, const void *from, size_t count, int kind, const char *waits) {
    static const char *const names[] = {"H2H", "H2D", "D2H", "D2D", "ANY", "H2D", "D2D", "D2D"};
    const char *name = kind >= 0 && kind < 8 ? names[kind] : "ANY";
    if (count > room) return FAILED;
    memmove(to, from, count);
    if (strcmp(name, "D2D") == 0)
        fake_cann_record("launch memcpy:D2D");
    else
        fake_cann_record("copy %s %zu", name, count);
    if (waits) fake_cann_record("sync %s", waits);
    return OK;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t count, int kind) {
    return copy(to, room, from, count, kind, "aclrtMemcpy");
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, int kind, void *stream) {
    return (void)stream, copy(to, room, from, count, kind, NULL);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t count, int kind, void *s) {
    return (void)s, copy(to, room, from, count, kind, NULL);
}
int aclrtMemset(void *to, size_t room, int32_t value, size_t count) {
    return count > room ? FAILED : (memset(to, value, count), OK);
}
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t count, void *stream) {
    (void)stream;
    fake_cann_record("launch memset");
    return aclrtMemset(to, room, value, count);
}
int aclrtPointerGetAttributes(const void *memory, uint32_t *attributes) {
    (void)memory;
    return attributes[1] = 2, OK; /* location.type: host memory that is not registered */
}

/* ---- streams and events ---------------------------------------------------------------------- */

static int handle(void **out) { return *out = malloc(8), OK; }
int aclrtCreateStream(void **out) { return handle(out); }
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flag) {
    return (void)priority, (void)flag, handle(out);
}
int aclrtDestroyStream(void *stream) { return free(stream), OK; }
int aclrtDestroyStreamForce(void *stream) { return free(stream), OK; }
int aclrtStreamGetId(void *stream, int32_t *id) { return (void)stream, *id = 0, OK; }
int aclrtStreamQuery(void *stream, int *status) { return (void)stream, *status = 0, OK; }
int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { return (void)flag, handle(out); }
int aclrtCreateEventWithFlag(void **out, uint32_t flag) { return (void)flag, handle(out); }
int aclrtDestroyEvent(void *event) { return free(event), OK; }
int aclrtQueryEventStatus(void *event, int *status) { return (void)event, *status = 1, OK; }
int aclQueryEventRecordedStatus(void *event, int *status) { return (void)event, *status = 1, OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { return (void)event, *status = 0, OK; }
int aclQueryEventWaitStatus(void *event, int *status) { return (void)event, *status = 0, OK; }
int aclrtEventElapsedTime(float *ms, void *a, void *b) { return (void)a, (void)b, *ms = 0, OK; }
int aclrtRecordEvent(void *event, void *stream) { return (void)event, (void)stream, OK; }
int aclrtStreamWaitEvent(void *stream, void *event) { return (void)event, (void)stream, OK; }

static int waited(const char *name) { return fake_cann_record("sync %s", name), OK; }
int aclrtSynchronizeStream(void *stream) { return (void)stream, waited("aclrtSynchronizeStream"); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t ms) {
    return (void)stream, (void)ms, waited("aclrtSynchronizeStream");
}
int aclrtSynchronizeDevice(void) { return waited("aclrtSynchronizeDevice"); }
int aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return (void)ms, waited("aclrtSynchronizeDevice"); }
int aclrtSynchronizeEvent(void *event) { return (void)event, waited("aclrtSynchronizeEvent"); }

/* ---- descriptions of arguments --------------------------------------------------------------- */

typedef struct {
    int64_t dims[MAX_DIMS];
    uint64_t count;
    int dtype, format;
} Tensor;

/* Record a tensor that is not contiguous: some kernels copy it first, inside CANN. */
static void record_strides(const int64_t *dims, const int64_t *strides, uint64_t count) {
    char line[200] = "";
    size_t used = 0;
    int64_t step = 1;
    int plain = 1;
    for (uint64_t i = count; i-- > 0; step *= dims[i]) plain &= dims[i] == 1 || strides[i] == step;
    for (uint64_t i = 0; !plain && i < 2 * count; i++) {
        const char *before = i == count ? "/" : i ? "x" : "";
        int64_t number = i < count ? dims[i] : strides[i - count];
        int size = snprintf(line + used, sizeof line - used, "%s%lld", before, (long long)number);
        if (size < 0 || (used += (size_t)size) >= sizeof line) return;
    }
    if (!plain) fake_cann_record("strided %s", line);
}

Tensor *aclCreateTensor(const int64_t *dims, uint64_t count, int dtype, const int64_t *strides, int64_t offset,
                        int format, const int64_t *storage, uint64_t storage_count, void *data) {
    (void)offset, (void)storage, (void)storage_count, (void)data;
    if (strides && count <= MAX_DIMS) record_strides(dims, strides, count);
    Tensor *tensor = calloc(1, sizeof *tensor);
    tensor->count = count < MAX_DIMS ? count : MAX_DIMS;
    memcpy(tensor->dims, dims, tensor->count * sizeof *dims);
    tensor->dtype = dtype, tensor->format = format;
    return tensor;
}
int aclDestroyTensor(Tensor *tensor) { return free(tensor), OK; }
int aclGetViewShape(const Tensor *tensor, int64_t **dims, uint64_t *count) {
    *count = tensor->count;
    *dims = malloc(sizeof tensor->dims);
    memcpy(*dims, tensor->dims, sizeof tensor->dims);
    return OK;
}

static void *blank(void) { return malloc(8); }
void *aclCreateScalar(void *value, int dtype) { return (void)value, (void)dtype, blank(); }
void *aclCreateIntArray(const int64_t *value, uint64_t size) { return (void)value, (void)size, blank(); }
void *aclCreateFloatArray(const float *value, uint64_t size) { return (void)value, (void)size, blank(); }
void *aclCreateBoolArray(const char *value, uint64_t size) { return (void)value, (void)size, blank(); }
void *aclCreateScalarList(const void *value, uint64_t size) { return (void)value, (void)size, blank(); }
int aclDestroyScalar(void *p) { return free(p), OK; }
int aclDestroyIntArray(void *p) { return free(p), OK; }
int aclDestroyFloatArray(void *p) { return free(p), OK; }
int aclDestroyBoolArray(void *p) { return free(p), OK; }
int aclDestroyScalarList(void *p) { return free(p), OK; }
/* A list owns its tensors, as in CANN. */
typedef struct {
    uint64_t size;
    Tensor *tensors[];
} List;
void *aclCreateTensorList(Tensor *const *value, uint64_t size) {
    List *list = malloc(sizeof *list + size * sizeof *value);
    list->size = size;
    memcpy(list->tensors, value, size * sizeof *value);
    return list;
}
int aclDestroyTensorList(List *list) {
    for (uint64_t i = 0; i < list->size; i++) free(list->tensors[i]);
    return free(list), OK;
}

/* ---- the old interface, aclop ---------------------------------------------------------------- */

void *aclopCreateAttr(void) { return blank(); }
void aclopDestroyAttr(const void *p) { free((void *)p); }
void *aclCreateTensorDesc(int dtype, int count, const int64_t *dims, int format) {
    (void)dtype, (void)count, (void)dims, (void)format;
    return blank();
}
void aclDestroyTensorDesc(const void *p) { free((void *)p); }
void *aclCreateDataBuffer(void *data, size_t size) { return (void)data, (void)size, blank(); }
int aclDestroyDataBuffer(const void *p) { return free((void *)p), OK; }
int aclopCompileAndExecute(const char *name) { return fake_cann_record("launch aclop:%s", name), OK; }
int aclopCompileAndExecuteV2(const char *name) { return fake_cann_record("launch aclop:%s", name), OK; }

/* ---- FRACTAL_NZ ------------------------------------------------------------------------------ */

static int bytes_of(int dtype) {
    switch (dtype) { /* aclDataType */
        case 0: case 3: case 7: return 4;          /* float32 int32 uint32 */
        case 1: case 6: case 27: case 5: return 2; /* float16 int16 bfloat16 uint16 */
        case 8: case 9: case 10: case 11: return 8;
        default: return 1;
    }
}

/* The storage of [.., r, c] in NZ: [.., c / C0, r / 16, 16, C0] where C0 elements are 32 bytes. */
int aclnnNpuFormatCastCalculateSizeAndFormat(const Tensor *source, int format, int dtype, int64_t **dims,
                                             uint64_t *count, int *actual) {
    (void)dtype; /* customize_dtype: packed FP4 is passed as int8, so the dtype of the source decides */
    uint64_t n = source->count;
    int64_t *out = *dims = malloc((MAX_DIMS + 2) * sizeof *out);
    memcpy(out, source->dims, n * sizeof *out);
    *actual = format;
    *count = n;
    if (format == NZ && n >= 2) {
        int64_t c0 = 32 / bytes_of(source->dtype), r = out[n - 2], c = out[n - 1];
        out[n - 2] = (c + c0 - 1) / c0, out[n - 1] = (r + 15) / 16, out[n] = 16, out[n + 1] = c0;
        *count = n + 2;
    }
    return OK;
}
