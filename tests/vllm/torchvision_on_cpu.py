"""Lets a torchvision that was built for CUDA import beside a torch for CPUs, as vLLM's build for CPUs installs them.

Such a torchvision cannot load its compiled operators, and stops at the first one that it describes. Nothing here uses
them: declaring the two is enough. `make test-vllm` lays this file beside a .pth file that imports it.
"""

import importlib.abc
import importlib.metadata
import sys


class _Before(importlib.abc.MetaPathFinder):
    """Runs once, before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.backends.cuda.is_built() and "+cpu" not in importlib.metadata.version("torchvision"):
                _Before.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    _Before.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


sys.meta_path.insert(0, _Before())
