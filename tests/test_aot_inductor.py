"""AOTInductor's packages of models with fastnn's operators: loaded in Python, and by a C++ program."""

import os
import subprocess
import sysconfig
from pathlib import Path

import fusing
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fastnn

PROGRAM = r"""
#include <ATen/ops/ones.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

// Arguments: libpython, for which fastnn's extension asks; the extension, which registers the operators; the package;
// and the threads. Prints the results for an input of ones.
int main(int, char** argv) {
  for (int i : {1, 2}) {
    if (!dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL)) {
      std::fprintf(stderr, "%s\n", dlerror());
      return 1;
    }
  }
  torch::inductor::AOTIModelPackageLoader model(argv[3]);
  const auto outputs = model.run({at::ones({2, 3, 12, 12})});
  const at::Tensor result = outputs[0].contiguous();
  for (int64_t i = 0; i < result.numel(); ++i) std::printf("%.9g\n", result.data_ptr<float>()[i]);
}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(200, 6), nn.ReLU(), nn.Linear(6, 4)),
    ).eval()
    exported = torch.export.export(fusing.fused_copy(model), (torch.randn(2, 3, 12, 12),))
    assert any("fastnn" in str(node.target) for node in exported.graph.nodes)
    return Path(fusing.package(exported, tmp_path_factory.mktemp("package") / "model.pt2")), model


def test_in_python(package: tuple[Path, nn.Module]) -> None:
    path, model = package
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert_close(torch._inductor.aoti_load_package(str(path))(x), model(x))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_ENABLE_SHARED"), reason="this Python has no shared library")
def test_in_a_program(package: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = package
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    torch_root = Path(torch.__file__).parent
    include, library = torch_root / "include", torch_root / "lib"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", str(source), "-o", str(program)]
    command += ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    command += [
        f"-L{library}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        f"-Wl,-rpath,{library}",
        "-Wl,--no-as-needed",
    ]
    subprocess.run(command, check=True, timeout=600)
    python = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("INSTSONAME")
    run = [str(program), str(python), fastnn._C.__file__, str(path)]
    output = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300).stdout
    with torch.no_grad():
        expected = model(torch.ones(2, 3, 12, 12))
    assert_close(torch.tensor([float(line) for line in output.split()]).reshape(expected.shape), expected)
