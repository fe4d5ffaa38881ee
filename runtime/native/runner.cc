// Runs one compiled library on a device: no Python, no C++ standard library, only TVM's C interface.
//
//     runner PLAN
//
// PLAN is a text file, one item a line, fields separated by one space, a path being the rest of its line:
//
//     library PATH                                     the shared library; it holds a Relax VM executable
//     function NAME                                    the VM function to call (main)
//     threads N                                        of the pool that kernels run on
//     warmup N, repeat N                               calls before timing, calls timed
//     weights PATH                                     mapped into memory, read-only
//     parameter DTYPE RANK DIM... OFFSET NBYTES        a tensor inside the weights file
//     input DTYPE RANK DIM... PATH                     a tensor's raw bytes, in the order of the arguments
//     output PATH                                      folder for the results
//
// The function gets the inputs, then one array of all parameters; it returns a tensor or an array of tensors. Into the
// output folder go 0.bin, 1.bin, ... (raw bytes) and results.txt: "output DTYPE RANK DIM..." for each tensor and
// "seconds S" for each timed call. When anything fails, one line on stderr and exit status 1, or 2 when the function
// itself raised an error.

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "pool.h"

namespace {

constexpr int kPooledAllocator = 2;  // VirtualMachine.POOLED_ALLOCATOR
constexpr size_t kAlignment = 64;    // what TVM's generated code assumes of every tensor
constexpr int kMaxRank = 64;
constexpr int kRaised = 2;  // exit status when the function itself raised an error

int status_of_failure = 1;

[[noreturn]] void Fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  exit(status_of_failure);
}

// A growing array for plain values.
template <typename T>
struct List {
  T* data = nullptr;
  int size = 0;
  void Add(const T& value) {
    if ((size & (size - 1)) == 0) {
      data = static_cast<T*>(realloc(data, sizeof(T) * (size ? 2 * size : 1)));
      if (data == nullptr) Fail("out of memory");
    }
    data[size++] = value;
  }
};

// --- TVM values ------------------------------------------------------------------------------------------------

void Check(int status, const char* doing) {
  if (status == 0) return;
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == nullptr) Fail("%s: failed without a message", doing);
  const TVMFFIByteArray& text = TVMFFIErrorGetCellPtr(error)->message;
  size_t length = 0;
  while (length < text.size && text.data[length] != '\n') ++length;
  Fail("%s: %.*s", doing, static_cast<int>(length), text.data);
}

TVMFFIAny None() {
  TVMFFIAny value;
  memset(&value, 0, sizeof(value));
  value.type_index = kTVMFFINone;
  return value;
}

TVMFFIAny Integer(int64_t number) {
  TVMFFIAny value = None();
  value.type_index = kTVMFFIInt;
  value.v_int64 = number;
  return value;
}

TVMFFIAny Text(const char* text) {
  TVMFFIAny value = None();
  value.type_index = kTVMFFIRawStr;
  value.v_c_str = text;
  return value;
}

TVMFFIAny Object(TVMFFIObjectHandle object, int type_index) {
  TVMFFIAny value = None();
  value.type_index = type_index;
  value.v_obj = static_cast<TVMFFIObject*>(object);
  return value;
}

void Release(const TVMFFIAny& value) {
  if (value.type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(value.v_obj);
}

TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, const char* doing) {
  TVMFFIAny result = None();
  Check(TVMFFIFunctionCall(function, arguments, count, &result), doing);
  return result;
}

template <typename... Arguments>
TVMFFIAny CallGlobal(const char* name, Arguments... arguments) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  Check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == nullptr) Fail("TVM's runtime has no %s; expected the version the library was built with", name);
  TVMFFIAny list[] = {arguments...};
  return Call(function, list, sizeof...(arguments), name);
}

TVMFFIObjectHandle Member(const TVMFFIAny& module, const char* name) {
  TVMFFIAny query_imports = Integer(0);
  query_imports.type_index = kTVMFFIBool;
  TVMFFIAny found = CallGlobal("ffi.ModuleGetFunction", module, Text(name), query_imports);
  if (found.type_index != kTVMFFIFunction) Fail("the library has no function %s; compile the model again", name);
  return found.v_obj;
}

size_t BytesOf(const DLTensor& tensor) {
  size_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= static_cast<size_t>(tensor.shape[i]);
  return count * ((tensor.dtype.bits * tensor.dtype.lanes + 7) / 8);
}

// --- files -----------------------------------------------------------------------------------------------------

struct Mapping {
  char* data;
  size_t size;
};

