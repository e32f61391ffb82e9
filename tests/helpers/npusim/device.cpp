// Computes aten operators of the real torch_npu on the host. The memory of the stand-in for CANN is host memory, so each
// PrivateUse1 kernel of torch_npu is replaced by one that runs the CPU kernel on aliases of the same bytes.
//
// Before it runs, every NPU tensor of a call is checked: all on one device, and every byte it may touch mapped there, as
// the stand-in's books have it. Copies of plain bytes go through the stand-in's aclrtMemcpyAsync, with its rules.
#include <ATen/ATen.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <set>

namespace {
using Stack = torch::jit::Stack;
constexpr auto NPU = c10::DeviceType::PrivateUse1;

std::mutex lock;
std::map<std::string, int64_t> seen;
std::vector<std::unique_ptr<torch::Library>> libraries;

// The stand-in's calls; it is loaded already, by torch_npu.
template <typename F>
F* from_cann(const char* name) {
  static void* library = dlopen("libascendcl.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, name) : nullptr;
  TORCH_CHECK(found, "npusim: ", name, " is not loaded; it needs the stand-in for CANN");
  return reinterpret_cast<F*>(found);
}
bool holds(const void* address, size_t size, int device) {
  static auto* ask = from_cann<int(const void*, size_t, int)>("cann_standin_holds");
  return ask(address, size, device) != 0;
}

void cann(int status, const char* call) {
  static auto* recent = from_cann<const char*()>("aclGetRecentErrMsg");
  TORCH_CHECK(!status, "npusim: ", call, " failed: ", recent() ? recent() : "");
}

// Somebody waits for what this device has been given.
void settle(c10::Device device) {
  static auto* wait = from_cann<int(int)>("cann_standin_settle");
  cann(wait(device.index()), "waiting for the device");
}

bool is_npu(const at::Tensor& t) { return t.defined() && t.device().type() == NPU; }

void check_mapped(const at::Tensor& t, const std::string& name) {
  if (!t.numel()) return;
  int64_t first = 0, last = 0;
  for (int64_t d = 0; d < t.dim(); d++) (t.stride(d) < 0 ? first : last) += (t.size(d) - 1) * t.stride(d);
  auto* base = static_cast<const char*>(t.const_data_ptr());
  const auto* begin = base + first * static_cast<int64_t>(t.itemsize());
  const size_t bytes = (last - first + 1) * t.itemsize();
  TORCH_CHECK(holds(begin, bytes, t.device().index()), "npusim: ", name, " would touch ", bytes, " bytes at ",
              static_cast<const void*>(begin), " of a ", t.dtype(), " ", t.sizes(), ", which are not all mapped on ", t.device());
}

struct Hold { c10::Storage storage; };
void drop(void* p) { delete static_cast<Hold*>(p); }

at::Tensor host_alias(const at::Tensor& t) {
  if (!is_npu(t)) return t;
  auto st = t.storage();
  c10::Storage cpu(c10::Storage::use_byte_size_t(), st.nbytes(),
                   c10::DataPtr(st.mutable_data(), new Hold{st}, &drop, c10::Device(c10::kCPU)), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(cpu), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

at::Tensor to_device(const at::Tensor& cpu, c10::Device device) {
  if (!cpu.defined() || device.type() != NPU || !cpu.device().is_cpu()) return cpu;
  auto src = cpu.resolve_conj().resolve_neg();
  auto out = at::empty_strided(src.sizes(), src.strides(), src.options().device(device).pinned_memory(false));
  if (src.numel()) host_alias(out).copy_(src);
  return out;
}

// Calls `each` for every tensor of a value; what it returns takes the tensor's place.
template <typename F>
c10::IValue map_tensors(const c10::IValue& v, const F& each) {
  if (v.isTensor()) return each(v.toTensor());
  if (v.isTensorList()) {
    c10::List<at::Tensor> out;
    for (at::Tensor t : v.toTensorList()) out.push_back(each(t));
    return out;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (std::optional<at::Tensor> t : v.toOptionalTensorList())
      out.push_back(t ? std::optional<at::Tensor>(each(*t)) : std::nullopt);
    return out;
  }
  return v;
}

// Operators that answer the host with a value.
const std::set<std::string> WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"};

// One call of an operator, from NPU tensors to host aliases and back.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), stack_(stack), count_(op.schema().arguments().size()), base_(stack->size() - count_),
        original_(stack->begin() + base_, stack->end()), name_(toString(op.operator_name())) {
    std::lock_guard<std::mutex> guard(lock);
    seen[name_]++;
  }

  void run() {
    for (size_t i = 0; i < count_; i++) take(i);
    if (!asked_ && !device_)  // a factory without a device: the default is this one
      for (size_t i = 0; i < count_; i++)
        if (argument(i).name() == "device") (*stack_)[base_ + i] = c10::Device(c10::kCPU);
    if (device_ && WAITS.count(name_)) settle(*device_);
    op_.callBoxed(stack_);
    for (auto& [npu, cpu] : written_) {
      if (npu.sizes() == cpu.sizes() && cpu.numel() && npu.data_ptr() == cpu.data_ptr()) continue;
      if (npu.sizes() != cpu.sizes()) npu.resize_(cpu.sizes());
      if (cpu.numel()) host_alias(npu).copy_(cpu);
    }
    const c10::Device target = asked_ ? *asked_ : device_ ? *device_ : c10::Device(NPU);
    const auto& returns = op_.schema().returns();
    for (size_t r = 0; r < returns.size(); r++) give(returns[r], (*stack_)[stack_->size() - returns.size() + r], target);
  }

 private:
  const c10::Argument& argument(size_t i) const { return op_.schema().arguments()[i]; }

  at::Tensor alias(const at::Tensor& t) {
    if (!is_npu(t)) return t;
    if (!device_) device_ = t.device();
    TORCH_CHECK(t.device() == *device_, "npusim: ", name_, " gets tensors of ", *device_, " and ", t.device());
    check_mapped(t, name_);
    return host_alias(t);
  }

  void take(size_t i) {
    auto& v = (*stack_)[base_ + i];
    const bool writes = argument(i).alias_info() && argument(i).alias_info()->isWrite();
    if (v.isTensor() && writes && is_npu(v.toTensor())) {
      auto npu = v.toTensor();
      auto cpu = alias(npu);
      if (!npu.numel()) cpu = at::empty({0}, npu.options().device(c10::kCPU)).resize_(npu.sizes());  // it may grow
      written_.emplace_back(npu, cpu);
      v = cpu;
    } else if (v.isDevice()) {
      asked_ = v.toDevice();
      if (asked_->type() == NPU) v = c10::Device(c10::kCPU);
    } else if (v.isGenerator()) {
      if (v.toGenerator().device().type() == NPU) v = c10::IValue();
    } else if (argument(i).name() == "pin_memory" && v.isBool()) {
      v = c10::IValue();
    } else {
      v = map_tensors(v, [&](const at::Tensor& t) { return alias(t); });
    }
  }

  void give(const c10::Argument& declared, c10::IValue& v, c10::Device target) {
    if (declared.alias_info() && declared.alias_info()->isWrite()) {
      for (size_t i = 0; i < count_; i++)
        if (argument(i).alias_info() && *argument(i).alias_info() == *declared.alias_info()) {
          v = original_[i];
          return;
        }
    }
    v = map_tensors(v, [&](const at::Tensor& t) { return to_device(t, target); });
  }

  const c10::OperatorHandle& op_;
  Stack* stack_;
  const size_t count_, base_;
  const std::vector<c10::IValue> original_;
  const std::string name_;
  std::optional<c10::Device> device_, asked_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

void on_host(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

// Bytes as they are, by the stand-in, which knows addresses, devices and peers.
void copy_bytes(const at::Tensor& to, const at::Tensor& from) {
  static auto* copy = from_cann<int(void*, size_t, const void*, size_t, int, void*)>("aclrtMemcpyAsync");
  static auto* get = from_cann<int(int32_t*)>("aclrtGetDevice");
  static auto* set = from_cann<int(int32_t)>("aclrtSetDevice");
  static auto* peer = from_cann<int(int32_t, uint32_t)>("aclrtDeviceEnablePeerAccess");
  const int device = (is_npu(to) ? to : from).device().index();
  int32_t before = -1;
  const bool had_one = get(&before) == 0;
  if (before != device) cann(set(device), "aclrtSetDevice");
  if (is_npu(to) && is_npu(from) && to.device() != from.device()) cann(peer(from.device().index(), 0), "aclrtDeviceEnablePeerAccess");
  const int kind = is_npu(to) ? (is_npu(from) ? 3 : 1) : 2;  // aclrtMemcpyKind
  cann(copy(to.mutable_data_ptr(), to.nbytes(), from.const_data_ptr(), from.nbytes(), kind, nullptr), "aclrtMemcpyAsync");
  if (had_one && before != device) cann(set(before), "aclrtSetDevice");
}

// To pinned host memory without waiting: the bytes come when somebody waits for them. False: nothing was done.
bool arrives_late(const at::Tensor& to, const at::Tensor& from) {
  static auto* late = from_cann<int(void*, const void*, size_t, int, void (*)(void*), void*)>("cann_standin_arrives_late");
  if (!to.is_pinned()) return false;
  check_mapped(from, "aten::copy_");
  auto* held = new at::Tensor(to);
  const bool is = late(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes(), from.device().index(),
                       [](void* tensor) { delete static_cast<at::Tensor*>(tensor); }, held);
  if (!is) delete held;
  return is;
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  {
    std::lock_guard<std::mutex> guard(lock);
    seen["aten::copy_"]++;
  }
  const bool plain = self.sizes() == src.sizes() && self.dtype() == src.dtype() && self.is_contiguous() &&
                     src.is_contiguous() && !src.is_conj() && !src.is_neg() && !self.is_conj() && !self.is_neg();
  if (plain) {
    if (!self.numel()) return self;
    const bool to_host = is_npu(src) && !is_npu(self);
    if (to_host && non_blocking && arrives_late(self, src)) return self;
    if (to_host) settle(src.device());
    copy_bytes(self, src);
    return self;
  }
  if (is_npu(self) && is_npu(src) && self.device() != src.device()) {  // another layout or dtype: at the source first
    copy(self, src.to(self.dtype()).expand(self.sizes()).contiguous().to(self.device()), false);
    return self;
  }
  for (const at::Tensor& t : {self, src})
    if (is_npu(t)) check_mapped(t, "aten::copy_");
  host_alias(self).copy_(host_alias(src));
  return self;
}

at::Tensor contiguous(const at::Tensor& self, at::MemoryFormat format) {
  return self.is_contiguous(format) ? self : self.clone(format);
}
at::Tensor clone(const at::Tensor& self, std::optional<at::MemoryFormat> format) {
  check_mapped(self, "aten::clone");
  return to_device(host_alias(self).clone(format), self.device());
}

// Memory, views and bookkeeping stay torch_npu's.
const std::set<std::string> KEPT = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty_strided", "aten::resize_",
    "aten::record_stream", "aten::is_pinned", "aten::_pin_memory", "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor", "aten::set_", "aten::resize_as_",
    "aten::is_set_to", "aten::contiguous", "aten::clone", "aten::copy_", "aten::_to_copy"};

int64_t install() {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto lib = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  int64_t count = 0;
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0 || KEPT.count(toString(name))) continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema() || !op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    bool view = false;
    for (auto& r : op->schema().returns()) view |= r.alias_info() && !r.alias_info()->isWrite();
    if (view) continue;
    lib->impl(toString(name).substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
    count++;
  }
  lib->impl("contiguous", TORCH_FN(contiguous));
  lib->impl("clone", TORCH_FN(clone));
  lib->impl("copy_", TORCH_FN(copy));
  lib->impl("_to_copy", TORCH_FN(at::native::_to_copy));  // an empty tensor, and copy_
  libraries.push_back(std::move(lib));
  return count;
}

std::vector<std::string> calls() {
  std::lock_guard<std::mutex> guard(lock);
  std::vector<std::string> out;
  for (auto& [name, count] : seen) out.push_back(name + " " + std::to_string(count));
  return out;
}

at::Tensor checked_alias(const at::Tensor& t, const std::string& name) {
  if (is_npu(t)) check_mapped(t, name);
  return host_alias(t);
}
}  // namespace

TORCH_LIBRARY(npusim, m) {
  m.def("alias(Tensor x, str name) -> Tensor", torch::CppFunction(TORCH_FN(checked_alias)));
  m.def("install() -> int", torch::CppFunction(TORCH_FN(install)));
  m.def("calls() -> str[]", torch::CppFunction(TORCH_FN(calls)));
}
