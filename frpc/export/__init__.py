"""Exports: an explainer as a file that runs without frpc.

frpc.export.onnx(explainer, "model.onnx")
frpc.export.verify("model.onnx", explainer)
"""

from frpc.export.question import Question, Signature
from frpc.export.to_aoti import aoti
from frpc.export.to_onnx import onnx
from frpc.export.to_torch import torch_export
from frpc.export.verification import Report, open_file, verify

__all__ = ["Question", "Report", "Signature", "aoti", "onnx", "open_file", "torch_export", "verify"]
