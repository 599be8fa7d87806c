"""A trained model as a program of torch.export or an ONNX file, which answer images without this package.

from modeling_bpgcn.export import export_onnx

export_onnx(model, "model.onnx", image_size=224, image_processor=processor)
"""

from .agreement import Agreement, compare
from .files import export_onnx, run_file, save_program
from .program import BANKS, bank_inputs, export_program

__all__ = ["BANKS", "Agreement", "bank_inputs", "compare", "export_onnx", "export_program", "run_file", "save_program"]
