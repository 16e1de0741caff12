"""What docs/results.md reports, trained anew; `python -m train.reproduce`."""
