"""Builds the engines in C++ where a compiler and torch's headers are found; else the package is pure.

FASTCL_BUILD=0 leaves extensions out, FASTCL_BUILD=1 makes a failure to build it fatal. FASTCL_TORCH is the directory
of the torch package whose headers are used; by default torch is looked for in this environment, then in the one that
runs pip, since an isolated build environment has none. Nothing of torch is installed or changed: its headers are read,
and the extension names libtorch_cpu.so as a dependency, which `import torch` has always loaded before. It loads with
any torch from 2.11 on. All of this holds for both: ``fastcl._C`` for the CPU, and ``fastcl._cuda``.

The latter is built where there is nvcc and torch is a CUDA build. FASTCL_CUDA=0 leaves it out, FASTCL_CUDA=1 builds
it with any torch and makes a failure fatal. Architectures are those of TORCH_CUDA_ARCH_LIST from 8.0 up, else those of
the devices present, else 8.0 with code that later ones can use.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIMITED_API = "0x030A0000"  # Python 3.10
TORCH_TARGET = "0x020B000000000000"  # the stable ABI of torch 2.11
STABLE_HEADER = Path("torch", "csrc", "stable", "ops.h")
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
COMMON_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))  # once more, so that they have the last word
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
LEVEL_FLAGS = {
    "level_baseline.cpp": [],
    "level_avx2.cpp": ["-mavx2", "-mfma"],
    "level_avx512.cpp": AVX512,
    "level_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}


def torch_candidates():
    """Directories that may be a torch package, best first."""
    if "FASTCL_TORCH" in os.environ:
        yield Path(os.environ["FASTCL_TORCH"])
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    # sys.executable is the environment that pip was started from even in an isolated build.
    query = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    found = subprocess.run([sys.executable, "-c", query], env=environment, capture_output=True, text=True, check=False)
    if found.returncode == 0 and found.stdout.strip():
        yield Path(found.stdout.strip()).parent


def torch_package():
    """torch's directory, or an error that says what is missing."""
    for package in torch_candidates():
        if (package / "include" / STABLE_HEADER).is_file():
            return package
    raise CompileError("no torch >= 2.11 with its headers was found (FASTCL_TORCH may name the torch package)")


def level_sources():
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name, flags in LEVEL_FLAGS.items() if is_x86 or not flags]


def toolkit():
    """The CUDA toolkit's directory, or None."""
    if "CUDA_HOME" in os.environ:
        return Path(os.environ["CUDA_HOME"])
    if shutil.which("nvcc") is None:
        return None
    # nvcc may be a script that starts the toolkit's.
    told = subprocess.run(
        ["nvcc", "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else None


def builds_cuda():
    wanted = os.environ.get("FASTCL_CUDA")
    if wanted is not None or os.environ.get("FASTCL_BUILD") == "0":
        return wanted == "1"
    return toolkit() is not None and any((torch / "lib" / "libtorch_cuda.so").is_file() for torch in torch_candidates())


def architecture_flags():
    """nvcc's flags for the architectures to build for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = sorted(set(subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()))
    flags = []
    for name in listed or ["8.0+PTX"]:
        version = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if version is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has {name!r}, expected versions as in '8.0;9.0+PTX'")
        if int(version[1]) < 8:
            continue
        number = version[1] + version[2] + version[3]
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        if version[4]:
            flags += [f"-gencode=arch=compute_{number},code=compute_{number}"]
    if not flags:
        raise CompileError(f"the CUDA engine needs an architecture from 8.0 up, got {' '.join(listed)}")
    return flags


def builds_hopper():
    """Whether one of the architectures is 9.0, which has kernels of its own."""
    return any("code=sm_90" in flag for flag in architecture_flags())


class BuildEngine(build_ext):
    """Per-file flags and parallel compilation. Errors of an optional extension become warnings in setuptools."""

    def build_extensions(self):
        # nvcc works beside the host compiler.
        with ThreadPoolExecutor(1) as pool:
            self.kernels = pool.submit(self._compile_kernels) if CUDA_ENGINE in self.extensions else None
            super().build_extensions()

    def build_extension(self, ext):
        torch = torch_package()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        if ext is CUDA_ENGINE:
            ext.extra_objects += self.kernels.result()
            if builds_hopper():
                ext.define_macros.append(("FASTCL_HOPPER", None))
            home = toolkit()
            ext.include_dirs.append(str(next(home.glob("targets/*/include"), home / "include")))
            ext.library_dirs += [str(path) for path in (*home.glob("targets/*/lib"), home / "lib64") if path.is_dir()]
        self._compile_in_parallel()
        super().build_extension(ext)

    def _compile_kernels(self):
        """The object files of all CUDA kernels."""
        home = toolkit()
        if home is None:
            raise CompileError("no CUDA toolkit was found (CUDA_HOME may name it)")
        flags_of = {"engine": architecture_flags()}
        if builds_hopper():
            flags_of["engine"].append("-DFASTCL_HOPPER")
            flags_of["hopper"] = ["-gencode=arch=compute_90a,code=sm_90a"]
        objects = []
        for name, flags in flags_of.items():
            built = Path(self.build_temp, "csrc", "cuda", f"{name}.o")
            built.parent.mkdir(parents=True, exist_ok=True)
            common = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            self.spawn([str(home / "bin" / "nvcc"), *common, *flags, "-c", f"csrc/cuda/{name}.cu", "-o", str(built)])
            objects.append(str(built))
        return objects

    def _compile_in_parallel(self):
        compiler = self.compiler
        compile_one = compiler._compile

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None,
                        extra_postargs=None, depends=None):  # fmt: skip
            macros, objects, extra, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def work(obj):
                source, suffix = build[obj]
                compile_one(obj, source, suffix, cc_args, [*extra, *LEVEL_FLAGS.get(Path(source).name, [])], pp_opts)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(work, build))
            return objects

        compiler.compile = compile_all


ENGINE = Extension(
    "fastcl._C",
    sources=[
        "csrc/bindings.cpp",
        *(
            f"csrc/cpu/{name}.cpp"
            for name in (
                "levels",
                "schedule",
                "shared_operands",
                "statistics",
                "gradient",
                "cross_entropy",
                "sigmoid",
                "pairs",
                "triplets",
            )
        ),
        *(f"csrc/cpu/{name}" for name in level_sources()),
    ],
    depends=["setup.py", *map(str, sorted(Path("csrc").rglob("*.[hi]*")))],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
    extra_compile_args=COMMON_FLAGS,
    libraries=["torch_cpu"],
    language="c++",
    py_limited_api=True,
    optional=os.environ.get("FASTCL_BUILD") != "1",
)

CUDA_ENGINE = Extension(
    "fastcl._cuda",
    sources=["csrc/cuda_bindings.cpp"],
    depends=["setup.py", *map(str, sorted(Path("csrc").rglob("*.[hc]*")))],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
    extra_compile_args=[*COMMON_FLAGS, "-Wno-unknown-pragmas"],
    libraries=["torch_cpu", "cudart_static", "dl", "pthread", "rt"],
    language="c++",
    py_limited_api=True,
    optional=os.environ.get("FASTCL_CUDA") != "1",
)


EXTENSIONS = [ENGINE] if os.environ.get("FASTCL_BUILD") != "0" else []
if builds_cuda():
    EXTENSIONS.append(CUDA_ENGINE)

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildEngine},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
