"""sentence-transformers in one process, without HTTP: what a server for embeddings has to be better than.

in_process.py FOLDER BACKEND PRECISION THREADS, in the encoders' environment; BACKEND is torch, onnx or openvino. Reads
a line of JSON for a measurement ({"texts": [[...]], "seconds": s}) and answers with one; each inner list is one call,
and they come again until the time is over.
The texts of all clients are given in one call, which is more than several clients could do without a server.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

ONNX_INT8 = "avx512_vnni" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else "avx2"
WORDS = __doc__.split()
"""Texts to calibrate with are made of these."""


def load(folder: str, backend: str, precision: str) -> SentenceTransformer:
    if backend == "torch":
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        return SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": types[precision]})
    if precision != "int8":
        computed = {"ov_config": {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision]}}
        more = computed if backend == "openvino" else {}
        return SentenceTransformer(folder, device="cpu", backend=backend, model_kwargs=more)
    name = _quantize(folder, backend)
    return SentenceTransformer(folder, device="cpu", backend=backend, model_kwargs={"file_name": name})


def _quantize(folder: str, backend: str) -> str:
    """Makes the int8 model beside the checkpoint; the name of its file.

    For OpenVINO as sentence-transformers' own function does it, which fetches texts to calibrate with.
    """
    if backend == "onnx":
        from sentence_transformers import export_dynamic_quantized_onnx_model

        name = f"onnx/model_qint8_{ONNX_INT8}.onnx"
        if not (Path(folder) / name).exists():
            plain = SentenceTransformer(folder, device="cpu", backend="onnx")
            export_dynamic_quantized_onnx_model(plain, ONNX_INT8, folder)
        return name
    name = "openvino/openvino_model_qint8_quantized.xml"
    if not (Path(folder) / name).exists():
        import nncf
        import openvino

        plain = SentenceTransformer(folder, device="cpu", backend="openvino")
        texts = [" ".join(WORDS[place % len(WORDS) :][: 4 + place % 40]) for place in range(128)]
        inputs = [dict(plain.tokenizer([text], return_tensors="np")) for text in texts]
        network = plain[0].auto_model.model
        calibration = nncf.Dataset(inputs, lambda entry: entry)
        quantized = nncf.quantize(network, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        openvino.save_model(quantized, Path(folder) / name)
    return name


def main(folder: str, backend: str, precision: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = load(folder, backend, precision)
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        work = json.loads(line)
        count, began = 0, time.perf_counter()
        for texts in itertools.cycle(work["texts"]):
            model.encode(texts, batch_size=max(32, len(texts)) if len(texts) < 128 else 32)
            count += len(texts)
            if time.perf_counter() - began > work["seconds"]:
                break
        seconds = time.perf_counter() - began
        print(json.dumps({"texts": count, "seconds": seconds}), flush=True)  # noqa: T201


main(*sys.argv[1:])
