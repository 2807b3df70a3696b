# The official Triton image and what the models that inference writes import.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:24.10-py3
FROM ${TRITON_IMAGE}
COPY requirements/triton-image.txt /requirements/
# --no-deps: the rest of ONNX Runtime's requirements is for its tools.
RUN pip install --no-cache-dir --no-deps --require-hashes -r /requirements/triton-image.txt \
    # A named volume takes over the owner of the folder: inference writes it, Triton reads it.
    && mkdir /models && chown 10001:10001 /models
USER 1000
