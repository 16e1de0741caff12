"""The results that the README reports, trained anew; `python -m train.reproduce`."""
