"""The ctypes declarations of the Ascend backend against CANN's own headers, as the torch_npu wheel ships them."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from elasticmoe_sglang.hmm.vmm import acl
from tests.helpers import torch_npu_wheel

pytestmark = pytest.mark.toolchain

STRUCTS = {"aclrtMemLocation": acl.MemLocation, "aclrtPhysicalMemProp": acl.PhysicalMemProp}

ENUMERATORS = {
    "ACL_MEM_HANDLE_TYPE_NONE": acl.MEM_HANDLE_TYPE_NONE,
    "ACL_MEM_ALLOCATION_TYPE_PINNED": acl.MEM_ALLOCATION_TYPE_PINNED,
    "ACL_HBM_MEM": acl.HBM_MEM,
    "ACL_HBM_MEM_HUGE": acl.HBM_MEM_HUGE,
    "ACL_MEM_LOCATION_TYPE_DEVICE": acl.MEM_LOCATION_TYPE_DEVICE,
    "ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM": acl.GRANULARITY_MINIMUM,
    "ACL_RT_VMM_EXPORT_FLAG_DISABLE_PID_VALIDATION": acl.EXPORT_WITHOUT_PID_VALIDATION,
    "ACL_MEMCPY_DEVICE_TO_DEVICE": acl.MEMCPY_DEVICE_TO_DEVICE,
    "ACL_SUCCESS": acl.SUCCESS,
    "ACL_ERROR_REPEAT_INITIALIZE": acl.REPEAT_INITIALIZE,
    "ACL_ERROR_RT_CONTEXT_NULL": acl.CONTEXT_NULL,
}

C_TYPES = {
    ctypes.c_void_p: "void *",
    ctypes.c_char_p: "const char *",
    ctypes.c_size_t: "size_t",
    ctypes.c_int32: "int32_t",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.POINTER(ctypes.c_void_p): "void **",
    ctypes.POINTER(ctypes.c_int32): "int32_t *",
    ctypes.POINTER(ctypes.c_uint32): "uint32_t *",
    ctypes.POINTER(ctypes.c_uint64): "uint64_t *",
    ctypes.POINTER(ctypes.c_size_t): "size_t *",
    ctypes.POINTER(acl.PhysicalMemProp): "aclrtPhysicalMemProp *",
}

# What ctypes cannot say: const, and which enumeration an int is.
SPELLED = {
    ("aclrtGetMemInfo", 0): "aclrtMemAttr",
    ("aclrtMallocPhysical", 2): "const aclrtPhysicalMemProp *",
    ("aclrtMemcpyAsync", 2): "const void *",
    ("aclrtMemcpyAsync", 4): "aclrtMemcpyKind",
    ("aclrtMemGetAllocationGranularity", 1): "aclrtMemGranularityOptions",
    ("aclrtMemExportToShareableHandle", 1): "aclrtMemHandleType",
}


@pytest.fixture(scope="module")
def compile_c(tmp_path_factory: pytest.TempPathFactory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    try:
        include = torch_npu_wheel.include_dir()
    except torch_npu_wheel.WheelMissing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("headers")

    def compile_(body: str) -> subprocess.CompletedProcess[str]:
        source = folder / "probe.c"
        headers = ("acl/acl.h", "acl/error_codes/rt_error_codes.h", "stddef.h", "stdio.h", "stdint.h")
        source.write_text("".join(f"#include <{name}>\n" for name in headers) + body)
        command = [compiler, "-std=c11", "-Wall", "-Werror", "-Wno-unused", "-I", str(include), str(source), "-c"]
        return subprocess.run(
            [*command, "-o", str(folder / "probe.o")], capture_output=True, text=True, timeout=60, check=False
        )

    def run(body: str) -> str:
        done = compile_(body)
        assert done.returncode == 0, done.stderr
        subprocess.run([compiler, str(folder / "probe.o"), "-o", str(folder / "probe")], check=True, timeout=60)
        return subprocess.run([folder / "probe"], capture_output=True, text=True, check=True, timeout=10).stdout

    return compile_, run


def prototypes(change: tuple[str, int, str] | None = None) -> str:
    """One function pointer a call; initialising it from the header's function compiles only for equal types."""
    lines = []
    for name, arguments in acl.SIGNATURES.items():
        types = []
        for index, argument in enumerate(arguments):
            spelled = SPELLED.get((name, index))
            types.append(spelled or C_TYPES[argument])
        if change and change[0] == name:
            types[change[1]] = change[2]
        lines.append(f"static aclError (*const p_{name})({', '.join(types)}) = {name};\n")
    enums = {spelled for spelled in SPELLED.values() if spelled.startswith("aclrt")}
    lines += [f'_Static_assert(sizeof({enum}) == sizeof(int), "{enum}");\n' for enum in sorted(enums)]
    return "".join(lines)


def test_signatures_are_the_headers(compile_c) -> None:
    done = compile_c[0](prototypes())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change",
    [("aclrtMapMem", 1, "uint32_t"), ("aclrtReleaseMemAddress", 0, "uint64_t"), ("aclrtMallocPhysical", 3, "int")],
)
def test_a_wrong_signature_would_be_seen(compile_c, change: tuple[str, int, str]) -> None:
    assert compile_c[0](prototypes(change)).returncode != 0


def test_struct_layouts_are_the_headers(compile_c) -> None:
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("%zu ", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(f'printf("%zu %zu ", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
    measured = [int(word) for word in compile_c[1]("int main(void) {" + "".join(lines) + "}").split()]
    declared = []
    for struct in STRUCTS.values():
        declared.append(ctypes.sizeof(struct))
        for field, *_ in struct._fields_:
            declared += [getattr(struct, field).offset, getattr(struct, field).size]
    assert measured == declared


def test_constants_and_error_codes_are_the_headers(compile_c) -> None:
    names = {**ENUMERATORS, **{meaning.name: code for code, meaning in acl.CODES.items()}}
    prints = "".join(f'printf("\\"{name}\\": %ld{{}}", (long){name});'.replace("{}", ",") for name in names)
    text = compile_c[1]('int main(void) { printf("{");' + prints + 'printf("\\"end\\": 0}"); }')
    measured = json.loads(text)
    del measured["end"]
    assert measured == names


def test_every_code_of_the_header_becomes_an_exception_of_its_range(compile_c) -> None:
    text = (Path(torch_npu_wheel.include_dir()) / "acl/error_codes/rt_error_codes.h").read_text()
    codes = [int(line.split()[2]) for line in text.splitlines() if line.startswith("#define  ACL_ERROR")]
    assert len(codes) > 100
    assert all(issubclass(acl.explain(code).error, acl.DriverError) for code in codes)
    assert not [code for code in codes if acl.explain(code).text == "an unknown failure"]