// Private, so that code which writes into its inputs cannot change the file.
Mapping Map(const char* path) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  struct stat about;
  if (file < 0 || fstat(file, &about) != 0) Fail("%s: cannot be opened", path);
  size_t size = static_cast<size_t>(about.st_size);
  static char nothing[kAlignment] __attribute__((aligned(kAlignment)));
  if (size == 0) {
    close(file);
    return {nothing, 0};
  }
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  if (data == MAP_FAILED) Fail("%s: cannot be mapped into memory", path);
  close(file);
  return {static_cast<char*>(data), size};
}

void WriteFile(const char* folder, int index, const void* data, size_t size) {
  char path[4096];
  snprintf(path, sizeof(path), "%s/%d.bin", folder, index);
  FILE* file = fopen(path, "wb");
  if (file == nullptr || fwrite(data, 1, size, file) != size || fclose(file) != 0) Fail("%s: cannot be written", path);
}

// --- the plan --------------------------------------------------------------------------------------------------

struct Fields {
  char* rest;
  char* Next() {
    char* word = strsep(&rest, " ");
    if (word == nullptr || *word == '\0') Fail("the plan is cut short");
    return word;
  }
  int64_t Number() {
    char* end = nullptr;
    const char* word = Next();
    int64_t number = strtoll(word, &end, 10);
    if (*end != '\0' || number < 0) Fail("the plan has %s where a number is expected", word);
    return number;
  }
};

struct Plan {
  const char* library = nullptr;
  const char* function = "main";
  const char* output = nullptr;
  int64_t warmup = 0, repeat = 1;
  Mapping weights = {nullptr, 0};
  List<TVMFFIAny> inputs, parameters;
};

// The type and shape that follow in the line, as a tensor that is never freed: the process ends with it.
DLManagedTensor* ReadTensor(Fields* fields) {
  auto* tensor = static_cast<DLManagedTensor*>(calloc(1, sizeof(DLManagedTensor)));
  const char* dtype = fields->Next();
  TVMFFIByteArray text = {dtype, strlen(dtype)};
  Check(TVMFFIDataTypeFromString(&text, &tensor->dl_tensor.dtype), dtype);
  int64_t rank = fields->Number();
  if (rank > kMaxRank) Fail("the plan has a tensor of rank %lld", static_cast<long long>(rank));
  tensor->dl_tensor.ndim = static_cast<int32_t>(rank);
  tensor->dl_tensor.shape = static_cast<int64_t*>(calloc(static_cast<size_t>(rank) + 1, sizeof(int64_t)));
  for (int64_t i = 0; i < rank; ++i) tensor->dl_tensor.shape[i] = fields->Number();
  tensor->dl_tensor.device = {kDLCPU, 0};
  return tensor;
}

TVMFFIAny Finish(DLManagedTensor* tensor, char* data) {
  tensor->dl_tensor.data = data;
  TVMFFIObjectHandle handle = nullptr;
  Check(TVMFFITensorFromDLPack(tensor, kAlignment, 1, &handle), "make a tensor");
  return Object(handle, kTVMFFITensor);
}

void ReadItem(const char* key, Fields fields, Plan* plan) {
  if (strcmp(key, "library") == 0) {
    plan->library = fields.rest;
  } else if (strcmp(key, "function") == 0) {
    plan->function = fields.rest;
  } else if (strcmp(key, "output") == 0) {
    plan->output = fields.rest;
  } else if (strcmp(key, "threads") == 0) {
    graphwright_pool_use(static_cast<int>(fields.Number()));
  } else if (strcmp(key, "warmup") == 0) {
    plan->warmup = fields.Number();
  } else if (strcmp(key, "repeat") == 0) {
    plan->repeat = fields.Number();
  } else if (strcmp(key, "weights") == 0) {
    plan->weights = Map(fields.rest);
  } else if (strcmp(key, "parameter") == 0) {
    DLManagedTensor* tensor = ReadTensor(&fields);
    size_t offset = static_cast<size_t>(fields.Number()), size = static_cast<size_t>(fields.Number());
    if (size != BytesOf(tensor->dl_tensor) || offset > plan->weights.size || size > plan->weights.size - offset) {
      Fail("parameter %d lies outside the weights file; copy the artifact again", plan->parameters.size);
    }
    plan->parameters.Add(Finish(tensor, plan->weights.data + (size ? offset : 0)));
  } else if (strcmp(key, "input") == 0) {
    DLManagedTensor* tensor = ReadTensor(&fields);
    Mapping file = Map(fields.rest);
    if (file.size != BytesOf(tensor->dl_tensor)) Fail("%s: has not the size of its shape", fields.rest);
    plan->inputs.Add(Finish(tensor, file.data));
  } else {
    Fail("the plan has an item %s, which this runner does not know", key);
  }
}

