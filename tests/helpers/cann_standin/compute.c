/* What would compute or communicate. Building a description of an operator succeeds, so that a caller gets as far as the
 * call that would run it, and that call returns an error: no test can mistake this library for a device. */
#include <stdlib.h>

#include "standin.h"
#include "acl/acl_op_compiler.h"

#define NO_COMPUTE(name) standin_error(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, #name ": the stand-in for CANN does not compute")

struct aclopAttr { int unused; };
struct aclDataBuffer { void *data; size_t size; };
struct aclTensorDesc { aclDataType type; aclFormat format; int dimensions; int64_t shape[8]; };

/* ---- descriptions ---- */

aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
    aclDataBuffer *buffer = malloc(sizeof *buffer);
    *buffer = (aclDataBuffer){data, size};
    return buffer;
}
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) { free((void *)buffer); return ACL_SUCCESS; }

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dimensions, const int64_t *shape, aclFormat format) {
    aclTensorDesc *desc = calloc(1, sizeof *desc);
    desc->type = type;
    desc->format = format;
    desc->dimensions = dimensions > 8 ? 8 : dimensions;
    for (int i = 0; i < desc->dimensions; i++) desc->shape[i] = shape[i];
    return desc;
}
void aclDestroyTensorDesc(const aclTensorDesc *desc) { free((void *)desc); }
aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return (size_t)desc->dimensions; }
aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t index, int64_t *out) {
    if (index >= (size_t)desc->dimensions) return standin_error(ACL_ERROR_INVALID_PARAM, "aclGetTensorDescDimV2: %zu", index);
    *out = desc->shape[index];
    return ACL_SUCCESS;
}
void aclSetTensorDescName(aclTensorDesc *desc, const char *name) { (void)desc, (void)name; }
aclError aclSetTensorFormat(aclTensorDesc *desc, aclFormat format) { desc->format = format; return ACL_SUCCESS; }
aclError aclSetTensorShape(aclTensorDesc *desc, int count, const int64_t *shape) { (void)desc, (void)count, (void)shape; return ACL_SUCCESS; }
aclError aclSetTensorPlaceMent(aclTensorDesc *desc, aclMemType type) { (void)desc, (void)type; return ACL_SUCCESS; }

aclopAttr *aclopCreateAttr(void) { return calloc(1, sizeof(aclopAttr)); }
void aclopDestroyAttr(const aclopAttr *attr) { free((void *)attr); }
#define SET_ATTR(name, ...) aclError name(aclopAttr *attr, const char *key, __VA_ARGS__) { (void)attr, (void)key; return ACL_SUCCESS; }
SET_ATTR(aclopSetAttrBool, uint8_t value __attribute__((unused)))
SET_ATTR(aclopSetAttrInt, int64_t value __attribute__((unused)))
SET_ATTR(aclopSetAttrFloat, float value __attribute__((unused)))
SET_ATTR(aclopSetAttrString, const char *value __attribute__((unused)))
SET_ATTR(aclopSetAttrDataType, aclDataType value __attribute__((unused)))
SET_ATTR(aclopSetAttrListBool, int count __attribute__((unused)), const uint8_t *values __attribute__((unused)))
SET_ATTR(aclopSetAttrListInt, int count __attribute__((unused)), const int64_t *values __attribute__((unused)))
SET_ATTR(aclopSetAttrListFloat, int count __attribute__((unused)), const float *values __attribute__((unused)))
SET_ATTR(aclopSetAttrListListInt, int count __attribute__((unused)), const int *sizes __attribute__((unused)),
         const int64_t *const values[] __attribute__((unused)))

aclError aclSetCompileopt(aclCompileOpt option, const char *value) { (void)option, (void)value; return ACL_SUCCESS; }

/* ---- what would compute ---- */

