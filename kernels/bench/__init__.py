"""Speed and memory of the operations beside plain forms, peers and floors.

`timing` measures, `cases` says what, `peers` are kernels of PyTorch; the command is
python -m kernels.bench.
"""
