"""Speed and memory of layers and training steps; `python -m train.bench`."""