aclError aclopCompileAndExecute(const char *type, int inputs, const aclTensorDesc *const input_desc[],
                                const aclDataBuffer *const input[], int outputs, const aclTensorDesc *const output_desc[],
                                aclDataBuffer *const output[], const aclopAttr *attr, aclopEngineType engine,
                                aclopCompileType compile, const char *path, aclrtStream stream) {
    (void)inputs, (void)input_desc, (void)input, (void)outputs, (void)output_desc, (void)output;
    (void)attr, (void)engine, (void)compile, (void)path, (void)stream;
    return standin_error(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "operator %s: the stand-in for CANN does not compute", type);
}

aclError aclopCompileAndExecuteV2(const char *type, int inputs, aclTensorDesc *input_desc[], aclDataBuffer *input[],
                                  int outputs, aclTensorDesc *output_desc[], aclDataBuffer *output[], aclopAttr *attr,
                                  aclopEngineType engine, aclopCompileType compile, const char *path, aclrtStream stream) {
    (void)inputs, (void)input_desc, (void)input, (void)outputs, (void)output_desc, (void)output;
    (void)attr, (void)engine, (void)compile, (void)path, (void)stream;
    return standin_error(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "operator %s: the stand-in for CANN does not compute", type);
}

aclError aclrtBinaryLoadFromData(const void *data, size_t size, const aclrtBinaryLoadOptions *options, aclrtBinHandle *out) {
    (void)data, (void)size, (void)options, (void)out;
    return NO_COMPUTE(aclrtBinaryLoadFromData);
}
aclError aclrtBinaryGetFunction(const aclrtBinHandle binary, const char *name, aclrtFuncHandle *out) {
    (void)binary, (void)name, (void)out;
    return NO_COMPUTE(aclrtBinaryGetFunction);
}
aclError aclrtGetFunctionAddr(aclrtFuncHandle function, void **aicore, void **aivector) {
    (void)function, (void)aicore, (void)aivector;
    return NO_COMPUTE(aclrtGetFunctionAddr);
}
aclError aclrtLaunchKernel(aclrtFuncHandle function, uint32_t blocks, const void *args, size_t size, aclrtStream stream) {
    (void)function, (void)blocks, (void)args, (void)size, (void)stream;
    return NO_COMPUTE(aclrtLaunchKernel);
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    (void)ms, (void)start, (void)end;
    return NO_COMPUTE(aclrtEventElapsedTime); /* no device, so no device time either */
}
aclError aclmdlInitDump(void) { return NO_COMPUTE(aclmdlInitDump); }
aclError aclmdlSetDump(const char *path) { (void)path; return NO_COMPUTE(aclmdlSetDump); }
aclError aclmdlFinalizeDump(void) { return NO_COMPUTE(aclmdlFinalizeDump); }

/* Nothing is supported: aclGetDeviceCapability leaves 0 ("no") for every feature. */
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value) {
    (void)device, (void)info;
    *value = 0;
    return ACL_SUCCESS;
}

/* Private runtime entries that torch_npu links to. The wheel ships no header for them: every one fails. */
int rtDevBinaryRegister(void) { return NO_COMPUTE(rtDevBinaryRegister); }
int rtFunctionRegister(void) { return NO_COMPUTE(rtFunctionRegister); }
int rtGetC2cCtrlAddr(void) { return NO_COMPUTE(rtGetC2cCtrlAddr); }
int rtKernelLaunch(void) { return NO_COMPUTE(rtKernelLaunch); }

/* Profiling hooks: accepted and dropped. */
int32_t MsprofRegisterCallback(uint32_t module, void *handle) { (void)module, (void)handle; return 0; }
int32_t MsprofReportApi(uint32_t flag, const void *api) { (void)flag, (void)api; return 0; }
int32_t MsprofReportCompactInfo(uint32_t flag, const void *data, uint32_t size) { (void)flag, (void)data, (void)size; return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t flag, const void *data, uint32_t size) { (void)flag, (void)data, (void)size; return 0; }
uint64_t MsprofGetHashId(const char *text, size_t size) { (void)text; return size; }
uint64_t MsprofSysCycleTime(void) { return 0; }