void ReadPlan(const char* path, Plan* plan) {
  FILE* file = fopen(path, "r");
  if (file == nullptr) Fail("%s: cannot be opened", path);
  char* line = nullptr;
  size_t room = 0;
  for (ssize_t length; (length = getline(&line, &room, file)) > 0;) {
    if (line[length - 1] == '\n') line[length - 1] = '\0';
    Fields fields = {strdup(line)};  // kept: the plan points into it
    const char* key = strsep(&fields.rest, " ");
    if (fields.rest == nullptr || *fields.rest == '\0') Fail("the plan's item %s has no value", key);
    ReadItem(key, fields, plan);
  }
  free(line);
  fclose(file);
  if (plan->library == nullptr || plan->output == nullptr) Fail("%s: names no library or no output folder", path);
}

// --- the run ---------------------------------------------------------------------------------------------------

double Now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void SaveTensor(const TVMFFIAny& value, const char* folder, int index, FILE* results) {
  if (value.type_index != kTVMFFITensor) Fail("result %d is not a tensor", index);
  const DLTensor& tensor = *TVMFFITensorGetDLTensorPtr(value.v_obj);
  TVMFFIAny name = None();
  Check(TVMFFIDataTypeToString(&tensor.dtype, &name), "name a type");
  TVMFFIByteArray text = name.type_index == kTVMFFISmallStr ? TVMFFISmallBytesGetContentByteArray(&name)
                                                            : *TVMFFIBytesGetByteArrayPtr(name.v_obj);
  fprintf(results, "output %.*s %d", static_cast<int>(text.size), text.data, tensor.ndim);
  for (int i = 0; i < tensor.ndim; ++i) fprintf(results, " %lld", static_cast<long long>(tensor.shape[i]));
  fputc('\n', results);
  WriteFile(folder, index, static_cast<const char*>(tensor.data) + tensor.byte_offset, BytesOf(tensor));
}

void SaveResult(const TVMFFIAny& result, const char* folder, FILE* results) {
  if (result.type_index != kTVMFFIArray) {
    SaveTensor(result, folder, 0, results);
    return;
  }
  int64_t count = CallGlobal("ffi.ArraySize", result).v_int64;
  for (int64_t i = 0; i < count; ++i) {
    TVMFFIAny item = CallGlobal("ffi.ArrayGetItem", result, Integer(i));
    SaveTensor(item, folder, static_cast<int>(i), results);
    Release(item);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) Fail("usage: runner PLAN");
  Plan plan;
  ReadPlan(argv[1], &plan);

  TVMFFIAny library = CallGlobal("ffi.ModuleLoadFromFile", Text(plan.library));
  graphwright_pool_adopt(plan.library);
  TVMFFIAny machine = Call(Member(library, "vm_load_executable"), nullptr, 0, "load the executable");
  TVMFFIAny devices[] = {Integer(kDLCPU), Integer(0), Integer(kPooledAllocator)};
  Release(Call(Member(machine, "vm_initialization"), devices, 3, "start the virtual machine"));
  TVMFFIObjectHandle function = Member(machine, plan.function);

  TVMFFIByteArray make_array = {"ffi.Array", 9};
  TVMFFIObjectHandle array = nullptr;
  Check(TVMFFIFunctionGetGlobal(&make_array, &array), "ffi.Array");
  plan.inputs.Add(Call(array, plan.parameters.data, plan.parameters.size, "gather the parameters"));

  char path[4096];
  snprintf(path, sizeof(path), "%s/results.txt", plan.output);
  FILE* results = fopen(path, "w");
  if (results == nullptr) Fail("%s: cannot be written", path);
  TVMFFIAny result = None();
  for (int64_t i = 0; i < plan.warmup + plan.repeat; ++i) {
    Release(result);
    double start = Now();
    status_of_failure = kRaised;
    result = Call(function, plan.inputs.data, plan.inputs.size, plan.function);
    status_of_failure = 1;
    if (i >= plan.warmup) fprintf(results, "seconds %.9f\n", Now() - start);
  }
  SaveResult(result, plan.output, results);
  if (fclose(results) != 0) Fail("%s: cannot be written", path);
  // Without the destructors of TVM's libraries, whose threads may still wait for work.
  fflush(stderr);
  _exit(0);
}
