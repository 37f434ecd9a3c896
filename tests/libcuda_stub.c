// A CUDA driver without a card behind it, for tests of the launch path: it answers what Triton asks of libcuda.so.1 as
// an H100 would, and writes a line for each launch to the file that LAUNCHES names. The sizes of a launch's parameters
// are those that the kernel's own image states.

#include <cuda.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 256, KPARAM_INFO = 0x17, WITH_SIZE = 4 };

struct Kernel {
  int parameters;
  unsigned sizes[MOST_PARAMETERS];  // bytes
};

// The attributes of a section .nv.info.<kernel>: a format and a kind, then two bytes, or their number and so many.
static void read_attributes(struct Kernel* kernel, const unsigned char* at, const unsigned char* end) {
  while (at < end) {
    unsigned short size;
    memcpy(&size, at + 2, 2);
    if (at[0] == WITH_SIZE && at[1] == KPARAM_INFO) {
      unsigned short ordinal;
      unsigned flags;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&flags, at + 12, 4);
      kernel->sizes[ordinal] = flags >> 18;
      if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
    }
    at += at[0] == WITH_SIZE ? 4 + size : 4;
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const unsigned char* bytes = image;
  const Elf64_Ehdr* file = image;
  const Elf64_Shdr* sections = (const void*)(bytes + file->e_shoff);
  const char* names = (const char*)bytes + sections[file->e_shstrndx].sh_offset;
  struct Kernel* kernel = calloc(1, sizeof *kernel);
  for (int i = 0; i < file->e_shnum; i++) {
    const unsigned char* start = bytes + sections[i].sh_offset;
    if (!strncmp(names + sections[i].sh_name, ".nv.info.", 9))
      read_attributes(kernel, start, start + sections[i].sh_size);
  }
  *module = (CUmodule)kernel;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  (void)name;  // a module of Triton's has one kernel
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void** parameters, void** extra) {
  (void)extra;
  const struct Kernel* kernel = (const struct Kernel*)function;
  FILE* log = fopen(getenv("LAUNCHES"), "a");
  if (!log) return CUDA_ERROR_UNKNOWN;
  fprintf(log, "grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p function=%p", launch->gridDimX, launch->gridDimY,
          launch->gridDimZ, launch->blockDimX, launch->blockDimY, launch->blockDimZ, launch->sharedMemBytes,
          (void*)launch->hStream, (void*)function);
  fprintf(log, " cooperative=");
  for (unsigned i = 0; i < launch->numAttrs; i++)
    if (launch->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) fprintf(log, "%d", launch->attrs[i].value.cooperative);
  fprintf(log, " attributes=%u parameters=", launch->numAttrs);
  for (int i = 0; i < kernel->parameters; i++) {
    for (unsigned j = 0; j < kernel->sizes[i]; j++) fprintf(log, "%02x", ((unsigned char*)parameters[i])[j]);
    fprintf(log, i + 1 < kernel->parameters ? "," : "\n");
  }
  fclose(log);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// Any memory will do for a tensor: nothing runs.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return (void)attribute, *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  return (void)error, *text = "an error of the stub", CUDA_SUCCESS;
}

// What there is nothing to say to.
CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return (void)device, cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return (void)function, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return (void)function, (void)config, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return (void)stream, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
